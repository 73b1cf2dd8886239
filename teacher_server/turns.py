"""Who writes next, where so many texts are written at a time: of the tenants that wait, the one that has least in work
for its weight. Called from the event loop only.

Invariants: no more than `most` are in work; a place that becomes free goes to somebody who waits; the seconds in which
something is in work are divided equally among what is, and add up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Turn:
    """Of one text. `seconds`: its part of the time, once it has ended."""

    seconds: float = 0.0


class Turns:
    """
    Args:
        most: in work at a time.
        weight_of: a tenant's share, as a number beside the others'.
        clock: in seconds.
    """

    def __init__(
        self, most: int, weight_of: Callable[[str], float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most = most
        self._weight_of = weight_of
        self._clock = clock
        self._in_work: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant, who came first first
        self._shared_s = 0.0  # what a text would have that had been in work from the beginning
        self._looked_at = clock()

    @contextlib.asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[Turn]:
        """Around the writing of one text: waits for its place."""
        await self._placed(tenant)
        turn, before = Turn(), self._shared_s
        try:
            yield turn
        finally:
            self._leave(tenant)
            turn.seconds = self._shared_s - before

    async def _placed(self, tenant: str) -> None:
        if not self._waiting and self._in_work.total() < self._most:
            self._enter(tenant)
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._leave(tenant)  # it had its place in the moment of the cancellation
            elif place in self._waiting.get(tenant, ()):  # unless it was passed over between its end and now
                self._waiting[tenant].remove(place)
                self._forget(tenant)
            raise

    def _enter(self, tenant: str) -> None:
        self._look()
        self._in_work[tenant] += 1

    def _leave(self, tenant: str) -> None:
        self._look()
        self._in_work[tenant] -= 1
        if not self._in_work[tenant]:
            del self._in_work[tenant]
        while self._waiting and self._in_work.total() < self._most:
            first = min(self._waiting, key=lambda name: (self._in_work.get(name, 0) + 1) / self._weight_of(name))
            place = self._waiting[first].popleft()
            self._waiting[first] = self._waiting.pop(first)  # among equals, whoever had a place longest ago
            self._forget(first)
            if not place.done():
                self._enter(first)
                place.set_result(None)

    def _forget(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    def _look(self) -> None:
        now = self._clock()
        if self._in_work:
            self._shared_s += (now - self._looked_at) / self._in_work.total()
        self._looked_at = now
