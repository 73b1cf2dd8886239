"""Held to numpy's counting, and to the rank's definition on values that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_server.histogram import SECONDS, Histogram, quantile

VALUES = st.lists(st.floats(0.0, 2000.0), max_size=60)


@settings(deadline=None, max_examples=60)
@given(values=VALUES)
def test_counts_are_numpys(values: list[float]) -> None:
    held = Histogram()
    for value in values:
        held.add(value)
    expected = [int(np.sum(np.asarray(values) <= bound)) for bound in SECONDS]
    got = held.cumulative()
    assert [count for _, count in got] == [*expected, len(values)]
    assert [float(bound) for bound, _ in got] == [*SECONDS, np.inf]
    assert held.total == pytest.approx(sum(values))


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.floats(0.0, 599.0), min_size=1, max_size=60), q=st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_interval_of_the_value_of_its_rank(values: list[float], q: float) -> None:
    held = Histogram()
    for value in values:
        held.add(value)
    ranked = sorted(values)[max(int(np.ceil(q * len(values))) - 1, 0)]
    above = int(np.searchsorted(SECONDS, ranked))
    low = 0.0 if above == 0 else SECONDS[above - 1]
    found = quantile(q, held.bounds, held.counts)
    assert found is not None
    assert low <= found <= SECONDS[above] * (1 + 1e-12)


def test_quantiles_by_hand() -> None:
    assert quantile(0.5, (1.0, 2.0), (0, 0, 0)) is None
    assert quantile(0.5, (1.0, 2.0), (4, 0, 0)) == 0.5
    assert quantile(0.75, (1.0, 2.0), (2, 2, 0)) == 1.5
    assert quantile(0.99, (1.0, 2.0), (0, 0, 3)) == 2.0  # above all bounds: the highest of them
