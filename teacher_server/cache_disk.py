"""The disk tier of the score cache: one SQLite file (docs/decisions/0039-score-cache.md), a thread that reads and a
thread that writes. The only importer of sqlite3 for answers. Knows entries as bytes only.

Invariants: the event loop never waits for the disk; what waits to be written is bounded, and beyond it entries are not
kept; a file that is no database any more is begun anew; one server per directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import structlog

from teacher_server.cache_memory import LARGEST_SHARE

log = structlog.get_logger("teacher_server.cache")

FILE, LOCK = "scores.sqlite", "scores.lock"
LAYOUT = 1
"""Of the tables (PRAGMA user_version): a file of another one is begun anew."""
ROW_BYTES = 256
"""Of an entry beside its own bytes: key, row, index."""
PENDING_BYTES = 64 << 20
"""Waiting to be written; what comes beyond it is not kept."""
BATCH_BYTES = 8 << 20  # of one transaction, so that none takes long
EVICT_ROWS = 64  # looked at together when room is made
TELL_EVERY_S = 30.0  # of a disk that fails at every entry
_ENDED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    key BLOB PRIMARY KEY, owner TEXT NOT NULL, used INTEGER NOT NULL, size INTEGER NOT NULL, entry BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_use ON entries (owner, used);
"""
T = TypeVar("T")


def _miscounted() -> sqlite3.DatabaseError:
    """What SQLite itself says of a damaged file: another program wrote into it, or its index is wrong."""
    error = sqlite3.DatabaseError("entries that were counted are missing")
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


