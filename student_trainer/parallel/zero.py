"""DeepSpeed's ZeRO stages 2 and 3 behind the seam. The engine runs the trunk; the head runs on a stand-in with
weights of its own, whose gradients join the trunk's single backward pass: DeepSpeed wants every gradient once per pass.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from student_trainer.distributed import Distributed, waiting
from student_trainer.optim import OptimConfig, Optimizer, Snapshot, StateSource
from student_trainer.parallel.sharded import Sharded
from student_trainer.parallel.shell import Shell, structure_copy
from student_trainer.student import Student

SMALL = 100_000
"""DeepSpeed's own default: gathering so few values costs more than it saves."""
FIRST_PASS = -1
"""Of DeepSpeed's count of a step's passes under stage 2, before the first."""
SLOTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW's state, as large as the parameter each."""


class Zero(Sharded):
    """`zero2`: gradients and optimizer state in parts; `zero3`: weights too.

    Args:
        whole_below: stage 3 keeps parameters of fewer values whole on every rank.
    """

    def __init__(self, dist: Distributed, stage: int, *, whole_below: int = SMALL) -> None:
        super().__init__(dist)
        self._whole_below = whole_below
        self.name = f"zero{stage}"
        self.stage = stage

    def spread(self, student: Student, config: OptimConfig, total_steps: int) -> Student:
        if config.name != "adamw":
            raise ValueError(f"optim.name: got {config.name} with train.strategy {self.name}, expected adamw")
        if config.ema_decay:
            raise ValueError(f"optim.ema_decay: got {config.ema_decay} with train.strategy {self.name}, expected 0")
        deepspeed = _import(student.device)
        self.device = student.device
        self.plain = student
        self._shell = Shell(student.model)
        self._trained, copy_of = structure_copy(student.model)
        project = copy_of(student.parts.project)
        stand_in = structure_copy(project)[0]
        root = _Root(
            self._trained,
            copy_of(student.parts.body),
            _Join(project, stand_in, keep=self.stage < 3, factor=self.dist.world),
        )
        plain = Optimizer(self._trained.named_parameters(), config, total_steps)
        with waiting():
            self.engine, self._wrapped, _, _ = deepspeed.initialize(
                model=root,
                optimizer=plain._parts["adamw"][0],
                config=self._settings(config),
                dist_init_required=False,
            )
        self._shell.empty()
        self.optimizer = _ZeroOptimizer(self, self._wrapped, config, total_steps)
        parts = dataclasses.replace(student.parts, body=_Body(self.engine), project=stand_in)
        self._student = dataclasses.replace(student, parts=parts)
        return self._student

    def _settings(self, config: OptimConfig) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "managed_gradient_accumulation": False,  # a step ends where we say so, after any number of passes
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": False,
                "stage3_param_persistence_threshold": self._whole_below,
            },
        }

    def finished_norm(self) -> float:
        """Ends the accumulation of this step; the global norm of its gradients."""
        wrapped = self._wrapped
        wrapped.finalize_gradient_accumulation_boundary()
        if not wrapped.averaged_gradients:
            return 0.0
        norms = [wrapped.scaled_global_norm()] if self.stage == 2 else wrapped._get_norm_groups()
        if any(float(norm) < 0 for norm in norms):  # DeepSpeed's sign for a gradient that is not finite
            return float("nan")
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def flat_pieces(self) -> list[Tensor]:
        """This rank's parts of the float32 weights, as the inner optimizer has them."""
        pieces = (
            self._wrapped.single_partition_of_fp32_groups
            if self.stage == 2
            else (self._wrapped.fp32_partitioned_groups_flat)
        )
        return list(pieces)

    def _whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        for name, parameter in self.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                yield name, parameter

    def parts(self) -> dict[str, int]:
        world = self.dist.world
        return {"weights": world if self.stage == 3 else 1, "gradients": world, "optimizer": world}


def _import(device: torch.device) -> Any:
    """DeepSpeed, told what it would find out with many words, and not to compile collectives of its own for CPUs: that
    takes minutes, and gloo has them."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.[a-z_]*_tensor` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _Root(Module):
    """What the engine runs: tokens to hidden rows, with the head's weights joined to their graph."""

    def __init__(self, model: Module, body: Module, join: Module) -> None:
        super().__init__()
        self.model = model
        self.join = join
        self._body = (body,)  # no submodule of its own: it is one of the model's

    def forward(self, **inputs: Any) -> Tensor:
        hidden: Tensor = self.join(self._body[0](**inputs).last_hidden_state)
        return hidden


