"""Made-up teacher answers for the tests of the losses, computed in float64 numpy from whole distributions.

Shape legend: N positions, W logit columns, V tokenizer size, K ids of a top-k.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from student_trainer.losses.base import LossInputs, TeacherRows
from student_trainer.types import Prompt, Rollout, ScoredRollout
from teacher_api.types import LOGPROB_FLOOR, Scores


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    z = np.asarray(logits, np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def log_mass(log_p: np.ndarray) -> float:
    """log Σ exp, LOGPROB_FLOOR for an empty set."""
    if log_p.size == 0 or not np.exp(log_p - log_p.max()).sum() > 0:
        return LOGPROB_FLOOR
    return max(float(log_p.max() + np.log(np.exp(log_p - log_p.max()).sum())), LOGPROB_FLOOR)


def likeliest(log_p: np.ndarray, k: int, vocabulary: int) -> np.ndarray:
    """[N, k] ids below `vocabulary`, most likely first."""
    return np.argsort(-log_p[:, :vocabulary], axis=1, kind="stable")[:, :k].astype(np.int32)


def scored_rollout(
    teacher_log_p: np.ndarray,  # float64 [N, W]
    token_ids: Sequence[int],
    *,
    vocabulary: int,
    top_k: int | str = 0,
    student_ids: np.ndarray | None = None,
    full_logprob: np.ndarray | None = None,
    value_type: type = np.float32,
    uid: int = 0,
    prompt_index: int = 0,
) -> ScoredRollout:
    """What a perfect teacher answers for these tokens after a prompt of three."""
    tokens = np.asarray(token_ids, np.int32)
    rows = np.arange(len(tokens))
    topk_ids = topk_logprob = None
    outside = np.ones(teacher_log_p.shape, bool)
    outside[rows, tokens] = False
    if top_k == "all":
        topk_logprob = teacher_log_p[:, :vocabulary]
        outside[:, :vocabulary] = False
    elif top_k:
        topk_ids = likeliest(teacher_log_p, int(top_k), vocabulary)
        topk_logprob = np.take_along_axis(teacher_log_p, topk_ids, 1)
        np.put_along_axis(outside, topk_ids, False, 1)
    candidate = None
    if student_ids is not None:
        candidate = np.take_along_axis(teacher_log_p, student_ids, 1).reshape(-1).astype(np.float32)
        np.put_along_axis(outside, student_ids, False, 1)
    old = np.full(len(tokens), -1.0) if full_logprob is None else full_logprob
    return ScoredRollout(
        Rollout(
            uid=uid,
            prompt=Prompt(index=prompt_index, token_ids=np.array([2, 3, 4], np.int32)),
            token_ids=tokens,
            finish="eos",
            behaviour_logprob=np.asarray(old, np.float32),
            full_logprob=np.asarray(old, np.float32),
            student_topk_ids=student_ids,
        ),
        Scores(
            id=str(uid),
            positions=np.arange(3, 3 + len(tokens), dtype=np.int32),
            token_logprob=np.maximum(teacher_log_p[rows, tokens], LOGPROB_FLOOR).astype(np.float32),
            log_tail=np.array([log_mass(p[o]) for p, o in zip(teacher_log_p, outside, strict=True)], dtype=np.float32),
            topk_ids=topk_ids,
            topk_logprob=None if topk_logprob is None else np.maximum(topk_logprob, LOGPROB_FLOOR).astype(value_type),
            candidate_logprob=candidate,
        ),
    )


def exact_rows(log_p: np.ndarray, supports: Sequence[Sequence[int]] | None, targets: Sequence[int]) -> TeacherRows:
    """float64 TeacherRows from log p [N, W]; `supports` names each row's ids (None: dense over all W)."""
    rows = np.arange(len(targets))
    token = torch.tensor(log_p[rows, np.asarray(targets)])
    if supports is None:
        return TeacherRows(None, torch.tensor(log_p), None, torch.full((len(rows),), LOGPROB_FLOOR).double(), token)
    width = max(len(s) for s in supports)
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), bool)
    values, tail = np.zeros((len(rows), width)), np.zeros(len(rows))
    for n, support in enumerate(supports):
        ids[n, : len(support)], mask[n, : len(support)] = support, True
        values[n, : len(support)] = log_p[n, list(support)]
        tail[n] = log_mass(np.delete(log_p[n], list(support)))
    return TeacherRows(
        torch.tensor(ids), torch.tensor(values), torch.tensor(mask), torch.tensor(tail), token_logprob=token
    )


def loss_inputs(
    student_logits: torch.Tensor,
    teacher: TeacherRows,
    targets: Sequence[int],
    old_logprob: torch.Tensor | None = None,
    advantage: torch.Tensor | None = None,
) -> LossInputs:
    target = torch.as_tensor(np.asarray(targets), dtype=torch.int64)
    if old_logprob is None:
        z = student_logits.detach()
        z = z if z.dtype == torch.float64 else z.float()
        old_logprob = torch.log_softmax(z, -1).gather(1, target[:, None]).squeeze(1)
    yes = torch.ones(len(target), dtype=torch.bool)
    return LossInputs(student_logits, target, teacher, old_logprob, old_logprob, yes, ~yes, advantage)
