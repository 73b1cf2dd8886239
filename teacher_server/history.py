"""The last hour in steps of ten seconds, of the whole server and of each tenant: what was scored, how requests ended,
how full the queue was. Reads counts.py; the page for people is made of it (status.py).

Memory is bounded: POINTS steps of each series, a series for each tenant that has called, and tenants are configured.
Sampled and read on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from teacher_server.counts import OK, Counts, Work
from teacher_server.histogram import quantile

STEP_S = 10.0
POINTS = 360
LATENCY_POINTS = 30
"""Of the requests whose durations are shown: five minutes."""


@dataclass(frozen=True, slots=True)
class Point:
    """Of one step: differences, but for `queued`, which is what was in the queue at its end."""

    computed: int
    cached: int
    queued: int
    outcomes: dict[str, int]  # of the requests for scores that ended in it; none that is 0

    @property
    def answered(self) -> int:
        return self.outcomes.get(OK, 0)

    @property
    def refused(self) -> int:
        return sum(self.outcomes.values()) - self.answered


@dataclass(slots=True)
class Series:
    """Of one Work, newest last. `computed`, `cached` and `ended` are the sums over `points`, so that reading them costs
    the same whatever has happened."""

    points: deque[Point] = field(default_factory=lambda: deque(maxlen=POINTS))
    computed: int = 0
    cached: int = 0
    ended: Counter[str] = field(default_factory=Counter)  # requests by outcome
    _took: deque[list[int]] = field(default_factory=lambda: deque(maxlen=LATENCY_POINTS))  # at the begin of each step
    _computed: int = 0
    _cached: int = 0
    _outcomes: dict[str, int] = field(default_factory=dict)

    def sample(self, work: Work, queued: int, missed: int = 0) -> None:
        """The step that ends now; before it `missed` steps, of which nobody knows what was in which."""
        for _ in range(min(missed, POINTS)):
            self._add(Point(0, 0, queued, {}))
            self._took.append(list(work.took.counts))
        now = dict(work.requests.by_outcome)
        ended = {name: number - self._outcomes.get(name, 0) for name, number in now.items()}
        self._add(
            Point(
                work.computed_tokens - self._computed,
                work.cached_tokens - self._cached,
                queued,
                {name: number for name, number in ended.items() if number},
            )
        )
        self._computed, self._cached, self._outcomes = work.computed_tokens, work.cached_tokens, now
        self._took.append(list(work.took.counts))

    def _add(self, point: Point) -> None:
        if len(self.points) == POINTS:
            gone = self.points[0]
            self.computed -= gone.computed
            self.cached -= gone.cached
            self.ended.subtract(gone.outcomes)
        self.points.append(point)
        self.computed += point.computed
        self.cached += point.cached
        self.ended.update(point.outcomes)

    def last(self, number: int) -> list[Point]:
        """In time that does not grow with the number of points."""
        return list(islice(reversed(self.points), number))[::-1]

    def outcomes(self) -> dict[str, int]:
        """Within all points; none that is 0."""
        return {name: number for name, number in self.ended.items() if number}

    def latency_s(self, work: Work, shares: tuple[float, ...]) -> list[float | None]:
        """Durations below which each of `shares` of the requests lies that were answered within LATENCY_POINTS steps;
        None where there was none."""
        before = self._took[0] if len(self._took) == LATENCY_POINTS else [0] * len(work.took.counts)
        recent = [now - then for now, then in zip(work.took.counts, before, strict=True)]
        return [quantile(share, work.took.bounds, recent) for share in shares]


class History:
    """
    Args:
        queued: tokens accepted and not yet answered, of all.
        queued_by_tenant: the same of each tenant that has some.
    """

    def __init__(
        self, counts: Counts, queued: Callable[[], int], queued_by_tenant: Callable[[], Mapping[str, int]]
    ) -> None:
        self._counts = counts
        self._queued = queued
        self._queued_by_tenant = queued_by_tenant
        self.step_s = STEP_S
        self.all = Series()
        self.tenants: dict[str, Series] = {}

    async def run(self) -> None:
        """Samples until cancelled."""
        clock = asyncio.get_running_loop().time
        due = clock() + self.step_s
        while True:
            await asyncio.sleep(max(due - clock(), 0))
            missed = int((clock() - due) / self.step_s)  # by a process that was held up
            self.sample(missed)
            due += (1 + missed) * self.step_s

    def sample(self, missed: int = 0) -> None:
        self.all.sample(self._counts.all, self._queued(), missed)
        queued = self._queued_by_tenant()
        for name, work in self._counts.tenants.items():
            self.tenants.setdefault(name, Series()).sample(work, queued.get(name, 0), missed)
