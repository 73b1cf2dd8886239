"""One source's records, one after the other, as what steps train on: prompts, or pieces of packed text. Knows where it
is, so that a stream can go on from there; leaves out what is too long, and counts it. Owns no order.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from student_trainer.data import fixed, sources
from student_trainer.data.config import DomainConfig, PromptConfig, SourceConfig
from student_trainer.data.errors import DataError
from student_trainer.data.render import Renderer, field_of, string_of
from student_trainer.data.views import View
from student_trainer.types import Fixed, Prompt
from teacher_api.types import IntArray


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a source, between two of its prompts."""

    record: int = 0  # records read before it
    offset: int = 0  # packed text: tokens of the next record's document that belong to earlier pieces
    pieces: int = 0  # packed text: pieces before it


@dataclass(frozen=True, slots=True)
class Dropped:
    """Numbers of prompts left out."""

    prompts: int = 0  # over max_prompt_tokens
    answers: int = 0  # over max_answer_tokens

    @property
    def total(self) -> int:
        return self.prompts + self.answers

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(self.prompts + other.prompts, self.answers + other.answers)


class Source:
    """A configured source whose keys are settled by its first record.

    Args:
        eos_token_ids: ends of the student's completions; fixed completions are read where given.
        number, of: which one it is of how many: prompts of several sources have indices of their own.
        views: of teachers that see prompts otherwise.

    Raises:
        DataError: the source can't be read, is empty, or does not have what the configuration asks for.
    """

    def __init__(
        self,
        config: PromptConfig,
        tokenizer: Any,
        *,
        eos_token_ids: Sequence[int] | None = None,
        number: int = 0,
        of: int = 1,
        views: Sequence[View] = (),
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.number, self.of = number, of
        self.domain = config.name if isinstance(config, DomainConfig) else ""
        self.views = [view for view in views if view.domains is None or self.domain in view.domains]
        self.opened = sources.open_source(config)
        records = self.opened(0)
        first = next(records, None)
        if first is None:
            raise DataError(f"data.source {config.source}: no prompts in it")
        # What has been opened is read on: a user's class is not asked twice for what one epoch needs once.
        self._begun: sources.Records | None = itertools.chain([first], records)
        self.is_packed = isinstance(config, SourceConfig) and config.format == "packed_text"
        self.renderer = None if self.is_packed else Renderer(config, tokenizer, first[1], first[0])
        self.completions: fixed.Completions | None = None
        if eos_token_ids is not None and isinstance(config, SourceConfig) and self.renderer is not None:
            self.completions = fixed.Completions(
                config, tokenizer, eos_token_ids, answer_key=self.renderer.answer_key, is_chat=self.renderer.is_chat
            )

    def read(self, position: Position | None = None) -> Reader:
        """The prompts from `position` on (the beginning, where it is not given), to the end of the source."""
        return Reader(self, position or Position())

    def records(self, start: int) -> sources.Records:
        if start == 0 and self._begun is not None:
            begun, self._begun = self._begun, None
            return begun
        return self.opened(start)


class Reader:
    """An iterator over prompts that says where it stands and what it has left out so far."""

    def __init__(self, source: Source, position: Position) -> None:
        self._source = source
        self.position = position
        self.dropped = Dropped()
        self._prompts = self._pieces() if source.is_packed else self._rendered()

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        return next(self._prompts)

    def _rendered(self) -> Iterator[Prompt]:
        source, config = self._source, self._source.config
        assert source.renderer is not None, "packed text is not rendered"
        first = self.position.record
        for record_number, (where, record) in enumerate(source.records(first), start=first):
            self.position = Position(record_number + 1)
            index = record_number * source.of + source.number
            prompt = source.renderer.prompt(index, where, record, domain=source.domain)
            if _is_over(len(prompt.token_ids), config.max_prompt_tokens, "prompt", where, config):
                self.dropped += Dropped(prompts=1)
                continue
            prompt = self._with_views(prompt, where, record)
            if any(self._exceeds(view, prompt, where) for view in source.views):
                self.dropped += Dropped(prompts=1)
                continue
            if source.completions is not None:
                prompt = source.completions.added_to(prompt, where, record)
                longest = max(len(each.token_ids) for each in prompt.fixed)
                if _is_over(longest, getattr(config, "max_answer_tokens", None), "answer", where, config):
                    self.dropped += Dropped(answers=1)
                    continue
            yield prompt

    def _with_views(self, prompt: Prompt, where: str, record: sources.Record) -> Prompt:
        source = self._source
        assert source.renderer is not None, "packed text is not rendered"
        if not source.views:
            return prompt
        seen = {view.teacher: source.renderer.seen_by(view, prompt, where, record) for view in source.views}
        return dataclasses.replace(prompt, teacher_ids=seen)

    def _exceeds(self, view: View, prompt: Prompt, where: str) -> bool:
        tokens, config = len(prompt.teacher_ids[view.teacher]), self._source.config
        return _is_over(tokens, view.max_prompt_tokens, "prompt", where, config, view.key)

    def _pieces(self) -> Iterator[Prompt]:
        """seq_length + 1 tokens at a time of all documents, each followed by the end token: the first token is the
        prompt, the others are trained on."""
        source, config = self._source, self._source.config
        assert isinstance(config, SourceConfig), "only sources of training data are packed"
        held: deque[tuple[Position, IntArray]] = deque()  # what is left of the documents read, and where it begins
        size = config.seq_length + 1
        start, pieces = self.position, self.position.pieces
        for number, (where, record) in enumerate(source.records(start.record), start=start.record):
            document = _document(source, where, record)
            offset = start.offset if number == start.record else 0
            held.append((Position(number, offset), document[offset:]))
            while sum(len(tokens) for _, tokens in held) >= size:
                piece = _take(held, size)
                index = pieces * source.of + source.number
                pieces += 1
                at = held[0][0] if held else Position(number + 1)
                self.position = Position(at.record, at.offset, pieces)
                given = (Fixed(piece[1:], "length"),)
                yield Prompt(index, piece[:1], fixed=given, domain=source.domain)


def _is_over(tokens: int, most: int | None, what: str, where: str, config: PromptConfig, section: str = "data") -> bool:
    """Whether something is too long and to be left out; an error where it is not to be."""
    if most is None or tokens <= most:
        return False
    if config.overlong == "error":
        raise DataError(
            f"{where}: the {what} has {tokens} tokens, {section}.max_{what}_tokens is {most}; raise it, or leave such "
            f"prompts out with data.overlong=drop"
        )
    return True


def _document(source: Source, where: str, record: sources.Record) -> IntArray:
    """Token ids of one document and the end token."""
    assert isinstance(source.config, SourceConfig), "only sources of training data are packed"
    key = source.config.text_key
    text = string_of(field_of(record, key, where), key, where)
    end = source.tokenizer.eos_token_id
    if end is None:
        raise DataError("data.format packed_text joins documents with the end token, but the tokenizer has none")
    ids = source.tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.asarray([*ids, end], dtype=np.int32)


def _take(held: deque[tuple[Position, IntArray]], size: int) -> IntArray:
    """The next `size` tokens, which are there."""
    parts = []
    while size:
        position, tokens = held.popleft()
        parts.append(tokens[:size])
        if len(tokens) > size:
            held.appendleft((Position(position.record, position.offset + size), tokens[size:]))
        size -= len(parts[-1])
    return np.concatenate(parts)
