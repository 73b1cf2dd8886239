"""`student-migrate`: finds out whose configuration or command it was given, and writes ours."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from student_trainer.config import TrainConfig
from student_trainer.migrate import command as commands
from student_trainer.migrate import hybrid, local_script, nemo_rl, references, roll
from student_trainer.migrate.base import Migration, MigrationError, flat, follow, markdown, nested
from student_trainer.migrate.shared import evaluate

DESCRIPTION = """Turns a configuration file of NeMo-RL's distillation or ROLL's DistillPipeline, or a command line of
theirs, of a local on-policy script or of the hybrid multi-GPU script, into a configuration for student-train. It goes
to standard output; what has no counterpart, and what to know, is in its comments and on standard error. Exit code 2: it
is none of these."""
SYSTEMS: dict[str, ModuleType] = {"S1": nemo_rl, "S2": roll, "S3": local_script, "S4": hybrid}
NEEDED = {
    "student.model": "a directory or hub id (--student)",
    "data.source": "a file, a hub id, or data.preset (--prompts)",
    "teacher": "teacher.url of a running teacher (--teacher-url), or teacher.model (--teacher-model)",
}


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="student-migrate", description=DESCRIPTION)
    parser.add_argument(
        "given", nargs="?", metavar="FILE_OR_COMMAND", help="a file (YAML, or a shell script), or a command in quotes"
    )
    parser.add_argument("-o", "--output", type=Path, help="write the configuration to this file")
    parser.add_argument("--tables", action="store_true", help="print all rules as Markdown and exit")
    options = parser.parse_args()
    if options.tables:
        print(tables())
        sys.exit(0)
    if options.given is None:
        parser.error("FILE_OR_COMMAND is missing")
    try:
        migration = migrate(options.given)
    except MigrationError as error:
        print(f"student-migrate: error: {error}", file=sys.stderr)
        sys.exit(2)
    report = notes(migration)
    written = "".join(f"# {line}\n" for line in report) + "\n" + as_yaml(migration)
    if options.output:
        try:
            options.output.write_text(written, encoding="utf-8")
        except OSError as error:
            print(f"student-migrate: error: --output {options.output}: {error.strerror or error}", file=sys.stderr)
            sys.exit(2)
    else:
        print(written, end="")
    print("\n".join(report), file=sys.stderr)
    sys.exit(0)


def migrate(given: str) -> Migration:
    """Our configuration for theirs.

    Args:
        given: the path of a file, or a command.

    Raises:
        MigrationError: neither is one of a system known here, or it can't be read.
    """
    path = Path(given)
    with contextlib.suppress(OSError):  # a command may be longer than a path can be
        if path.is_file():
            text = _text(path)
            if path.suffix in (".yaml", ".yml", ".json"):
                tree = _tree(text, str(path))
                module = _whose(tree)
                return _finished(module, _of_tree(tree, module))
            return _of_command(text)
    if given.endswith((".yaml", ".yml", ".json")) and " " not in given.strip():
        raise MigrationError(f"{given}: there is no such file")
    return _of_command(given)


def as_yaml(migration: Migration) -> str:
    tree = nested(migration.settings)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) if tree else ""


def notes(migration: Migration) -> list[str]:
    """What a person has to know, a line each."""
    lines = [f"From {migration.system}, by student-migrate."]
    lines += [f"Still needed: {key}: {what}." for key, what in _missing(migration)]
    lines += [f"Not carried over: {left}." for left in migration.left]
    lines += [f"Note: {remark}." for remark in migration.remarks]
    return lines


def tables() -> str:
    """All rules as Markdown: what docs/migration.md shows."""
    return "\n\n".join(f"### {module.NAME}\n\n{markdown(module.TABLE)}" for module in SYSTEMS.values())


def _of_tree(tree: Mapping[str, Any], module: ModuleType) -> Migration:
    theirs = flat(references.resolved(tree))
    return follow(module.TABLE, theirs, module.NAME, f"no key that is known of {module.NAME}")


def _whose(tree: Mapping[str, Any]) -> ModuleType:
    names = {str(name) for name in tree}
    if names & {"kd_objective", "student_pretrain", "distill_loss_weight", "logits_topk", "kd_temperature"}:
        return roll
    if names & {"distillation", "loss_fn", "policy", "train_mb_tokens", "checkpointing"}:
        return nemo_rl
    raise MigrationError(
        f"not a configuration that is known here: its sections are {', '.join(sorted(names)[:8]) or 'none'}; expected "
        "NeMo-RL's (distillation, policy, …) or ROLL's (student_pretrain, kd_objective, …)"
    )


def _of_command(text: str) -> Migration:
    command = commands.parse(text)
    program = command.program.lower()
    options, plain = commands.options(command.words)
    if "train_on_policy" in program:
        return _of_options(local_script, options, command)
    if program.startswith("train_gpus"):
        return _of_options(hybrid, options, command)
    if "run_distillation" in program:
        (file,), words = _named(options, "config")
        return _of_file_and_overrides(file, [*plain, *words], nemo_rl)
    if "start_distill_pipeline" in program:
        (path, name), words = _named(options, "config_path", "config_name")
        return _of_file_and_overrides(f"{path or '.'}/{name}.yaml" if name else "", [*plain, *words], roll)
    if "eval_mmlu" in program:
        return _evaluation(options)
    raise MigrationError(
        f"{command.program!r} is no program that is known here; expected run_distillation, start_distill_pipeline, "
        "train_on_policy_local, train_gpus or eval_mmlu_hybrid"
    )


def _of_options(module: ModuleType, options: Mapping[str, list[str]], command: commands.Command) -> Migration:
    theirs: dict[str, Any] = {
        name: True if not values else values[0] if len(values) == 1 else values for name, values in options.items()
    }
    theirs |= {f"launcher.{name}": value or True for name, value in command.launcher.items()}
    known = {name: value for name, value in command.environment.items() if name in module.TABLE}
    migration = follow(module.TABLE, theirs | known, module.NAME, f"no option that is known of the {module.NAME}")
    for name, value in command.environment.items():
        if name not in known:
            migration.leave(name, value, "set it in the shell: the trainer's processes inherit it")
    return _finished(module, migration)


def _named(options: Mapping[str, list[str]], *names: str) -> tuple[list[str], list[str]]:
    """The values of these options, and every other word: overrides, and options that nobody knows here."""
    values = [next(iter(options.get(name, ())), "") for name in names]
    words = [word for name in names for word in options.get(name, ())[1:]]
    for name, given in options.items():
        if name not in names:
            words += [f"--{name}", *given]
    return values, words


def _of_file_and_overrides(file: str, words: list[str], module: ModuleType) -> Migration:
    path = Path(file)
    found = bool(file) and path.is_file()
    tree = _tree(_text(path), file) if found else {}
    strange = [word for word in words if not _override(tree, word)]
    module = _whose(tree) if found else module
    migration = _of_tree(tree, module)
    for word in strange:
        migration.remark(f"{word!r} of the command is no key=value, and not carried over")
    if not found:
        migration.leave(
            "the file", file or "of its defaults", "not found from here: only what the command says is carried over"
        )
    return _finished(module, migration)


def _override(tree: dict[str, Any], word: str) -> bool:
    """Does to their configuration what a word of the command does, before references in it are followed: `key=value`
    (with + where it is new) sets, `~key` takes away. False: it is neither."""
    name, equals, value = word.lstrip("+~").partition("=")
    *sections, last = name.split(".")
    if not (equals or word.startswith("~")) or word.startswith("-"):
        return False
    node = tree
    for section in sections:
        inner = node.get(section)
        if not isinstance(inner, dict):
            inner = node[section] = {}
        node = inner
    if word.startswith("~"):
        node.pop(last, None)
        return True
    try:
        given = yaml.safe_load(value)
    except yaml.YAMLError:
        given = value
    before = node.get(last)
    node[last] = _merged(before, given) if isinstance(before, dict) and isinstance(given, dict) else given
    return True


def _merged(section: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """As Hydra merges a section with one that is given for it."""
    merged = dict(section)
    for name, value in more.items():
        before = merged.get(name)
        merged[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _evaluation(options: Mapping[str, list[str]]) -> Migration:
    migration = Migration(hybrid.NAME)
    (checkpoint, dtype), _ = _named(options, "ckpt", "dtype")
    checkpoint, dtype = checkpoint or "OUTPUT_DIR", dtype or "float32"
    migration.remark(f"this is no training: student-eval --model {checkpoint}/final --dtype {dtype} --tasks mmlu")
    migration.remark("a checkpoint says itself which layers it has from another model: no --layers")
    return migration


def _finished(module: ModuleType, migration: Migration) -> Migration:
    module.finish(migration)
    evaluate(migration)
    _check(migration)
    return migration


def _check(migration: Migration) -> None:
    """Leaves out what our configuration refuses, with its reason, so that what is written can be read."""
    needed = {"student.model": "STUDENT", "data.source": "PROMPTS"}
    for _ in range(len(migration.settings) + 1):
        settings = {**{k: v for k, v in needed.items() if k not in migration.settings}, **migration.settings}
        if "data.preset" in settings or "data.domains" in settings:
            settings = {k: v for k, v in settings.items() if k != "data.source" or k in migration.settings}
        if "teacher.model" not in settings:
            settings["teacher.url"] = "grpc://teacher:8301"
        try:
            TrainConfig.model_validate(nested(settings))
        except ValidationError as error:
            _take_out(migration, error)
        else:
            return


def _take_out(migration: Migration, error: ValidationError) -> None:
    failure = error.errors()[0]
    path = ".".join(str(part) for part in failure["loc"])
    reason = " ".join(failure["msg"].removeprefix("Value error, ").split())
    names = [key for key in migration.settings if path.startswith(key) or f"{key}:" in reason]
    names += [key for key in migration.settings if key.startswith(path) and key.rsplit(".", 1)[-1] in reason]
    if not names:
        raise MigrationError(f"what came of it is refused: {path}: {reason}")
    migration.leave(names[0], migration.drop(names[0]), f"refused: {reason}")


def _missing(migration: Migration) -> list[tuple[str, str]]:
    settings = migration.settings
    if not settings:
        return []
    have = {
        "student.model": "student.model" in settings,
        "data.source": bool({"data.source", "data.preset", "data.domains"} & settings.keys()),
        "teacher": bool({"teacher.url", "teacher.model"} & settings.keys()),
    }
    return [(key, what) for key, what in NEEDED.items() if not have[key]]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MigrationError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def _tree(text: str, origin: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MigrationError(f"{origin}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise MigrationError(f"{origin}: expected a mapping of keys, got {type(tree).__name__}")
    return tree
