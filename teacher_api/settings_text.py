"""What is known of a configuration key (type, docs, nearest name), and the text made of it: help and one-line errors.

Used by settings.py only, which owns the sources and their order.
"""

from __future__ import annotations

import difflib
import enum
import json
import re
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, PlainValidator, SecretBytes, SecretStr, ValidationError, WrapValidator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined


class SettingsError(ValueError):
    """A wrong configuration, in one line that names the key, its source, what was got and what was expected."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a key."""

    leaves: tuple[Any, ...] = ()  # the types its value may have, unions and Annotated taken apart
    is_section: bool = False
    is_free: bool = False  # below it, keys are the value's own: a dict, or a section chosen by one of its keys

    @property
    def is_bool(self) -> bool:
        return bool in self.leaves

    @property
    def is_list(self) -> bool:
        return any(get_origin(leaf) in (list, tuple, set, frozenset) or leaf in (list, tuple) for leaf in self.leaves)

    @property
    def is_secret(self) -> bool:
        return bool({SecretStr, SecretBytes} & set(_flatten(self.leaves)))


FREE = Known(is_free=True)
_POLYMORPHIC = (BeforeValidator, PlainValidator, WrapValidator)


def _leaves(annotation: Any) -> tuple[Any, ...]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return tuple(leaf for arg in get_args(annotation) for leaf in _leaves(arg))
    if origin is not None and hasattr(annotation, "__metadata__"):  # Annotated
        return _leaves(get_args(annotation)[0])
    return (annotation,)


def _flatten(leaves: Iterable[Any]) -> Iterator[Any]:
    for leaf in leaves:
        yield leaf
        for arg in get_args(leaf):
            yield from _flatten(_leaves(arg))


def _sections(leaves: Sequence[Any]) -> list[type[BaseModel]]:
    return [leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, BaseModel)]


def _sections_by_name(leaves: Sequence[Any]) -> list[type[BaseModel]]:
    """Of a mapping from names of the user's own to sections: those sections."""
    mappings = [leaf for leaf in leaves if get_origin(leaf) in (dict, Mapping)]
    return [section for leaf in mappings for section in _sections(get_args(leaf)[1:])]


def _known(info: FieldInfo) -> Known:
    leaves = _leaves(info.annotation)
    free = any(isinstance(m, _POLYMORPHIC) for m in info.metadata) or Any in leaves
    is_dict = any(get_origin(leaf) is dict or leaf is dict or get_origin(leaf) is Mapping for leaf in leaves)
    return Known(leaves, is_section=bool(_sections(leaves)) or is_dict, is_free=free or is_dict)


def field_at(cls: type[BaseModel], path: tuple[str, ...], near: Iterable[str] = ()) -> Known:
    """What is known of the key at `path`.

    Raises:
        SettingsError: there is no such key; names the nearest of all keys and of `near`.
    """
    classes, known = [cls], Known((cls,), is_section=True)
    for i, part in enumerate(path):
        by_name = _sections_by_name(known.leaves)
        if by_name:
            classes, known = by_name, Known(tuple(by_name), is_section=True)
            continue
        infos = [c.model_fields[part] for c in classes if part in c.model_fields]
        if not infos:
            if known.is_free and i:
                return FREE
            siblings = [".".join((*path[:i], name)) for c in classes for name in c.model_fields]
            raise SettingsError(_unknown_key(cls, path, near, siblings if i else ()))
        inner = [_known(info) for info in infos]
        known = Known(
            tuple(leaf for k in inner for leaf in k.leaves),
            any(k.is_section for k in inner),
            any(k.is_free for k in inner),
        )
        classes = _sections(known.leaves)
    return known


def is_mapping(cls: type[BaseModel], path: tuple[str, ...]) -> bool:
    """Whether the keys below `path` are free text."""
    try:
        known = field_at(cls, path)
    except SettingsError:
        return False
    return known.is_free and not _sections(known.leaves)


