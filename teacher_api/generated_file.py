"""The files of `teacher-generate`: prompts in, one JSON line per prompt out, and what of a file that is already there
may be gone on with. Knows no network.

A line of output: {"index": place in the prompts file, "prompt": as it was given, "prompt_token_ids": [...],
"completions": [{"text", "token_ids", "logprobs", "finish_reason", "stop_reason"}, …], "settings": {...}, "teacher":
fingerprint}. Lines are in the order in which they were finished.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from teacher_api.generation import Answer, Prompt, Sampling

SUFFIXES = (".txt", ".jsonl", ".json")


def read_prompts(path: Path, key: str) -> list[Prompt]:
    """Prompts in their order: texts, or lists of token ids.

    Args:
        path: .txt: a text a line. .jsonl: an object or a bare prompt a line. .json: an array of those. Empty lines are
            skipped.
        key: of the objects.

    Raises:
        ValueError: there is no such file, it can't be read, or holds no prompt; names the line.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"prompts {path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"prompts {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    lines = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path.suffix.lower() == ".txt":
        prompts: list[Prompt] = [line for _, line in lines]
    elif path.suffix.lower() == ".jsonl":
        prompts = [_prompt(_parsed(line, f"{path}:{n}"), key, f"{path}:{n}") for n, line in lines]
    else:
        values = _parsed(text, str(path))
        if not isinstance(values, list):
            raise ValueError(f"{path}: expected an array of prompts; got {type(values).__name__}")
        prompts = [_prompt(value, key, f"{path}[{n}]") for n, value in enumerate(values)]
    if not prompts:
        raise ValueError(f"prompts {path}: there are none in it")
    return prompts


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {str(error)[:120]}") from None


def _prompt(value: Any, key: str, where: str) -> Prompt:
    if isinstance(value, Mapping):
        if key not in value:
            raise ValueError(
                f"{where}: has no {key!r}; it has {', '.join(map(repr, value)) or 'nothing'}: set --prompt-key"
            )
        value = value[key]
    is_ids = isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
    if not (isinstance(value, str) or is_ids) or not value:
        raise ValueError(f"{where}: expected a text or a list of token ids, not empty; got {str(value)[:60]!r}")
    return value  # type: ignore[no-any-return]  # looked at above


class Output:
    """The file that completions are added to, a whole line at a time. `with Output(...) as output: …`

    What is there already is kept: `done` says which prompts it holds. A line that was cut off when its writer was
    killed is taken away.

    Raises:
        ValueError: it can't be written, or another program writes to it; or it holds something else than completions of
            these prompts, with these settings, by this teacher.
    """

    def __init__(self, path: Path, prompts: list[Prompt], sampling: Sampling, teacher: str) -> None:
        self._prompts, self.teacher = prompts, teacher
        self._settings = asdict(sampling)
        self.done: set[int] = set()
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise ValueError(f"output {path}: {error.strerror or error}") from None
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
            except BlockingIOError:
                raise ValueError(f"output {path}: another program is writing to it") from None
            self._file.seek(0)
            whole = 0
            for number, line in enumerate(self._file, start=1):
                if not line.endswith(b"\n"):
                    break
                self.done.add(self._index_of(line, f"{path}:{number}"))
                whole += len(line)
            self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def add(self, index: int, answer: Answer) -> None:
        """One line, in one write: a reader, and a run that goes on, find it whole or not at all."""
        line = {
            "index": index,
            "prompt": self._prompts[index],
            "prompt_token_ids": answer.prompt_token_ids,
            "completions": [asdict(each) for each in answer.completions],
            "settings": self._settings,
            "teacher": self.teacher,
        }
        self._file.write(
            json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
        )
        self._file.flush()
        self.done.add(index)

    def _index_of(self, line: bytes, where: str) -> int:
        """Of a line that is there already."""
        try:
            found = json.loads(line)
            index, prompt, settings, teacher = (found[name] for name in ("index", "prompt", "settings", "teacher"))
            complete = len(found["completions"]) == self._settings["n"]
            known = prompt == self._prompts[index] and index >= 0
        except (ValueError, TypeError, KeyError, IndexError):
            raise ValueError(f"{where}: no line of these prompts; give another --output") from None
        if not known:
            raise ValueError(f"{where}: holds another prompt than place {index} of the prompts; give another --output")
        ours = json.loads(json.dumps(self._settings))
        for name in ours.keys() | settings.keys():
            if ours.get(name) != settings.get(name):
                raise ValueError(
                    f"{where}: was written with {name} {settings.get(name)!r}, now it is {ours.get(name)!r}; give "
                    "another --output, or the same options"
                )
        if teacher != self.teacher or not complete:
            raise ValueError(
                f"{where}: was written by teacher {teacher!s:.80}, now it is {self.teacher}; give another --output"
            )
        return int(index)
