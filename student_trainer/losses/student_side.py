"""What objectives take of the student: log q on the teacher's support, its own log tail, log q(y), entropy; all from
one chunk of logits, differentiable, without an autograd graph over the vocabulary.

Two ways to the same numbers. Plain tensors of logits go through autograd (`_Partition`). Where chunked.py hands in a
`Tape`, the objective's graph ends in leaves [N, K], and the gradient over all W columns is then formed once, by hand,
in the logits' own memory.

The tail is a logsumexp over the columns outside the support, in float32; never 1 minus the sum of what is inside, which
is off by 10 % at a tail of 4e-4 and negative a third of the time at 7e-6 (from float16 values).

Shape legend: N positions, S support slots, K slots of a partition (the support's, then y), W the student's logit width.
Columns that only the student has (ids past the tokenizer's size) are in its softmax and, being in no support, in its
tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_trainer.losses.base import LossInputs, as_float
from student_trainer.losses.rows import first_occurrences
from teacher_api.types import LOGPROB_FLOOR

REMOVED = -1e30
"""Stands for log 0 inside a logsumexp. Finite, because the gradient through a row of nothing but -inf is NaN; so far
below LOGPROB_FLOOR that the floor's clamp ends its gradient."""
BLOCK_BYTES = {"cpu": 2**20}
"""Logits worked on at a time: what the passes over the vocabulary read again is then still in a CPU's own cache."""
DEVICE_BLOCK_BYTES = 64 * 2**20
"""The same on other devices, where few large kernels are better; it bounds the extra memory."""


@dataclass(frozen=True, slots=True)
class StudentRows:
    """Counterpart of TeacherRows; padded slots hold the actual token's value and mean nothing."""

    support_logprob: Tensor  # float32 [N, S]: log q at the student's temperature, with gradient
    log_tail: Tensor  # float32 [N]: log mass outside the support, with gradient; LOGPROB_FLOOR where nothing is
    token_logprob: Tensor  # float32 [N]: log q(y) at the student's temperature, detached
    full_logprob: Tensor  # float32 [N]: log q(y) at T = 1, detached


def student_rows(inputs: LossInputs, temperature: float = 1.0) -> StudentRows:
    """log q = log softmax(z / T) on the support, and log Σ_{v not in S} q(v).

    Values under LOGPROB_FLOOR (masked columns) are raised to it, in the forward and in the backward pass alike: such a
    column has mass 0 and gradient 0.

    Raises:
        ValueError: dense teacher rows are wider than the student's logits.
    """
    if inputs.teacher.support_ids is None:
        support_NS, log_tail_N, token_N = _dense(inputs, temperature)
    else:
        slots_NK, log_tail_N = _partition(inputs, inputs.teacher.support_ids, temperature)
        support_NS, token_N = slots_NK[:, :-1], slots_NK[:, -1].detach()
    return StudentRows(
        support_logprob=support_NS.clamp(min=LOGPROB_FLOOR),
        log_tail=log_tail_N.clamp(min=LOGPROB_FLOOR),
        token_logprob=token_N,
        full_logprob=token_N if temperature == 1.0 else token_logprob(inputs).detach(),
    )


def token_logprob(inputs: LossInputs, temperature: float = 1.0) -> Tensor:
    """log q(y) of the actual token [N], with gradient; by default at T = 1.

    Beside `student_rows` at the same temperature it costs nothing.
    """
    ids = inputs.teacher.support_ids
    return _partition(inputs, inputs.target[:, None] if ids is None else ids, temperature)[0][:, -1]


@torch.no_grad()
def logprob_of(logits_NW: Tensor, ids_N: Tensor) -> Tensor:
    """log softmax(z) at one id of each row, float32 [N], detached."""
    return _Cut.of(as_float(logits_NW), ids_N[:, None], 1.0).slots_NK[:, 0]


@torch.no_grad()
def student_entropy(inputs: LossInputs) -> Tensor:
    """−Σ_v q_v log q_v over all W columns at T = 1, [N], detached. One more pass over the vocabulary."""
    logits_NW = inputs.student_logits.detach()
    entropy_N = torch.empty(len(logits_NW), dtype=as_float(logits_NW[:0]).dtype, device=logits_NW.device)
    for block in _blocks(logits_NW):
        log_q_nW = torch.log_softmax(as_float(logits_NW[block]), dim=1)
        mass_nW = log_q_nW.exp()
        entropy_N[block] = -mass_nW.mul_(log_q_nW.clamp_(min=LOGPROB_FLOOR)).sum(1)
    return entropy_N


