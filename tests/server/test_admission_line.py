"""The order of those who were told to come back: as a plain list of them has it, and at a cost that does not grow with
their number."""

from __future__ import annotations

import time
from collections.abc import Hashable

from hypothesis import given
from hypothesis import strategies as st

from teacher_api.errors import Overloaded
from teacher_server import admission as module
from teacher_server.admission import MAX_PLACES, Admission, Cost, _Line, _Place
from teacher_server.caller import Caller

STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "leave", "forget"]), st.integers(0, 9), st.integers(0, 20), st.integers(0, 9)),
    max_size=200,
)


@given(steps=STEPS)
def test_a_line_is_a_plain_table_of_those_who_come_back(steps: list[tuple[str, int, int, int]]) -> None:
    line, plain, now = _Line(), dict[Hashable, _Place](), 0.0
    for what, number, tokens, later in steps:
        who = ("e", "r", number if number % 2 else (str(number),))  # calls are known by numbers, sequences by tuples
        if what == "add":
            line.add(who, _Place(tokens, now, now + later))
            plain[who] = _Place(tokens, now, now + later)
        elif what == "leave":
            line.leave(who)
            plain.pop(who, None)
        else:
            now += later / 3
            line.forget(now)
            plain = {who: place for who, place in plain.items() if place.until >= now}
        assert len(line) == len(plain)
        assert line.tokens == sum(place.tokens for place in plain.values())
        assert line.get(who) == plain.get(who)


def test_those_who_left_are_not_kept(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_PLACES", 8)
    line = _Line()
    for n in range(1000):
        line.add(n % 4, _Place(1, 0.0, 1e9))
    assert (len(line), line.tokens) == (4, 4)
    assert len(line._ends) <= 17


def test_a_refusal_costs_the_same_however_many_were_refused_before() -> None:
    admission = Admission(1000, 10**9, lambda: 10.0, clock=lambda: 0.0)
    held = Cost(400, 1, Caller("t", "e"))
    for cost in (Cost(600, 1, Caller("t", "e")), held):
        admission.take(cost)

    def refusals_s(first: int, number: int = 50) -> float:
        """Where there is room again, so that it is asked whose it is."""
        admission.give(held)
        begun = time.perf_counter()
        for n in range(first, first + number):
            try:
                admission.take(Cost(10, 1, Caller("t", "e"), n))
            except Overloaded:
                continue
            raise AssertionError("let in before those who were told to come back")
        took = time.perf_counter() - begun
        admission.adopt(held)
        return took

    def fill(upto: int) -> None:
        for n in range(upto):
            try:
                admission.take(Cost(500, 1, Caller("t", "e"), -1 - n))
            except Overloaded:
                continue
            raise AssertionError("let in while the queue is full")

    fill(64)
    few = min(refusals_s(1000 * n) for n in range(1, 4))
    fill(2 * MAX_PLACES)
    many = min(refusals_s(100000 * n) for n in range(1, 4))
    assert many < 10 * few, (many, few)
