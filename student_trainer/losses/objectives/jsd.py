"""Generalised Jensen–Shannon divergence: between the two KLs, and bounded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from student_trainer.losses.config import DivergenceConfig
from student_trainer.losses.divergence import Divergence, forward_kl, reverse_kl
from student_trainer.losses.mixture import log_ratios
from student_trainer.losses.registry import register


class JSDConfig(DivergenceConfig):
    objective: Literal["jsd"] = "jsd"

    beta: float = Field(0.5, ge=0.0, le=1.0)
    """β: the teacher's share of the mixture. 0 selects forward_kl and 1 reverse_kl, the limits of JSD/β and JSD/(1 − β)
    (JSD itself goes to 0 there)."""


@register(JSDConfig)
class JSD(Divergence[JSDConfig]):
    """D = β KL(p‖r) + (1 − β) KL(q‖r), r = βp + (1 − β)q, in nats (arXiv 2306.13649).

    At β = 0 and 1 the value jumps: it is the forward and the reverse KL, as the paper has it.
    """

    def divergence(self, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        beta = self.config.beta
        if beta == 0.0:
            return forward_kl(log_p_NO, log_q_NO)
        if beta == 1.0:
            return reverse_kl(log_p_NO, log_q_NO)
        r_over_p, r_over_q = log_ratios(log_p_NO, log_q_NO, beta)
        return -(beta * log_p_NO.exp() * r_over_p + (1.0 - beta) * log_q_NO.exp() * r_over_q).sum(1)
