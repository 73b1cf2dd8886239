"""What the trainer asks of its data, and prompts that are held in memory. Which prompts a step trains on is a pure
function of (seed, step), the same on every rank.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from student_trainer.data.config import PromptConfig
from student_trainer.data.errors import DataError
from student_trainer.data.reader import Dropped, Source
from student_trainer.data.views import View
from student_trainer.types import Prompt

ORDER_STREAM = 2**64 - 1  # second word of the Philox key; no sample has this uid, so the sampler draws other numbers


@dataclass(frozen=True, slots=True)
class Longest:
    """Greatest lengths that can come up, in tokens."""

    prompt: int
    fixed: int = 0  # completion of fixed data
    sequence: int = 0  # prompt and its fixed completion
    teacher_prompt: int = 0  # prompt as a teacher sees it, where that is another


class Prompts(ABC):
    """An endless sequence of prompts, place after place, epoch after epoch. Steps take the next ones of it."""

    longest: Longest
    num_prompts: int | None  # of one epoch; None where nobody knows before its end

    def batch(self, step: int, batch_size: int, seed: int) -> list[Prompt]:
        """The prompts of one step, counted from 0: places step·batch_size … of the sequence. Batches run across epoch
        ends; one larger than the source repeats prompts.

        Raises:
            ValueError: `step` or `seed` is negative, or `batch_size` < 1.
            DataError: a stream's record can't be read or used.
        """
        if step < 0 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"step {step}, batch_size {batch_size}, seed {seed}: expected step >= 0, batch_size >= 1, seed >= 0"
            )
        return self.take(step * batch_size, batch_size, seed)

    @abstractmethod
    def take(self, start: int, count: int, seed: int) -> list[Prompt]:
        """The prompts at places start … start + count - 1, a pure function of these arguments."""

    @abstractmethod
    def digest(self) -> str:
        """Of the data: of all of it, or of what a stream begins with."""

    @abstractmethod
    def dropped(self) -> Dropped:
        """What was left out for its length so far."""

    def state(self, place: int, seed: int) -> dict[str, Any]:
        """What `restore` needs to find `place` again without reading everything before it; JSON values."""
        return {}

    def restore(self, state: dict[str, Any], *, verify: bool = True) -> None:
        """Makes what follows the place of `state` quick to find. What `take` gives doesn't depend on it.

        Raises:
            DataError: with `verify`, the data there is not what it was.
        """
        return


class PromptSource(Prompts):
    """All prompts, in memory.

    Args:
        prompts: at least one.
        shuffle: see DataConfig.shuffle.
        dropped: prompts left out for their length.
        number: of this source among several, so that their orders differ.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, shuffle: bool = True, dropped: Dropped | None = None, number: int = 0
    ) -> None:
        if not prompts:
            raise DataError("there are no prompts")
        self._prompts = tuple(prompts)
        self._shuffle = shuffle
        self._dropped = dropped or Dropped()
        self._number = number
        self.num_prompts = len(self._prompts)
        self.longest = longest_of(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def all(self) -> Sequence[Prompt]:
        """Every prompt once, in the source's order."""
        return self._prompts

    def take(self, start: int, count: int, seed: int) -> list[Prompt]:
        """Each epoch is a permutation of all prompts."""
        places = range(start, start + count)
        epochs = {place // len(self) for place in places}
        order = {epoch: permuted(len(self), seed, epoch, self._number, shuffle=self._shuffle) for epoch in epochs}
        return [self._prompts[order[place // len(self)][place % len(self)]] for place in places]

    def digest(self) -> str:
        """Of the token ids of all prompts and of their fixed completions, in their order."""
        return digest_of(self._prompts)

    def dropped(self) -> Dropped:
        return self._dropped


def load_prompts(
    config: PromptConfig,
    tokenizer: Any,
    *,
    limit: int | None = None,
    shuffle: bool = True,
    eos_token_ids: Sequence[int] | None = None,
    number: int = 0,
    of: int = 1,
    views: Sequence[View] = (),
) -> PromptSource:
    """Reads, renders and tokenises one source, whole; `limit` lowers `config.limit`.

    Args:
        eos_token_ids: ends of the student's completions; fixed completions are read where given.
        number, of: which one it is of how many.
        views: of teachers that see prompts otherwise.

    Raises:
        DataError: see sources.read and Renderer; the source is empty; or a prompt or fixed completion is over its limit
            (with `overlong: drop`: all of them are).
    """
    limits = [n for n in (limit, config.limit) if n is not None]
    config = config.model_copy(update={"limit": min(limits, default=None)})
    reader = Source(config, tokenizer, eos_token_ids=eos_token_ids, number=number, of=of, views=views).read()
    prompts = list(reader)
    if not prompts:
        raise DataError(nothing_left(config, reader.dropped))
    return PromptSource(prompts, shuffle=shuffle, dropped=reader.dropped, number=number)


def nothing_left(config: PromptConfig, dropped: Dropped) -> str:
    """Why a source with records has nothing to train on."""
    if not dropped.total:
        return f"data.source {config.source}: its text is shorter than one piece of data.seq_length + 1 tokens"
    exceeded = {
        f"data.max_prompt_tokens {config.max_prompt_tokens}": dropped.prompts,
        f"data.max_answer_tokens {getattr(config, 'max_answer_tokens', None)}": dropped.answers,
    }
    limits = " or ".join(name for name, count in exceeded.items() if count)
    return f"data.source {config.source}: all {dropped.total} prompts exceed {limits}"


def longest_of(prompts: Sequence[Prompt]) -> Longest:
    """Greatest lengths among `prompts`."""
    lengths = [(len(p.token_ids), max((len(f.token_ids) for f in p.fixed), default=0)) for p in prompts]
    return Longest(
        prompt=max(prompt for prompt, _ in lengths),
        fixed=max(fixed for _, fixed in lengths),
        sequence=max(prompt + fixed for prompt, fixed in lengths),
        teacher_prompt=max((len(ids) for p in prompts for ids in p.teacher_ids.values()), default=0),
    )


def digest_of(prompts: Iterable[Prompt]) -> str:
    """Of the token ids of prompts, fixed completions and what teachers see instead, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        seen = (prompt.teacher_ids[name] for name in sorted(prompt.teacher_ids))
        for ids in (prompt.token_ids, *(fixed.token_ids for fixed in prompt.fixed), *seen):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
    return digest.hexdigest()


def permuted(
    count: int, seed: int, epoch: int, number: int = 0, window: int = 0, *, shuffle: bool
) -> npt.NDArray[np.int64]:
    """The order of `count` prompts in one epoch, or in one window of a stream's."""
    if not shuffle:
        return np.arange(count)
    counter = np.array([0, number, window, epoch], dtype=np.uint64)
    stream = np.random.Philox(key=np.array([seed, ORDER_STREAM], dtype=np.uint64), counter=counter)
    return np.random.Generator(stream).permutation(count)
