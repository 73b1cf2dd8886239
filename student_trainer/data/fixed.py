"""Fixed data: completions that came with the prompts or that a teacher wrote, which samples are on them, and how one
becomes a rollout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from student_trainer.data import sources
from student_trainer.data.config import SourceConfig
from student_trainer.data.errors import DataError
from student_trainer.types import Fixed, Prompt, Rollout
from teacher_api.types import IntArray

CHOICE_STREAM = 2**64 - 3  # second word of the Philox key: see prompts.ORDER_STREAM
MARK = "answer"


@dataclass(frozen=True, slots=True)
class Mix:
    """Which samples are on fixed data: with λ = 1 none, with λ = 0 all, else each step (or sample) with probability
    1 - λ, a pure function of (seed, step or sample number)."""

    on_policy_fraction: float
    by: Literal["step", "sample"]
    seed: int

    def is_fixed(self, step: int, uid: int) -> bool:
        """Whether sample `uid` of `step` is on fixed data."""
        number = step if self.by == "step" else uid
        key = np.array([self.seed, CHOICE_STREAM], dtype=np.uint64)
        stream = np.random.Philox(key=key, counter=np.array([0, 0, 0, number], dtype=np.uint64))
        return bool(np.random.Generator(stream).random() >= self.on_policy_fraction)


def rollout(prompt: Prompt, member: int, *, uid: int) -> Rollout:
    """Sample `uid` of fixed data; the members of a prompt's group take turns with its completions. Nobody sampled it:
    its logprobs are not defined (NaN), and nothing was found likely."""
    given = prompt.fixed[member % len(prompt.fixed)]
    undefined = np.full(len(given.token_ids), np.nan, dtype=np.float32)
    return Rollout(uid, prompt, given.token_ids, given.finish, undefined, undefined, source="fixed")


class Completions:
    """The fixed completions of one source's prompts.

    Args:
        eos_token_ids: every id that ends a completion of the student.
        answer_key: field of the reference answer, None where records have none.
        is_chat: prompts go through the tokenizer's chat template.

    Raises:
        DataError: there are none, or `fixed_source` can't be read.
    """

    def __init__(
        self,
        config: SourceConfig,
        tokenizer: Any,
        eos_token_ids: Sequence[int],
        *,
        answer_key: str | None,
        is_chat: bool,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._ends = tuple(eos_token_ids)
        self._end = end_of_answer(tokenizer, self._ends, is_chat=is_chat)
        self._written = self._read(config.fixed_source) if config.fixed_source else None
        if not (config.fixed_source or config.completion_key or config.messages_key or answer_key):
            raise DataError(
                f"data.source {config.source}: data.on_policy_fraction asks for fixed data, but no field holds answers;"
                " set data.answer_key, data.completion_key or data.fixed_source"
            )

    def added_to(self, prompt: Prompt, where: str, record: Mapping[str, Any]) -> Prompt:
        """`prompt` with its fixed completions.

        Raises:
            DataError: it has none.
        """
        if self._written is not None:
            found = self._written.get(_key(prompt.token_ids))
            if not found:
                raise DataError(
                    f"{where}: data.fixed_source {self._config.fixed_source} has no completion of this prompt; write "
                    "them for exactly these prompts (student-train --print-prompts)"
                )
            return dataclasses.replace(prompt, fixed=tuple(found))
        key = self._config.completion_key
        value = prompt.answer if key is None else record.get(key)
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{where}: no fixed completion: {f'field {key!r}' if key else 'its answer'} is "
                f"{'empty' if isinstance(value, str) else type(value).__name__}; expected text"
            )
        ids = self._tokenizer(value, add_special_tokens=False)["input_ids"]
        return dataclasses.replace(prompt, fixed=(Fixed(self._ended(ids), "eos"),))

    def _ended(self, ids: Sequence[int]) -> IntArray:
        """With the end token, once."""
        ended = ids if ids and ids[-1] in self._ends else [*ids, self._end]
        return np.asarray(ended, dtype=np.int32)

    def _read(self, source: str) -> dict[bytes, list[Fixed]]:
        """Completions by the token ids of their prompt."""
        path = Path(source).expanduser()
        written: dict[bytes, list[Fixed]] = {}
        for where, line in _lines_of(path, source):
            try:
                prompt = self._ids(line["prompt_token_ids"])
                given = [self._completion(each) for each in line["completions"]]
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise DataError(
                    f"{where}: not a line that teacher-generate wrote ({type(error).__name__}: {error}); expected "
                    "prompt_token_ids and completions with token_ids and finish_reason"
                ) from None
            written.setdefault(_key(prompt), []).extend(given)
        return written

    def _completion(self, line: Mapping[str, Any]) -> Fixed:
        """As written; a text that was cut off at its limit has no end."""
        ids = self._ids(line["token_ids"])
        if line["finish_reason"] == "length":
            return Fixed(ids, "length")
        if line["finish_reason"] != "stop":
            raise ValueError(f"finish_reason {line['finish_reason']!r}")
        return Fixed(self._ended(ids.tolist()), "eos")

    def _ids(self, value: Any) -> IntArray:
        ids = np.asarray(value, dtype=np.int64)
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= len(self._tokenizer):
            raise ValueError(f"token ids outside the tokenizer's {len(self._tokenizer)}, or none")
        return ids.astype(np.int32)


def _lines_of(path: Path, source: str) -> sources.Records:
    """The lines of data.fixed_source, whatever its name ends in."""
    try:
        if not path.is_file():
            what = "a directory, expected a file" if path.is_dir() else "no such file"
            raise DataError(f"data.fixed_source {source}: {what}")
        yield from sources.from_jsonl(path)
    except OSError as error:
        raise sources.unreadable("data.fixed_source", source, error) from None


def _key(token_ids: IntArray) -> bytes:
    return np.ascontiguousarray(token_ids, dtype="<i4").tobytes()


def end_of_answer(tokenizer: Any, eos_token_ids: Sequence[int], *, is_chat: bool) -> int:
    """The id that ends an answer: what the chat template puts after the assistant's turn where the student stops at
    that, else the tokenizer's end token. A chat model's end of turn is often not the tokenizer's end of text."""
    if is_chat:
        turns = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
        text: str = tokenizer.apply_chat_template(turns, tokenize=False)
        after = tokenizer(text[text.rindex(MARK) + len(MARK) :], add_special_tokens=False)["input_ids"]
        for token_id in after:
            if token_id in eos_token_ids:
                return int(token_id)
    end = tokenizer.eos_token_id
    return int(end if end is not None else eos_token_ids[0])
