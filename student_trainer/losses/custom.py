"""An objective of the user's own: `loss.objective: package.module:function`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from student_trainer.losses.base import LossInputs, Needs, Objective, PerToken
from student_trainer.losses.config import CustomConfig, LossConfig
from student_trainer.losses.divergence import needs_of_support


class CustomObjective(Objective[CustomConfig]):
    """Calls ``function(inputs: LossInputs, config: CustomConfig) -> PerToken`` on each chunk of positions.

    `student_side.student_rows` and `divergence.outcomes` give the function the same two distributions that the built-in
    objectives compare.
    """

    def __init__(self, config: LossConfig, function: Callable[..., Any]) -> None:
        if not isinstance(config, CustomConfig):
            raise TypeError(f"expected a CustomConfig, got {type(config).__name__}")
        super().__init__(config)
        self._function = function

    def needs(self, teacher_top_k: int | Literal["all"]) -> Needs:
        return needs_of_support(self.config, teacher_top_k)

    def per_token(self, inputs: LossInputs) -> PerToken:
        result = self._function(inputs, self.config)
        if not isinstance(result, PerToken):
            raise ValueError(f"{self.config.objective} returned a {type(result).__name__}; expected a PerToken")
        num_rows = len(inputs.target)
        for name, tensor in {"value": result.value, **result.metrics}.items():
            if tuple(tensor.shape) != (num_rows,):
                raise ValueError(
                    f"{self.config.objective} returned {name} of shape {tuple(tensor.shape)}; expected ({num_rows},), "
                    "one number per position"
                )
        return PerToken(result.value, {name: metric.detach() for name, metric in result.metrics.items()})
