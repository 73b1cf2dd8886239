"""Figures of a step: what the rollouts and scores say by themselves. The objective's own
metrics come from its chunks; here everything is put on one scale and reduced over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from student_trainer.console import SampleRow
from student_trainer.losses import importance
from student_trainer.losses.base import ROWS_OF
from student_trainer.types import MAXIMUM, Metrics, ScoredRollout

SHOWN_CHARACTERS = 600
"""Of a prompt or completion in the console's table."""


def of_rollouts(scored: Sequence[ScoredRollout], sum_metrics: Callable[[Metrics], Metrics]) -> Metrics:
    """Global means over samples: completion length, share that ended by themselves, tokens in all. Tokens that an
    environment wrote are counted apart; its figures are there where it took part in any sample.

    Args:
        sum_metrics: adds up a dict over ranks.
    """
    sums = sum_metrics(
        {
            "samples": float(len(scored)),
            "completion": float(
                sum(s.rollout.num_completion_tokens - s.rollout.num_environment_tokens for s in scored)
            ),
            "prompt": float(sum(len(s.rollout.prompt.token_ids) + s.rollout.scored_prompt_tokens for s in scored)),
            "finished": float(sum(s.rollout.finish == "eos" for s in scored)),
            "fixed": float(sum(s.rollout.source == "fixed" for s in scored)),
            "cached": float(sum(s.scores.cached_tokens for s in scored)),
            "environment": float(sum(s.rollout.num_environment_tokens for s in scored)),
            "conversations": float(sum(s.rollout.by_student is not None for s in scored)),
            "turns": float(sum(len(s.rollout.turns) for s in scored if s.rollout.by_student is not None)),
        }
    )
    samples = max(sums["samples"], 1.0)
    talks = sums["conversations"]
    found = {
        "completion_tokens": sums["completion"] / samples,
        "prompt_tokens": sums["prompt"] / samples,
        "finished": sums["finished"] / samples,
        "fixed_samples": sums["fixed"] / samples,
        "tokens": sums["completion"],
        "teacher_cached_tokens": sums["cached"],
    }
    return found | (
        {"turns": sums["turns"] / talks, "environment_tokens": sums["environment"] / talks} if talks else {}
    )


def of_staleness(
    scored: Sequence[ScoredRollout], step: int, dropped: int, sum_metrics: Callable[[Metrics], Metrics]
) -> Metrics:
    """Of the sampled tokens that `step` learns from: mean and largest number of optimizer steps between the weights
    that sampled a token and those that learn it, and each number's share (`staleness_0`, …); and samples made again
    for their age.

    Args:
        sum_metrics: adds up a dict over ranks.
    """
    counts: Metrics = {"dropped": float(dropped)}
    for s in scored:
        versions = s.rollout.versions
        ages = step - versions[versions >= 0] if versions is not None else np.zeros(0, dtype=np.int64)
        for age, num in zip(*np.unique(ages, return_counts=True), strict=True):
            add(counts, {f"{age:d}": float(num)})
    counts = sum_metrics(counts)
    found = {"dropped_samples": counts.pop("dropped")}
    total = sum(counts.values())
    if total:
        found["staleness_mean"] = sum(int(age) * num for age, num in counts.items()) / total
        found["staleness_max"] = float(max(int(age) for age in counts))
        found |= {f"staleness_{age}": num / total for age, num in counts.items()}
    return found


def means(sums: Metrics) -> Metrics:
    """Metrics of the objective from their sums over the global batch (importance.backward's, and `scored_tokens`).

    A mean is over all tokens that had a part in the loss, or over those that have the metric (`rows_of_NAME`), and left
    out where none has. Of weights w the effective sample size (Σw)² / Σw², as a share of their number. Of the tokens
    that were scored, how many had no part in the loss. `max_of_NAME` is NAME_max.
    """
    trained = sums.get("trained_tokens", 0.0)
    counts = {name.removeprefix(ROWS_OF): value for name, value in sums.items() if name.startswith(ROWS_OF)}
    found: Metrics = {"skipped_tokens": sums.get("scored_tokens", 0.0) - trained}
    first, second = importance.MOMENTS
    for name, value in sums.items():
        if name.startswith(first):
            weight = name.removeprefix(first)
            num, squares = counts[f"{weight}_clipped"], sums[second + weight]
            if num:
                found[f"{weight}_ess"] = value**2 / (num * squares) if squares else 0.0
        elif name.startswith(MAXIMUM):
            found[f"{name.removeprefix(MAXIMUM)}_max"] = value
        elif not name.startswith((ROWS_OF, second)) and name not in ("loss", "scored_tokens", "trained_tokens"):
            num = counts.get(name, trained)
            if num or name not in counts:
                found[name] = value / max(num, 1.0)
    return found


def of_teacher(name: str, sums: Metrics) -> Metrics:
    """What the objective's sums over the rows of one of several teachers say of it, under its name."""
    found: Metrics = {}
    for metric in ("delta", "teacher_mass", "student_mass"):
        if name and metric in sums:
            found[f"{name}/{metric}"] = sums[metric]
            found[f"{ROWS_OF}{name}/{metric}"] = sums.get(ROWS_OF + metric, sums["trained_tokens"])
    return found


def sample_rows(scored: Sequence[ScoredRollout], decode: Callable[[list[int]], str], most: int) -> list[SampleRow]:
    """Rows of the console's table. Its KL is the mean of log q(y) − log p(y): an estimate from the sampled tokens, not
    defined where nobody sampled."""
    return [
        SampleRow(
            prompt=(s.rollout.prompt.text or decode(s.rollout.prompt_ids.tolist()))[-SHOWN_CHARACTERS:],
            completion=decode(s.rollout.token_ids[s.rollout.scored_prompt_tokens :].tolist())[:SHOWN_CHARACTERS],
            tokens=s.rollout.num_completion_tokens - s.rollout.num_environment_tokens,
            finish=s.rollout.finish,
            divergence_nats=mean_delta(s),
        )
        for s in scored[:most]
    ]


def mean_delta(scored: ScoredRollout) -> float:
    """Mean of log q_old(y) − log p(y) over the tokens that the student sampled; NaN where it sampled none."""
    sampled = scored.rollout.sampled
    delta = (scored.rollout.full_logprob - scored.scores.token_logprob)[sampled]
    return float(delta.mean()) if len(delta) else math.nan


def add(sums: Metrics, more: Metrics) -> None:
    for name, value in more.items():
        sums[name] = max(sums.get(name, value), value) if name.startswith(MAXIMUM) else sums.get(name, 0.0) + value


def finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)
