"""The last hour, next to the same sums over a plain list of everything that happened."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_api.errors import KINDS
from teacher_server import history
from teacher_server.counts import OK, Counts
from teacher_server.history import LATENCY_POINTS, POINTS, History, Series

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["left", "right"]),
        st.integers(0, 1000),
        st.integers(0, 1000),
        st.lists(st.sampled_from([OK, *KINDS]), max_size=5),
    ),
    min_size=1,
    max_size=40,
)


@settings(deadline=None, max_examples=30)
@given(steps=STEPS)
def test_each_step_has_what_happened_in_it(steps: list[tuple[str, int, int, list[str]]]) -> None:
    counts, queued = Counts(), {"left": 0, "right": 0}
    kept = History(counts, lambda: sum(queued.values()), lambda: queued)
    expected: dict[str, list[tuple[int, int, int, dict[str, int]]]] = {"all": [], "left": [], "right": []}
    for who, computed, cached, outcomes in steps:
        for work in (counts.all, counts.of(who)):
            work.computed_tokens += computed
            work.cached_tokens += cached
        for outcome in outcomes:
            with counts.request("grpc", "score") as one:
                one.name, one.tenant = outcome, who
        with counts.request("grpc", "info") as other:  # not for scores: in no step
            other.tenant = who
        queued[who] = computed
        kept.sample()
        ended = {name: outcomes.count(name) for name in set(outcomes)}
        for name in expected:
            if name == "all":
                expected[name].append((computed, cached, sum(queued.values()), ended))
            elif name in counts.tenants:
                own = name == who
                row = (computed, cached, queued[name], ended) if own else (0, 0, queued[name], {})
                expected[name].append(row)
    got = {"all": kept.all, **kept.tenants}
    for name, rows in expected.items():
        points = got.get(name, Series()).points
        assert [(p.computed, p.cached, p.queued, p.outcomes) for p in points] == rows
        refused = [sum(row[3].values()) - row[3].get(OK, 0) for row in rows]
        assert [p.refused for p in points] == refused


def test_an_hour_and_no_more_is_kept() -> None:
    assert history.STEP_S * POINTS == 3600
    kept = History(Counts(), lambda: 0, dict)
    for _ in range(POINTS + 50):
        kept.sample()
    assert len(kept.all.points) == POINTS


def test_the_sums_of_the_hour_are_those_of_its_points() -> None:
    counts = Counts()
    kept = History(counts, lambda: 0, dict)
    random = np.random.default_rng(1)
    for n in range(2 * POINTS + 7):
        counts.all.computed_tokens += int(random.integers(9))
        counts.all.cached_tokens += int(random.integers(9))
        for name in random.choice([OK, "overloaded", "cancelled"], size=random.integers(3)):
            counts.all.requests.end(str(name))
        if n == POINTS // 2:
            counts.all.requests.end("internal")  # long over by the end
        kept.sample(missed=int(n % 50 == 0))
    points = kept.all.points
    ended: Counter[str] = Counter()
    for point in points:
        ended.update(point.outcomes)
    assert (kept.all.computed, kept.all.cached) == (sum(p.computed for p in points), sum(p.cached for p in points))
    assert kept.all.outcomes() == dict(ended)
    assert "internal" not in ended
    assert kept.all.last(7) == list(points)[-7:]
    assert kept.all.last(2 * POINTS) == list(points)


def test_durations_are_of_the_last_steps_only() -> None:
    counts = Counts()
    kept = History(counts, lambda: 0, dict)
    series, work = kept.all, counts.all
    assert series.latency_s(work, (0.5,)) == [None]
    for _ in range(100):
        work.took.add(400.0)  # long ago, and slow
    kept.sample()
    for _ in range(LATENCY_POINTS - 2):
        kept.sample()
    (slow,) = series.latency_s(work, (0.5,))
    assert slow is not None
    assert 300 <= slow <= 600
    kept.sample()
    for value in np.linspace(0.011, 0.024, 200):
        work.took.add(float(value))
    (median,) = series.latency_s(work, (0.5,))
    assert median is not None
    assert 0.01 <= median <= 0.025


def test_a_server_that_was_held_up_keeps_its_time_axis() -> None:
    counts = Counts()
    kept = History(counts, lambda: 7, dict)
    kept.sample()
    counts.all.computed_tokens = 50
    kept.sample(missed=3)
    assert [(point.computed, point.queued) for point in kept.all.points] == [(0, 7), (0, 7), (0, 7), (0, 7), (50, 7)]
    kept.sample(missed=10**9)
    assert len(kept.all.points) == POINTS


def test_steps_come_at_their_times_whatever_the_loop_does() -> None:
    async def held_up() -> int:
        kept = History(Counts(), lambda: 0, dict)
        kept.step_s = 0.05
        started = asyncio.get_running_loop().time()
        running = asyncio.create_task(kept.run())
        await asyncio.sleep(0.12)
        time.sleep(0.3)  # a loop that does nothing else meanwhile
        await asyncio.sleep(0.12)
        running.cancel()
        expected = (asyncio.get_running_loop().time() - started) / kept.step_s
        return round(expected) - len(kept.all.points)

    assert abs(asyncio.run(held_up())) <= 1
