"""The student's log q on the teacher's support, and its own log tail, differentiable and from the same logits.

The tail is a logsumexp over the columns outside the support, in float32; never 1 minus the sum of what is inside, which
is off by 10 % at a tail of 4e-4 and negative a third of the time at 7e-6 (from float16 values).

Shape legend: N positions, S support slots, W the student's logit width. Columns that only the student has (ids past the
tokenizer's size) are in its softmax and, being in no support, in its tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_trainer.losses.base import LossInputs, TeacherRows, as_float, log_softmax_f32
from teacher_api.types import LOGPROB_FLOOR

REMOVED = -1e30
"""Stands for log 0 inside a logsumexp. Finite, because the gradient through a row of nothing but -inf is NaN; so far
below LOGPROB_FLOOR that the floor's clamp ends its gradient."""


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
    scaled_NW = as_float(inputs.student_logits)
    if temperature != 1.0:
        scaled_NW = scaled_NW / temperature
    if inputs.teacher.support_ids is None:
        support_NS, log_tail_N, token_N = _dense(scaled_NW, inputs.teacher.support_logprob.shape[1], inputs.target)
    else:
        support_NS, log_tail_N, token_N = _sparse(scaled_NW, inputs.teacher, inputs.teacher.support_ids, inputs.target)
    full_N = token_N if temperature == 1.0 else token_logprob(inputs.student_logits.detach(), inputs.target)
    return StudentRows(
        support_logprob=support_NS.clamp(min=LOGPROB_FLOOR),
        log_tail=log_tail_N.clamp(min=LOGPROB_FLOOR),
        token_logprob=token_N,
        full_logprob=full_N,
    )


def token_logprob(logits_NW: Tensor, target_N: Tensor) -> Tensor:
    """log q(y) [N] at T = 1, with gradient."""
    return log_softmax_f32(logits_NW).gather(1, target_N[:, None]).squeeze(1)


def _dense(scaled_NW: Tensor, shared: int, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log q of the first `shared` ids [N, V], of the columns past them [N], and of y [N], detached."""
    width = scaled_NW.shape[1]
    if shared > width:
        raise ValueError(f"the student has {width} logits, but the teacher scored {shared} token ids")
    log_q_NW = torch.log_softmax(scaled_NW, dim=1)
    token_N = log_q_NW.detach().gather(1, target_N[:, None]).squeeze(1)
    if shared == width:
        return log_q_NW, torch.full_like(token_N, LOGPROB_FLOOR), token_N
    return log_q_NW[:, :shared], log_q_NW[:, shared:].clamp(min=REMOVED).logsumexp(1), token_N


def _sparse(scaled_NW: Tensor, teacher: TeacherRows, ids_NS: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log q on the support [N, S], of the rest [N], and of y [N], detached."""
    target_N1 = target_N[:, None]
    if teacher.support_mask is not None:
        # A padded slot repeats y, which is in the support: it then takes nothing out of the tail.
        ids_NS = torch.where(teacher.support_mask, ids_NS, target_N1)
    slots, log_tail_N = _Partition.apply(scaled_NW, torch.cat([ids_NS, target_N1], dim=1))  # type: ignore[no-untyped-call]
    return slots[:, :-1], log_tail_N, slots[:, -1].detach()


class _Partition(torch.autograd.Function):
    """log softmax(z) at some ids of each row, and the logsumexp of log softmax(z) over the other columns.

    With G the sum of a row's incoming gradients and s the softmax over the other columns alone:

        dL/dz_v = g_v − G q_v  at the ids,   g_tail s_v − G q_v = (g_tail − G e^tail) s_v  elsewhere.

    By hand because one [N, W] tensor then serves forward and backward; autograd of the parts keeps three, and it is
    these passes over the whole vocabulary that cost, not the ids. Ids may repeat within a row.
    """

    @staticmethod
    def forward(ctx: Any, logits_NW: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
        rest_NW = torch.log_softmax(logits_NW, dim=1)
        slots_NK = rest_NW.gather(1, ids_NK)
        rest_NW.scatter_(1, ids_NK, REMOVED)
        log_tail_N = rest_NW.logsumexp(1)
        ctx.save_for_backward(rest_NW, ids_NK, slots_NK, log_tail_N)
        return slots_NK, log_tail_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_slots_NK: Tensor, grad_tail_N: Tensor) -> tuple[Tensor, None]:
        rest_NW, ids_NK, slots_NK, log_tail_N = ctx.saved_tensors
        total_N = grad_slots_NK.sum(1) + grad_tail_N
        grad_NW = (rest_NW - log_tail_N[:, None]).exp_()
        grad_NW.mul_((grad_tail_N - total_N * log_tail_N.exp())[:, None])
        grad_NW.scatter_(1, ids_NK, -total_N[:, None] * slots_NK.exp())
        return grad_NW.scatter_add_(1, ids_NK, grad_slots_NK), None
