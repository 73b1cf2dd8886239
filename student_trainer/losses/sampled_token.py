"""What the objectives that look at the actual token alone share: they ask for one logprob a position, and compare T = 1
distributions.

Shape legend: N positions.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from student_trainer.losses.base import LossInputs, Needs, Objective, OwnToken, PerToken, rollout_gap
from student_trainer.losses.config import SampledTokenConfig
from student_trainer.losses.student_side import student_entropy, token_logprob
from teacher_api.types import LOGPROB_FLOOR

ConfigT = TypeVar("ConfigT", bound=SampledTokenConfig)


class SampledToken(Objective[ConfigT]):
    """A function of the actual token's logprobs, which estimates a divergence where the student sampled that token.
    Where nobody did (fixed data) it estimates nothing, and is 0."""

    own_token: ClassVar[OwnToken] = "weight"

    def needs(self, teacher_top_k: int | Literal["all"]) -> Needs:
        return Needs(top_k=0, student_top_k=0)

    def per_token(self, inputs: LossInputs) -> PerToken:
        log_q_N = token_logprob(inputs).clamp(min=LOGPROB_FLOOR)
        value_N, metrics = self.of_token(inputs, log_q_N)
        value_N = torch.where(inputs.sampled, value_N, 0.0)
        now_N = log_q_N.detach()
        with torch.no_grad():
            metrics |= {"student_entropy": student_entropy(inputs), **rollout_gap(inputs, now_N)}
        return PerToken(value_N, metrics, now_N)

    @abstractmethod
    def of_token(self, inputs: LossInputs, log_q_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Value [N] from log q_now(y), and the objective's own metrics, detached."""
