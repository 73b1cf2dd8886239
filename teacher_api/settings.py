"""How our programs read their configuration: frozen pydantic sections, one source of defaults.

Order of strength: defaults < YAML files in the order given < environment < command line. The sources are merged into
one nested dict, every key checked against the sections as it is read, and the model validates the whole. Each failure
is one line: the key, where it came from, what was got, what was expected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from teacher_api import settings_text as text
from teacher_api.settings_text import SettingsError

__all__ = ["Extras", "Section", "SettingsError", "dump_yaml", "load"]

_ORCHESTRATOR = re.compile(r"(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_(TCP|UDP)\w*)$")
"""Variables that Kubernetes injects for a service that happens to be called like our prefix."""


class Section(BaseModel):
    """Base of every configuration section: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Extras:
    """What the command line said beside the configuration. `"dry-run" in extras` asks for a switch."""

    switches: frozenset[str] = frozenset()  # in snake case
    config_files: tuple[Path, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)  # dotted key -> where its value came from

    def __contains__(self, switch: str) -> bool:
        return switch.replace("-", "_") in self.switches


class UniqueKeys(yaml.SafeLoader):
    """YAML, except that a key given twice is an error and not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            try:
                is_twice = key in seen
                seen.add(key)
            except TypeError:  # no key of a mapping can be a mapping: refused below
                continue
            if is_twice:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
        return super().construct_mapping(node, deep)


class _Merged:
    """The nested dict that grows from weak to strong sources, and who set each key."""

    def __init__(self, cls: type[BaseModel]) -> None:
        self.cls = cls
        self.values: dict[str, Any] = {}
        self.origins: dict[tuple[str, ...], str] = {}

    def put(self, path: tuple[str, ...], value: Any, origin: str) -> None:
        """Sets one key; a mapping merges into what is there, anything else replaces it."""
        known = text.field_at(self.cls, path)
        if value is None and known.is_section and type(None) not in known.leaves:
            value = {}  # a section whose keys are all commented out
        if isinstance(value, Mapping) and known.is_section:
            self._node(path)  # a section that the user named is there even if it is empty
            for key, inner in value.items():
                self.put((*path, str(key)), inner, origin)
            return
        self._node(path[:-1])[path[-1]] = value
        self.origins[path] = origin

    def _node(self, path: tuple[str, ...]) -> dict[str, Any]:
        node = self.values
        for part in path:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                child = node[part] = {}
            node = child
        return node


def load(
    cls: type[S],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    env_prefix: str,
    shortcuts: Mapping[str, str] | None = None,
    flat: bool = False,
    switches: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[S, Extras]:
    """Reads a program's configuration; prints the help and exits 0 on --help.

    Args:
        argv: the command line without the program's name: `--section.key value`, `--section.key=value`,
            `section.key=value`, in kebab or snake case; `--flag` and `--no-flag` for booleans; lists by repetition or
            as `[a, b]`; `--config FILE`, repeatable.
        env_prefix: `TEACHER_`: TEACHER_MAX_TOP_K is max_top_k, STUDENT_OPTIM__LEARNING_RATE is optim.learning_rate.
            <prefix>CONFIG names files as --config does, separated by the path separator.
        shortcuts: further flags and variables, `{"teacher-url": "teacher.url"}`.
        flat: the sections are few and their keys have names of their own: `--port` also means `http.port` where only
            one section has it.
        switches: flags that are no configuration, with their help: `{"dry-run": "…"}`.
        environ: instead of os.environ.

    Raises:
        SettingsError: one line.
    """
    environ = os.environ if environ is None else environ
    names = text.flag_names(cls, shortcuts or {}, flat)
    near = [
        "--" + flag.removeprefix("--").replace("_", "-") for flag in ("config", *(shortcuts or {}), *(switches or {}))
    ]
    line = _read_command_line(cls, argv, names, {s.replace("-", "_") for s in switches or {}}, near)
    if line.wants_help:
        print(text.help_text(cls, prog, description, env_prefix, shortcuts or {}, switches or {}))
        raise SystemExit(0)
    merged = _Merged(cls)
    listed = environ.get(f"{env_prefix}CONFIG", "")
    files = [Path(p) for p in listed.split(os.pathsep) if p] + line.files
    for path in files:
        for key, value in _read_yaml(path).items():
            with text.blamed_on(str(path)):
                merged.put((str(key),), value, str(path))
    _read_environment(merged, environ, env_prefix, shortcuts or {})
    for keys, value, origin in line.values:
        merged.put(keys, value, origin)
    try:
        config = cls.model_validate(merged.values)
    except ValidationError as error:
        raise SettingsError(text.one_line(cls, error, merged.origins, env_prefix)) from None
    origins = {".".join(path): origin for path, origin in merged.origins.items()}
    return config, Extras(frozenset(line.switches), tuple(files), origins)


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        where = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingsError(f"{path}: not valid YAML{where}: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise SettingsError(f"{path}: holds a {type(loaded).__name__}; expected keys and values")
    return loaded


def _read_environment(merged: _Merged, environ: Mapping[str, str], prefix: str, shortcuts: Mapping[str, str]) -> None:
    named = {prefix + flag.replace("-", "_").upper(): tuple(key.split(".")) for flag, key in shortcuts.items()}
    for name in sorted(environ):
        if not name.startswith(prefix) or name == f"{prefix}CONFIG" or not environ[name]:
            continue
        if _ORCHESTRATOR.search(name) or environ[name].startswith(("tcp://", "udp://")):
            continue
        path = named.get(name) or tuple(name[len(prefix) :].lower().split("__"))
        with text.blamed_on(f"environment {name}"):
            known = text.field_at(merged.cls, path)
            merged.put(path, text.parse(environ[name], known), f"environment {name}")


@dataclass(slots=True)
class _CommandLine:
    values: list[tuple[tuple[str, ...], Any, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    switches: set[str] = field(default_factory=set)
    wants_help: bool = False


def _read_command_line(
    cls: type[BaseModel],
    argv: Sequence[str],
    names: Mapping[str, tuple[str, ...]],
    switches: set[str],
    near: Sequence[str],
) -> _CommandLine:
    line = _CommandLine()
    lists: dict[tuple[str, ...], list[Any]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, given = word.partition("=")
        value = given if equals else None
        snake = name.removeprefix("--").replace("-", "_")
        dashed = name.startswith("--")
        if word in ("-h", "--help"):
            line.wants_help = True
        elif name in ("--config", "-c"):
            value = value if value is not None else _next_value(words, name)
            line.files.append(Path(value))
        elif dashed and snake in switches:
            if equals:
                raise SettingsError(f"{name} takes no value, got {given!r}")
            line.switches.add(snake)
        elif not dashed and not equals:
            raise SettingsError(f"unexpected argument {word!r}; expected --key value or key=value (--help lists keys)")
        else:
            path, known, negated = _resolve(cls, name, names, near)
            if value is None:
                takes_word = words and not negated and not (known.is_bool and not text.is_bool_word(words[0]))
                value = words.pop(0) if takes_word and (known.is_bool or not words[0].startswith("--")) else None
            if value is None and not known.is_bool:
                raise SettingsError(f"{name}: expected a value after it")
            with text.blamed_on(f"command line {name}"):
                parsed = (not negated) if value is None else text.parse(value, known)
            if known.is_list:
                lists.setdefault(path, []).extend(parsed if isinstance(parsed, list) else [parsed])
                parsed = lists[path]
            line.values.append((path, parsed, f"command line {name}"))
    return line


def _next_value(words: list[str], name: str) -> str:
    if not words:
        raise SettingsError(f"{name}: expected a file after it")
    return words.pop(0)


def _resolve(
    cls: type[BaseModel], name: str, names: Mapping[str, tuple[str, ...]], near: Sequence[str]
) -> tuple[tuple[str, ...], text.Known, bool]:
    """The key a flag means, what is known of it, and whether it was given as --no-flag."""
    raw = name.removeprefix("--")
    snake = raw.replace("-", "_")
    for spelling, negated in ((snake, False), (snake.removeprefix("no_"), True)):
        path = names.get(spelling)
        if path is not None:
            known = text.field_at(cls, path)
            if not negated or (known.is_bool and spelling != snake):
                return path, known, negated
    key: tuple[str, ...] = ()
    with text.blamed_on("command line"):
        for part in raw.split("."):
            # keys of a free mapping are the user's own; all others are ours, and ours have no dashes
            key = (*key, part if text.is_mapping(cls, key) else part.replace("-", "_"))
        return key, text.field_at(cls, key, near=near), False


def dump_yaml(section: BaseModel) -> str:
    """The resolved configuration as YAML that `load` reads back. Secrets are left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items() if not _is_secret(v)}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return value

    def without_secrets(model: BaseModel) -> dict[str, Any]:
        data = model.model_dump(mode="json", serialize_as_any=True)
        for name in type(model).model_fields:
            inner = getattr(model, name)
            if isinstance(inner, BaseModel):
                data[name] = without_secrets(inner)
            elif isinstance(inner, Mapping) and all(isinstance(v, BaseModel) for v in inner.values()):
                data[name] = {key: without_secrets(value) for key, value in inner.items()}
            elif _is_secret(inner):
                del data[name]
        return data

    return yaml.safe_dump(plain(without_secrets(section)), sort_keys=False, allow_unicode=True, width=120)


def _is_secret(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_secret(item) for item in value)
    return isinstance(value, SecretStr)
