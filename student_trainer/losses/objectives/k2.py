"""Half the squared log ratio of the actual token: an estimate whose gradient is reverse KL's."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from student_trainer.losses.base import LossInputs
from student_trainer.losses.config import SampledTokenConfig
from student_trainer.losses.registry import register
from student_trainer.losses.sampled_token import SampledToken


class K2Config(SampledTokenConfig):
    objective: Literal["k2"] = "k2"


@register(K2Config)
class K2(SampledToken[K2Config]):
    """D = ½ δ², δ = log q_now(y) − log p(y).

    Over the student's own untruncated samples its expected gradient, E δ ∇log q, is that of KL(q‖p), while δ itself has
    expected gradient 0. (Names and forms of the estimators: J. Schulman, "Approximating KL divergence", 2020.)
    """

    def of_token(self, inputs: LossInputs, log_q_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        delta_N = log_q_N - inputs.teacher.token_logprob
        return 0.5 * delta_N.square(), {"delta": delta_N.detach()}