class Tape:
    """What an objective took from one chunk's logits, and the way back: dL/dz over all W columns, written over z.

    `inputs.student_logits` stays usable as an ordinary tensor with gradient; what flows through it is added, at the
    price of a graph over [N, W].
    """

    def __init__(self, logits_NW: Tensor) -> None:
        """`logits_NW` float32 or float64, contiguous, without graph; `backward_` overwrites it."""
        self.logits = logits_NW
        self.leaf = logits_NW.detach().requires_grad_()
        self._cuts: dict[float, tuple[_Cut, Tensor, Tensor]] = {}

    def partition(self, ids_NK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Leaves: log q at the ids [N, K] and of the rest [N]. The ids of a tape are always the same: one cut serves
        all that ask at one temperature."""
        if temperature not in self._cuts:
            cut = _Cut.of(self.logits, ids_NK, temperature)
            self._cuts[temperature] = (cut, cut.slots_NK.requires_grad_(), cut.log_tail_N.requires_grad_())
        _, slots_NK, log_tail_N = self._cuts[temperature]
        return slots_NK, log_tail_N

    def backward_(self, loss: Tensor, slope: Callable[[Tensor], Tensor | float] = lambda _: 1.0) -> None:
        """Replaces the logits z by slope(z)·dL/dz, a block of rows at a time.

        Args:
            loss: a number that depends on the student through this tape alone.
            slope: dz/dx of what came before z, elementwise.

        Raises:
            ValueError: `loss` has no gradient.
        """
        if not loss.requires_grad:
            raise ValueError("the objective's value has no gradient: it doesn't depend on the student")
        leaves = [leaf for _, *pair in self._cuts.values() for leaf in pair]
        dense_NW, *narrow = torch.autograd.grad(loss, [self.leaf, *leaves], allow_unused=True)
        used = [
            (cut, cut.coefficients(slots, tail))
            for (cut, _, _), slots, tail in zip(self._cuts.values(), narrow[::2], narrow[1::2], strict=True)
            if slots is not None or tail is not None
        ]
        for block in _blocks(self.logits):
            z_nW = self.logits[block]
            factor = slope(z_nW)
            again = [z_nW.clone() for _ in used[1:]]
            if not used:
                z_nW.zero_()
            for (cut, held), own_nW in zip(used, [z_nW, *again], strict=False):
                cut.gradient_(own_nW, block, held)
            for other_nW in again:
                z_nW.add_(other_nW)
            if dense_NW is not None:
                z_nW.add_(dense_NW[block])
            if isinstance(factor, Tensor) or factor != 1.0:
                z_nW.mul_(factor)


@dataclass(frozen=True, slots=True)
class _Cut:
    """softmax(z / T) cut into some ids of each row (they may repeat) and the rest.

    With g the gradients at the slots, G a row's sum of them and of the tail's, s the softmax over the rest alone:

        dL/dz_v = (g_v − G q_v) / T  at the ids,   (g_tail − G e^tail) s_v / T  elsewhere.
    """

    ids_NK: Tensor
    temperature: float
    slots_NK: Tensor  # log q at the ids
    log_tail_N: Tensor  # log q of the rest; about REMOVED where nothing is left
    rest_max_N: Tensor  # M = max z/T over the rest
    rest_sum_N: Tensor  # Σ e^(z/T − M) over the rest

    @classmethod
    @torch.no_grad()
    def of(cls, logits_NW: Tensor, ids_NK: Tensor, temperature: float) -> _Cut:
        picked_NK = logits_NW.gather(1, ids_NK) / temperature
        rest_max_N, rest_sum_N = picked_NK.new_empty(2, len(picked_NK))
        for block in _blocks(logits_NW):
            rest_nW = logits_NW[block].clone() if temperature == 1.0 else logits_NW[block] / temperature
            rest_nW.scatter_(1, ids_NK[block], REMOVED)
            torch.amax(rest_nW, 1, out=rest_max_N[block])
            torch.sum(rest_nW.sub_(rest_max_N[block, None]).exp_(), 1, out=rest_sum_N[block])
        # Everything relative to the row's maximum: differences of large logits keep their bits.
        max_N = torch.maximum(rest_max_N, picked_NK.amax(1))
        picked_NK -= max_N[:, None]
        rest_N = rest_max_N - max_N + rest_sum_N.log()
        once_NK = picked_NK.masked_fill(~first_occurrences(ids_NK), -torch.inf)
        log_total_N = torch.cat([once_NK, rest_N[:, None]], dim=1).logsumexp(1)
        return cls(ids_NK, temperature, picked_NK - log_total_N[:, None], rest_N - log_total_N, rest_max_N, rest_sum_N)

    def coefficients(self, grad_slots_NK: Tensor | None, grad_tail_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What `gradient_` needs: of the rest [N], of the slots to be set and to be added [N, K]."""
        slots_NK, log_tail_N = self.slots_NK.detach(), self.log_tail_N.detach()
        grad_slots_NK = torch.zeros_like(slots_NK) if grad_slots_NK is None else grad_slots_NK
        grad_tail_N = torch.zeros_like(log_tail_N) if grad_tail_N is None else grad_tail_N
        total_N = grad_slots_NK.sum(1) + grad_tail_N
        rest_N = (grad_tail_N - total_N * log_tail_N.exp()) / (self.rest_sum_N * self.temperature)
        set_NK = -total_N[:, None] * slots_NK.exp() / self.temperature
        return rest_N, set_NK, grad_slots_NK / self.temperature

    def gradient_(self, z_nW: Tensor, block: slice, coefficients: tuple[Tensor, Tensor, Tensor]) -> None:
        """Turns the logits of these rows into their gradient, in place."""
        rest_N, set_NK, add_NK = coefficients
        ids_nK = self.ids_NK[block]
        if self.temperature != 1.0:
            z_nW.div_(self.temperature)
        z_nW.sub_(self.rest_max_N[block, None]).exp_().mul_(rest_N[block, None])
        z_nW.scatter_(1, ids_nK, set_NK[block]).scatter_add_(1, ids_nK, add_NK[block])


class _Partition(torch.autograd.Function):
    """`_Cut` in autograd's terms."""

    @staticmethod
    def forward(ctx: Any, logits_NW: Tensor, ids_NK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        cut = _Cut.of(logits_NW, ids_NK, temperature)
        ctx.save_for_backward(logits_NW, ids_NK, cut.slots_NK, cut.log_tail_N, cut.rest_max_N, cut.rest_sum_N)
        ctx.temperature = temperature
        return cut.slots_NK, cut.log_tail_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_slots_NK: Tensor, grad_tail_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NW, ids_NK, *held = ctx.saved_tensors
        cut = _Cut(ids_NK, ctx.temperature, *held)
        coefficients = cut.coefficients(grad_slots_NK, grad_tail_N)
        grad_NW = logits_NW.clone()
        for block in _blocks(grad_NW):
            cut.gradient_(grad_NW[block], block, coefficients)
        return grad_NW, None, None


def _partition(inputs: LossInputs, ids_NS: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log q on the support's slots and of y [N, S + 1], and of the rest [N]."""
    target_N1 = inputs.target[:, None]
    mask_NS = inputs.teacher.support_mask
    if mask_NS is not None:
        # A padded slot repeats y, which is in the support: it then takes nothing out of the tail.
        ids_NS = torch.where(mask_NS, ids_NS, target_N1)
    ids_NK = torch.cat([ids_NS, target_N1], dim=1)
    if inputs.tape is not None:
        return inputs.tape.partition(ids_NK, temperature)
    return _Partition.apply(as_float(inputs.student_logits), ids_NK, temperature)  # type: ignore[no-any-return, no-untyped-call]


def _dense(inputs: LossInputs, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log q of the ids that the teacher scored [N, V], of the columns past them [N], and of y [N], detached. Through
    autograd: the objective holds several [N, V] tensors anyway, so chunked.py gives it few rows at a time."""
    scaled_NW, shared = as_float(inputs.student_logits), inputs.teacher.support_logprob.shape[1]
    width = scaled_NW.shape[1]
    if shared > width:
        raise ValueError(f"the student has {width} logits, but the teacher scored {shared} token ids")
    log_q_NW = torch.log_softmax(scaled_NW if temperature == 1.0 else scaled_NW / temperature, dim=1)
    token_N = log_q_NW.detach().gather(1, inputs.target[:, None]).squeeze(1)
    if shared == width:
        return log_q_NW, torch.full_like(token_N, LOGPROB_FLOOR), token_N
    return log_q_NW[:, :shared], log_q_NW[:, shared:].clamp(min=REMOVED).logsumexp(1), token_N


def _blocks(logits_NW: Tensor) -> Iterator[slice]:
    """Consecutive rows, as many as BLOCK_BYTES says; at least one."""
    size = BLOCK_BYTES.get(logits_NW.device.type, DEVICE_BLOCK_BYTES)
    step = max(1, size // max(1, logits_NW.shape[1] * logits_NW.element_size()))
    for start in range(0, len(logits_NW), step):
        yield slice(start, min(start + step, len(logits_NW)))
