"""What callers hold beside work in the queue: streams, calls, and bytes of bodies that are being received. Each kind
has a bound, and none of several tenants can hold all of it.

Invariants: nothing is held beyond a bound; a tenant alone on a server may hold all of it, and one of several so much
that the others find a quarter.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from teacher_api.errors import Overloaded

LARGEST_SHARE = 0.75
"""Of the places, for one of several tenants."""
RETRY_AFTER_S = 1.0
"""Of what ends at its callers' pace, so that nobody can say when."""


class Places:
    """
    Args:
        most: places there are.
        is_shared: whether there are several tenants; asked each time.
    """

    def __init__(self, most: int, is_shared: Callable[[], bool] = lambda: False) -> None:
        self.most = most
        self.taken = 0
        self._is_shared = is_shared
        self._taken_by: Counter[str] = Counter()

    def has_room(self, tenant: str, more: int = 1) -> bool:
        if self.taken + more > self.most:
            return False
        held = self._taken_by.get(tenant, 0)
        return not held or not self._is_shared() or held + more <= LARGEST_SHARE * self.most

    def take(self, tenant: str, number: int = 1) -> None:
        self.taken += number
        self._taken_by[tenant] += number

    def give(self, tenant: str, number: int = 1) -> None:
        self.taken -= number
        self._taken_by[tenant] -= number
        if not self._taken_by[tenant]:
            del self._taken_by[tenant]

    @contextlib.contextmanager
    def held(self, tenant: str) -> Iterator[None]:
        """One place, for the block. Whether there is room is asked before."""
        self.take(tenant)
        try:
            yield
        finally:
            self.give(tenant)


class Receiving:
    """Bytes of request bodies that are being received, over all connections. What has come counts, not what was
    announced: a caller that announces much and sends nothing keeps nobody out."""

    def __init__(self, places: Places) -> None:
        self._places = places

    @property
    def num_bytes(self) -> int:
        return self._places.taken

    @contextlib.contextmanager
    def body(self, announced: int, tenant: str) -> Iterator[Callable[[int], None]]:
        """Around the receiving of one body. Gives what must be called with the size of each piece that came.

        Raises:
            Overloaded: there is no room for a body of `announced` bytes, or for the piece.
        """
        held = 0

        def came(num_bytes: int) -> None:
            nonlocal held
            self._check(num_bytes, tenant)
            held += num_bytes
            self._places.take(tenant, num_bytes)

        self._check(announced, tenant)
        try:
            yield came
        finally:
            self._places.give(tenant, held)

    def _check(self, more: int, tenant: str) -> None:
        if not self._places.has_room(tenant, more):
            raise Overloaded(
                f"too many bytes of request bodies are being received; {more} more would pass the bound of "
                f"{self._places.most}, or this tenant's part of it; come back later",
                retry_after_s=RETRY_AFTER_S,
            )
