"""Policy gradient on the sampled token: its reward is how much likelier the teacher finds it than the student did.
Needs one logprob a position. In expectation over the student's own samples its gradient is reverse KL's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from student_trainer.losses.base import AllReduceSum, LossInputs, Needs, Objective, PerToken, log_softmax_f32
from student_trainer.losses.config import SampledTokenConfig
from student_trainer.losses.mask import loss_mask
from student_trainer.losses.registry import register
from student_trainer.types import BoolArray, ScoredRollout
from teacher_api.types import FloatArray

Float64Array = npt.NDArray[np.float64]


class PolicyGradientConfig(SampledTokenConfig):
    objective: Literal["policy_gradient"] = "policy_gradient"

    kl_coef: float = Field(1.0, gt=0.0, le=1e3)
    """Scale of the advantages."""

    kl_discount: float = Field(0.0, ge=0.0, le=1.0)
    """γ: a token is also credited with γ^j of the advantage j tokens later in its completion. 0: with its own only."""

    center: Literal["none", "batch", "group"] = "none"
    """Subtract from the advantages their mean over the counted tokens of the whole batch, or of the same prompt's
    samples."""

    clip: float | None = Field(None, gt=0.0, lt=1.0)
    """ε of PPO's clipped ratio [1 − ε, 1 + ε]; unset: not clipped."""


@register(PolicyGradientConfig)
class PolicyGradient(Objective[PolicyGradientConfig]):
    """With Δ = log q_old(y) − log p(y), no gradient:

    A_t = −kl_coef·Δ_t, then Σ_{j≥0} γ^j A_{t+j}, then centred; D_t = −r_t A_t with r_t = (q_now/q_old)(y_t), or with
    `clip` −min(r_t A_t, clip(r_t, 1 − ε, 1 + ε) A_t) (arXiv 1707.06347). All at T = 1.

    Back-propagating Δ itself would be another thing: its gradient doesn't contain the teacher.
    """

    def needs(self, teacher_top_k: int | Literal["all"]) -> Needs:
        return Needs(top_k=0, student_top_k=0)

    def prepare(self, scored: Sequence[ScoredRollout], all_reduce_sum: AllReduceSum) -> list[FloatArray]:
        """A_t of every token. Masked tokens earn nothing, neither for themselves nor for the tokens before them.

        `center: group` takes the mean over the samples given: all samples of a prompt must be on one rank.
        """
        masks = [loss_mask(s.rollout, self.config) for s in scored]
        advantages = [
            discounted(-self.config.kl_coef * delta(s) * mask, self.config.kl_discount)
            for s, mask in zip(scored, masks, strict=True)
        ]
        pairs = list(zip(advantages, masks, strict=True))
        if self.config.center == "batch":
            mean = _mean(all_reduce_sum(_totals(pairs)))
            advantages = [a - mean for a in advantages]
        elif self.config.center == "group":
            groups: dict[int, list[tuple[Float64Array, BoolArray]]] = defaultdict(list)
            for s, pair in zip(scored, pairs, strict=True):
                groups[s.rollout.prompt.index].append(pair)
            means = {index: _mean(_totals(group)) for index, group in groups.items()}
            advantages = [a - means[s.rollout.prompt.index] for s, a in zip(scored, advantages, strict=True)]
        return [a.astype(np.float32) for a in advantages]

    def per_token(self, inputs: LossInputs) -> PerToken:
        if inputs.advantage is None:
            raise ValueError("policy_gradient: no advantages; call prepare() on the whole step's samples first")
        log_q_NW = log_softmax_f32(inputs.student_logits)
        log_q_N = log_q_NW.gather(1, inputs.target[:, None]).squeeze(1)
        ratio = (log_q_N - inputs.old_logprob).exp()
        gain = ratio * inputs.advantage
        clipped = torch.zeros_like(ratio, dtype=torch.bool)
        if self.config.clip is not None:
            bounded = ratio.clamp(1.0 - self.config.clip, 1.0 + self.config.clip) * inputs.advantage
            clipped = (bounded < gain).detach()
            gain = torch.minimum(gain, bounded)
        with torch.no_grad():
            metrics = {
                "delta": inputs.old_logprob - inputs.teacher.token_logprob,
                "advantage": inputs.advantage,
                "ratio": ratio.detach(),
                "clipped": clipped.float(),
                "student_entropy": torch.special.entr(log_q_NW.exp()).sum(1),
                "rollout_gap": (inputs.old_logprob - log_q_N).abs(),
            }
        return PerToken(-gain, metrics)


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


def _totals(pairs: Iterable[tuple[Float64Array, BoolArray]]) -> Float64Array:
    """[2]: sum of the counted tokens' advantages, and how many they are."""
    totals = np.zeros(2)
    for advantage, mask in pairs:
        totals += advantage[mask].sum(), mask.sum()
    return totals


def _mean(totals: Float64Array) -> float:
    return float(totals[0] / totals[1]) if totals[1] else 0.0
