"""Base of the objectives that compare two distributions: it makes the outcomes they compare, and the metrics; a
subclass gives the divergence alone.

Shape legend: N positions, S support slots, O outcomes (the S slots; then, with `tail: bucket`, one for all the rest).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from student_trainer.losses.base import LossInputs, Needs, Objective, PerToken, TeacherRows, rollout_gap
from student_trainer.losses.config import DivergenceConfig
from student_trainer.losses.student_side import REMOVED, StudentRows, student_rows
from teacher_api.types import LOGPROB_FLOOR

ConfigT = TypeVar("ConfigT", bound=DivergenceConfig)
DENSE_OVERLAP_K = 16  # how many of each model's likeliest ids `topk_overlap` compares where no top-k was asked for


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Two distributions over the same outcomes. Absent outcomes (padding) have both logs at LOGPROB_FLOOR: mass exactly
    0 on both sides, equal logs, so that they add exactly 0 to any divergence and its gradient."""

    log_p: Tensor  # float32 [N, O], the teacher's, no gradient
    log_q: Tensor  # float32 [N, O], the student's, with gradient


class Divergence(Objective[ConfigT]):
    """D(p, q) over the outcomes of `outcomes`."""

    @abstractmethod
    def divergence(self, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        """D [N] from two log distributions; entries at LOGPROB_FLOOR have mass 0. `tail: bucket` puts the tail last."""

    def needs(self, teacher_top_k: int | Literal["all"]) -> Needs:
        return needs_of_support(self.config, teacher_top_k)

    def per_token(self, inputs: LossInputs) -> PerToken:
        student = student_rows(inputs, self.config.student_temperature)
        compared = outcomes(inputs.teacher, student, self.config.tail)
        with torch.no_grad():
            metrics = comparison_metrics(inputs, student)
        return PerToken(self.divergence(compared.log_p, compared.log_q), metrics, student.full_logprob)


def forward_kl(log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
    """KL(p‖q) [N] = Σ_o p_o (log p_o − log q_o), in nats."""
    return (log_p_NO.exp() * (log_p_NO - log_q_NO)).sum(1)


def reverse_kl(log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
    """KL(q‖p) [N] = Σ_o q_o (log q_o − log p_o), in nats."""
    return (log_q_NO.exp() * (log_q_NO - log_p_NO)).sum(1)


def needs_of_support(config: DivergenceConfig, teacher_top_k: int | Literal["all"]) -> Needs:
    """Ids from both sides as `config.support` says; the student keeps as many as the teacher gives.

    Raises:
        ValueError: `teacher.top_k` is 0, and without the bucket there is then nothing to compare.
    """
    if teacher_top_k == "all":
        return Needs(top_k="all", student_top_k=0)
    if teacher_top_k < 1 and config.tail != "bucket":
        raise ValueError(
            f"loss.tail: {config.tail!r} compares distributions on the support only, and teacher.top_k is "
            f"{teacher_top_k}; set teacher.top_k to at least 1, or loss.tail to 'bucket'"
        )
    return Needs(
        top_k=0 if config.support == "student" else teacher_top_k,
        student_top_k=0 if config.support == "teacher" else teacher_top_k,
    )


def outcomes(teacher: TeacherRows, student: StudentRows, tail: Literal["bucket", "renormalise", "none"]) -> Outcomes:
    """What is compared at each position.

    bucket:       p and q on S, then (1 - p(S)), (1 - q(S)) as one more outcome, from the tails' own logs
    renormalise:  p / p(S) and q / q(S) on S
    none:         p and q on S: two measures of mass below 1
    """
    mask = teacher.support_mask
    log_p, log_q = teacher.support_logprob, student.support_logprob
    if tail == "renormalise":
        log_p, log_q = (log_p - _log_total(log_p, mask), log_q - _log_total(log_q, mask))
    log_p, log_q = (log_p.clamp(min=LOGPROB_FLOOR), log_q.clamp(min=LOGPROB_FLOOR))
    if mask is not None:
        log_p, log_q = (log_p.masked_fill(~mask, LOGPROB_FLOOR), log_q.masked_fill(~mask, LOGPROB_FLOOR))
    if tail == "bucket":
        log_p = torch.cat([log_p, teacher.log_tail.clamp(min=LOGPROB_FLOOR)[:, None]], dim=1)
        log_q = torch.cat([log_q, student.log_tail[:, None]], dim=1)
    return Outcomes(log_p, log_q)


def comparison_metrics(inputs: LossInputs, student: StudentRows) -> dict[str, Tensor]:
    """Metrics [N] of two distributions on a support (docs/losses.md lists them)."""
    teacher = inputs.teacher
    whole = outcomes(teacher, student, "bucket")
    metrics = {
        "delta": student.token_logprob - teacher.token_logprob,
        "teacher_mass": -torch.expm1(whole.log_p[:, -1]),
        "student_mass": -torch.expm1(whole.log_q.detach()[:, -1]),
        "teacher_entropy": _entropy(whole.log_p),
        "student_entropy": _entropy(whole.log_q.detach()),
        **rollout_gap(inputs, student.full_logprob),
    }
    if teacher.topk_overlap is not None:
        metrics["topk_overlap"] = teacher.topk_overlap
    elif teacher.support_ids is None:
        metrics["topk_overlap"] = _dense_overlap(teacher.support_logprob, student.support_logprob.detach())
    return metrics


def _log_total(logprob_NS: Tensor, mask_NS: Tensor | None) -> Tensor:
    """log of the mass on the support, [N, 1]."""
    if mask_NS is not None:
        logprob_NS = logprob_NS.masked_fill(~mask_NS, REMOVED)
    return logprob_NS.logsumexp(1, keepdim=True)


def _entropy(log_p_NO: Tensor) -> Tensor:
    return -(log_p_NO.exp() * log_p_NO).sum(1)


def _dense_overlap(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    k = min(DENSE_OVERLAP_K, log_p_NV.shape[1])
    p_ids, q_ids = log_p_NV.topk(k, dim=1).indices, log_q_NV.topk(k, dim=1).indices
    return (p_ids[:, :, None] == q_ids[:, None, :]).any(2).float().mean(1)