class DiskTier:
    """`await open()`, then the rest; `await close()` writes what waits."""

    def __init__(self, directory: str, max_bytes: int) -> None:
        self.path = Path(directory).expanduser() / FILE
        self.max_bytes = max_bytes
        self.num_bytes = self.num_entries = 0  # in the file
        self.evicted = self.skipped = self.errors = 0
        self._pending: dict[bytes, tuple[str, bytes]] = {}  # key -> owner, entry
        self._pending_bytes = 0
        self._uses: dict[bytes, int] = {}  # key -> when it was used last, not written yet
        self._clock = 0
        self._bytes_of: dict[str, int] = {}  # by owner; of the writing thread, as are num_bytes and num_entries
        self._writing: asyncio.Task[None] | None = None
        self._lock: IO[bytes] | None = None
        self._files_begun = 0  # so that a file is begun anew once, however many reads it fails
        self._told_at = -TELL_EVERY_S
        self._reader = ThreadPoolExecutor(1, "cache-read")
        self._writer = ThreadPoolExecutor(1, "cache-write")
        self._read: sqlite3.Connection | None = None
        self._write: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Raises ValueError with one line where the directory can't be used."""
        await self._on(self._writer, self._open)

    async def close(self) -> None:
        """Writes what waits, and frees the directory."""
        while self._writing is not None:
            await asyncio.wait({self._writing})
        await self._on(self._writer, self._close)
        for pool in (self._reader, self._writer):
            pool.shutdown(wait=False)

    # ---- on the event loop -------------------------------------------------------------------------------------------

    async def has(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of `keys` that are kept here."""
        waiting = {key for key in keys if key in self._pending}
        others = [key for key in keys if key not in waiting]
        return waiting | (await self._on(self._reader, self._find, others) if others else set())

    async def get(self, key: bytes) -> object:
        """The entry, or None. What a damaged file gives in its place may be anything."""
        waiting = self._pending.get(key)
        if waiting is not None:
            return waiting[1]
        entry = await self._on(self._reader, self._load, key)
        if entry is not None:
            self._uses[key] = self._tick()
            self._begin()
        return entry

    def put(self, key: bytes, entry: bytes, owner: str) -> None:
        """Keeps `entry` soon, unless it is too large or too much waits already."""
        size = len(entry) + ROW_BYTES
        if size > LARGEST_SHARE * self.max_bytes or self._pending_bytes + size > PENDING_BYTES:
            self.skipped += 1
            return
        if key not in self._pending:
            self._pending[key] = (owner, entry)
            self._pending_bytes += size
            self._begin()

    async def drop(self, key: bytes) -> None:
        await self._on(self._writer, self._delete, key)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _begin(self) -> None:
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_all())

    async def _write_all(self) -> None:
        try:
            while self._pending or self._uses:
                batch: dict[bytes, tuple[str, bytes, int]] = {}
                size = 0
                for key, (owner, entry) in self._pending.items():
                    if batch and size + len(entry) > BATCH_BYTES:
                        break
                    batch[key] = (owner, entry, self._tick())
                    size += len(entry)
                uses, self._uses = self._uses, {}
                await self._on(self._writer, self._store, batch, uses)
                for key in batch:
                    _, entry = self._pending.pop(key)
                    self._pending_bytes -= len(entry) + ROW_BYTES
        finally:
            self._writing = None

    async def _on(self, pool: ThreadPoolExecutor, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *args)

    # ---- in the reading thread ---------------------------------------------------------------------------------------

    def _find(self, keys: Sequence[bytes]) -> set[bytes]:
        found: set[bytes] = set()
        with self._guarded("read"):
            for key in keys:
                if self._reading().execute("SELECT 1 FROM entries WHERE key = ?", (key,)).fetchone():
                    found.add(key)
        return found

    def _load(self, key: bytes) -> object:
        with self._guarded("read"):
            row = self._reading().execute("SELECT entry FROM entries WHERE key = ?", (key,)).fetchone()
            return None if row is None else row[0]
        return None

    def _reading(self) -> sqlite3.Connection:
        if self._read is None:
            self._read = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        return self._read

    # ---- in the writing thread ---------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path.parent / LOCK).open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"cache.dir {str(self.path.parent)!r} is another server's; expected a directory for each"
            ) from None
        except OSError as error:
            raise ValueError(f"cache.dir {str(self.path.parent)!r}: {error.strerror or error}") from None
        try:
            self._connect()
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) not in _ENDED:
                raise ValueError(f"cache.dir {str(self.path.parent)!r}: {error}") from None
            self._begin_anew(self._files_begun, str(error))

    def _connect(self) -> None:
        """Opens the file, or begins it; counts what it holds."""
        write = self._write = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        write.execute("PRAGMA journal_mode = WAL")
        write.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last entries, never the file
        write.execute("PRAGMA journal_size_limit = 67108864")
        layout = write.execute("PRAGMA user_version").fetchone()[0]
        if layout not in (0, LAYOUT):
            write.execute("DROP TABLE IF EXISTS entries")
        write.executescript(_SCHEMA)
        write.execute(f"PRAGMA user_version = {LAYOUT}")
        rows = write.execute("SELECT owner, COUNT(*), SUM(size), MAX(used) FROM entries GROUP BY owner").fetchall()
        self._bytes_of = {owner: size for owner, _, size, _ in rows}
        self.num_entries = sum(count for _, count, _, _ in rows)
        self.num_bytes = sum(self._bytes_of.values())
        self._clock = max([self._clock, *(used for *_, used in rows)])
        if self.num_bytes > self.max_bytes:  # it was larger before
            self._make_room(0)
            write.execute("VACUUM")

    def _store(self, batch: Mapping[bytes, tuple[str, bytes, int]], uses: Mapping[bytes, int]) -> None:
        with self._guarded("write"), self._transaction() as write:
            write.executemany("UPDATE entries SET used = ? WHERE key = ?", [(at, key) for key, at in uses.items()])
            for key, (owner, entry, at) in batch.items():
                self._forget(write, key)
                self._make_room(len(entry) + ROW_BYTES)
                size = len(entry) + ROW_BYTES
                write.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (key, owner, at, size, entry))
                self._count(owner, 1, size)

    def _delete(self, key: bytes) -> None:
        with self._guarded("write"), self._transaction() as write:
            self._forget(write, key)

    def _forget(self, write: sqlite3.Connection, key: bytes) -> None:
        row = write.execute("DELETE FROM entries WHERE key = ? RETURNING owner, size", (key,)).fetchone()
        if row is not None:
            self._count(row[0], -1, -row[1])

    def _make_room(self, num_bytes: int) -> None:
        """Gives up the oldest entries of whoever holds most until so many bytes fit."""
        write = self._write
        assert write is not None, "open"
        while self._bytes_of and self.num_bytes + num_bytes > self.max_bytes:
            owner = max(self._bytes_of, key=self._bytes_of.__getitem__)
            old = write.execute(
                "SELECT rowid, size FROM entries WHERE owner = ? ORDER BY used LIMIT ?", (owner, EVICT_ROWS)
            ).fetchall()
            if not old:
                raise _miscounted()
            for rowid, size in old:
                write.execute("DELETE FROM entries WHERE rowid = ?", (rowid,))
                self._count(owner, -1, -size)
                self.evicted += 1
                if self.num_bytes + num_bytes <= self.max_bytes or owner not in self._bytes_of:
                    break

    def _count(self, owner: str, entries: int, size: int) -> None:
        self.num_entries += entries
        self.num_bytes += size
        self._bytes_of[owner] = self._bytes_of.get(owner, 0) + size
        if self._bytes_of[owner] <= 0:
            del self._bytes_of[owner]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block, or nothing of it; the counts go with it."""
        write = self._write
        if write is None:
            raise sqlite3.OperationalError("the file is closed")
        before = dict(self._bytes_of), self.num_bytes, self.num_entries
        write.execute("BEGIN IMMEDIATE")
        try:
            yield write
            write.execute("COMMIT")
        except BaseException:
            self._bytes_of, self.num_bytes, self.num_entries = before
            with contextlib.suppress(sqlite3.Error):
                write.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """A disk that fails costs entries and a line in the log, no answers."""
        files_begun = self._files_begun
        try:
            yield
        except sqlite3.Error as error:
            self.errors += 1
            if time.monotonic() - self._told_at >= TELL_EVERY_S:
                self._told_at = time.monotonic()
                log.warning("cache_disk_failed", doing=what, file=str(self.path), error=str(error))
            if getattr(error, "sqlite_errorcode", None) in _ENDED:
                self._writer.submit(self._begin_anew, files_begun, str(error))

    def _begin_anew(self, files_begun: int, cause: str) -> None:
        """In place of a file that is no database any more, unless that was done meanwhile."""
        if files_begun != self._files_begun:
            return
        log.warning("cache_begun_anew", file=str(self.path), error=cause)
        if self._write is not None:
            with contextlib.suppress(sqlite3.Error):
                self._write.close()
        self._write = None
        self._reader.submit(self._replace).result()  # no read in between: it would open the old file again

    def _replace(self) -> None:
        self._reopen()
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        try:
            self._connect()
        except sqlite3.Error as error:
            self._write = None
            log.warning("cache_disk_failed", doing="open", file=str(self.path), error=str(error))
        self._files_begun += 1  # now, for the reads that fail meanwhile

    def _reopen(self) -> None:
        if self._read is not None:
            with contextlib.suppress(sqlite3.Error):
                self._read.close()
        self._read = None

    def _close(self) -> None:
        self._reader.submit(self._reopen).result()
        if self._write is not None:
            self._write.close()
        self._write = None
        if self._lock is not None:
            self._lock.close()
        self._lock = None
