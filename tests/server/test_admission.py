"""The two budgets: what fits is taken, what doesn't is refused with a time or waits in order, nothing leaks."""

from __future__ import annotations

import asyncio

import pytest

from teacher_api.errors import Overloaded, TooLarge
from teacher_server.admission import Admission, Cost
from teacher_server.caller import Caller


def test_takes_until_full_and_names_a_time_to_come_back():
    admission = Admission(100, 1000, lambda: 50.0)
    admission.take(Cost(60, 10))
    with pytest.raises(Overloaded) as refused:
        admission.take(Cost(50, 10))
    assert refused.value.retry_after_s == pytest.approx(1.0)  # 50 tokens at 50 tokens/s
    admission.give(Cost(60, 10))
    admission.take(Cost(100, 1000))
    assert admission.share == 1.0


def test_bytes_bound_as_tokens_do():
    admission = Admission(100, 1000, lambda: 0.0)
    admission.take(Cost(1, 900))
    with pytest.raises(Overloaded):
        admission.take(Cost(1, 200))


def test_what_never_fits_is_too_large_and_not_retryable():
    admission = Admission(100, 1000, lambda: 0.0)
    with pytest.raises(TooLarge, match="101 tokens"):
        admission.take(Cost(101, 1))
    with pytest.raises(TooLarge):
        asyncio.run(admission.wait(Cost(1, 1001)))


def test_waiters_are_served_in_order_and_a_small_one_does_not_overtake():
    async def scenario() -> list[str]:
        admission = Admission(10, 1000, lambda: 0.0)
        admission.take(Cost(8, 1))
        order: list[str] = []

        async def one(name: str, tokens: int) -> None:
            await admission.wait(Cost(tokens, 1))
            order.append(name)

        first, second = asyncio.create_task(one("large", 9)), asyncio.create_task(one("small", 1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == []
        admission.give(Cost(8, 1))
        await asyncio.gather(first, second)
        assert admission.tokens == 10
        return order

    assert asyncio.run(scenario()) == ["large", "small"]


def test_a_cancelled_waiter_leaves_no_trace_and_lets_the_next_one_in():
    async def scenario() -> int:
        admission = Admission(10, 1000, lambda: 0.0)
        admission.take(Cost(5, 1))
        blocked = asyncio.create_task(admission.wait(Cost(10, 1)))
        behind = asyncio.create_task(admission.wait(Cost(5, 1)))
        await asyncio.sleep(0)
        blocked.cancel()
        await behind
        return admission.tokens

    assert asyncio.run(scenario()) == 10


def test_a_waiter_cancelled_in_the_moment_of_its_grant_gives_it_back():
    async def scenario() -> int:
        admission = Admission(10, 1000, lambda: 0.0)
        admission.take(Cost(10, 1))
        waiting = asyncio.create_task(admission.wait(Cost(10, 1)))
        await asyncio.sleep(0)
        admission.give(Cost(10, 1))  # grants it, but its task has not run yet
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return admission.tokens

    assert asyncio.run(scenario()) == 0


@pytest.mark.parametrize("freed", [True, False], ids=["as-room-comes", "with-room"])
def test_waiters_whose_deadlines_pass_together_end_as_cancelled(freed: bool):
    async def scenario() -> list[object]:
        admission = Admission(10, 1000, lambda: 0.0)
        held = Cost(8, 1, Caller("t", "x"))
        admission.take(held)
        waiting = [asyncio.create_task(admission.wait(Cost(5, 1, Caller("t", "y")))) for _ in range(3)]
        await asyncio.sleep(0)
        for task in waiting:  # their places are over before they know, and the next grant passes them over
            task.cancel()
        if freed:
            admission.give(held)
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        if not freed:
            admission.give(held)
        assert admission.tokens == 0
        assert not admission._waiting or not freed
        await asyncio.wait_for(admission.wait(Cost(10, 1)), 1)
        return list(ended)

    assert {type(one) for one in asyncio.run(scenario())} == {asyncio.CancelledError}
