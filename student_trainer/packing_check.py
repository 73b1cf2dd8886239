"""Which students are packed. It is tried at the start, never looked up by name: hidden states and their gradients of a
packed row must be those of every sequence alone, or the student is not packed.

Shape legend: N scored positions of all samples together, H hidden size, L tokens of one sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from student_trainer.config import TrainConfig
from student_trainer.packed_attention import install
from student_trainer.packing import MIN_SAVED_TOKENS, Packing, Row
from student_trainer.student import Student
from student_trainer.types import Prompt, Rollout
from teacher_api import causal_lm
from teacher_api.types import IntArray

Setting = Literal["auto", "on", "off"]
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_LENGTHS = (5, 17, 2, 9)
_SMALL_WINDOW = 64
"""Sliding windows up to this are crossed by a sequence of the check."""
_TOLERANCE = 1e-4
"""Of the largest value, in float32: rounding is an order below, another sequence's tokens are far above."""
_CHECK_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError)
"""What a model raises that can't take the mask, or positions that start again."""


def applied(student: Student, config: TrainConfig) -> Student:
    """The student with its packing. Raises ValueError where the configuration demands what it can't do."""
    share_prompt = config.train.share_prompt if config.rollout.group_size > 1 else "off"
    packing = choose(student.model, student.parts, student.device, config.train.packing, share_prompt)
    return dataclasses.replace(student, packing=packing)


def choose(
    model: Any, parts: causal_lm.Parts, device: torch.device, packing: Setting, share_prompt: Setting
) -> Packing:
    """What `train.packing` and `train.share_prompt` mean for this student. Where packing is used, attention by segments
    is installed in `model`, for good.

    Raises:
        ValueError: on was asked for, and this student can't; the message says why.
    """
    name = f"{type(model).__name__} (model_type {getattr(model.config, 'model_type', '')!r})"
    if packing == "off":
        if share_prompt == "on":
            raise ValueError("train.share_prompt: got on with train.packing off, expected auto or on: it needs packing")
        return Packing()
    reason = _unpackable(parts, causal_lm.text_config(model.config))
    if reason:
        return _refused(packing, share_prompt, "packing", name, reason)
    with _without_dropout(model):
        try:
            alone = _Check.alone(model, parts, device)
        except _CHECK_ERRORS as error:
            return _refused(packing, share_prompt, "packing", name, _cannot(error))
        uninstall = install(model)
        reason = alone.compare(Packing(packed=True))
        if reason:
            uninstall()
            return _refused(packing, share_prompt, "packing", name, reason)
        if share_prompt == "off":
            return Packing(packed=True)
        reason = alone.compare(Packing(packed=True, shared=True, min_saved_tokens=0))
    if reason:
        return _refused("auto", share_prompt, "share_prompt", name, reason)
    return Packing(packed=True, shared=True, min_saved_tokens=0 if share_prompt == "on" else MIN_SAVED_TOKENS)


def _refused(packing: Setting, share_prompt: Setting, what: str, name: str, reason: str) -> Packing:
    for option, setting in (("packing", packing), ("share_prompt", share_prompt)):
        if setting == "on":
            raise ValueError(f"train.{option}: got on, expected auto or off for this student: {name} {reason}")
    return Packing(packed=what != "packing", reason=f"train.{what} is off: {name} {reason}")


def _cannot(error: Exception) -> str:
    return f"can't take it: {' '.join(str(error).split())[:200]}"


def _unpackable(parts: causal_lm.Parts, config: Any) -> str:
    """Why this kind of model is not even tried; "" if nothing speaks against it."""
    if parts.cache_name != "past_key_values":
        return "carries a state from token to token, which sequences in one row would hand on"
    if not {"position_ids", "attention_mask"} <= parts.accepts:
        return "takes no positions or no mask"
    strange = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        return (
            f"has layers of type {', '.join(sorted(strange))}, which do more than attend to the tokens they are shown"
        )
    varying = causal_lm.rope_of_the_length(config)
    if varying:
        return f"has rotary positions of type {varying}, which depend on the longest sequence of a forward"
    return ""


