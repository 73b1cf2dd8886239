"""Data parallelism with whole weights on every rank and the optimizer's state cut into one part per rank: torch's
ZeroRedundancyOptimizer. Each rank updates its own parameters and sends them to the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import Parameter

from student_trainer.distributed import Distributed, waiting
from student_trainer.optim import OptimConfig, Optimizer, Snapshot, StateSource
from student_trainer.parallel.base import Replicated


class DdpSharded(Replicated):
    """`ddp_sharded`: the arithmetic is that of `ddp`, bit for bit."""

    name = "ddp_sharded"

    def _optimizer(self, config: OptimConfig, total_steps: int) -> Optimizer:
        return _ShardedState(self.dist, self.named_parameters(), config, total_steps)

    def parts(self) -> dict[str, int]:
        return {**super().parts(), "optimizer": self.dist.world}


class _ShardedState(Optimizer):
    def __init__(self, dist: Distributed, *args: Any) -> None:
        self._dist = dist
        super().__init__(*args)

    def _make(self, kind: type[torch.optim.Optimizer], groups: Any, **settings: Any) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(groups, optimizer_class=kind, **settings)

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        with waiting():
            super()._update(optimizer)

    def _slots(self, optimizer: torch.optim.Optimizer, parameter: Parameter) -> dict[str, Any]:
        return dict(_local(optimizer).state.get(parameter, {}))

    def _restore(self, optimizer: torch.optim.Optimizer, parameter: Parameter, slot: str, value: Tensor) -> None:
        own = {id(p) for group in _local(optimizer).param_groups for p in group["params"]}
        if id(parameter) in own:
            super()._restore(_local(optimizer), parameter, slot, value)

    def gathered(self) -> StateSource:
        tensors, description = self.state()
        return Snapshot(self._dist.collect(tensors), description)


def _local(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of the parameters that this rank updates."""
    return optimizer.optim  # type: ignore[no-any-return]
