"""Policy gradient on the sampled token: its reward is how much likelier the teacher finds it than the student did.
Needs one logprob a position. In expectation over the student's own samples its gradient is reverse KL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from student_trainer.losses.base import AllReduceSum, LossInputs, partly_defined
from student_trainer.losses.config import SampledTokenConfig
from student_trainer.losses.mask import loss_mask
from student_trainer.losses.registry import register
from student_trainer.losses.sampled_token import SampledToken
from student_trainer.types import BoolArray, ScoredRollout
from teacher_api.types import FloatArray

Float64Array = npt.NDArray[np.float64]


class PolicyGradientConfig(SampledTokenConfig):
    objective: Literal["policy_gradient"] = "policy_gradient"

    kl_coef: float = Field(1.0, gt=0.0, le=1e3)
    """Scale of the advantages."""

    kl_discount: float = Field(0.0, ge=0.0, le=1.0)
    """γ: a token is also credited with γ^j of the advantage of the j-th token that the student wrote after it in its
    completion. 0: with its own only."""

    center: Literal["none", "batch", "group"] = "none"
    """Subtract from the advantages their mean over the counted tokens of the whole batch, or of the same prompt's
    samples."""

    clip: float | None = Field(None, gt=0.0, lt=1.0)
    """ε of PPO's clipped ratio [1 − ε, 1 + ε]; unset: not clipped."""


@register(PolicyGradientConfig)
class PolicyGradient(SampledToken[PolicyGradientConfig]):
    """With Δ = log q_old(y) − log p(y), no gradient:

    A_t = −kl_coef·Δ_t, then Σ_{j≥0} γ^j A_{t+j}, then centred; D_t = −r_t A_t with r_t = (q_now/q_old)(y_t), or with
    `clip` −min(r_t A_t, clip(r_t, 1 − ε, 1 + ε) A_t) (arXiv 1707.06347). All at T = 1.

    Back-propagating Δ itself would be another thing: its gradient doesn't contain the teacher.
    """

    own_token = "ratio"

    def prepare(self, scored: Sequence[ScoredRollout], all_reduce_sum: AllReduceSum) -> list[FloatArray]:
        """A_t of every token. Masked tokens earn nothing, neither for themselves nor for the tokens before them. Tokens
        that nobody sampled have no q_old: their A is 0, and the sum over what comes later passes over them, so that a
        turn is credited for the next one whatever an environment wrote in between."""
        masks = [loss_mask(s.rollout, self.config) & s.rollout.sampled for s in scored]
        advantages = []
        for s, mask in zip(scored, masks, strict=True):
            own = -self.config.kl_coef * np.where(mask, delta(s), 0.0)
            own[s.rollout.sampled] = discounted(own[s.rollout.sampled], self.config.kl_discount)
            advantages.append(own)
        if self.config.center == "batch":
            advantages = center(advantages, masks, [0] * len(scored), all_reduce_sum)
        elif self.config.center == "group":
            advantages = center(advantages, masks, [s.rollout.prompt.index for s in scored], all_reduce_sum)
        return [np.where(s.rollout.sampled, a, 0.0).astype(np.float32) for s, a in zip(scored, advantages, strict=True)]

    @property
    def looks_at_whole_steps(self) -> bool:
        return self.config.center != "none"

    def of_token(self, inputs: LossInputs, log_q_N: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if inputs.advantage is None:
            raise ValueError("policy_gradient: no advantages; call prepare() on the whole step's samples first")
        log_ratio_N = torch.where(inputs.sampled, log_q_N - inputs.old_logprob, 0.0)
        ratio_N = log_ratio_N.exp()
        gain_N = ratio_N * inputs.advantage
        clipped_N = torch.zeros_like(inputs.sampled)
        if self.config.clip is not None:
            bounded_N = ratio_N.clamp(1.0 - self.config.clip, 1.0 + self.config.clip) * inputs.advantage
            clipped_N = (bounded_N < gain_N).detach()
            gain_N = torch.minimum(gain_N, bounded_N)
        own = {
            "delta": inputs.old_logprob - inputs.teacher.token_logprob,
            "advantage": inputs.advantage,
            "ratio": ratio_N.detach(),
            "clipped": clipped_N.to(ratio_N.dtype),
        }
        metrics: dict[str, Tensor] = {}
        for name, value_N in own.items():
            metrics |= partly_defined(name, value_N, inputs.sampled)
        return -gain_N, metrics


def delta(scored: ScoredRollout) -> Float64Array:
    """Δ_t = log q_old(y_t) − log p(y_t), float64 [N]."""
    return scored.rollout.full_logprob.astype(np.float64) - scored.scores.token_logprob.astype(np.float64)


def discounted(values: Float64Array, gamma: float) -> Float64Array:
    """Σ_{j≥0} γ^j v_{t+j} for each t of one completion, float64 [N]."""
    if gamma == 0.0:
        return values
    sums = values.copy()
    for t in range(len(sums) - 2, -1, -1):
        sums[t] += gamma * sums[t + 1]
    return sums


def center(
    advantages: Sequence[Float64Array], masks: Sequence[BoolArray], groups: Sequence[int], all_reduce_sum: AllReduceSum
) -> list[Float64Array]:
    """Each sample's advantages minus the mean over the counted tokens of its group, wherever their ranks are."""
    keys = union_over_ranks(groups, all_reduce_sum)
    slots = np.searchsorted(keys, np.asarray(groups, dtype=np.int64))
    totals = np.zeros((len(keys), 2))  # sum of the counted tokens' advantages, and how many they are
    for slot, advantage, mask in zip(slots, advantages, masks, strict=True):
        totals[slot] += advantage[mask].sum(), mask.sum()
    totals = all_reduce_sum(totals)
    means = totals[:, 0] / np.maximum(totals[:, 1], 1.0)
    return [advantage - means[slot] for slot, advantage in zip(slots, advantages, strict=True)]


def union_over_ranks(numbers: Sequence[int], all_reduce_sum: AllReduceSum) -> npt.NDArray[np.int64]:
    """All ranks' numbers (each in [0, 2^32)), ascending and without repeats, by sums alone: digit after digit, each
    rank marks which continuations of the prefixes known so far it holds."""
    own = np.asarray(numbers, dtype=np.int64)
    prefixes = np.zeros(1, dtype=np.int64)
    for shift in (24, 16, 8, 0):
        marks = np.zeros((len(prefixes), 256))
        slots = np.searchsorted(prefixes, own >> (shift + 8))
        marks[slots, (own >> shift) & 255] = 1.0
        rows, digits = np.nonzero(all_reduce_sum(marks))
        prefixes = (prefixes[rows] << 8) | digits
    return prefixes
