"""Skewed forward KL: the student is held against a mixture that already holds some of the teacher, so that no log of a
tiny q is ever taken."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from student_trainer.losses.config import DivergenceConfig
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.mixture import log_ratios
from student_trainer.losses.registry import register


class SkewedForwardKLConfig(DivergenceConfig):
    objective: Literal["skewed_forward_kl"] = "skewed_forward_kl"

    skew_lambda: float = Field(0.1, ge=0.0, lt=1.0)
    """λ: the teacher's share of the mixture; 0: forward_kl."""


@register(SkewedForwardKLConfig)
class SkewedForwardKL(Divergence[SkewedForwardKLConfig]):
    """D = KL(p ‖ λp + (1 − λ)q), in nats; at most −log λ (arXiv 2402.03898)."""

    def divergence(self, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        r_over_p, _ = log_ratios(log_p_NO, log_q_NO, self.config.skew_lambda)
        return -(log_p_NO.exp() * r_over_p).sum(1)
