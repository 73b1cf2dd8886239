"""Candidates for text that nobody sampled: what the student finds likely at each position of fixed data, by one forward
pass of the weights that a step begins with.

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
    """`rollouts` with the student's `keep_top_k` most likely ids at each position (T = 1, best first), as sampling
    keeps them; as they are where none are asked for.

    Args:
        micro_batch_tokens: most tokens of one forward pass.
    """
    if not keep_top_k:
        return list(rollouts)
    kept = list(rollouts)
    with evaluating(student.model):
        for batch in divide(rollouts, micro_batch_tokens, 0, student.packing):
            members = [rollouts[i] for i in batch]
            ids_NK = torch.cat(
                [
                    most_likely(student.head(rows_NH), keep_top_k, vocabulary_size=student.vocabulary_size)
                    for rows_NH in torch.split(student.hidden_rows(members), ROWS)
                ]
            ).cpu()
            pieces = torch.split(ids_NK, [r.num_tokens for r in members])
            for i, ids in zip(batch, pieces, strict=True):
                kept[i] = dataclasses.replace(rollouts[i], student_topk_ids=ids.numpy())
    return kept
