"""The memory tier of the score cache: entries as bytes, the least recently used given up for new ones.

Invariants: never more than `max_bytes`, entries and their bookkeeping together; room is taken from whoever holds most,
so that an owner who floods the cache loses its own entries.
"""

from __future__ import annotations

from collections import OrderedDict

ENTRY_BYTES = 400
"""Of an entry beside its own bytes: key, places in the tables."""
LARGEST_SHARE = 0.25
"""Of a tier that one entry may take: a larger one would push out too many for one."""


class MemoryTier:
    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.evicted = 0
        self._owner_of: dict[bytes, str] = {}
        self._entries: dict[str, OrderedDict[bytes, bytes]] = {}  # by owner, the oldest use first
        self._bytes_of: dict[str, int] = {}  # by owner

    def __len__(self) -> int:
        return len(self._owner_of)

    def __contains__(self, key: bytes) -> bool:
        return key in self._owner_of

    def fits(self, num_bytes: int) -> bool:
        """Whether an entry of that size would be kept."""
        return num_bytes + ENTRY_BYTES <= LARGEST_SHARE * self.max_bytes

    def get(self, key: bytes) -> bytes | None:
        owner = self._owner_of.get(key)
        if owner is None:
            return None
        entries = self._entries[owner]
        entries.move_to_end(key)
        return entries[key]

    def put(self, key: bytes, entry: bytes, owner: str) -> None:
        """Keeps `entry`, unless it is too large."""
        self.drop(key)
        if not self.fits(len(entry)):
            return
        size = len(entry) + ENTRY_BYTES
        while self.num_bytes + size > self.max_bytes:
            self._evict_one()
        self._entries.setdefault(owner, OrderedDict())[key] = entry
        self._owner_of[key] = owner
        self._count(owner, size)

    def drop(self, key: bytes) -> None:
        owner = self._owner_of.pop(key, None)
        if owner is not None:
            entry = self._entries[owner].pop(key)
            self._count(owner, -len(entry) - ENTRY_BYTES)

    def _evict_one(self) -> None:
        largest = max(self._bytes_of, key=self._bytes_of.__getitem__)
        self.drop(next(iter(self._entries[largest])))
        self.evicted += 1

    def _count(self, owner: str, more: int) -> None:
        self.num_bytes += more
        self._bytes_of[owner] = self._bytes_of.get(owner, 0) + more
        if not self._bytes_of[owner]:
            del self._bytes_of[owner], self._entries[owner]
