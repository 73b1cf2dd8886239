"""The bound on work in progress."""

from __future__ import annotations

import asyncio

import pytest

from teacher_server.backends.room import Room


def test_never_holds_more_than_its_size_and_serves_in_order() -> None:
    order: list[int] = []
    used: list[int] = []

    async def work(room: Room, index: int, size: int) -> None:
        async with room.taken(size):
            order.append(index)
            used.append(size)
            assert sum(used) <= 10
            await asyncio.sleep(0)
            used.remove(size)

    async def main() -> None:
        room = Room(10)
        sizes = [4, 4, 9, 1, 10, 3, 3, 3, 1]
        await asyncio.gather(*(work(room, index, size) for index, size in enumerate(sizes)))

    asyncio.run(main())
    assert order == list(range(9))


def test_what_is_larger_than_the_room_runs_alone() -> None:
    async def main() -> None:
        room = Room(10)
        async with room.taken(1000):
            waiting = asyncio.create_task(_enter(room, 1))
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting

    asyncio.run(main())


@pytest.mark.parametrize("admitted", [False, True])
def test_a_cancelled_waiter_takes_nothing_with_it(admitted: bool) -> None:
    async def main() -> None:
        room = Room(10)
        async with room.taken(10):
            cancelled = asyncio.create_task(_enter(room, 10))
            behind = asyncio.create_task(_enter(room, 10))
            await asyncio.sleep(0)
            if not admitted:
                cancelled.cancel()
                await asyncio.sleep(0)
        # Admitted above, but not resumed yet: the place must go to the next one.
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await asyncio.wait_for(behind, 5)
        await asyncio.wait_for(_enter(room, 10), 5)

    asyncio.run(main())


async def _enter(room: Room, size: int) -> None:
    async with room.taken(size):
        pass
