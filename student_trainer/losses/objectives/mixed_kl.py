"""A fixed mixture of forward and reverse KL."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from student_trainer.losses.config import DivergenceConfig
from student_trainer.losses.divergence import Divergence, forward_kl, reverse_kl
from student_trainer.losses.registry import register


class MixedKLConfig(DivergenceConfig):
    objective: Literal["mixed_kl"] = "mixed_kl"

    mixed_weight: float = Field(0.5, ge=0.0, le=1.0)
    """w: share of forward KL."""


@register(MixedKLConfig)
class MixedKL(Divergence[MixedKLConfig]):
    """D = w KL(p‖q) + (1 − w) KL(q‖p), in nats."""

    def divergence(self, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        weight = self.config.mixed_weight
        return weight * forward_kl(log_p_NO, log_q_NO) + (1.0 - weight) * reverse_kl(log_p_NO, log_q_NO)
