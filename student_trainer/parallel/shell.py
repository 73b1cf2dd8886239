"""The plain model of a run whose weights are sharded elsewhere: everybody may keep references to it, its parameters are
on the meta device (using them raises) except while it is filled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter


class Shell:
    """Fills and empties `model`. A parameter under two names (tied) stays one."""

    def __init__(self, model: Module) -> None:
        places: dict[int, list[tuple[Module, str]]] = {}
        names: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for attribute, parameter in module.named_parameters(recurse=False):
                places.setdefault(id(parameter), []).append((module, attribute))
                names.setdefault(id(parameter), f"{prefix}.{attribute}" if prefix else attribute)
        self._places = {names[key]: where for key, where in places.items()}

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Puts whole weights in place, by name."""
        for name, tensor in weights:
            self._put(name, tensor)

    def empty(self) -> None:
        """Gives the memory of all weights back."""
        for name, [(module, attribute), *_] in self._places.items():
            self._put(name, torch.empty_like(getattr(module, attribute), device="meta"))

    def _put(self, name: str, tensor: Tensor) -> None:
        where = self._places[name]
        trained = getattr(*where[0]).requires_grad
        parameter = Parameter(tensor.detach(), requires_grad=trained)
        for module, attribute in where:
            setattr(module, attribute, parameter)


def structure_copy(model: Module) -> tuple[Any, Callable[[Module], Any]]:
    """A copy of the module tree that shares the parameters, and a function from a module of the model to its copy."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    copied = copy.deepcopy(model, memo)
    return copied, lambda module: memo[id(module)]