def all_keys(cls: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key that has a value of its own, sections taken apart, in the order of declaration."""
    for name, info in cls.model_fields.items():
        sections = _sections(_leaves(info.annotation))
        if sections:
            for section in sections:
                yield from all_keys(section, (*prefix, name))
        else:
            yield (*prefix, name), info


def _unknown_key(cls: type[BaseModel], path: tuple[str, ...], near: Iterable[str], siblings: Iterable[str] = ()) -> str:
    key = ".".join(path)
    keys = [*(".".join(p) for p, _ in all_keys(cls)), *siblings]
    shown = {name: name for name in (*keys, *cls.model_fields)} | {
        flag.removeprefix("--").replace("-", "_"): flag for flag in near
    }
    found = [shown[name] for name in difflib.get_close_matches(key, list(shown), n=1, cutoff=0.6)]
    if not found:  # the right name under the wrong section
        last = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
        found = [last[n] for n in difflib.get_close_matches(path[-1], list(last), n=1, cutoff=0.75)]
    return f"{key}: unknown key" + (f"; did you mean {found[0]}?" if found else "; --help lists the keys")


def flag_names(cls: type[BaseModel], shortcuts: Mapping[str, str], flat: bool) -> dict[str, tuple[str, ...]]:
    """Flags in snake case -> key. `flat`: the last part of a key that no other key ends with is a flag as well."""
    names: dict[str, tuple[str, ...]] = {}
    if flat:
        last: dict[str, list[tuple[str, ...]]] = {}
        for path, _ in all_keys(cls):
            last.setdefault(path[-1], []).append(path)
        names.update({name: paths[0] for name, paths in last.items() if len(paths) == 1})
    names.update({".".join(path): path for path, _ in all_keys(cls)})
    for flag, key in shortcuts.items():
        path = tuple(key.split("."))
        field_at(cls, path)
        names[flag.removeprefix("--").replace("-", "_")] = path
    return names


# ---- values ----------------------------------------------------------------------------------------------------------


def is_bool_word(word: str) -> bool:
    return word.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0")


def parse(value: str, known: Known) -> Any:
    """A value given as text, by the types its key may have: text stays text where text is wanted, lists and mappings
    are YAML (and so JSON), numbers and booleans are left to the model's own reading.

    Raises:
        SettingsError: it begins like a list or mapping and is none.
    """
    stripped = value.strip()
    if types.NoneType in known.leaves and stripped.lower() in ("null", "none", "~"):
        return None
    if stripped[:1] in ("[", "{") and (known.is_free or known.is_list or known.is_section):
        try:
            return yaml.safe_load(stripped)
        except yaml.YAMLError as error:
            raise SettingsError(f"{value!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if known.is_list:
        return [value]
    if _wants_text(known):
        return value
    try:
        return json.loads(stripped)
    except ValueError:
        if known.is_free and stripped.lower() in ("true", "false", "null"):
            return {"true": True, "false": False, "null": None}[stripped.lower()]
        return _number_or_text(value) if known.is_free else value


def _number_or_text(value: str) -> Any:
    try:
        return float(value)  # such as .5 and 1e-4, which JSON or YAML read otherwise
    except ValueError:
        return value


def _wants_text(known: Known) -> bool:
    for leaf in known.leaves:
        if isinstance(leaf, type) and issubclass(leaf, str | Path | SecretStr | enum.Enum):
            return True
    literals = [leaf for leaf in known.leaves if get_origin(leaf) is Literal]
    others = [leaf for leaf in known.leaves if leaf not in literals and leaf is not types.NoneType]
    return bool(literals) and not others and all(isinstance(v, str) for leaf in literals for v in get_args(leaf))


# ---- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def blamed_on(origin: str) -> Iterator[None]:
    """Puts the source in front of a SettingsError that doesn't know it."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{origin}: {error}") from None


def _origin(path: tuple[str, ...], origins: Mapping[tuple[str, ...], str]) -> str:
    for length in range(len(path), 0, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    inside = {source for key, source in origins.items() if key[: len(path)] == path and path}
    return ", ".join(sorted(inside)) if len(inside) <= 2 else ""


def one_line(
    cls: type[BaseModel], error: ValidationError, origins: Mapping[tuple[str, ...], str], env_prefix: str
) -> str:
    """The first failure of a validation in one line, and how many more there are."""
    by_key: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for failure in error.errors(include_url=False):
        by_key.setdefault(_key_of(cls, failure), []).append(failure)
    path, failures = next(iter(by_key.items()))
    more = f" (and {len(by_key) - 1} more wrong)" if len(by_key) > 1 else ""
    return _one_failure(cls, path, failures, origins, env_prefix) + more


def _key_of(cls: type[BaseModel], failure: ErrorDetails) -> tuple[str, ...]:
    """`loc` also holds list indices and, below a union, names of its members: keep what leads to a key."""
    path: tuple[str, ...] = ()
    for part in failure["loc"]:
        try:
            known = field_at(cls, (*path, str(part)))
        except SettingsError:
            break
        if known is FREE and failure["type"] == "extra_forbidden":
            break
        path = (*path, str(part))
    return path


def _expected(failure: ErrorDetails) -> str:
    if failure["type"] == "missing":
        return "one more value"
    message = " ".join(failure["msg"].split())
    message = message.replace("Input should be ", "expected ").replace("Input should ", "expected to ")
    return message[:1].lower() + message[1:]


def _one_failure(
    cls: type[BaseModel],
    path: tuple[str, ...],
    failures: Sequence[ErrorDetails],
    origins: Mapping[tuple[str, ...], str],
    env_prefix: str,
) -> str:
    key, failure = ".".join(path), failures[0]
    if failure["type"] == "missing" and len(failure["loc"]) == len(path):
        variable = env_prefix + "__".join(path).upper()
        return f"{key}: not set; give --{key.replace('_', '-')}, {variable} or `{key}` in a --config file"
    if failure["type"] == "extra_forbidden":
        unknown = tuple(str(part) for part in failure["loc"])
        source = _origin(unknown, origins)
        return (f"{source}: " if source else "") + _unknown_key(cls, unknown, ())
    message = _with_whole_key(cls, path, " ".join(failure["msg"].split()).removeprefix("Value error, "))
    named = tuple(message.partition(":")[0].split("."))  # a section's own check may name a key below
    origin = _origin(named if named[: len(path)] == path and path else path, origins)
    source = f"{origin}: " if origin else ""
    if failure["type"] in ("value_error", "assertion_error"):
        where = "" if not key or message.startswith((f"{key}:", f"{key}.", f"{key} ")) else f"{key}: "
        return _named_once(source, f"{where}{message}")
    known = field_at(cls, path) if path else Known()
    where = "".join(f"[{p}]" for p in failure["loc"][len(path) :] if isinstance(p, int))
    got = "" if known.is_secret else f"got {failure['input']!r:.200}, "
    wanted = " or ".join(dict.fromkeys(_expected(f).removeprefix("expected ") for f in failures))
    return _named_once(source, f"{key}{where}: {got}expected {wanted}")


def _with_whole_key(cls: type[BaseModel], path: tuple[str, ...], message: str) -> str:
    """A section's own check names its keys without the section."""
    name = message.partition(":")[0]
    if not path or not re.fullmatch(r"[a-z]\w*(\.\w+)*", name) or message.startswith(f"{'.'.join(path)}."):
        return message
    try:
        known = field_at(cls, (*path, *name.split(".")))
    except SettingsError:
        return message
    return message if known is FREE else f"{'.'.join(path)}.{message}"


def _named_once(source: str, message: str) -> str:
    """`command line a.b: a.b: got …` without the first a.b."""
    key = message.partition(":")[0].partition("[")[0]
    return f"{source.removesuffix(f' {key}: ').removesuffix(': ')}: {message}" if source else message


# ---- help ------------------------------------------------------------------------------------------------------------


def _type_name(info: FieldInfo) -> str:
    names = []
    for leaf in _leaves(info.annotation):
        if get_origin(leaf) is Literal:
            names.append("|".join(str(v) for v in get_args(leaf)))
        elif leaf is not types.NoneType:
            origin = get_origin(leaf)
            names.append("list" if origin in (list, tuple) else getattr(origin or leaf, "__name__", str(leaf)))
    return "|".join(names)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=False)
    if info.default_factory is not None or value is PydanticUndefined:
        return ""
    if value is None or value in ("", ()) or isinstance(value, SecretStr):
        return "default: none"
    shown = list(value) if isinstance(value, tuple) else value
    shown = shown if isinstance(shown, str | int | float | bool | list) else str(shown)
    return f"default: {shown if isinstance(shown, str) else json.dumps(shown, default=str)}"


def help_text(
    cls: type[BaseModel],
    prog: str,
    description: str,
    env_prefix: str,
    shortcuts: Mapping[str, str],
    switches: Mapping[str, str],
) -> str:
    """All keys by section, with type, default and meaning."""
    short: dict[str, list[str]] = {}
    for flag, key in shortcuts.items():
        short.setdefault(key, []).append("--" + flag.removeprefix("--"))
    lines = [
        f"usage: {prog} [--config FILE] [--KEY VALUE | KEY=VALUE] …",
        "",
        *textwrap.wrap(description, 110),
        "",
        f"Every key is a flag, a YAML key, and a variable: a.b is {env_prefix}A__B. Strongest first: command line,",
        "environment, later --config files, earlier ones, the defaults below.",
        "",
        "  --config FILE  a YAML file; repeatable",
        *(f"  --{name.removeprefix('--').replace('_', '-')}  {what}" for name, what in switches.items()),
        "  --help",
    ]
    section = None
    for path, info in all_keys(cls):
        if path[:-1] != section:
            section = path[:-1]
            lines += ["", f"{'.'.join(section)}:"] if section else [""]
        key = ".".join(path)
        flags = ", ".join(dict.fromkeys(["--" + key.replace("_", "-"), *short.get(key, [])]))
        facts = ", ".join(fact for fact in (_type_name(info), _default(info)) if fact)
        lines.append(f"  {flags}  ({facts})")
        lines += textwrap.wrap(info.description or "", 104, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
