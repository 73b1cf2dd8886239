"""From the teacher's scores to the tensors of a micro-batch: the support of each row, without duplicates, and the exact
tail of what is left out of it.

Shape legend: N rows (completion tokens of all samples, concatenated), K ids of a top-k, L ids known of a row (the
actual token, the student's, the teacher's; some repeated), S support slots, V the tokenizer's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from student_trainer.losses.base import LossRows, TeacherRows
from student_trainer.losses.config import DivergenceConfig, LossConfig
from student_trainer.types import ScoredRollout
from teacher_api.types import LOGPROB_FLOOR, FloatArray


def loss_rows(
    scored: Sequence[ScoredRollout],
    config: LossConfig,
    device: torch.device | str = "cpu",
    advantages: Sequence[FloatArray] | None = None,
) -> LossRows:
    """All rows of these samples, one after the other in their order.

    Args:
        advantages: of the same samples, from `Objective.prepare`.

    Raises:
        ValueError: as `teacher_rows`; or an advantage's length isn't its completion's.
    """
    rollouts = [s.rollout for s in scored]
    for rollout, advantage in zip(rollouts, advantages or [r.full_logprob for r in rollouts], strict=True):
        if not rollout.num_tokens == len(rollout.full_logprob) == len(rollout.behaviour_logprob) == len(advantage):
            raise ValueError(f"sample {rollout.uid}: arrays of different lengths; expected {rollout.num_tokens} tokens")
    return LossRows(
        target=_tensor(_cat([r.token_ids for r in rollouts], np.int64), device),
        teacher=teacher_rows(scored, config, device),
        old_logprob=_tensor(_cat([r.full_logprob for r in rollouts], np.float32), device),
        behaviour_logprob=_tensor(_cat([r.behaviour_logprob for r in rollouts], np.float32), device),
        sampled=_tensor(_cat([r.sampled for r in rollouts], np.bool_), device),
        fixed=_tensor(_cat([np.full(r.num_tokens, r.source == "fixed") for r in rollouts], np.bool_), device),
        lengths=tuple(r.num_tokens for r in rollouts),
        advantage=None if advantages is None else _tensor(_cat(advantages, np.float32), device),
    )


def teacher_rows(
    scored: Sequence[ScoredRollout], config: LossConfig, device: torch.device | str = "cpu"
) -> TeacherRows:
    """The teacher's distribution on the support that `config` asks for; {y} alone for objectives of the sampled token.

    Ids that the teacher answered for but the support leaves out go into the tail: log_tail' = log(e^log_tail + Σ e^lp).
    Whole-vocabulary scores stay where they are, in host memory; LossRows.inputs moves a chunk of them at a time.

    Raises:
        ValueError: a value is missing, not finite, or doesn't fit its tokens; names sample and position.
    """
    if not scored:
        raise ValueError("teacher_rows: no samples")
    for sample in scored:
        _check(sample)
    support = config.support if isinstance(config, DivergenceConfig) else "token"
    if support != "token" and _all_or_none(scored, _is_dense, "whole-vocabulary scores"):
        return TeacherRows(
            support_ids=None,
            support_logprob=_tensor(_cat([s.scores.topk_logprob for s in scored], np.float32), "cpu"),
            support_mask=None,
            log_tail=_tensor(_cat([s.scores.log_tail for s in scored], np.float32), "cpu"),
            token_logprob=_tensor(_cat([s.scores.token_logprob for s in scored], np.float32), "cpu"),
        )
    return _sparse_rows(scored, support, device)


def _sparse_rows(
    scored: Sequence[ScoredRollout], support: Literal["token", "teacher", "student", "union"], device: Any
) -> TeacherRows:
    token_ids = _tensor(_cat([s.rollout.token_ids for s in scored], np.int64)[:, None], device)
    token_logprob = _tensor(_cat([s.scores.token_logprob for s in scored], np.float32), device)
    log_tail = _tensor(_cat([s.scores.log_tail for s in scored], np.float32), device)
    student = _student_ids(scored, device, required=support in ("student", "union"))
    teacher = _teacher_ids(scored, device, required=support in ("teacher", "union"))

    # First come, first kept: values that are float32 by contract before those that may have come as float16.
    sources = [(token_ids, token_logprob[:, None], True)]
    sources += [(*student, support in ("student", "union"))] if student else []
    sources += [(*teacher, support in ("teacher", "union"))] if teacher else []
    sources.sort(key=lambda source: not source[2])  # stable: what is in the support is kept rather than what isn't
    ids_NL = torch.cat([ids for ids, _, _ in sources], dim=1)
    logprob_NL = torch.cat([logprob for _, logprob, _ in sources], dim=1)
    inside_L = torch.cat([torch.full((ids.shape[1],), inside, device=ids.device) for ids, _, inside in sources])

    first_NL = first_occurrences(ids_NL)
    keep_NL = first_NL & inside_L
    outside = logprob_NL.masked_fill(~(first_NL & ~inside_L), -torch.inf).logsumexp(1)
    width = int(keep_NL.sum(1).max())
    order = torch.argsort((~keep_NL).to(torch.uint8), dim=1, stable=True)[:, :width]
    mask = keep_NL.gather(1, order)
    return TeacherRows(
        support_ids=ids_NL.gather(1, order).masked_fill(~mask, 0),
        support_logprob=logprob_NL.gather(1, order).masked_fill(~mask, 0.0),
        support_mask=mask,
        log_tail=torch.logaddexp(log_tail, outside).clamp(min=LOGPROB_FLOOR),
        token_logprob=token_logprob,
        topk_overlap=_overlap(teacher[0], student[0]) if teacher and student else None,
    )


def _student_ids(scored: Sequence[ScoredRollout], device: Any, *, required: bool) -> tuple[Tensor, Tensor] | None:
    """The student's ids [N, K], sent as candidates, and the teacher's logprobs of them."""
    if not _all_or_none(scored, lambda s: s.scores.candidate_logprob is not None, "candidate scores"):
        if required:
            raise ValueError(
                f"sample {scored[0].rollout.uid}: the support needs the student's ids scored; they are not"
            )
        return None
    ids, logprob = [], []
    for s in scored:
        kept, values = s.rollout.student_topk_ids, np.asarray(s.scores.candidate_logprob)
        if kept is None or len(kept) != s.rollout.num_tokens or kept.size != values.size:
            shape = None if kept is None else kept.shape
            raise ValueError(f"sample {s.rollout.uid}: {values.size} candidate scores for student ids of shape {shape}")
        ids.append(kept)
        logprob.append(values.reshape(kept.shape))
    return _tensor(_cat(ids, np.int64), device), _tensor(_cat(logprob, np.float32), device)


def _teacher_ids(scored: Sequence[ScoredRollout], device: Any, *, required: bool) -> tuple[Tensor, Tensor] | None:
    """The ids the teacher chose [N, K] and their logprobs."""
    if _all_or_none(scored, _is_dense, "whole-vocabulary scores"):
        values = _cat([s.scores.topk_logprob for s in scored], np.float32)
        ids = np.broadcast_to(np.arange(values.shape[1]), values.shape).copy()
        return _tensor(ids, device), _tensor(values, device)
    if not _all_or_none(scored, lambda s: s.scores.topk_ids is not None, "top-k scores"):
        if required:
            raise ValueError(f"sample {scored[0].rollout.uid}: the support needs the teacher's top-k; it is not there")
        return None
    ids = _cat([s.scores.topk_ids for s in scored], np.int64)
    return _tensor(ids, device), _tensor(_cat([s.scores.topk_logprob for s in scored], np.float32), device)


def first_occurrences(ids_NL: Tensor) -> Tensor:
    """bool [N, L]: True where a row's id is there for the first time."""
    in_order, order = torch.sort(ids_NL, dim=1, stable=True)
    first = torch.ones_like(in_order, dtype=torch.bool)
    first[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    return torch.empty_like(first).scatter(1, order, first)


def _overlap(teacher_ids_NK: Tensor, student_ids_NK: Tensor) -> Tensor:
    """|T ∩ S| / |T| per row, float32 [N]; a mixture's T holds some ids several times."""
    both = torch.cat([teacher_ids_NK, student_ids_NK], dim=1)
    teacher, student, union = (first_occurrences(ids).sum(1) for ids in (teacher_ids_NK, student_ids_NK, both))
    return (teacher + student - union).float() / teacher


def _check(sample: ScoredRollout) -> None:
    """A missing or non-finite score is an error, never a training token."""
    scores, num_tokens = sample.scores, sample.rollout.num_tokens
    for name in ("token_logprob", "log_tail", "topk_logprob", "candidate_logprob"):
        values = getattr(scores, name)
        if values is None:
            if name in ("token_logprob", "log_tail"):
                raise ValueError(f"sample {sample.rollout.uid}: the teacher's {name} is missing")
            continue
        if name != "candidate_logprob" and len(values) != num_tokens:
            raise ValueError(f"sample {sample.rollout.uid}: {name} has {len(values)} rows; expected {num_tokens}")
        finite = np.isfinite(values)
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            if name == "candidate_logprob":
                row //= max(len(values) // max(num_tokens, 1), 1)
            position = int(scores.positions[row])
            raise ValueError(f"sample {sample.rollout.uid}: the teacher's {name} at position {position} is not finite")
    if scores.topk_ids is not None and (
        scores.topk_logprob is None or scores.topk_ids.shape != scores.topk_logprob.shape
    ):
        raise ValueError(f"sample {sample.rollout.uid}: top-k ids and logprobs differ in shape")


def _is_dense(sample: ScoredRollout) -> bool:
    return sample.scores.topk_ids is None and sample.scores.topk_logprob is not None


def _all_or_none(scored: Sequence[ScoredRollout], has: Callable[[ScoredRollout], bool], what: str) -> bool:
    answers = [has(s) for s in scored]
    if any(answers) and not all(answers):
        raise ValueError(f"sample {scored[answers.index(False)].rollout.uid} has no {what}; others of its batch have")
    return all(answers)


def _cat(arrays: Sequence[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.concatenate(arrays).astype(dtype)
    return array


def _tensor(array: npt.NDArray[Any], device: torch.device | str) -> Tensor:
    return torch.from_numpy(array).to(device)