@dataclass(frozen=True, slots=True)
class _Check:
    """Made-up samples, and what the model as it was makes of each alone."""

    model: Any
    parts: causal_lm.Parts
    device: torch.device
    rollouts: list[Rollout]
    hidden_NH: Tensor
    gradients: list[Tensor]  # by sample: of its embedded tokens [L, H]

    @classmethod
    def alone(cls, model: Any, parts: causal_lm.Parts, device: torch.device) -> _Check:
        rollouts = _made_up(model, parts)
        hidden, gradients = [], []
        for rollout in rollouts:
            row = Row.of([rollout], Packing())
            ids = torch.from_numpy(row.token_ids)[None].to(device)
            rows, gradient = _states(model, lambda ids=ids: parts.trunk(ids)[0], row.scored, _seed(rollout))  # type: ignore[misc]
            hidden.append(rows)
            gradients.append(gradient)
        return cls(model, parts, device, rollouts, torch.cat(hidden), gradients)

    def compare(self, packing: Packing) -> str:
        """What differs in a packed row; "" if nothing does."""
        row = Row.of(self.rollouts, packing)
        seeds = np.concatenate([_seed(r) for r in self.rollouts])
        try:
            hidden_NH, gradient = _states(self.model, lambda: row.hidden(self.parts, self.device), row.scored, seeds)
        except _CHECK_ERRORS as error:
            return _cannot(error)
        expected = torch.zeros_like(gradient)
        for where, alone in zip(_places(self.rollouts, packing), self.gradients, strict=True):
            expected.index_add_(0, where.to(self.device), alone)
        for what, got, wanted in (
            ("hidden states", hidden_NH, self.hidden_NH),
            ("gradients", gradient, expected),
        ):
            difference, limit = float((got - wanted).abs().max()), _TOLERANCE * max(1.0, float(wanted.abs().max()))
            if not difference <= limit:
                return f"gives {what} that differ by {difference:.2g} from those of each sequence alone"
        return ""


def _places(rollouts: Sequence[Rollout], packing: Packing) -> Iterator[Tensor]:
    """Where the tokens of each sample's sequence (but its last) lie in the row."""
    scored = np.split(Row.of(rollouts, packing).scored, np.cumsum([r.num_tokens for r in rollouts])[:-1])
    for rollout, places in zip(rollouts, scored, strict=True):
        prompt = np.arange(places[0] + 1 - len(rollout.prompt.token_ids), places[0] + 1)
        yield torch.from_numpy(np.concatenate([prompt, places[1:]]))


def _states(model: Any, run: Callable[[], Tensor], scored: IntArray, seeds: IntArray) -> tuple[Tensor, Tensor]:
    """Hidden states [N, H] at `scored`, and the gradient of a random combination of them for the embedded tokens."""
    with _embedded(model) as tokens:
        hidden = run()
        rows_NH = hidden.index_select(0, torch.from_numpy(scored).to(hidden.device))
        angle = torch.from_numpy(seeds)[:, None] + torch.arange(rows_NH.shape[1])
        weights_NH = torch.sin(angle.double()).to(rows_NH)
        (gradient,) = torch.autograd.grad((rows_NH * weights_NH).sum(), tokens[0])
    return rows_NH.detach(), gradient[0]


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Evaluation mode, except of layers that are recomputed in the backward pass: they are, in training mode only."""
    changed = [m for m in model.modules() if m.training and not getattr(m, "gradient_checkpointing", False)]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


@contextmanager
def _embedded(model: Any) -> Iterator[list[Tensor]]:
    """Collects the embedded tokens of forwards inside, cut off from the embedding and made to require a gradient."""
    tokens: list[Tensor] = []

    def cut(module: Any, arguments: Any, output: Tensor) -> Tensor:
        tokens.append(output.detach().requires_grad_())
        return tokens[-1]

    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield tokens
    finally:
        handle.remove()


def _made_up(model: Any, parts: causal_lm.Parts) -> list[Rollout]:
    """Four samples, three of one prompt; the other prompt is one token, so that what leaks into the first token of a
    sequence shows. The longest crosses a small sliding window."""
    config = causal_lm.text_config(model.config)
    window = int(getattr(config, "sliding_window", None) or 0)
    limit = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
    draw = np.random.default_rng(0)

    def ids(num: int) -> IntArray:
        return draw.integers(0, parts.logit_width, num).astype(np.int32)

    shared, other = Prompt(0, ids(6)), Prompt(1, ids(1))
    lengths = list(_LENGTHS)
    if window <= _SMALL_WINDOW:
        lengths[1] = max(lengths[1], min(window + 3, limit - 6))
    values = np.zeros(0, dtype=np.float32)
    return [
        Rollout(uid, other if uid == 2 else shared, ids(num), "length", values, values)
        for uid, num in enumerate(lengths)
    ]


def _seed(rollout: Rollout) -> IntArray:
    """A different number for each of the sample's scored positions."""
    return 1000 * rollout.uid + 7 * np.arange(rollout.num_tokens)
