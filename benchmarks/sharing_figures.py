"""The arithmetic of shared teachers: what is made of tokens got, and of seconds taken. Knows no servers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Call:
    """One that was answered: when it was sent and when its answer was there, by one clock, and the tokens in it."""

    began: float
    ended: float
    tokens: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def jain(values: Sequence[float]) -> float:
    """(Σx)² / (n Σx²), 1 where all are equal (R. Jain, D. Chiu, W. Hawe, DEC-TR-301, 1984)."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def percentile(values: Sequence[float], share: float) -> float:
    """The least of `values` that `share` (0 to 1) of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


def share_error(got: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """max over callers of |share / due share − 1|, the share of what all of them got, the due one by weight."""
    total, whole = sum(got[name] for name in weights), sum(weights.values())
    return max(abs(got[name] / total * whole / weight - 1) for name, weight in weights.items())


def tokens_within(calls: Iterable[Call], start: float, end: float) -> int:
    """Of the calls whose answers came between `start` and `end`."""
    return sum(call.tokens for call in calls if start < call.ended <= end)


def p95_ratio(beside: Sequence[Call], alone: Sequence[Call]) -> float:
    """95th percentile of the seconds of `beside` over that of `alone`."""
    return percentile([call.seconds for call in beside], 0.95) / percentile([call.seconds for call in alone], 0.95)
