"""Several sources as one sequence of prompts: every place draws its source at random by weight, so that sources come
interleaved. Also what makes the data of a run from its configuration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from student_trainer.data.config import DataConfig, SourceConfig
from student_trainer.data.errors import DataError
from student_trainer.data.prompts import Longest, Prompts, load_prompts
from student_trainer.data.reader import Dropped, Source
from student_trainer.data.stream import StreamSource
from student_trainer.data.views import View
from student_trainer.types import Prompt

DRAW_STREAM = 2**64 - 2  # second word of the Philox key: see prompts.ORDER_STREAM
BLOCK = 1024
"""Draws made at a time; how many of them fell on each source is kept."""


class Mixture(Prompts):
    """Sources by weight. The n-th place that falls on a source gets the n-th prompt of that source's own sequence.

    Args:
        parts: at least one; their prompts have indices and domains of their own.
        weights: one a part, > 0.
    """

    def __init__(self, parts: Sequence[Prompts], weights: Sequence[float]) -> None:
        self._parts = tuple(parts)
        self._bounds = np.cumsum(np.asarray(weights, dtype=np.float64)) / np.sum(weights)
        self._counted: tuple[int, list[npt.NDArray[np.int64]]] = (-1, [])  # seed; per block, draws before it
        sizes = [part.num_prompts for part in parts]
        known = [size for size in sizes if size is not None]
        self.num_prompts = sum(known) if len(known) == len(sizes) else None
        self.longest = Longest(
            prompt=max(part.longest.prompt for part in parts),
            fixed=max(part.longest.fixed for part in parts),
            sequence=max(part.longest.sequence for part in parts),
            teacher_prompt=max(part.longest.teacher_prompt for part in parts),
        )

    def take(self, start: int, count: int, seed: int) -> list[Prompt]:
        """See Prompts.take."""
        drawn = self._draws(start, count, seed)
        before = self._before(start, seed)
        taken = [
            iter(part.take(int(before[i]), int((drawn == i).sum()), seed)) if (drawn == i).any() else iter(())
            for i, part in enumerate(self._parts)
        ]
        return [next(taken[i]) for i in drawn]

    def digest(self) -> str:
        """Of the parts' digests."""
        return hashlib.blake2b(" ".join(p.digest() for p in self._parts).encode(), digest_size=16).hexdigest()

    def dropped(self) -> Dropped:
        return sum((part.dropped() for part in self._parts), Dropped())

    def state(self, place: int, seed: int) -> dict[str, Any]:
        """Of every part, at the place that it has come to."""
        before = self._before(place, seed)
        return {"parts": [part.state(int(before[i]), seed) for i, part in enumerate(self._parts)]}

    def restore(self, state: dict[str, Any], *, verify: bool = True) -> None:
        """See Prompts.restore."""
        for part, its in zip(self._parts, state.get("parts", []), strict=True):
            if its:
                part.restore(its, verify=verify)

    def _draws(self, start: int, count: int, seed: int) -> npt.NDArray[np.intp]:
        """Which part each of these places falls on."""
        first, last = start // BLOCK, (start + count - 1) // BLOCK
        blocks = np.concatenate([self._block(block, seed) for block in range(first, last + 1)])
        return blocks[start - first * BLOCK :][:count]

    def _block(self, block: int, seed: int) -> npt.NDArray[np.intp]:
        key = np.array([seed, DRAW_STREAM], dtype=np.uint64)
        stream = np.random.Philox(key=key, counter=np.array([0, 0, 0, block], dtype=np.uint64))
        drawn = np.searchsorted(self._bounds, np.random.Generator(stream).random(BLOCK), side="right")
        return np.minimum(drawn, len(self._parts) - 1)  # rounding may leave the last bound a little under 1

    def _before(self, place: int, seed: int) -> npt.NDArray[np.int64]:
        """How many of the places before `place` fall on each part."""
        if self._counted[0] != seed:
            self._counted = (seed, [np.zeros(len(self._parts), dtype=np.int64)])
        counts = self._counted[1]
        block = place // BLOCK
        while len(counts) <= block:
            counts.append(counts[-1] + self._count(self._block(len(counts) - 1, seed)))
        return counts[block] + self._count(self._block(block, seed)[: place - block * BLOCK])

    def _count(self, drawn: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        return np.bincount(drawn, minlength=len(self._parts)).astype(np.int64)


def open_prompts(
    config: DataConfig, tokenizer: Any, *, eos_token_ids: Sequence[int], views: Sequence[View] = ()
) -> Prompts:
    """The training data that `config` describes: in memory, streamed, or a mixture of several sources.

    Args:
        eos_token_ids: every id that ends a completion of the student.
        views: of teachers that see prompts otherwise.

    Raises:
        DataError: see load_prompts.
    """
    ends = eos_token_ids if config.needs_fixed else None
    parts = [_open_one(config, source, i, tokenizer, ends, views) for i, source in enumerate(config.sources)]
    if not config.domains:
        return parts[0]
    return Mixture(parts, [domain.weight for domain in config.domains])


def _open_one(
    config: DataConfig,
    source: SourceConfig,
    number: int,
    tokenizer: Any,
    ends: Sequence[int] | None,
    views: Sequence[View],
) -> Prompts:
    common: dict[str, Any] = {"eos_token_ids": ends, "number": number, "of": len(config.sources), "views": views}
    if not source.streaming:
        return load_prompts(source, tokenizer, shuffle=config.shuffle, **common)
    longest = _longest_allowed(source, views)
    opened = Source(source, tokenizer, **common)
    return StreamSource(opened, buffer=config.shuffle_buffer, shuffle=config.shuffle, longest=longest)


def _longest_allowed(source: SourceConfig, views: Sequence[View]) -> Longest:
    """Of a stream, by its limits."""
    unbounded = [view.key for view in views if view.max_prompt_tokens is None]
    if unbounded:
        raise DataError(
            f"{unbounded[0]}.max_prompt_tokens: not set with data.streaming; expected a limit, as nobody can look for "
            "the longest"
        )
    if source.format == "packed_text":
        return Longest(prompt=1, fixed=source.seq_length, sequence=source.seq_length + 1)
    assert source.max_prompt_tokens is not None, "the configuration refuses a stream without a limit"
    fixed = source.max_answer_tokens or 0
    return Longest(
        prompt=source.max_prompt_tokens,
        fixed=fixed,
        sequence=source.max_prompt_tokens + fixed,
        teacher_prompt=max((view.max_prompt_tokens or 0 for view in views), default=0),
    )
