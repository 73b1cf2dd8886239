"""The student's log q on the teacher's support, and its own log tail, differentiable and from the same logits.

The tail is a logsumexp over the columns outside the support, in float32; never 1 minus the sum of what is inside, which
is off by 10 % at a tail of 4e-4 and negative a third of the time at 7e-6 (from float16 values).

Shape legend: N positions, S support slots, W the student's logit width. Columns that only the student has (ids past the
tokenizer's size) are in its softmax and, being in no support, in its tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from student_trainer.losses.base import LossInputs, TeacherRows, log_softmax_f32
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
    log_q_NW = log_softmax_f32(inputs.student_logits, temperature)
    target_N1 = inputs.target[:, None]
    support_NS, log_tail_N = _split(log_q_NW, inputs.teacher, target_N1)
    token_N = log_q_NW.detach().gather(1, target_N1).squeeze(1)
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


def _split(log_q_NW: Tensor, teacher: TeacherRows, target_N1: Tensor) -> tuple[Tensor, Tensor]:
    """log q on the support [N, S], and the logsumexp over the rest [N]."""
    if teacher.support_ids is not None:
        ids_NS = teacher.support_ids
        if teacher.support_mask is not None:
            # A padded slot repeats y, which is in the support: it then takes nothing out of the tail.
            ids_NS = torch.where(teacher.support_mask, ids_NS, target_N1)
        rest_NW = log_q_NW.scatter(1, ids_NS, REMOVED)
        return log_q_NW.gather(1, ids_NS), rest_NW.logsumexp(1)
    shared, width = teacher.support_logprob.shape[1], log_q_NW.shape[1]
    if shared > width:
        raise ValueError(f"the student has {width} logits, but the teacher scored {shared} token ids")
    if shared == width:
        return log_q_NW, torch.full_like(log_q_NW[:, 0], LOGPROB_FLOOR)
    return log_q_NW[:, :shared], log_q_NW[:, shared:].clamp(min=REMOVED).logsumexp(1)
