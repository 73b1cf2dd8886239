"""The ratio p/q of the actual token against its logarithm: an estimate of reverse KL that is never negative, and whose
gradient is *forward* KL's."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from student_trainer.losses.base import LossInputs
from student_trainer.losses.config import SampledTokenConfig
from student_trainer.losses.registry import register
from student_trainer.losses.sampled_token import SampledToken

LINEAR_BEYOND = 20.0
"""Where log p/q is larger, e^x goes on as its tangent. The student samples no token that it finds e^20 times less
likely than the teacher does; weights that have changed since may find it so, and float32's exponential ends at 88."""


class K3Config(SampledTokenConfig):
    objective: Literal["k3"] = "k3"


@register(K3Config)
class K3(SampledToken[K3Config]):
    """D = e^{−δ} − 1 + δ, δ = log q_now(y) − log p(y); e^x goes on as its tangent from x = 20, so that value and
    gradient stay finite and continuous.

    Over the student's own untruncated samples its expected value is KL(q‖p), but its expected gradient, E (1 − p/q)
    ∇log q = −E p/q ∇log q, is that of KL(p‖q). (J. Schulman, "Approximating KL divergence", 2020.)
    """

    def of_token(self, inputs: LossInputs, log_q_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        delta_N = log_q_N - inputs.teacher.token_logprob
        bounded_N = (-delta_N).clamp(max=LINEAR_BEYOND)
        tangent_N = math.exp(LINEAR_BEYOND) * (-delta_N - LINEAR_BEYOND).clamp(min=0.0)
        value_N = torch.expm1(bounded_N) + tangent_N + delta_N
        return value_N, {"delta": delta_N.detach()}
