"""The prompts of a run and their order. Which prompts a step trains on is a pure function of (seed, step): nothing to
save, nothing to restore, the same on every rank."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from student_trainer.data import sources
from student_trainer.data.config import DataConfig
from student_trainer.data.errors import DataError
from student_trainer.data.render import Renderer
from student_trainer.types import Prompt

ORDER_STREAM = 2**64 - 1  # second word of the Philox key; no sample has this uid, so the sampler draws other numbers


class PromptSource:
    """All prompts, in memory, and the order in which steps see them.

    Args:
        prompts: at least one.
        shuffle: see DataConfig.shuffle.
        num_dropped: prompts left out for their length.
    """

    def __init__(self, prompts: Sequence[Prompt], *, shuffle: bool = True, num_dropped: int = 0) -> None:
        if not prompts:
            raise DataError("there are no prompts")
        self._prompts = tuple(prompts)
        self._shuffle = shuffle
        self.num_dropped = num_dropped

    def __len__(self) -> int:
        return len(self._prompts)

    def all(self) -> Sequence[Prompt]:
        """Every prompt once, in the source's order."""
        return self._prompts

    def digest(self) -> str:
        """Of the token ids of all prompts, in their order."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self._prompts:
            ids = np.ascontiguousarray(prompt.token_ids, dtype="<i4")
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.tobytes())
        return digest.hexdigest()

    def batch(self, step: int, batch_size: int, seed: int) -> list[Prompt]:
        """The prompts of one step, counted from 0: places step·batch_size … of the endless sequence of epochs, each a
        permutation of all prompts. Batches run across epoch ends; one larger than the source repeats prompts.

        Raises:
            ValueError: `step` or `seed` is negative, or `batch_size` < 1.
        """
        if step < 0 or batch_size < 1 or seed < 0:
            raise ValueError(
                f"step {step}, batch_size {batch_size}, seed {seed}: expected step >= 0, batch_size >= 1, seed >= 0"
            )
        places = range(step * batch_size, (step + 1) * batch_size)
        order = {epoch: self._order(epoch, seed) for epoch in {place // len(self) for place in places}}
        return [self._prompts[order[place // len(self)][place % len(self)]] for place in places]

    def _order(self, epoch: int, seed: int) -> npt.NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(len(self))
        stream = np.random.Philox(key=np.array([seed, ORDER_STREAM], dtype=np.uint64), counter=[0, 0, 0, epoch])
        return np.random.Generator(stream).permutation(len(self))


def load_prompts(config: DataConfig, tokenizer: Any, *, limit: int | None = None) -> PromptSource:
    """Reads, renders and tokenises the prompts of `config`; `limit` lowers `config.limit`.

    Raises:
        DataError: see sources.read and Renderer; the source is empty; or a prompt is longer than
            `config.max_prompt_tokens` (with `overlong: drop`: all of them are).
    """
    limits = [n for n in (limit, config.limit) if n is not None]
    records = list(itertools.islice(sources.read(config), min(limits, default=None)))
    if not records:
        raise DataError(f"data.source {config.source}: no prompts in it")
    renderer = Renderer(config, tokenizer, records[0][1], records[0][0])
    longest = config.max_prompt_tokens
    prompts: list[Prompt] = []
    for index, (where, record) in enumerate(records):
        prompt = renderer.prompt(index, where, record)
        if longest is None or len(prompt.token_ids) <= longest:
            prompts.append(prompt)
        elif config.overlong == "error":
            raise DataError(
                f"{where}: the prompt has {len(prompt.token_ids)} tokens, data.max_prompt_tokens is {longest}; "
                "raise it, or leave such prompts out with data.overlong=drop"
            )
    if not prompts:
        raise DataError(f"data.source {config.source}: all {len(records)} prompts exceed {longest} tokens")
    return PromptSource(prompts, shuffle=config.shuffle, num_dropped=len(records) - len(prompts))
