"""The compiled scan of wide rows against float64 by the definition: whole groups, the columns behind them, and those
that no tokenizer has an id for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from teacher_server.backends import row_scan
from teacher_server.backends.row_scan_compiled import GROUP, exponential

KINDS = (
    *("flat", "peaked", "far above 0", "far below 0", "ties", "masked", "all equal"),
    *("wide", "one above all others", "few finite", "huge"),
)


def logits_of(kind: str, rows: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(KINDS.index(kind))
    z = rng.standard_normal((rows, width))
    if kind == "peaked":
        z[:, rng.permutation(width)[:12]] += 18
    elif kind.startswith("far"):
        z += 300 if kind.endswith("above 0") else -200
    elif kind == "ties":
        z = np.round(z)
    elif kind == "masked":
        z[rng.random((rows, width)) < 0.7] = -np.inf
    elif kind == "all equal":
        z[:] = 1.25
    elif kind == "wide":
        z *= 40
    elif kind == "one above all others":
        z[:, rng.integers(width)] += 90
    elif kind == "few finite":
        z[rng.random((rows, width)) < 0.999] = -np.inf
        z[:, 5] = 0.5
    elif kind == "huge":
        z *= 1e30
    return z.astype(np.float32)


def expected(z: np.ndarray, known: int, k: int, target: int, ids: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Ids of the top-k, and the sums over all columns and over those not named, from the largest."""
    order = np.lexsort((np.arange(known), -z[:known]))[:k]
    exp = np.exp(z.astype(np.float64) - z.max())
    total = exp.sum()
    exp[[target, *order, *ids]] = 0.0
    return order, total, exp.sum()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("width", "known", "k"),
    [
        (3 * GROUP, 3 * GROUP, 16),
        (20 * GROUP, 20 * GROUP, 128),
        (2 * GROUP + 77, 2 * GROUP + 77, 64),  # columns behind the groups, the last block not full
        (2 * GROUP + 900, GROUP + 500, 5),  # more columns than ids
        (GROUP + 1, GROUP, 0),
        (GROUP + 40, GROUP + 40, 300),  # more entries than blocks
        (33, 33, 33),
    ],
)
def test_what_is_found_follows_its_definition(width: int, known: int, k: int, kind: str, threads: int) -> None:
    rows, rng = 5, np.random.default_rng(7)
    z = logits_of(kind, rows, width)
    targets = rng.integers(0, known, rows)
    counts = [0, 3, 70, 1, 0]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ids = rng.integers(0, known, offsets[-1])
    ids[1] = ids[0]  # named twice
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = row_scan.scan(*map(torch.from_numpy, (z,)), known, k, *map(torch.from_numpy, (targets, ids)), offsets)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(got.top.numpy(), z.max(1))
    assert np.array_equal(got.token.numpy(), z[np.arange(rows), targets])
    assert np.array_equal(got.asked.numpy(), z[np.repeat(np.arange(rows), counts), ids])
    for row in range(rows):
        mine = ids[offsets[row] : offsets[row + 1]]
        order, total, rest = expected(z[row], known, k, targets[row], mine)
        assert np.array_equal(got.topk_ids[row].numpy(), order)
        assert np.array_equal(got.topk[row].numpy(), z[row, order])
        shift = np.exp(float(got.base[row]) - float(got.top[row]))
        assert float(got.sum[row]) * shift == pytest.approx(total, rel=2e-6)
        # What is next to nothing beside the largest is left to the caller, who takes it from its own maximum.
        assert float(got.rest[row]) * shift == pytest.approx(rest, rel=3e-6, abs=1e-28)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("column", [3, GROUP + 2, 2 * GROUP + 10])
def test_a_row_without_a_distribution_has_no_finite_sum_and_ids_that_exist(bad: float, column: int) -> None:
    width = 2 * GROUP + 50
    z = logits_of("flat", 3, width)
    z[1, column] = bad
    nothing: Any = torch.empty(0, dtype=torch.int64)
    got = row_scan.scan(torch.from_numpy(z), width, 8, torch.tensor([1, 2, 3]), nothing, np.zeros(4, np.int64))
    assert np.array_equal(np.isfinite(got.sum.numpy()), [True, False, True])
    assert ((got.topk_ids >= 0) & (got.topk_ids < width)).all()


def test_the_exponential_is_good_to_float32() -> None:
    x = np.concatenate([np.linspace(-86.9, 60.0, 20_001), [0.0, -0.0, 1e-30]]).astype(np.float32)
    got = np.array([exponential(value) for value in x], dtype=np.float64)
    assert np.max(np.abs(got / np.exp(x.astype(np.float64)) - 1.0)) < 3e-7
    assert np.isnan(exponential(np.float32(np.nan)))
    assert exponential(np.float32(-np.inf)) < 2e-38
