"""A distribution in plain numbers: how many values fell between fixed bounds. Knows no Prometheus (metrics.py)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bounds of times: from a small request on an idle server to the default deadline."""
SEQUENCES = tuple(float(1 << power) for power in range(11))
"""Bounds of the number of sequences in a batch."""


class Histogram:
    """`counts[i]` values v with bounds[i-1] < v <= bounds[i]; the last: those above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Pairs of bound and number of values up to it, as Prometheus has them."""
        found, upto = [], 0
        for bound, number in zip((*map(_text, self.bounds), "+Inf"), self.counts, strict=True):
            upto += number
            found.append((bound, float(upto)))
        return found


def _text(bound: float) -> str:
    return repr(bound)


def quantile(q: float, bounds: Sequence[float], counts: Sequence[int]) -> float | None:
    """The value below which the share `q` lies, linear within its interval (from 0 in the first), as Prometheus'
    histogram_quantile: of values above all bounds the highest bound. None without values."""
    rank, upto = q * sum(counts), 0
    if not sum(counts):
        return None
    low = 0.0
    for bound, number in zip(bounds, counts[:-1], strict=True):
        if number and upto + number >= rank:
            return low + (bound - low) * (rank - upto) / number
        upto, low = upto + number, bound
    return bounds[-1]
