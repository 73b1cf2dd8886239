"""Figures of a step: what the rollouts and scores say by themselves, and where the time went. The objective's own
metrics come from its chunks; here everything is put on one scale and reduced over ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from student_trainer.console import SampleRow
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
            "completion": float(sum(s.rollout.num_tokens for s in scored)),
            "prompt": float(sum(len(s.rollout.prompt.token_ids) for s in scored)),
            "finished": float(sum(s.rollout.finish == "eos" for s in scored)),
            "cached": float(sum(s.scores.cached_tokens for s in scored)),
        }
    )
    samples = max(sums["samples"], 1.0)
    return {
        "completion_tokens": sums["completion"] / samples,
        "prompt_tokens": sums["prompt"] / samples,
        "finished": sums["finished"] / samples,
        "tokens": sums["completion"],
        "teacher_cached_tokens": sums["cached"],
    }


def sample_rows(scored: Sequence[ScoredRollout], decode: Callable[[list[int]], str], most: int) -> list[SampleRow]:
    """Rows of the console's table. Its KL is the mean of log q(y) − log p(y): an estimate from the sampled tokens."""
    return [
        SampleRow(
            prompt=(s.rollout.prompt.text or decode(s.rollout.prompt.token_ids.tolist()))[-SHOWN_CHARACTERS:],
            completion=decode(s.rollout.token_ids.tolist())[:SHOWN_CHARACTERS],
            tokens=s.rollout.num_tokens,
            finish=s.rollout.finish,
            divergence_nats=float((s.rollout.full_logprob - s.scores.token_logprob).mean()),
        )
        for s in scored[:most]
    ]


def add(sums: Metrics, more: Metrics) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)
