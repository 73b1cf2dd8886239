"""An exponential moving average of the weights, kept as one more part of the optimizer: every strategy then cuts,
gathers, saves and restores it as it does the optimizer's own state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PART, SLOT = "ema", "average"
"""Of the optimizer's state: `ema/PARAMETER/average`."""


class Average(torch.optim.Optimizer):
    """e ← decay · e + (1 − decay) · w after every update of the weights w; e begins as they are when this is made.

    Not an optimizer of its own: it has a state per parameter and a step, and changes no weights.
    """

    def __init__(self, params: Any, decay: float) -> None:
        super().__init__(params, {"decay": decay, "lr": 0.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter][SLOT] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter][SLOT].mul_(group["decay"]).add_(parameter, alpha=1.0 - group["decay"])


def averages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averages in an optimizer's state, by parameter."""
    found = {}
    for key, tensor in tensors.items():
        part, name, slot = key.split("/")
        if (part, slot) == (PART, SLOT):
            found[name] = tensor
    return found


@contextlib.contextmanager
def in_place_of(weights: torch.nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model has the averages for weights. Tied weights stay tied; nothing is copied on one device."""
    parameters = dict(weights.named_parameters())
    missing = sorted(average.keys() - parameters.keys())
    if missing:
        raise ValueError(f"averages of weights that the model does not have, for example {missing[0]}")
    held = {name: parameters[name].data for name in average}
    try:
        for name, tensor in average.items():
            parameters[name].data = tensor.detach().to(held[name].device)
        yield
    finally:
        for name, data in held.items():
            parameters[name].data = data
