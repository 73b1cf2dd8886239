"""Candidates for text that nobody sampled: what the student finds likely at each position of fixed data and of prompts
that are trained on, by one forward pass of the weights that a step begins with.

Shape legend: N rows of one micro-batch, H hidden size, K ids kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from student_trainer.microbatch import divide
from student_trainer.rollout.sampling import most_likely
from student_trainer.rollout.torch_sampler import evaluating
from student_trainer.student import Student
from student_trainer.types import Rollout

ROWS = 1024
"""Positions whose logits exist at a time."""


def with_likely_ids(
    student: Student, rollouts: Sequence[Rollout], keep_top_k: int, micro_batch_tokens: int
) -> list[Rollout]:
    """`rollouts` with the student's `keep_top_k` most likely ids at each position (T = 1, best first): as they are
    where sampling kept them or none are asked for.

    Args:
        student: a plain one (strategy.plain), since ranks differ in what they have to do.
        micro_batch_tokens: most tokens of one forward pass.
    """
    lacking = [i for i, r in enumerate(rollouts) if keep_top_k and r.student_topk_ids is None]
    if not lacking:
        return list(rollouts)
    kept = list(rollouts)
    with evaluating(student.model):
        for batch in divide([rollouts[i] for i in lacking], micro_batch_tokens, 0, student.packing):
            members = [lacking[b] for b in batch]
            hidden_NH = student.hidden_rows([rollouts[i] for i in members])
            ids_NK = torch.cat(
                [
                    most_likely(student.head(rows_NH), keep_top_k, vocabulary_size=student.vocabulary_size)
                    for rows_NH in torch.split(hidden_NH, ROWS)
                ]
            ).cpu()
            pieces = torch.split(ids_NK, [rollouts[i].num_tokens for i in members])
            for i, ids in zip(members, pieces, strict=True):
                kept[i] = dataclasses.replace(rollouts[i], student_topk_ids=ids.numpy())
    return kept
