"""Optimizers and learning-rate schedules. The schedule is a pure function of the step, so that a resumed run needs no
scheduler state; the update itself is torch.optim's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import Parameter

from student_trainer import average
from student_trainer.muon import Muon
from teacher_api.settings import Section

VOCABULARY_MODULES = frozenset({"lm_head", "wte", "wpe", "output"})
"""Modules, besides those with embed in their name, whose matrices have a row for each token or position."""
NO_DECAY = frozenset({"norms", "biases"})


class OptimConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon (muon.py) on the hidden layers' matrices, AdamW on everything else (embeddings and output head
    among it)."""
    learning_rate: float = Field(1e-5, gt=0, le=10)
    """Peak rate of AdamW."""
    muon_learning_rate: float = Field(5e-3, gt=0, le=10)
    """Peak rate of Muon."""
    weight_decay: float = Field(0.0, ge=0, le=10)
    """Decoupled decay: each step takes rate · weight_decay of a weight away from it."""
    no_decay: tuple[Literal["norms", "biases", "embeddings"], ...] = ("norms", "biases")
    """What is left alone by it. norms: their scales, and every other vector that is no bias, such as a state-space
    layer's rates; embeddings: matrices with a row for each token or position, the output head among them."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """After warm-up: constant; straight line or half cosine down to min_lr_ratio; or wsd: constant, then a straight
    line down over the last `decay_steps` steps."""
    warmup_steps: int = Field(0, ge=0)
    """Straight line from learning_rate / warmup_steps at the first step."""
    decay_steps: int = Field(0, ge=0)
    """wsd only: length of the final decay, in steps."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where linear, cosine and wsd end, as a share of the peak."""
    grad_clip: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Largest global gradient norm; 0: no clipping."""
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Keep an exponential moving average of the weights, e ← decay·e + (1−decay)·w after every update; it is saved in
    checkpoints, and at the end as a model of its own in `ema/`. 0: none."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise ValueError("schedule wsd needs decay_steps > 0")
        if self.schedule != "wsd" and self.decay_steps:
            raise ValueError(f"decay_steps belongs to schedule wsd, got schedule {self.schedule}")
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError("min_lr_ratio belongs to schedules linear, cosine and wsd, got schedule constant")
        if set(self.no_decay) != NO_DECAY and not self.weight_decay:
            raise ValueError(
                f"no_decay: got {list(self.no_decay)} with weight_decay 0, expected none: there is nothing to leave out"
            )
        return self


def check_length(config: OptimConfig, steps: int) -> None:
    """Raises ValueError where the schedule's parts are longer than the run."""
    warmup, decay = config.warmup_steps, config.decay_steps
    if warmup > steps:
        raise ValueError(f"optim.warmup_steps is {warmup}, more than train.steps {steps}")
    if warmup + decay > steps:
        raise ValueError(
            f"optim.decay_steps is {decay}, with {warmup} of optim.warmup_steps more than train.steps {steps}; "
            "expected the decay after the warm-up"
        )


def schedule_factor(config: OptimConfig, step: int, total_steps: int) -> float:
    """Share of the peak rate at `step` s (0-based) of a run of N `total_steps`, with w warm-up and d decay steps and
    r = min_lr_ratio:

        s < w: (s + 1) / w;   then, at progress x of the way down: 1 − (1 − r) x, or r + (1 − r) (1 + cos πx) / 2

    for linear and cosine with x = (s − w) / (N − w), for wsd (linear) with x = max(0, s − (N − d)) / d. The floor is
    what step N would have: the last step is one short of it.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "wsd":
        left = total_steps - step
        progress = max(0.0, 1.0 - left / config.decay_steps)
        return 1.0 - (1.0 - config.min_lr_ratio) * progress
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    shape = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape


class StateSource(Protocol):
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An optimizer's state, gathered from the ranks that hold its parts."""

    tensors: dict[str, Tensor]
    description: dict[str, Any]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors, self.description


