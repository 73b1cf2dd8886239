"""A shell command as its users write it, or a script with one in it: environment, program, options."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

from student_trainer.migrate.base import MigrationError

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_RUNNERS = ("python", "python3", "torchrun", "accelerate", "uv", "bash", "sh", "pip", "tensorboard")


@dataclass(slots=True)
class Command:
    """`launcher` are the options of torchrun or accelerate launch, `words` what follows the program's name."""

    program: str  # a script or module: the last part of its name, without .py
    words: list[str]
    launcher: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def parse(text: str) -> Command:
    """The first command in `text` that starts a program.

    Raises:
        MigrationError: there is none, or its quotes don't match.
    """
    variables: dict[str, str] = {}
    for line in re.sub(r"\\\s*\n", " ", text).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise MigrationError(f"can't read the command: {error}: {line.strip()[:80]!r}") from error
        words = [_expanded(word, variables) for word in words]
        if words and all(_ASSIGNMENT.fullmatch(word) for word in words):
            variables |= dict(word.split("=", 1) for word in words)
        elif any(word.rsplit("/", 1)[-1] in _RUNNERS for word in words):
            return _command(words)
    raise MigrationError("no command that starts a program (python, torchrun, accelerate launch) in what was given")


def options(words: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """`--name value …`, `--name=value` and bare `--name`, by name; and the words in front of the first option."""
    found: dict[str, list[str]] = {}
    others: list[str] = []
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = [value] if equals else []
            if equals:
                name = ""
        elif name:
            found[name].append(word)
        else:
            others.append(word)
    return found, others


def _expanded(word: str, variables: dict[str, str]) -> str:
    word = word.replace("$@", "")
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), word)


def _command(words: list[str]) -> Command:
    ends = [i for i, word in enumerate(words) if word in ("&", "|", ";", "&&") or re.match(r"\d?>", word)]
    words = [word for word in words[: min(ends, default=len(words))] if word]
    environment: dict[str, str] = {}
    while words and (_ASSIGNMENT.fullmatch(words[0]) or words[0] in ("nohup", "setsid", "env", "exec", "uv", "run")):
        word = words.pop(0)
        if "=" in word:
            environment |= dict([word.split("=", 1)])
    launcher: dict[str, str] = {}
    while words:
        word = words.pop(0)
        base = word.rsplit("/", 1)[-1]
        if word == "-m" and words:
            return Command(words.pop(0).rsplit(".", 1)[-1], words, launcher, environment)
        if word.endswith((".py", ".sh")) or base in ("pip", "tensorboard"):
            return Command(base.rsplit(".", 1)[0] if "." in base else base, words, launcher, environment)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            takes_next = not equals and bool(words) and not words[0].startswith("-") and not words[0].endswith(".py")
            launcher[name.replace("-", "_")] = value if equals else words.pop(0) if takes_next else ""
    raise MigrationError("no program in the command: expected a script.py or -m module")
