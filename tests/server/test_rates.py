"""A rate is kept over time, and an appointment is kept too: by simulated callers that do what they are told."""

from __future__ import annotations

import heapq
import random

import pytest

from teacher_server.rates import MAX_APPOINTMENTS, TokenRate


def simulate(rate: TokenRate, callers: int, seconds: float, seed: int, jitter: float = 0.25) -> tuple[int, int, int]:
    """Closed-loop callers, each of which comes back when told to plus a share of the delay. Tokens let in, returns, and
    returns that were let in at once."""
    chance = random.Random(seed)
    coming = [(chance.random(), n, 0, 0) for n in range(callers)]  # when, who, call, attempts
    heapq.heapify(coming)
    let_in = returns = at_once = 0
    while coming:
        now, who, call, attempts = heapq.heappop(coming)
        if now > seconds:
            break
        tokens = 100 + 10 * (who % 5)
        delay = rate.ask(tokens, (who, call), now)
        if attempts:
            returns, at_once = returns + 1, at_once + (delay == 0)
        if delay:
            heapq.heappush(coming, (now + delay * (1 + jitter * chance.random()), who, call, attempts + 1))
        else:
            let_in += tokens
            heapq.heappush(coming, (now + chance.random() * 0.01, who, call + 1, 0))
    return let_in, returns, at_once


@pytest.mark.parametrize("callers", [1, 8, 64])
def test_the_rate_is_kept_and_who_comes_back_when_told_to_is_let_in(callers):
    rate = TokenRate(1000.0, 1000.0)
    let_in, returns, at_once = simulate(rate, callers, 120.0, callers)
    assert let_in == pytest.approx(1000.0 * 120, rel=0.05)
    assert returns > 100
    assert at_once >= 0.95 * returns


def test_a_burst_is_let_in_at_once_and_no_more():
    rate = TokenRate(10.0, 100.0)
    assert [rate.ask(50, n, 0.0) for n in range(3)] == [0.0, 0.0, pytest.approx(5.0)]


def test_a_call_larger_than_the_burst_waits_for_a_full_bucket_and_is_paid_for():
    rate = TokenRate(10.0, 20.0)
    assert rate.ask(100, "large", 0.0) == 0.0
    assert rate.ask(1, "next", 0.0) == pytest.approx(10.0 - 2.0 + 0.1)


def test_who_comes_early_is_told_the_same_time_again():
    rate = TokenRate(10.0, 10.0)
    rate.ask(10, "first", 0.0)
    assert rate.ask(10, "a", 0.0) == pytest.approx(1.0)
    assert rate.ask(10, "b", 0.0) == pytest.approx(2.0)
    assert rate.ask(10, "a", 0.25) == pytest.approx(0.75)
    assert rate.ask(10, "a", 1.0) == 0.0
    assert rate.ask(10, "b", 2.0) == 0.0


def test_appointments_are_bounded_and_end():
    rate = TokenRate(1.0, 1.0)
    for n in range(3 * MAX_APPOINTMENTS):
        rate.ask(10, n, 0.0)
    assert len(rate._appointments) == MAX_APPOINTMENTS
    rate.ask(10, "later", 1e6)
    assert len(rate._appointments) <= 1