class Optimizer:
    """torch.optim behind one door: clipping, schedule, and a state that is tensors and JSON (no pickle).

    Args:
        named_parameters: those to train; a parameter under two names (tied) counts once, under its first.
        total_steps: length of the run, for the schedule.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Parameter]], config: OptimConfig, total_steps: int
    ) -> None:
        seen: dict[int, str] = {}
        self._parameters: dict[str, Parameter] = {}
        for name, parameter in named_parameters:
            if parameter.requires_grad and id(parameter) not in seen:
                seen[id(parameter)] = name
                self._parameters[name] = parameter
        if not self._parameters:
            raise ValueError("nothing to train: no parameter requires a gradient")
        self._config = config
        self._total_steps = total_steps
        self._parts = self._build()

    def _build(self) -> dict[str, tuple[torch.optim.Optimizer, float]]:
        config = self._config
        left = set(config.no_decay)
        is_muon = config.name == "muon"
        muon = {n: p for n, p in self._parameters.items() if is_muon and p.ndim == 2 and kind(n, p) == "weights"}
        rest = {n: p for n, p in self._parameters.items() if n not in muon}
        parts: dict[str, tuple[torch.optim.Optimizer, float]] = {}
        if rest:
            groups = [
                {"params": [p for n, p in rest.items() if kind(n, p) not in left], "weight_decay": config.weight_decay},
                {"params": [p for n, p in rest.items() if kind(n, p) in left], "weight_decay": 0.0},
            ]
            filled = [g for g in groups if g["params"]]
            adamw = self._make(torch.optim.AdamW, filled, lr=config.learning_rate, betas=config.betas, eps=config.eps)
            parts["adamw"] = (adamw, config.learning_rate)
        if muon:
            matrices = list(muon.values())
            rate, decay = config.muon_learning_rate, config.weight_decay
            parts["muon"] = (self._make(Muon, matrices, lr=rate, weight_decay=decay), rate)
        if config.ema_decay:  # last: it averages what the others have updated
            kept = self._make(average.Average, list(self._parameters.values()), decay=config.ema_decay)
            parts[average.PART] = (kept, 0.0)
        return parts

    def _make(self, kind: Any, groups: list[Any], **settings: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(groups, **settings)
        return optimizer

    def learning_rate(self, step: int) -> float:
        """AdamW's (or, where Muon takes everything, Muon's) rate at `step`."""
        peak = next(iter(self._parts.values()))[1]
        return peak * schedule_factor(self._config, step, self._total_steps)

    def zero_grad(self) -> None:
        for optimizer, _ in self._parts.values():
            optimizer.zero_grad(set_to_none=True)

    def grad_norm(self) -> float:
        """Global L2 norm of all gradients, in float32. Parameters without a gradient count as zero."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def step(self, step: int) -> float:
        """Clips, sets the rate of `step` and updates the weights; returns the norm before clipping. A norm that is
        not finite is returned without any update: the caller counts it."""
        norm = self.grad_norm()
        if not math.isfinite(norm):
            return norm
        if self._config.grad_clip:
            self._clip(norm)
        factor = schedule_factor(self._config, step, self._total_steps)
        for optimizer, peak in self._parts.values():
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            self._update(optimizer)
        return norm

    def _clip(self, norm: float) -> None:
        torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._config.grad_clip, torch.tensor(norm))

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def gathered(self) -> StateSource:
        """Where the whole state can be had on the main rank. Called by every rank."""
        return self

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by "part/parameter/slot", JSON description), of what this rank holds. References, not copies."""
        tensors: dict[str, Tensor] = {}
        for part, (optimizer, _) in self._parts.items():
            for name, parameter in self._parameters.items():
                for slot, value in self._slots(optimizer, parameter).items():
                    if not isinstance(value, Tensor):
                        raise TypeError(f"optimizer slot {part}/{name}/{slot} is {type(value).__name__}, not a tensor")
                    tensors[f"{part}/{name}/{slot}"] = value
        return tensors, {"optimizer": self._config.name, "parameters": list(self._parameters)}

    def load_state(self, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """Restores what `state` gave. Raises ValueError where it belongs to another model or optimizer."""
        if description["optimizer"] != self._config.name:
            raise ValueError(f"checkpoint has {description['optimizer']} state, the run uses {self._config.name}")
        if description["parameters"] != list(self._parameters):
            different = sorted(set(description["parameters"]) ^ set(self._parameters))
            raise ValueError(f"checkpoint's optimizer covers other parameters, for example {different[:3]}")
        for key, value in tensors.items():
            part, name, slot = key.split("/")
            if part == average.PART and part not in self._parts:
                continue  # begun from a run that kept an average
            if part not in self._parts or name not in self._parameters:
                raise ValueError(f"checkpoint's optimizer state {key!r} belongs to no parameter of this run")
            self._restore(self._parts[part][0], self._parameters[name], slot, value)

    def _slots(self, optimizer: torch.optim.Optimizer, parameter: Parameter) -> dict[str, Any]:
        return dict(optimizer.state.get(parameter, {}))

    def _restore(self, optimizer: torch.optim.Optimizer, parameter: Parameter, slot: str, value: Tensor) -> None:
        on_device = value if slot == "step" else value.to(parameter.device)
        optimizer.state[parameter][slot] = on_device.clone()


def kind(name: str, parameter: Tensor) -> str:
    """norms, biases or embeddings, as no_decay means them; weights: all others."""
    *modules, attribute = name.split(".")
    if parameter.ndim < 2:
        return "biases" if attribute == "bias" or attribute.endswith("_bias") else "norms"
    if any("embed" in module or module in VOCABULARY_MODULES for module in modules):
        return "embeddings"
    return "weights"
