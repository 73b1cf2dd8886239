"""Memory and disk stay within their bytes, give up the oldest of whoever holds most, and give back what was put, also
after a restart; a damaged or full disk costs entries, never answers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_server import cache_disk
from teacher_server.cache_disk import FILE, ROW_BYTES, DiskTier
from teacher_server.cache_memory import ENTRY_BYTES, MemoryTier


def key(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


@settings(deadline=None)
@given(
    work=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 900), st.sampled_from("abc"), st.booleans()), max_size=150
    )
)
def test_memory_stays_within_its_bytes_and_gives_back_what_was_put(work: list[tuple[int, int, str, bool]]):
    tier, put = MemoryTier(8000), {}
    for name, size, owner, reads in work:
        if reads:
            found = tier.get(key(name))
            assert found is None or found == put[name]
        else:
            put[name] = bytes([name]) * size
            tier.put(key(name), put[name], owner)
            assert (key(name) in tier) == (size + ENTRY_BYTES <= 2000)
        held = [tier.get(key(other)) for other in put]
        assert tier.num_bytes == sum(len(entry) + ENTRY_BYTES for entry in held if entry is not None) <= 8000
        assert len(tier) == sum(entry is not None for entry in held)
    for name in put:
        tier.drop(key(name))
    assert (tier.num_bytes, len(tier)) == (0, 0)


def test_memory_gives_up_what_was_used_longest_ago():
    tier = MemoryTier(4 * (100 + ENTRY_BYTES))
    for name in "abcd":
        tier.put(key(name), bytes(100), "t")
    tier.get(key("a"))
    tier.put(key("e"), bytes(100), "t")
    assert [name for name in "abcde" if key(name) in tier] == ["a", "c", "d", "e"]
    assert tier.evicted == 1


def test_an_owner_who_floods_memory_loses_its_own_entries():
    tier = MemoryTier(100 * (100 + ENTRY_BYTES))
    for n in range(40):
        tier.put(key(("quiet", n)), bytes(100), "quiet")
    for n in range(1000):
        tier.put(key(("loud", n)), bytes(100), "loud")
    assert all(key(("quiet", n)) in tier for n in range(40))
    assert sum(key(("loud", n)) in tier for n in range(1000)) == 60


def on_disk(directory: Path, max_bytes: int, work: Callable[[DiskTier], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        tier = DiskTier(str(directory), max_bytes)
        try:
            await tier.open()
            return await work(tier)
        finally:
            await tier.close()

    return asyncio.run(whole())


async def written(tier: DiskTier) -> None:
    while tier._writing is not None:
        await asyncio.wait({tier._writing})


@pytest.mark.parametrize("name", ["a#b", "a?mode=memory", "100%41"])
def test_a_directory_may_be_called_what_a_uri_may_not(tmp_path: Path, name: str):
    async def work(tier: DiskTier) -> object:
        tier.put(key(1), b"entry", "t")
        await written(tier)
        return await tier.get(key(1))

    assert on_disk(tmp_path / name, 1 << 20, work) == b"entry"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_disk_gives_back_what_was_put_at_once_and_after_a_restart(tmp_path: Path):
    entries = {key(n): bytes([n]) * (n * 1000) for n in range(50)}

    async def first(tier: DiskTier) -> None:
        for one, entry in entries.items():
            tier.put(one, entry, "t")
        assert [await tier.get(one) for one in entries] == list(entries.values()), "before they are written"
        await written(tier)
        assert [await tier.get(one) for one in entries] == list(entries.values())

    async def second(tier: DiskTier) -> None:
        assert await tier.has([key("none"), *entries]) == set(entries)
        assert await tier.get(key("none")) is None
        assert [await tier.get(one) for one in entries] == list(entries.values())
        assert tier.num_entries == 50
        assert tier.num_bytes == sum(len(entry) + ROW_BYTES for entry in entries.values())
        await tier.drop(key(7))
        assert await tier.get(key(7)) is None
        assert tier.num_entries == 49

    on_disk(tmp_path / "made" / "here", 1 << 26, first)
    on_disk(tmp_path / "made" / "here", 1 << 26, second)


def test_disk_stays_within_its_bytes_and_gives_up_the_oldest_use_of_whoever_holds_most(tmp_path: Path):
    size = 20_000

    async def work(tier: DiskTier) -> None:
        for n in range(10):
            tier.put(key(("quiet", n)), bytes(size), "quiet")
        await written(tier)
        for n in range(300):
            tier.put(key(("loud", n)), bytes(size), "loud")
            if n % 20 == 0:
                await tier.get(key(("loud", 0)))
                await written(tier)
                assert tier.num_bytes <= 1 << 20
        await written(tier)
        assert len(await tier.has([key(("quiet", n)) for n in range(10)])) == 10
        kept = await tier.has([key(("loud", n)) for n in range(300)])
        assert kept == {key(("loud", n)) for n in (0, *range(300 - len(kept) + 1, 300))}
        assert tier.num_bytes > 0.9 * (1 << 20)
        assert tier.evicted == 300 - len(kept)

    on_disk(tmp_path, 1 << 20, work)
    assert (tmp_path / FILE).stat().st_size < 1.5 * (1 << 20)


def test_a_smaller_limit_makes_the_file_smaller(tmp_path: Path):
    async def fill(tier: DiskTier) -> None:
        for n in range(100):
            tier.put(key(n), bytes(50_000), "t")

    async def look(tier: DiskTier) -> int:
        assert tier.num_bytes <= 1 << 20
        return len(await tier.has([key(n) for n in range(100)]))

    on_disk(tmp_path, 1 << 26, fill)
    assert on_disk(tmp_path, 1 << 20, look) == (1 << 20) // (50_000 + ROW_BYTES)
    assert (tmp_path / FILE).stat().st_size < 1.5 * (1 << 20)


def test_what_waits_to_be_written_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_disk, "PENDING_BYTES", 100_000)

    async def work(tier: DiskTier) -> None:
        for n in range(30):  # nothing is written while this holds the loop
            tier.put(key(n), bytes(9000), "t")
            assert tier._pending_bytes <= 100_000
        assert tier.skipped == 30 - 100_000 // (9000 + ROW_BYTES)
        await written(tier)
        assert tier._pending_bytes == 0
        tier.put(key("later"), bytes(9000), "t")
        assert await tier.get(key("later")) == bytes(9000)

    on_disk(tmp_path, 1 << 26, work)


def test_one_server_per_directory(tmp_path: Path):
    async def work(_: DiskTier) -> None:
        second = DiskTier(str(tmp_path), 1 << 20)
        with pytest.raises(ValueError, match=r"cache\.dir .* is another server's"):
            await second.open()
        await second.close()

    on_disk(tmp_path, 1 << 20, work)


def test_a_directory_that_can_not_be_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache\.dir .*: Not a directory"):
        on_disk(tmp_path / "file" / "dir", 1 << 20, lambda tier: tier.get(b""))


@pytest.mark.parametrize("damage", ["nonsense", "header", "empty", "other layout"])
def test_a_file_that_is_no_store_is_begun_anew(tmp_path: Path, damage: str):
    async def fill(tier: DiskTier) -> None:
        for n in range(100):
            tier.put(key(n), bytes(5000), "t")

    async def use(tier: DiskTier) -> None:
        assert await tier.get(key(1)) is None
        await fill(tier)
        await written(tier)
        assert await tier.get(key(1)) == bytes(5000)

    on_disk(tmp_path, 1 << 26, fill)
    file = tmp_path / FILE
    if damage == "other layout":
        with sqlite3.connect(file) as other:
            other.execute("PRAGMA user_version = 99")
        other.close()
    else:
        content = bytearray(file.read_bytes())
        content[:100] = {"nonsense": b"\xff" * 100, "header": b"x" + content[1:100], "empty": b""}[damage]
        file.write_bytes(b"" if damage == "empty" else content)
    on_disk(tmp_path, 1 << 26, use)


def test_a_file_that_another_program_emptied_is_begun_anew(tmp_path: Path):
    async def work(tier: DiskTier) -> None:
        for n in range(200):  # it is full
            tier.put(key(n), bytes(5000), "t")
        await written(tier)
        with contextlib.closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
            other.execute("DELETE FROM entries")
        for n in range(200, 300):
            tier.put(key(n), bytes(5000), "t")
            await written(tier)
        assert await tier.get(key(299)) == bytes(5000)
        assert 0 < tier.num_bytes <= 1 << 20
        with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as other:
            assert other.execute("SELECT SUM(size) FROM entries").fetchone() == (tier.num_bytes,)

    on_disk(tmp_path, 1 << 20, work)


def test_a_file_damaged_inside_loses_entries_and_goes_on(tmp_path: Path):
    """Pages of the tree are overwritten while the server runs: reads fail, and later it works again."""

    async def work(tier: DiskTier) -> None:
        for n in range(400):
            tier.put(key(n), bytes([n % 256]) * 3000, "t")
        await written(tier)
        tier._write.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with (tmp_path / FILE).open("r+b") as file:
            size = file.seek(0, 2)
            for page in range(1, size // 4096):
                file.seek(page * 4096)
                file.write(b"\xff" * 64)
        await tier._on(tier._reader, tier._reopen)  # what it has read stays in its memory
        found = [await tier.get(key(n)) for n in range(400)]
        assert all(entry in (None, bytes([n % 256]) * 3000) for n, entry in enumerate(found))
        assert None in found
        assert tier.errors > 0
        await asyncio.get_running_loop().run_in_executor(tier._writer, lambda: None)
        tier.put(key("new"), b"new", "t")
        await written(tier)
        assert await tier.get(key("new")) == b"new"
        assert tier._files_begun == 1

    on_disk(tmp_path, 1 << 26, work)


def test_a_full_disk_keeps_nothing_and_fails_nobody(tmp_path: Path):
    async def work(tier: DiskTier) -> None:
        tier.put(key("before"), bytes(1000), "t")
        await written(tier)
        pages = tier._write.execute("PRAGMA page_count").fetchone()[0]
        tier._write.execute(f"PRAGMA max_page_count = {pages}")  # SQLITE_FULL, as a full disk gives
        before = tier.num_bytes
        tier.put(key("after"), bytes(100_000), "t")
        await written(tier)
        assert tier.errors == 1
        assert tier.num_bytes == before
        assert await tier.get(key("after")) is None
        assert await tier.get(key("before")) == bytes(1000)

    on_disk(tmp_path, 1 << 26, work)
