"""Texts that wait for their turn: places are divided among tenants by weight, never lost, and their seconds add up."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from teacher_server.turns import Turn, Turns

WEIGHTS = {"heavy": 2.0}


class Texts:
    """Texts that end when told to."""

    def __init__(self, most: int) -> None:
        self.now = 0.0
        self.turns = Turns(most, lambda tenant: WEIGHTS.get(tenant, 1.0), lambda: self.now)
        self.begun: list[tuple[str, asyncio.Event, Turn]] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def add(self, tenant: str, number: int) -> None:
        async def one() -> None:
            async with self.turns.of(tenant) as turn:
                over = asyncio.Event()
                self.begun.append((tenant, over, turn))
                await over.wait()

        self.tasks += [asyncio.create_task(one()) for _ in range(number)]
        await settled()

    async def end(self, index: int, seconds: float = 1.0) -> Turn:
        self.now += seconds
        _, over, turn = self.begun[index]
        over.set()
        await settled()
        return turn


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_who_comes_after_a_flood_has_the_next_place():
    async def main() -> None:
        texts = Texts(2)
        await texts.add("flood", 100)
        await texts.add("late", 3)
        assert [tenant for tenant, *_ in texts.begun] == ["flood", "flood"]
        for n in range(4):
            await texts.end(n)
        assert [tenant for tenant, *_ in texts.begun[2:]].count("late") == 2
        for task in texts.tasks:
            task.cancel()

    asyncio.run(main())


def test_places_are_divided_by_weight():
    async def main() -> None:
        texts = Texts(6)
        for tenant in ("light", "heavy", "other"):
            await texts.add(tenant, 200)
        for n in range(240):
            await texts.end(n)
        last = Counter(tenant for tenant, *_ in texts.begun[-6:])
        assert last == {"heavy": 3, "light": 2, "other": 1} or last == {"heavy": 3, "light": 1, "other": 2}
        all_of_them = Counter(tenant for tenant, *_ in texts.begun[20:])
        assert all_of_them["light"] == pytest.approx(all_of_them["other"], abs=25)
        for task in texts.tasks:
            task.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("waiting", [True, False], ids=["waiting", "as-its-turn-comes"])
def test_who_leaves_takes_no_place_along(waiting: bool):
    async def main() -> None:
        texts = Texts(1)
        await texts.add("a", 2)
        if not waiting:
            texts.begun[0][1].set()
            while not any(task.done() for task in texts.tasks):
                await asyncio.sleep(0)
        texts.tasks[1].cancel()
        await settled()
        if waiting:
            await texts.end(0)
        await texts.add("b", 1)
        assert texts.begun[-1][0] == "b"
        await texts.end(-1)
        assert not texts.turns._waiting
        assert not texts.turns._in_work

    asyncio.run(main())


def test_a_text_that_is_given_up_in_the_moment_in_which_another_ends_ends_as_cancelled():
    async def main() -> None:
        texts = Texts(1)
        await texts.add("a", 4)
        texts.begun[0][1].set()
        texts.tasks[1].cancel()  # its place is over before it knows, and passed over
        await settled()
        assert texts.tasks[1].cancelled()
        assert len(texts.begun) == 2
        for n in (1, 2):
            await texts.end(n)
        assert not texts.turns._waiting
        assert not texts.turns._in_work

    asyncio.run(main())


def test_the_seconds_of_all_are_those_in_which_something_was_written():
    async def main() -> None:
        texts = Texts(2)
        await texts.add("a", 1)
        texts.now += 3  # alone
        await texts.add("b", 1)
        assert (await texts.end(0, 4)).seconds == pytest.approx(3 + 2)
        assert (await texts.end(1, 5)).seconds == pytest.approx(2 + 5)
        texts.now += 100  # nothing is written
        await texts.add("a", 1)
        assert (await texts.end(2, 6)).seconds == pytest.approx(6)

    asyncio.run(main())
