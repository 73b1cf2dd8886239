"""Samples in one row of a forward: several sequences one after the other without padding, and completions of one prompt
behind a single copy of it. Knows no model beyond its trunk; packing_check.py decides which students are packed.

Shape legend: T tokens of the row, N scored positions of all samples together, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student_trainer.packed_attention import Segment, segmented
from student_trainer.types import Rollout
from teacher_api import causal_lm
from teacher_api.types import IntArray

MIN_SAVED_TOKENS = 64
"""Prompt tokens that sharing must save to be worth its mask and its copies of keys and values."""
PREFIX_WEIGHT = 0.25
"""What a token of a shared prompt counts in a micro-batch for every completion that continues it: its keys and values
are copied, spread out over the query heads; of a token of its own a layer keeps four times as much and more."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How a step's samples are laid out."""

    packed: bool = False
    shared: bool = False  # completions of one prompt share its forward, where that saves enough
    min_saved_tokens: int = MIN_SAVED_TOKENS
    reason: str = ""  # why nothing is packed, or no prompt shared, although it could have been

    def shares(self, prompt_tokens: int, completions: int) -> bool:
        """Whether so many completions of one prompt share its forward."""
        return self.shared and completions > 1 and (completions - 1) * prompt_tokens >= self.min_saved_tokens

    def groups(self, rollouts: Sequence[Rollout], members: Sequence[int]) -> list[list[int]]:
        """`members` (indices of `rollouts`) by the prompt they share, in order of their first; whoever shares none, or
        too little of it, stands alone."""
        if not self.shared:
            return [[i] for i in members]
        by_prompt: dict[bytes, list[int]] = {}
        for i in members:
            by_prompt.setdefault(rollouts[i].prompt.token_ids.tobytes(), []).append(i)
        groups: list[list[int]] = []
        for group in by_prompt.values():
            shares = self.shares(len(rollouts[group[0]].prompt.token_ids), len(group))
            groups += [group] if shares else [[i] for i in group]
        return sorted(groups, key=lambda group: group[0])


PADDED = Packing()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of tokens and what is read from it."""

    token_ids: IntArray  # [T]
    positions: IntArray  # [T], each token's place in its own sequence
    segments: list[Segment]
    scored: IntArray  # [N]: of the row, where the completion tokens are predicted, sample after sample

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], packing: Packing) -> Row:
        """The last token of a sequence predicts nothing that is scored, and is left out."""
        tokens: list[IntArray] = []
        positions: list[IntArray] = []
        segments: list[Segment] = []
        scored: dict[int, IntArray] = {}
        end = 0

        def add(ids: IntArray, first: int, prefix: tuple[int, int]) -> int:
            """Appends a segment whose first token has position `first`; returns where it begins."""
            nonlocal end
            start, end = end, end + len(ids)
            if len(ids):
                tokens.append(ids)
                positions.append(np.arange(first, first + len(ids)))
                segments.append(Segment(start, end, *prefix))
            return start

        for group in packing.groups(rollouts, range(len(rollouts))):
            prompt = rollouts[group[0]].prompt.token_ids
            if len(group) == 1:
                only = rollouts[group[0]]
                start = add(np.concatenate([prompt, only.token_ids[:-1]]), 0, (0, 0))
                scored[group[0]] = start + len(prompt) - 1 + np.arange(only.num_tokens)
                continue
            root = add(prompt, 0, (0, 0))
            for i in group:
                start = add(rollouts[i].token_ids[:-1], len(prompt), (root, root + len(prompt)))
                own = start + np.arange(rollouts[i].num_tokens - 1)
                scored[i] = np.concatenate([[root + len(prompt) - 1], own])
        in_order = [scored[i] for i in range(len(rollouts))]
        return cls(_joined(tokens), _joined(positions), segments, _joined(in_order))

    def hidden_rows(self, parts: causal_lm.Parts, device: torch.device) -> Tensor:
        """Last hidden states [N, H] at the scored positions, with their graph."""
        return self.hidden(parts, device).index_select(0, torch.from_numpy(self.scored).to(device))

    def hidden(self, parts: causal_lm.Parts, device: torch.device) -> Tensor:
        """Last hidden states [T, H]. The mask of ones says that nothing is padded, and keeps transformers from looking
        for sequences in the positions."""
        ids_1T, positions_1T = (torch.from_numpy(x)[None].to(device) for x in (self.token_ids, self.positions))
        with segmented(self.segments):
            return parts.trunk(ids_1T, torch.ones_like(ids_1T), positions_1T)[0]  # type: ignore[no-any-return]


def _joined(pieces: Sequence[IntArray]) -> IntArray:
    return np.concatenate(pieces).astype(np.int64)