class _Body:
    """The engine, called as a trunk."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __call__(self, **inputs: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self._engine(**inputs))


class _Join(Module):
    """Hidden rows as they are; in the backward pass, what the stand-in's weights got becomes the head's gradient.

    Args:
        keep: the head's weights stay whole between passes, so that the stand-in may share their memory.
        factor: of all gradients. DeepSpeed takes the mean over ranks, losses are weighted for a sum.
    """

    def __init__(self, project: Module, stand_in: Module, *, keep: bool, factor: float) -> None:
        super().__init__()
        self._keep = keep
        self._factor = factor
        self._places: list[tuple[Module, str]] = []
        modules = dict(stand_in.named_modules())
        for prefix, module in project.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                # Of this module too, so that stage 3 gathers them for it.
                self.register_parameter(f"weight{len(self._places)}", parameter)
                self._places.append((modules[prefix], name))

    def forward(self, hidden: Tensor) -> Tensor:
        weights = list(self.parameters(recurse=False))
        for (module, name), weight in zip(self._places, weights, strict=True):
            value = weight.detach() if self._keep else weight.detach().clone()
            setattr(module, name, Parameter(value, requires_grad=weight.requires_grad))
        joined: Tensor = _JoinFunction.apply(hidden, self._places, self._factor, *weights)  # type: ignore[no-untyped-call]
        return joined


class _JoinFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, places: list[tuple[Module, str]], factor: float, *weights: Tensor) -> Tensor:
        ctx.places, ctx.factor = places, factor
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_weights = []
        for module, name in ctx.places:
            parameter = getattr(module, name)
            gradient = parameter.grad
            if gradient is None and parameter.requires_grad:
                gradient = torch.zeros_like(parameter)
            of_weights.append(None if gradient is None else gradient * ctx.factor)
            setattr(module, name, Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad))
        return (gradients[0] * ctx.factor, None, None, *of_weights)


class _ZeroOptimizer(Optimizer):
    """DeepSpeed's optimizer behind our door. AdamW's state lies in flat pieces; it goes in and out by parameter."""

    def __init__(self, strategy: Zero, wrapped: Any, config: OptimConfig, total_steps: int) -> None:
        self._strategy = strategy
        self._wrapped = wrapped
        self._norm: float | None = None  # of the gradients as they are; None: not known
        super().__init__(strategy.named_parameters(), config, total_steps)
        self._make_room()

    def _build(self) -> dict[str, tuple[torch.optim.Optimizer, float]]:
        return {"adamw": (self._wrapped.optimizer, self._config.learning_rate)}

    def grad_norm(self) -> float:
        """See Optimizer. Not a number where a gradient of any rank is not finite. Ends the step's passes."""
        if self._norm is None:
            with waiting():
                self._norm = self._strategy.finished_norm()
        return self._norm

    def _clip(self, norm: float) -> None:
        """DeepSpeed clips by the same norm in its step."""

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        with waiting():
            self._wrapped.step()

    def zero_grad(self) -> None:
        self._norm = None
        self._wrapped.zero_grad()
        self._wrapped.averaged_gradients = {}
        if self._strategy.stage == 2:
            self._wrapped.all_grad_tensors = {}
            self._wrapped.micro_step_id = FIRST_PASS

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        (step, *_) = [state["step"] for state in self._wrapped.optimizer.state.values()]
        for name, parameter in self._parameters.items():
            for slot in SLOTS:
                with waiting():
                    tensors[f"adamw/{name}/{slot}"] = safe_get_full_optimizer_state(parameter, slot).clone()
            tensors[f"adamw/{name}/step"] = step.clone()  # one file does not hold a tensor twice
        return tensors, {"optimizer": self._config.name, "parameters": list(self._parameters)}

    def gathered(self) -> StateSource:
        tensors, description = self.state()
        return Snapshot(tensors if self._strategy.dist.is_main else {}, description)

    def load_state(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        super().load_state(tensors, description)
        steps = {float(value) for key, value in tensors.items() if key.endswith("/step")}
        for piece in self._strategy.flat_pieces() if steps else ():
            self._wrapped.optimizer.state[piece]["step"].fill_(max(steps))

    def _make_room(self) -> None:
        """The flat pieces of state, as the first step would make them: under stage 2 DeepSpeed finds those of the first
        group only if they come with it."""
        for piece in self._strategy.flat_pieces():
            zeros = {slot: torch.zeros_like(piece) for slot in SLOTS}
            self._wrapped.optimizer.state[piece] = {"step": torch.zeros(()), **zeros}
        if self._strategy.stage == 2:
            self._wrapped._lazy_init_hp_params_optimizer_state()

    def _restore(self, optimizer: torch.optim.Optimizer, parameter: Parameter, slot: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if slot != "step":
            safe_set_full_optimizer_state(parameter, value.to(self._strategy.device), slot)
