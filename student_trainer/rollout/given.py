"""Prompts that are trained on: the same sequence, cut elsewhere."""

from __future__ import annotations

import dataclasses

import numpy as np

from student_trainer.types import Rollout


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
    )
