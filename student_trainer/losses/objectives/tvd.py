"""Total variation distance: bounded by 1, and blind to how unlikely an unlikely id is."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from student_trainer.losses.config import DivergenceConfig
from student_trainer.losses.divergence import Divergence
from student_trainer.losses.registry import register


class TVDConfig(DivergenceConfig):
    objective: Literal["tvd"] = "tvd"


@register(TVDConfig)
class TVD(Divergence[TVDConfig]):
    """D = ½ Σ_o |p_o − q_o|, in [0, 1]. Where p_o = q_o its gradient is taken as 0."""

    def divergence(self, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        return 0.5 * (log_p_NO.exp() - log_q_NO.exp()).abs().sum(1)
