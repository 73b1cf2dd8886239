"""Reverse KL, KL(q‖p): the student keeps to what the teacher finds likely. The usual on-policy objective (arXiv
2306.13649, 2306.08543)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from student_trainer.losses.config import DivergenceConfig
from student_trainer.losses.divergence import Divergence, reverse_kl
from student_trainer.losses.registry import register


class ReverseKLConfig(DivergenceConfig):
    objective: Literal["reverse_kl"] = "reverse_kl"

    support: Literal["teacher", "student", "union"] = "union"
    """The ids compared at each position: the teacher's top-k, the k the student found likely when it sampled, or both
    (default: reverse KL weighs by the student's mass, so the student's own likely ids must be seen). The actual token
    is always among them. With `teacher.top_k: all` the support is the whole vocabulary."""


@register(ReverseKLConfig)
class ReverseKL(Divergence[ReverseKLConfig]):
    """D = Σ_o q_o (log q_o − log p_o), in nats.

    Without the bucket (`tail: none`) moving mass out of the support lowers it, whatever the teacher says there.
    """

    def divergence(self, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        return reverse_kl(log_p_NO, log_q_NO)
