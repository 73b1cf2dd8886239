"""What every objective gets and gives. Pure functions of tensors: no config globals, no collectives, no reductions over
tokens (normalise.py owns those).

Shape legend: N scored positions of one chunk, S support slots, V vocabulary shared by both models (ids below the
tokenizer's size), W the student's logit width (W >= V).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """The teacher's distribution at N positions on a per-row support. Padded slots have mask False, id 0 and
    logprob 0; the actual token is always in the support and no id is there twice."""

    support_ids: Tensor | None  # int64 [N, S]; None: dense, slot s is id s and S = V
    support_logprob: Tensor  # float32 [N, S]: log p at the teacher's temperature
    support_mask: Tensor | None  # bool [N, S]; None: all valid
    log_tail: Tensor  # float32 [N]: log mass of everything outside the support; <= -1e4 if nothing is
    token_logprob: Tensor  # float32 [N]: log p(y)


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One chunk of scored positions."""

    student_logits: Tensor  # float32 [N, W], with gradient
    target: Tensor  # int64 [N]: y, the actual next token
    teacher: TeacherRows
    old_logprob: Tensor  # float32 [N]: log q_old(y), T = 1, untruncated
    behaviour_logprob: Tensor  # float32 [N]: log b(y)
    advantage: Tensor | None = None  # float32 [N]: policy_gradient's A_t, computed over whole completions


@dataclass(frozen=True, slots=True)
class PerToken:
    """An objective's value at each position, with gradient, and detached per-token metrics (each [N])."""

    value: Tensor  # float32 [N]
    metrics: dict[str, Tensor] = field(default_factory=dict)


def log_softmax_f32(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(z / T) over the last axis, in float32 (float64 stays float64)."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(z if temperature == 1.0 else z / temperature, dim=-1)
