"""Weights of positions whose samples come from another policy than the one trained: older weights (q_now/q_old), or
tempered sampling (q_old/b). They multiply a token's weight in the loss; no gradient flows through them.

A divergence at a position is a function of the tokens before it: its own token's ratio would only add variance, what is
off is how often the position is come to. So its ratios are products over the prefix. Objectives of the sampled token
depend on that one as well (`Objective.own_token`).

Shape legend: N scored positions of a micro-batch, whole samples one after the other; H hidden, W logit width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from student_trainer.losses import chunked
from student_trainer.losses.base import AnyObjective, LossRows, partly_defined
from student_trainer.losses.student_side import logprob_of
from student_trainer.types import MAXIMUM

MOMENTS = ("sum_of_", "squares_of_")
"""Prefixes of the sums that the effective sample size of a weight is made from."""


def backward(
    head: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    objective: AnyObjective,
    rows: LossRows,
    weights_N: Tensor,
    chunk_rows: int,
    **options: Any,
) -> tuple[float, dict[str, float]]:
    """`chunked.backward` with every token's weight multiplied by its importance, as `objective.config` says.

    q_now is read off the loss's own pass. Where weights depend on it, it takes a pass through the head of its own
    before, without gradient.

    Returns:
        As chunked.backward, with these sums besides: `trained_tokens`, of non-zero weight, and what metrics.means
        makes `staleness_ess`, `staleness_clipped`, `behaviour_ess`, `behaviour_clipped`, `ratio_masked`,
        `rollout_gap_max` and `rollout_kl` of.
    """
    config = objective.config
    counted_N = weights_N.cpu() != 0
    factor_N, sums = _behaviour(objective, rows, counted_N)
    reads_now = config.staleness == "prefix" or config.ratio_bounds is not None
    if reads_now:
        now_N = logprobs(head, hidden_NH, rows.target, chunk_rows).cpu()
        stale_N, more = _staleness(objective, rows, counted_N, now_N)
        factor_N, sums = factor_N * stale_N, {**sums, **more}
    weights_N = weights_N * factor_N.to(weights_N)
    if bool(counted_N.any()) and not bool(weights_N.any()) and hidden_NH.requires_grad:
        hidden_NH.backward(torch.zeros_like(hidden_NH))  # type: ignore[no-untyped-call]  # it may be a collective
    now_N = torch.full((rows.num_rows,), torch.nan)
    loss, learned = chunked.backward(
        head, hidden_NH, objective, rows, weights_N, chunk_rows, out_logprob_N=now_N, **options
    )
    if not reads_now:
        sums |= _staleness(objective, rows, counted_N, now_N)[1]
    return loss, {**learned, **sums, "trained_tokens": float((weights_N != 0).sum())}


@torch.no_grad()
def logprobs(head: Callable[[Tensor], Tensor], hidden_NH: Tensor, target_N: Tensor, chunk_rows: int) -> Tensor:
    """log q_now(y) [N], T = 1, a chunk of logits at a time."""
    chunks = zip(torch.split(hidden_NH.detach(), chunk_rows), torch.split(target_N, chunk_rows), strict=True)
    return torch.cat([logprob_of(head(hidden), target.to(hidden.device)) for hidden, target in chunks])


def prefix_sums(values_N: Tensor, lengths: tuple[int, ...], *, inclusive: bool) -> Tensor:
    """Σ_{j<t} v_j [N] within each sample; Σ_{j<=t} where `inclusive`."""
    sums = [v.cumsum(0) if inclusive else v.cumsum(0) - v for v in torch.split(values_N, list(lengths))]
    return torch.cat(sums) if sums else values_N


def _behaviour(objective: AnyObjective, rows: LossRows, counted_N: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Weights [N] by q_old/b (ones with `behaviour: none`), and what is logged of them either way."""
    config, sampled_N = objective.config, rows.sampled.cpu()
    log_N = torch.where(sampled_N, (rows.old_logprob - rows.behaviour_logprob).cpu().double(), 0.0)
    if objective.own_token == "none":
        log_N = prefix_sums(log_N, rows.lengths, inclusive=False)
    weight_N, sums = _truncated("behaviour", log_N, config.behaviour_cap, counted_N & sampled_N)
    return (weight_N if config.behaviour == "weight" else torch.ones_like(weight_N)), sums


def _staleness(
    objective: AnyObjective, rows: LossRows, counted_N: Tensor, now_N: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Weights [N] by q_now/q_old (ones with `staleness: none`), 0 where `ratio_bounds` masks a token, and what is
    logged of them. Where q_now isn't known (a token that doesn't count) the ratio is taken as 1."""
    config, sampled_N = objective.config, rows.sampled.cpu()
    log_N = torch.where(sampled_N & ~now_N.isnan(), now_N.double() - rows.old_logprob.cpu().double(), 0.0)
    over_N = prefix_sums(log_N, rows.lengths, inclusive=objective.own_token == "weight")
    weight_N, sums = _truncated("staleness", over_N, config.staleness_cap, counted_N & sampled_N)
    sums |= _gap(log_N, counted_N & sampled_N & ~now_N.isnan())
    if config.staleness == "none":
        weight_N = torch.ones_like(weight_N)
    if config.ratio_bounds is not None:
        low, high = config.ratio_bounds
        masked_N = (log_N.exp() < low) | (log_N.exp() > high)
        weight_N = weight_N.masked_fill(masked_N, 0.0)
        sums |= _summed(partly_defined("ratio_masked", masked_N.double(), counted_N & sampled_N))
    return weight_N, sums


def _gap(log_N: Tensor, logged_N: Tensor) -> dict[str, float]:
    """How far the policy that is trained is from the one that sampled, by log (q_now/q_old): its largest size, and the
    estimate r − 1 − log r of KL(q_old ‖ q_now), never negative. (`rollout_gap`, its mean size, is the objectives'.)"""
    if not bool(logged_N.any()):
        return {}
    sums = _summed(partly_defined("rollout_kl", log_N.expm1() - log_N, logged_N))
    return {**sums, f"{MAXIMUM}rollout_gap": float(log_N[logged_N].abs().max())}


def _truncated(name: str, log_N: Tensor, cap: float, logged_N: Tensor) -> tuple[Tensor, dict[str, float]]:
    """min(e^log, cap) [N], with its moments and the share that was cut, over the tokens of `logged_N`."""
    weight_N = log_N.clamp(max=math.log(cap)).exp()
    ess = {f"{MOMENTS[0]}{name}": weight_N, f"{MOMENTS[1]}{name}": weight_N.square()}
    sums = {key: float(value[logged_N].sum()) for key, value in ess.items()}
    return weight_N, {**sums, **_summed(partly_defined(f"{name}_clipped", (log_N > math.log(cap)).double(), logged_N))}


def _summed(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.sum()) for name, value in metrics.items()}
