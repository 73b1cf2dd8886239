"""What each tenant's experiments used, by day (UTC), in SQLite: tokens computed, taken from a cache and refused, and
seconds of the engine. Knows no queue and no transport.

Counted in memory, written every few seconds and at the end: a server that is killed loses what came
after the last write, never what was written. A tenant's experiments beyond a bound are counted together.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime

import structlog

from teacher_api.errors import TeacherError
from teacher_api.types import Scores
from teacher_server.caller import Caller

log = structlog.get_logger("teacher_server.usage")

WRITE_S = 5.0
MAX_EXPERIMENTS = 1000  # of one tenant and day that are told apart
OTHERS = "(others)"
BUSY_S = 10.0  # to wait for another program that reads the file
BY = {"tenant": ("tenant",), "experiment": ("tenant", "experiment"), "day": ("day", "tenant", "experiment")}
"""How rows may be added up, and by which columns."""

Key = tuple[str, str, str]  # day, tenant, experiment


@dataclass(slots=True)
class Spent:
    """`sequences`: those that the engine ended with, whatever became of them."""

    sequences: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    refused_tokens: int = 0
    engine_s: float = 0.0

    def add(self, other: Spent) -> None:
        for name in SPENT:
            setattr(self, name, getattr(self, name) + getattr(other, name))


SPENT = tuple(field.name for field in fields(Spent))
_TABLE = f"""CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL, tenant TEXT NOT NULL, experiment TEXT NOT NULL,
    {", ".join(f"{name} {'REAL' if name == 'engine_s' else 'INTEGER'} NOT NULL" for name in SPENT)},
    PRIMARY KEY (day, tenant, experiment)) WITHOUT ROWID"""
_ADD = f"""INSERT INTO usage VALUES ({", ".join("?" * (3 + len(SPENT)))})
    ON CONFLICT DO UPDATE SET {", ".join(f"{name} = {name} + excluded.{name}" for name in SPENT)}"""


def today() -> str:
    return datetime.now(UTC).date().isoformat()


class Usage:
    """The counts, and the file that keeps them.

    Args:
        path: of the file; empty: in memory.

    Raises:
        ValueError: the file can't be opened, or is something else.
    """

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._pending: dict[Key, Spent] = {}
        self._counting = threading.Lock()  # of what is pending: counted on the event loop, taken away in threads
        self._lock = threading.Lock()  # of the database: written in a thread, read in others
        try:
            self._database = sqlite3.connect(path or ":memory:", timeout=BUSY_S, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(_TABLE)
            rows = self._database.execute("SELECT tenant, experiment FROM usage WHERE day = ?", (today(),)).fetchall()
            self._database.commit()
        except sqlite3.Error as error:
            raise ValueError(f"usage_file {path!r}: {error}") from None
        self._day = today()
        self._experiments: dict[str, set[str]] = {}
        for tenant, experiment in rows:
            self._experiments.setdefault(tenant, set()).add(experiment)

    def served(self, caller: Caller, answer: Scores | TeacherError, engine_s: float) -> None:
        """One sequence has left the engine, which gave it `engine_s` of its time."""
        spent = Spent(sequences=1, engine_s=engine_s)
        if isinstance(answer, Scores):
            spent.computed_tokens, spent.cached_tokens = answer.computed_tokens, answer.cached_tokens
        self._add(caller, spent)

    def written(self, caller: Caller, tokens: int, engine_s: float) -> None:
        """A text has left the engine, for which `tokens` were computed, those of its prompt among them; 0: it did not
        come to its end."""
        self._add(caller, Spent(sequences=1, computed_tokens=tokens, engine_s=engine_s))

    def cached(self, caller: Caller, tokens: int) -> None:
        """`tokens` were answered without the engine."""
        self._add(caller, Spent(cached_tokens=tokens))

    def refused(self, caller: Caller, tokens: int) -> None:
        self._add(caller, Spent(refused_tokens=tokens))

    def _add(self, caller: Caller, spent: Spent) -> None:
        day = today()
        if day != self._day:
            self._day, self._experiments = day, {}
        known = self._experiments.setdefault(caller.tenant, set())
        experiment = caller.experiment
        if experiment not in known and len(known) >= MAX_EXPERIMENTS:
            experiment = OTHERS
        known.add(experiment)
        self._count((day, caller.tenant, experiment), spent)

    def _count(self, key: Key, spent: Spent) -> None:
        with self._counting:
            self._pending.setdefault(key, Spent()).add(spent)

    async def keep(self) -> None:
        """Writes what was counted until cancelled, and then once more."""
        try:
            while True:
                await asyncio.sleep(WRITE_S)
                await asyncio.to_thread(self.write)
        finally:
            self.write()

    def write(self) -> None:
        """What can't be written is kept in memory, and tried again."""
        with self._counting:
            pending, self._pending = self._pending, {}
        rows = [(*key, *(getattr(spent, name) for name in SPENT)) for key, spent in pending.items()]
        try:
            with self._lock, self._database:
                self._database.executemany(_ADD, rows)
        except sqlite3.Error as error:
            log.error("usage_not_written", file=self._path, reason=str(error))
            for key, spent in pending.items():
                self._count(key, spent)

    def close(self) -> None:
        self.write()
        with self._lock:
            self._database.close()

    def rows(self, *, by: str = "experiment", since: str = "", tenant: str | None = None) -> list[dict[str, object]]:
        """What was used, the largest computation first.

        Args:
            by: one of BY.
            since: first day, as YYYY-MM-DD; empty: from the beginning.
            tenant: that one's alone; None: everybody's.

        Raises:
            ValueError: `by` is no such way, or `since` no date.
        """
        if by not in BY:
            raise ValueError(f"by: expected one of {', '.join(BY)}")
        first = _day(since) if since else ""
        columns = ", ".join(BY[by])
        sums = ", ".join(f"SUM({name})" for name in SPENT)
        order = "day, " if by == "day" else ""
        sql = (
            f"SELECT {columns}, {sums} FROM usage WHERE day >= ? AND (? IS NULL OR tenant = ?) "
            f"GROUP BY {columns} ORDER BY {order}SUM(computed_tokens) DESC, {columns}"
        )
        self.write()
        with self._lock:
            found = self._database.execute(sql, (first, tenant, tenant)).fetchall()
        return [dict(zip((*BY[by], *SPENT), row, strict=True)) for row in found]


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError("since: expected a day as YYYY-MM-DD") from None
