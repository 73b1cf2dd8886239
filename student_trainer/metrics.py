"""Figures of a step: what the rollouts and scores say by themselves, and where the time went. The objective's own
metrics come from its chunks; here everything is put on one scale and reduced over ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from student_trainer.console import SampleRow
from student_trainer.losses.base import ROWS_OF
from student_trainer.types import Metrics, ScoredRollout

SHOWN_CHARACTERS = 600
"""Of a prompt or completion in the console's table."""


class Clock:
    """Wall-clock seconds of a step's parts."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.seconds: Metrics = {}

    def lap(self, name: str) -> None:
        """The time since the last lap was spent on `name`."""
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"] = now - self._last
        self._last = now

    def read(self) -> Metrics:
        return {**self.seconds, "seconds": time.perf_counter() - self._started}


def of_rollouts(scored: Sequence[ScoredRollout], sum_metrics: Callable[[Metrics], Metrics]) -> Metrics:
    """Global means over samples: completion length, share that ended by themselves, tokens in all.

    Args:
        sum_metrics: adds up a dict over ranks.
    """
    sums = sum_metrics(
        {
            "samples": float(len(scored)),
            "completion": float(sum(s.rollout.num_completion_tokens for s in scored)),
            "prompt": float(sum(len(s.rollout.prompt.token_ids) + s.rollout.scored_prompt_tokens for s in scored)),
            "finished": float(sum(s.rollout.finish == "eos" for s in scored)),
            "fixed": float(sum(s.rollout.source == "fixed" for s in scored)),
            "cached": float(sum(s.scores.cached_tokens for s in scored)),
        }
    )
    samples = max(sums["samples"], 1.0)
    return {
        "completion_tokens": sums["completion"] / samples,
        "prompt_tokens": sums["prompt"] / samples,
        "finished": sums["finished"] / samples,
        "fixed_samples": sums["fixed"] / samples,
        "tokens": sums["completion"],
        "teacher_cached_tokens": sums["cached"],
    }


def means(sums: Metrics, counted_tokens: float) -> Metrics:
    """Metrics of the objective from their global sums: over all counted tokens, or over those that have the metric
    (`rows_of_NAME`), left out where none has."""
    counts = {name.removeprefix(ROWS_OF): value for name, value in sums.items() if name.startswith(ROWS_OF)}
    return {
        name: value / max(counts.get(name, counted_tokens), 1.0)
        for name, value in sums.items()
        if not name.startswith(ROWS_OF) and counts.get(name, 1.0)
    }


def sample_rows(scored: Sequence[ScoredRollout], decode: Callable[[list[int]], str], most: int) -> list[SampleRow]:
    """Rows of the console's table. Its KL is the mean of log q(y) − log p(y): an estimate from the sampled tokens, not
    defined where nobody sampled."""
    return [
        SampleRow(
            prompt=(s.rollout.prompt.text or decode(s.rollout.prompt_ids.tolist()))[-SHOWN_CHARACTERS:],
            completion=decode(s.rollout.token_ids[s.rollout.scored_prompt_tokens :].tolist())[:SHOWN_CHARACTERS],
            tokens=s.rollout.num_completion_tokens,
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
        sums[name] = sums.get(name, 0.0) + value


def finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)
