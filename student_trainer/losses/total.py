"""The loss of a position where it is more than its objective: a factor, and cross-entropy on fixed data. Both come from
the chunk's own logits, so nothing more is held.

Shape legend: N positions of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from student_trainer.losses.base import (
    AllReduceSum,
    AnyObjective,
    LossInputs,
    Needs,
    Objective,
    PerToken,
    partly_defined,
)
from student_trainer.losses.config import LossConfig
from student_trainer.losses.student_side import token_logprob
from student_trainer.types import ScoredRollout
from teacher_api.types import FloatArray


class Total(Objective[LossConfig]):
    """L = a·CE + b·D, CE = −log q_now(y) (T = 1) at tokens of fixed data and 0 at others; (a, b) = `config.totals`.

    On the student's own samples the expected gradient of −log q(y) is zero: it would only add noise.
    """

    def __init__(self, objective: AnyObjective) -> None:
        super().__init__(objective.config)
        self.objective = objective
        self.own_token = objective.own_token  # type: ignore[misc]

    def needs(self, teacher_top_k: int | Literal["all"]) -> Needs:
        return self.objective.needs(teacher_top_k)

    def prepare(self, scored: Sequence[ScoredRollout], all_reduce_sum: AllReduceSum) -> list[FloatArray] | None:
        return self.objective.prepare(scored, all_reduce_sum)

    @property
    def looks_at_whole_steps(self) -> bool:
        return self.objective.looks_at_whole_steps

    def per_token(self, inputs: LossInputs) -> PerToken:
        cross_entropy, own = self.config.totals
        result = self.objective.per_token(inputs)
        value_N = own * result.value
        metrics = {**result.metrics, "distillation": result.value.detach()}
        if cross_entropy:
            surprise_N = -token_logprob(inputs)
            value_N = value_N + cross_entropy * torch.where(inputs.fixed, surprise_N, 0.0)
            metrics |= partly_defined("cross_entropy", surprise_N.detach(), inputs.fixed)
        return PerToken(value_N, metrics, result.token_logprob)
