"""Weights, gradients and optimizer state in one part per rank: torch's `fully_shard` (FSDP2), one group per layer and
one for embeddings, norm and head. The root of the shards is a module of our own around the trunk, because that is what
a step calls; the head is used while the root's weights are whole, and its gradients leave with the trunk's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module, ModuleList, Parameter

from student_trainer.distributed import Distributed, waiting
from student_trainer.muon import Muon
from student_trainer.optim import OptimConfig, Optimizer, Snapshot, StateSource
from student_trainer.parallel.sharded import Sharded, refuse_untrainable
from student_trainer.parallel.shell import Shell, structure_copy
from student_trainer.student import Student


class Fsdp2(Sharded):
    """`fsdp2`.

    Args:
        cpu_offload: keep the shards, their gradients and the optimizer on the host between uses.
    """

    name = "fsdp2"

    def __init__(self, dist: Distributed, *, cpu_offload: bool = False) -> None:
        super().__init__(dist)
        self._cpu_offload = cpu_offload

    def spread(self, student: Student, config: OptimConfig, total_steps: int) -> Student:
        self.plain = student
        self._shell = Shell(student.model)
        self._trained, copy_of = structure_copy(student.model)
        body, project = copy_of(student.parts.body), copy_of(student.parts.project)
        layers = layers_of(body)
        _refuse_unfit(self._trained, layers)
        refuse_untrainable(self.name, self._trained, body)
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(student.device.type, (self.dist.world,)),
            "offload_policy": self._offload(student.device),
        }
        root = _Root(self._trained, body)
        for layer in layers:
            fully_shard(layer, **settings)
        # The head is used after the root's forward: its weights must still be whole then.
        fully_shard(root, reshard_after_forward=False, **settings)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # losses are weighted by global counts: a sum is wanted
                module.set_force_sum_reduction_for_comms(True)
                # An expert may have had tokens on another rank only.
                module.set_reduce_scatter_unused_params(True, recurse=False)
        self._shell.empty()
        self.optimizer = self._optimizer(config, total_steps)
        parts = dataclasses.replace(student.parts, body=root, project=project)
        self._student = dataclasses.replace(student, parts=parts)
        return self._student

    def _offload(self, device: torch.device) -> OffloadPolicy:
        return CPUOffloadPolicy(pin_memory=device.type == "cuda") if self._cpu_offload else OffloadPolicy()

    def _optimizer(self, config: OptimConfig, total_steps: int) -> Optimizer:
        return _Sharded(self.dist, self.named_parameters(), config, total_steps)

    def _whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.named_parameters():
            yield name, full_tensor(parameter)

    def parts(self) -> dict[str, int]:
        world = self.dist.world
        return {"weights": world, "gradients": world, "optimizer": world}


class _Root(Module):
    """Calls the trunk; holds the whole model, so that all of its parameters belong to this root."""

    def __init__(self, model: Module, body: Module) -> None:
        super().__init__()
        self.model = model
        self._body = (body,)  # no submodule of its own: it is one of the model's

    def forward(self, **inputs: Any) -> Any:
        return self._body[0](**inputs)


class _Sharded(Optimizer):
    """An optimizer of DTensors: its state is cut as they are."""

    def __init__(self, dist: Distributed, *args: Any) -> None:
        self._dist = dist
        super().__init__(*args)

    def grad_norm(self) -> float:
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if not gradients:
            return 0.0
        with waiting():
            return float(full_tensor(torch.nn.utils.get_total_norm(gradients)))

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(optimizer, Muon):
            _update_whole(optimizer)
        else:
            super()._update(optimizer)

    def _restore(self, optimizer: torch.optim.Optimizer, parameter: Parameter, slot: str, value: Tensor) -> None:
        data = parameter.data
        if isinstance(data, DTensor) and value.shape == data.shape:
            optimizer.state[parameter][slot] = _part_like(data, value.to(data.to_local().device))
        else:
            super()._restore(optimizer, parameter, slot, value)

    def gathered(self) -> StateSource:
        tensors, description = self.state()
        whole = {}
        for name, value in tensors.items():
            tensor = full_tensor(value)
            if self._dist.is_main:
                whole[name] = tensor.cpu()
        return Snapshot(whole, description)


def _update_whole(optimizer: Muon) -> None:
    """Muon's step of each matrix in turn while every rank has it whole, as one process takes it: its iteration
    multiplies the whole matrix by itself."""
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            whole = Parameter(full_tensor(parameter.data).clone())
            whole.grad = full_tensor(parameter.grad)
            of_whole = Muon([{**settings, "params": [whole]}])
            of_whole.state[whole].update({slot: full_tensor(value).clone() for slot, value in state.items()})
            of_whole.step()
            parameter.data.to_local().copy_(_part_like(parameter.data, whole.data).to_local())
            state.update({slot: _part_like(parameter.data, value) for slot, value in of_whole.state[whole].items()})


def _part_like(data: DTensor, whole: Tensor) -> DTensor:
    """This rank's part of a tensor that every rank has whole, cut as `data`: nothing is sent."""
    return distribute_tensor(whole, data.device_mesh, data.placements, src_data_rank=None)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; a plain one as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with waiting():
        whole: Tensor = tensor.full_tensor().detach()
        return whole


def layers_of(body: Module) -> list[Module]:
    """The trunk's repeated layers, in order."""
    return [layer for child in body.children() if isinstance(child, ModuleList) for layer in child]


def _refuse_unfit(model: Module, layers: Sequence[Module]) -> None:
    name = type(model).__name__
    cure = "use train.strategy ddp or ddp_sharded"
    if not layers:
        raise ValueError(f"train.strategy: fsdp2 found no list of layers in {name}; {cure}")
    owners: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise ValueError(f"train.strategy: fsdp2 can't shard {name}, whose layers share parameters; {cure}")
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside and any(id(p) in owners for p in module.parameters(recurse=False)):
            raise ValueError(
                f"train.strategy: fsdp2 can't shard {name}: a layer's parameter is used outside it; {cure}"
            )
