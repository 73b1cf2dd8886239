"""The arithmetic of benchmarks/sharing.py, against numbers made by hand, and its real part once, for seconds."""

from __future__ import annotations

import pytest

from benchmarks import sharing_real
from benchmarks.sharing_figures import Call, jain, p95_ratio, percentile, share_error, tokens_within


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0, 5.0, 5.0], 1.0),
        ([1.0, 0.0, 0.0, 0.0], 0.25),  # one of four has everything: 1/n
        ([1.0, 2.0, 4.0], 49 / 63),
        ([3, 1], 16 / 20),
    ],
)
def test_jains_index(values, expected):
    assert jain(values) == pytest.approx(expected, rel=1e-12)


def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed():
    hundred = [float(n) for n in range(100, 0, -1)]
    assert percentile(hundred, 0.95) == 95.0
    assert percentile(hundred, 0.5) == 50.0
    assert percentile(hundred, 1.0) == 100.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.95) == 4.0
    assert percentile([7.0], 0.95) == 7.0


def test_the_ratio_of_latencies_is_that_of_their_95th_percentiles():
    alone = [Call(10.0 * n, 10.0 * n + n / 100, 1) for n in range(1, 21)]  # 0.01 to 0.20 s
    beside = [Call(10.0 * n, 10.0 * n + n / 20, 1) for n in range(1, 21)]  # five times as long
    beside[-1] = Call(200.0, 999.0, 1)  # beyond the 95th
    assert p95_ratio(beside, alone) == pytest.approx(5.0, rel=1e-9)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ({"a": 100.0, "b": 200.0, "c": 400.0}, 0.0),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 4 / 3),  # a third where a seventh was due: 7/3 of it
        ({"a": 110.0, "b": 190.0, "c": 400.0}, 0.1),
        ({"a": 100.0, "b": 100.0, "c": 500.0}, 0.5),  # b got half of its own
    ],
)
def test_the_error_of_a_share_is_relative_to_the_share_that_was_due(got, expected):
    assert share_error(got, {"a": 1.0, "b": 2.0, "c": 4.0}) == pytest.approx(expected, abs=1e-12)


def test_tokens_count_where_the_answer_came_in_time():
    calls = [Call(0.0, 1.0, 1), Call(1.0, 2.0, 10), Call(2.0, 3.5, 100), Call(3.5, 4.1, 1000)]
    assert tokens_within(calls, 1.0, 4.0) == 110


@pytest.mark.slow
def test_the_real_part_measures_a_running_server(tmp_path):
    figures = sharing_real.requests(tmp_path, sharing_real.QUICK)
    assert figures["requests_per_minute"] > 100
