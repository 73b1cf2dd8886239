"""What sequences draw and what is recorded of them, row by row: random numbers, tokens, logprobs, likely ids. Rows are
those of whatever decodes; a row counts from its sequence's first new token.

Shape legend: S rows, n of them running (0…n-1), N new tokens (at most max_new_tokens), K ids kept, W logit width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from student_trainer.rollout import sampling
from student_trainer.rollout.config import RolloutConfig
from student_trainer.types import BoolArray
from teacher_api.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Rules:
    """How tokens are chosen."""

    config: RolloutConfig
    vocabulary_size: int
    stop_ids: tuple[int, ...]
    seed: int
    keep_top_k: int  # 0: none are kept


@dataclass(frozen=True, slots=True)
class Record:
    """Of one finished sequence, [N] each, on the host."""

    tokens: IntArray
    behaviour: FloatArray
    full: FloatArray
    topk: npt.NDArray[np.int32] | None  # [N, K]
    stopped: bool  # by a stop token; else by its length


class Ledger:
    """Rows of `capacity` sequences."""

    def __init__(self, rules: Rules, capacity: int, device: torch.device) -> None:
        self._rules = rules
        shape = (capacity, rules.config.max_new_tokens)
        kept = min(rules.keep_top_k, rules.vocabulary_size)
        self._uniform_SN = torch.zeros(shape, dtype=torch.float64, device=device)
        self._tokens_SN = torch.full(shape, -1, dtype=torch.int32, device=device)
        self._behaviour_SN = torch.zeros(shape, device=device)
        self._full_SN = torch.zeros(shape, device=device)
        self._topk_SNK = torch.zeros((*shape, kept), dtype=torch.int32, device=device)
        self._stopped_S = torch.zeros(capacity, dtype=torch.bool, device=device)
        self._count_S = torch.zeros(capacity, dtype=torch.int64, device=device)  # tokens drawn
        self._rows_S = torch.arange(capacity, device=device)
        is_stop = np.zeros(rules.vocabulary_size, dtype=np.bool_)
        is_stop[list(rules.stop_ids)] = True
        self._is_stop = is_stop
        self._is_stop_V = torch.from_numpy(is_stop).to(device)

    def enter(self, first: int, uids: Sequence[int]) -> None:
        """Sequences with these uids begin in the rows `first`, `first` + 1, …"""
        rows = slice(first, first + len(uids))
        uniform = sampling.uniforms(self._rules.seed, uids, self._uniform_SN.shape[1])
        self._uniform_SN[rows] = torch.from_numpy(uniform).to(self._uniform_SN.device)
        self._tokens_SN[rows] = -1
        self._count_S[rows] = 0
        self._stopped_S[rows] = False

    def draw(self, logits_nW: Tensor) -> Tensor:
        """The next token (int64 [n]) of the rows 0…n-1. A row that goes on after its stop token or past its length
        draws what is cut off later."""
        n = len(logits_nW)
        rows, count = self._rows_S[:n], self._count_S[:n].clamp_max(self._uniform_SN.shape[1] - 1)
        drawn = self._drawn(logits_nW, self._uniform_SN[rows, count])
        self._tokens_SN[rows, count] = drawn.token_B.int()
        self._behaviour_SN[rows, count] = drawn.behaviour_logprob_B
        self._full_SN[rows, count] = drawn.full_logprob_B
        if self._rules.keep_top_k:
            kept = sampling.most_likely(logits_nW, self._rules.keep_top_k, vocabulary_size=self._rules.vocabulary_size)
            self._topk_SNK[rows, count] = kept
        self._count_S[:n] += 1
        self._stopped_S[:n] |= self._is_stop_V[drawn.token_B]
        return drawn.token_B

    def stopped(self, n: int) -> BoolArray:
        """Which of the rows 0…n-1 have drawn a stop token; the host waits for the accelerator."""
        return self._stopped_S[:n].cpu().numpy()  # type: ignore[no-any-return]

    def move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Rows `sources` to rows `targets`; all are read before any is written."""
        device = self._count_S.device
        into, of = (torch.tensor(x, dtype=torch.int64, device=device) for x in (targets, sources))
        for state in (
            self._uniform_SN, self._tokens_SN, self._behaviour_SN, self._full_SN, self._topk_SNK, self._stopped_S,
            self._count_S,
        ):  # fmt: skip
            state[into] = state[of]

    def take(self, rows: Sequence[int]) -> list[Record]:
        """What finished rows have, up to the stop token where there is one."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._count_S.device)
        tokens_BN, behaviour_BN, full_BN, topk_BNK = (
            state[index].cpu().numpy() for state in (self._tokens_SN, self._behaviour_SN, self._full_SN, self._topk_SNK)
        )
        records = []
        for row in range(len(rows)):
            stops = np.flatnonzero(self._is_stop[tokens_BN[row]] & (tokens_BN[row] >= 0))
            count = int(stops[0]) + 1 if len(stops) else tokens_BN.shape[1]
            records.append(
                Record(
                    tokens_BN[row, :count].copy(),
                    behaviour_BN[row, :count].copy(),
                    full_BN[row, :count].copy(),
                    topk_BNK[row, :count].copy() if self._rules.keep_top_k else None,
                    stopped=bool(len(stops)),
                )
            )
        return records

    def _drawn(self, logits_nW: Tensor, uniform_n: Tensor) -> sampling.Draw:
        config, size = self._rules.config, self._rules.vocabulary_size
        if config.greedy:
            return sampling.draw_greedy(logits_nW, vocabulary_size=size)
        how: dict[str, Any] = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        return sampling.draw(logits_nW, uniform_n, vocabulary_size=size, **how)
