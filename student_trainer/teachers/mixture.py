"""The target of several teachers at once: p = Σ_m w_m p_m, the weighted mean of their distributions (not of their
logits), each at its own temperature. Pure numpy; what is asked of whom is panel.py's.

Shape legend: M teachers, N rows of one sample, K ids that a teacher found likely, C the student's, U ids of the union.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from student_trainer.types import ScoredRollout
from teacher_api.types import LOGPROB_FLOOR, Candidates, FloatArray, IntArray, Scores

F64 = npt.NDArray[np.float64]


def log_weights(weights: Sequence[float]) -> F64:
    """log of the weights [M], rescaled to sum to 1."""
    array = np.asarray(weights, dtype=np.float64)
    found: F64 = np.log(array / array.sum())
    return found


def log_mean(logprobs: Sequence[npt.NDArray[Any]], log_w_M: F64) -> FloatArray:
    """log Σ_m w_m e^{x_m} elementwise, in float64 before it becomes float32; LOGPROB_FLOOR at least."""
    weighted = np.stack([x.astype(np.float64) + w for x, w in zip(logprobs, log_w_M, strict=True)])
    total: F64 = np.logaddexp.reduce(weighted, axis=0)
    floored: FloatArray = np.maximum(total, LOGPROB_FLOOR).astype(np.float32)
    return floored


def union(views: Sequence[ScoredRollout]) -> Candidates:
    """Every id that one of the teachers [M] or the student found likely, row by row, ascending and once."""
    ids = _all_ids(views)
    ids.sort(axis=1)
    first = np.ones_like(ids, dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    offsets = np.concatenate([[0], np.cumsum(first.sum(axis=1))]).astype(np.int32)
    return Candidates(np.ascontiguousarray(ids[first]), offsets)


def mix(views: Sequence[ScoredRollout], log_w_M: F64) -> Scores:
    """The mixture's scores from those of teachers that all answered for the same ids: the whole vocabulary, or the
    student's candidates, or the actual token alone."""
    scores = [view.scores for view in views]
    return replace(
        _common(scores, log_w_M),
        topk_logprob=_mean_of([s.topk_logprob for s in scores], log_w_M),
        candidate_logprob=_mean_of([s.candidate_logprob for s in scores], log_w_M),
    )


def _mean_of(logprobs: Sequence[npt.NDArray[Any] | None], log_w_M: F64) -> FloatArray | None:
    if all(x is None for x in logprobs):
        return None
    return log_mean([_required(x) for x in logprobs], log_w_M)


def mix_on_union(
    views: Sequence[ScoredRollout], asked: Candidates, answers: Sequence[ScoredRollout], log_w_M: F64
) -> Scores:
    """The mixture's scores on the union of the supports.

    Args:
        views: of each teacher, with its own top-k [N, K] and the student's candidates.
        asked: `union(views)`.
        answers: of each teacher, for the candidates `asked`; their tails are of what lies outside it.

    Returns:
        Scores whose top-k are all teachers' ids side by side [N, M·K], some of them repeated, and whose candidates are
        the student's.
    """
    found = log_mean([_required(a.scores.candidate_logprob) for a in answers], log_w_M)
    topk_ids = _teachers_ids(views)
    student_ids = views[0].rollout.student_topk_ids
    sent = views[0].scores.candidate_logprob is not None and student_ids is not None
    return replace(
        _common([a.scores for a in answers], log_w_M),
        topk_ids=topk_ids,
        topk_logprob=_look_up(topk_ids, asked, found),
        candidate_logprob=_look_up(np.asarray(student_ids), asked, found).reshape(-1) if sent else None,
    )


def _common(scores: Sequence[Scores], log_w_M: F64) -> Scores:
    return Scores(
        id=scores[0].id,
        positions=scores[0].positions,
        token_logprob=log_mean([s.token_logprob for s in scores], log_w_M),
        log_tail=log_mean([s.log_tail for s in scores], log_w_M),
        computed_tokens=sum(s.computed_tokens for s in scores),
        cached_tokens=sum(s.cached_tokens for s in scores),
        fingerprint="+".join(s.fingerprint for s in scores),
    )


def _look_up(ids_NX: npt.NDArray[Any], asked: Candidates, values_U: FloatArray) -> FloatArray:
    """The value of each id in its row of `asked`; all of them are there."""
    rows = np.repeat(np.arange(len(ids_NX)), np.diff(asked.row_offsets))
    width = int(max(asked.ids.max(initial=0), ids_NX.max(initial=0))) + 1
    keys = rows.astype(np.int64) * width + asked.ids  # ascending: ids ascend within a row
    wanted = np.arange(len(ids_NX), dtype=np.int64)[:, None] * width + ids_NX
    places = np.searchsorted(keys, wanted)
    if not np.array_equal(keys[np.minimum(places, len(keys) - 1)], wanted):
        raise ValueError("an id of the mixture's support was not asked of its teachers")
    found: FloatArray = values_U[places]
    return found


def _teachers_ids(views: Sequence[ScoredRollout]) -> IntArray:
    ids: IntArray = np.concatenate([_required(view.scores.topk_ids) for view in views], axis=1).astype(np.int32)
    return ids


def _all_ids(views: Sequence[ScoredRollout]) -> IntArray:
    ids = [_teachers_ids(views)]
    student_ids = views[0].rollout.student_topk_ids
    if views[0].scores.candidate_logprob is not None and student_ids is not None:
        ids.append(student_ids.astype(np.int32))
    together: IntArray = np.concatenate(ids, axis=1)
    return together


def _required(array: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    if array is None:
        raise ValueError("a teacher of the mixture left out the values that the others gave")
    return array
