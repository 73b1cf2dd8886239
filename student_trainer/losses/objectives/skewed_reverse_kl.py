"""Skewed reverse KL: the student is held against a teacher that has been given some of the student's mass, so that an
id the teacher all but excludes costs a bounded amount."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from student_trainer.losses.config import DivergenceConfig
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.mixture import log_ratios
from student_trainer.losses.registry import register


class SkewedReverseKLConfig(DivergenceConfig):
    objective: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"

    skew_lambda: float = Field(0.1, ge=0.0, lt=1.0)
    """λ: the student's share of the mixture; 0: reverse_kl."""


@register(SkewedReverseKLConfig)
class SkewedReverseKL(Divergence[SkewedReverseKLConfig]):
    """D = KL(q ‖ (1 − λ)p + λq), in nats; at most −log λ (arXiv 2402.03898)."""

    def divergence(self, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        _, r_over_q = log_ratios(log_p_NO, log_q_NO, 1.0 - self.config.skew_lambda)
        return -(log_q_NO.exp() * r_over_q).sum(1)
