"""Prompts that are trained on: the same sequence, cut elsewhere."""

from __future__ import annotations

import dataclasses

import numpy as np

from student_trainer.types import BoolArray, Rollout


def with_prompt(rollout: Rollout) -> Rollout:
    """The sequence cut after its first token: all later ones of the prompt are scored and trained on as well. They have
    no b and no q_old (NaN), since nobody sampled them, and no ids that the student found likely, which leaves the
    completion without them too."""
    ids = rollout.prompt.token_ids
    undefined = np.full(len(ids) - 1, np.nan, dtype=np.float32)
    return dataclasses.replace(
        rollout,
        prompt=dataclasses.replace(rollout.prompt, token_ids=ids[:1]),
        token_ids=np.concatenate([ids[1:], rollout.token_ids]),
        behaviour_logprob=np.concatenate([undefined, rollout.behaviour_logprob]),
        full_logprob=np.concatenate([undefined, rollout.full_logprob]),
        student_topk_ids=None if len(ids) > 1 else rollout.student_topk_ids,
        scored_prompt_tokens=len(ids) - 1,
        versions=None if rollout.versions is None else np.concatenate([np.full_like(ids[1:], -1), rollout.versions]),
        by_student=_extended(rollout.by_student, len(ids) - 1),
    )


def _extended(by_student: BoolArray | None, prompt_tokens: int) -> BoolArray | None:
    """Tokens of the prompt count as those that no environment wrote."""
    return None if by_student is None else np.concatenate([np.ones(prompt_tokens, dtype=np.bool_), by_student])
