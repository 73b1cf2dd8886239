"""Forward KL, KL(p‖q): the student covers whatever the teacher finds likely."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from student_trainer.losses.config import DivergenceConfig
from student_trainer.losses.divergence import Divergence, forward_kl
from student_trainer.losses.registry import register


class ForwardKLConfig(DivergenceConfig):
    objective: Literal["forward_kl"] = "forward_kl"


@register(ForwardKLConfig)
class ForwardKL(Divergence[ForwardKLConfig]):
    """D = Σ_o p_o (log p_o − log q_o), in nats.

    With `tail: none` it is truncated and may be negative; it is not clamped, since that would end its gradient.
    """

    def divergence(self, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        return forward_kl(log_p_NO, log_q_NO)
