"""The score cache, between the service and the scheduler: what was scored before is answered from memory or disk, and
what is asked several times at once is computed once. Owns the tiers and the work in flight; entries are
cache_entries.py's, tiers cache_memory.py's and cache_disk.py's.

Invariants: a future given out ends at its own deadline, whatever becomes of others; a caller that leaves takes nobody's
answer away, and the last one takes the work out of the queue; a damaged entry is never answered with.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import structlog

from teacher_api.errors import DeadlineExceeded, TeacherError
from teacher_api.types import Scores
from teacher_server import cache_entries
from teacher_server.admission import Admission, Cost
from teacher_server.backends.base import ScoreJob
from teacher_server.batching import tokens_to_compute
from teacher_server.cache_config import CacheConfig
from teacher_server.cache_disk import DiskTier
from teacher_server.cache_memory import MemoryTier
from teacher_server.caller import Caller

log = structlog.get_logger("teacher_server.cache")

Result = Scores | TeacherError
Source = Literal["memory", "disk", "flight", "engine"]
SOURCES: tuple[Source, ...] = ("memory", "disk", "flight", "engine")
"""Where an answer comes from: a tier, work that another caller had begun, or the engine."""
INLINE_BYTES = 1 << 18
"""Of an entry that is sealed or opened on the event loop; larger ones are in a thread."""
MAX_TENANTS = 1024
"""Counted apart; those after them are counted as OTHERS."""
OTHERS = ""
SEALING_BYTES = 256 << 20
"""Of large answers on their way to a tier; what comes beyond it is not kept."""


@dataclass(eq=False, slots=True)
class Lookup:
    """One job on its way, and where its answer was when it was looked for."""

    job: ScoreJob
    caller: Caller
    key: bytes
    source: Source
    tokens: int = 0
    """To be computed for it, as of batching.Entry; 0 where the answer is to come from elsewhere."""
    call_tokens: int = 0
    """Of the whole call."""


@dataclass(slots=True)
class Tally:
    """Sequences of one tenant by where their answers came from, and the tokens in them."""

    sequences: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    @property
    def hit_rate(self) -> float:
        """Share of the sequences that the engine was spared, 0 to 1."""
        total = sum(self.sequences.values())
        return 1 - self.sequences["engine"] / total if total else 0.0


@dataclass(eq=False, slots=True)
class _Flight:
    """Work for one key, and who waits for it. `works` is it as each of its callers has it in the queue, until the first
    of them comes to the engine. `first` is who it counts for, or whose has begun; `held` is what it counts as where
    nothing was taken for it, or whoever had taken that has left."""

    tokens: int
    first: Lookup
    works: dict[asyncio.Future[Result], Lookup] = field(default_factory=dict)
    has_begun: bool = False
    waiting: dict[asyncio.Future[Result], tuple[Lookup, float]] = field(default_factory=dict)
    held: Cost | None = None


class ScoreCache:
    """
    Args:
        submit: puts a job into the scheduler's queue, until its deadline; what else it is given is called when the
            job goes to the engine.
        check: what is wrong with the engine's answer, in its place.
        fingerprint_of: by the teacher's name.
        spared: is told whose tokens were answered without the engine.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        submit: Callable[[Lookup, float, Callable[[], None]], asyncio.Future[Result]],
        check: Callable[[ScoreJob, Result], Result],
        fingerprint_of: Callable[[str], str],
        admission: Admission,
        spared: Callable[[Caller, int], None],
    ) -> None:
        self.config = config
        self._submit = submit
        self._check = check
        self._fingerprint_of = fingerprint_of
        self._admission = admission
        self._spared = spared
        self.memory = MemoryTier(config.memory_bytes)
        self.disk = DiskTier(config.dir, config.disk_bytes) if config.dir else None
        self.tallies: dict[str, Tally] = {}  # by tenant
        self.damaged = 0  # entries that were dropped
        self._flights: dict[bytes, _Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sealing_bytes = 0

    async def open(self) -> None:
        """Raises ValueError with one line where `cache.dir` can't be used."""
        if self.disk is not None:
            await self.disk.open()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.disk is not None:
            await self.disk.close()

    def tally_of(self, tenant: str) -> Tally:
        """What the cache did for `tenant`."""
        if tenant not in self.tallies and len(self.tallies) >= MAX_TENANTS:
            tenant = OTHERS
        return self.tallies.setdefault(tenant, Tally())

    # ---- asking ------------------------------------------------------------------------------------------------------

    async def look(self, jobs: Sequence[ScoreJob], caller: Caller, *, shares_prompts: bool = False) -> list[Lookup]:
        """Where the answer to each sequence of a call would come from now. Takes nothing.

        Args:
            shares_prompts: the engine computes a prompt that several of them have once.
        """
        lookups = await self._look(jobs, caller)
        of_engine = [lookup for lookup in lookups if lookup.source == "engine"]
        tokens = tokens_to_compute([lookup.job for lookup in of_engine], shares_prompts=shares_prompts)
        for lookup, each in zip(of_engine, tokens, strict=True):
            lookup.tokens, lookup.call_tokens = each, sum(tokens)
        return lookups

    async def _look(self, jobs: Sequence[ScoreJob], caller: Caller) -> list[Lookup]:
        if not self.config.enabled:
            return [Lookup(job, caller, b"", "engine") for job in jobs]
        owner = caller.tenant if self.config.share == "tenant" else ""
        keys = [cache_entries.key_of(job, self._fingerprint_of(job.teacher), owner) for job in jobs]
        kept: set[bytes] = set()
        if self.disk is not None:
            unknown = [key for key in keys if key not in self._flights and key not in self.memory]
            kept = await self.disk.has(unknown) if unknown else kept
        found: list[Lookup] = []
        asked: set[bytes] = set()
        for job, key in zip(jobs, keys, strict=True):
            source = self._source(key, kept, asked)
            asked.add(key)
            found.append(Lookup(job, caller, key, source))
        return found

    def _source(self, key: bytes, on_disk: set[bytes], asked: set[bytes]) -> Source:
        if key in self.memory:
            return "memory"
        if key in self._flights or key in asked:
            return "flight"
        return "disk" if key in on_disk else "engine"

    def start(self, lookup: Lookup, deadline: float) -> asyncio.Future[Result]:
        """The answer to come, at the latest at `deadline` (event-loop time), checked. Cancelling the future ends what
        is done for it alone."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Result] = loop.create_future()
        timer = loop.call_at(deadline, _expire, waiter)
        waiter.add_done_callback(lambda _: timer.cancel())
        if not lookup.key:
            self._fly(lookup, waiter, deadline)
            return waiter
        entry = self.memory.get(lookup.key)
        if entry is not None and len(entry) <= INLINE_BYTES:
            self._answer_with(entry, lookup, waiter, deadline)
        elif entry is not None or (lookup.source == "disk" and lookup.key not in self._flights):
            self._in_background(self._load(entry, lookup, waiter, deadline))
        else:
            self._fly(lookup, waiter, deadline)
        return waiter

    async def _load(self, entry: object, lookup: Lookup, waiter: asyncio.Future[Result], deadline: float) -> None:
        """Answers with a large entry, or one from the disk."""
        source: Source = "memory"
        if entry is None:
            assert self.disk is not None, "found there"
            entry, source = await self.disk.get(lookup.key), "disk"
        if entry is None:  # given up meanwhile
            self._fly(lookup, waiter, deadline)
            return
        try:
            scores = await asyncio.to_thread(self._opened, entry, lookup)
        except cache_entries.Damaged as damage:
            self._drop(lookup, source, damage)
            self._fly(lookup, waiter, deadline)
            return
        if source == "disk" and isinstance(entry, bytes):
            self.memory.put(lookup.key, entry, lookup.caller.tenant)
        self._settle(waiter, scores, lookup, source)

    def _answer_with(self, entry: bytes, lookup: Lookup, waiter: asyncio.Future[Result], deadline: float) -> None:
        try:
            self._settle(waiter, self._opened(entry, lookup), lookup, "memory")
        except cache_entries.Damaged as damage:
            self._drop(lookup, "memory", damage)
            self._fly(lookup, waiter, deadline)

    def _opened(self, entry: object, lookup: Lookup) -> Scores:
        return cache_entries.opened(entry, lookup.key, lookup.job, self._fingerprint_of(lookup.job.teacher))

    def _drop(self, lookup: Lookup, source: Source, damage: cache_entries.Damaged) -> None:
        self.damaged += 1
        log.warning("cache_entry_damaged", tier=source, cause=str(damage))
        self.memory.drop(lookup.key)
        if self.disk is not None:
            self._in_background(self.disk.drop(lookup.key))

    def _settle(self, waiter: asyncio.Future[Result], result: Result, lookup: Lookup, source: Source) -> None:
        if waiter.done():
            return
        if isinstance(result, Scores):
            tally = self.tally_of(lookup.caller.tenant)
            tally.sequences[source] += 1
            tally.tokens[source] += lookup.job.num_tokens
            if source != "engine":
                self._spared(lookup.caller, lookup.job.num_tokens)
        waiter.set_result(result)

    # ---- work in flight ----------------------------------------------------------------------------------------------

    def _fly(self, lookup: Lookup, waiter: asyncio.Future[Result], deadline: float) -> None:
        """Joins the work for this key, or begins it."""
        if waiter.done():
            return
        flight = self._flights.get(lookup.key)
        if flight is None:
            flight = _Flight(lookup.tokens or lookup.job.num_tokens, lookup)
            self._queue(flight, lookup, deadline)
            if not lookup.tokens:  # it was to come from elsewhere
                self._hold(flight)
            if lookup.key:
                self._flights[lookup.key] = flight
        elif not flight.has_begun and all(_flow(lookup) != _flow(other) for other in flight.works.values()):
            self._queue(flight, lookup, deadline)  # it is not to wait behind what another has before it
        flight.waiting[waiter] = (lookup, deadline)
        waiter.add_done_callback(lambda waiter: self._leave(flight, waiter))

    def _queue(self, flight: _Flight, lookup: Lookup, deadline: float) -> None:
        def begun() -> None:
            flight.has_begun = True
            for other in [other for other in flight.works if other is not work]:
                other.cancel()

        work = self._submit(lookup, deadline, begun)
        flight.works[work] = lookup
        work.add_done_callback(lambda work: self._landed(flight, work))

    def _hold(self, flight: _Flight) -> None:
        if flight.held is None:
            flight.held = Cost(flight.tokens, 0, flight.first.caller)
            self._admission.adopt(flight.held)

    def _leave(self, flight: _Flight, waiter: asyncio.Future[Result]) -> None:
        """The last one takes the work along; otherwise it is the next one's."""
        left = flight.waiting.pop(waiter, None)
        if left is None or any(_has_answer(work) for work in flight.works):
            return
        if not flight.waiting:
            self._end(flight)
            for work in flight.works:
                work.cancel()
            return
        own = [work for work, lookup in flight.works.items() if lookup is left[0]]
        if own and not flight.has_begun and len(flight.works) > 1:
            del flight.works[own[0]]
            own[0].cancel()
        if left[0] is flight.first:
            flight.first = next(iter(flight.waiting.values()))[0]
            self._hold(flight)

    def _landed(self, flight: _Flight, work: asyncio.Future[Result]) -> None:
        """Every caller gets the answer under its own name."""
        whose = flight.works.pop(work, None)
        if whose is None:  # given up for another's
            return
        if work.cancelled():
            if not flight.works:
                self._end(flight)
            return
        result = self._check(whose.job, work.result())
        now = asyncio.get_running_loop().time()
        late = isinstance(result, DeadlineExceeded)
        if late and flight.works:
            return
        patient = [(lookup, at) for lookup, at in flight.waiting.values() if late and at > now]
        if patient:  # it was the deadline of one who has left
            flight.first, flight.has_begun = patient[0][0], False
            self._hold(flight)
            self._queue(flight, flight.first, max(at for _, at in patient))
            return
        self._end(flight)
        if any(lookup is whose for lookup, _ in flight.waiting.values()):
            flight.first = whose
        if isinstance(result, Scores) and flight.first.key:
            self._keep(flight.first, result)
        for waiter, (lookup, _) in list(flight.waiting.items()):
            self._settle(waiter, _for(lookup, result, flight.first), lookup, _source_of(lookup, flight))

    def _end(self, flight: _Flight) -> None:
        if self._flights.get(flight.first.key) is flight:
            del self._flights[flight.first.key]
        if flight.held is not None:
            self._admission.give(flight.held)
            flight.held = None

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def _keep(self, lookup: Lookup, scores: Scores) -> None:
        size = cache_entries.num_bytes(scores)
        wanted = self.memory.fits(size) or self.disk is not None
        if wanted and size <= INLINE_BYTES:
            self._put(lookup, cache_entries.sealed(scores, lookup.key))
        elif wanted and self._sealing_bytes + size <= SEALING_BYTES:
            self._sealing_bytes += size
            self._in_background(self._seal(lookup, scores, size))

    async def _seal(self, lookup: Lookup, scores: Scores, size: int) -> None:
        try:
            self._put(lookup, await asyncio.to_thread(cache_entries.sealed, scores, lookup.key))
        finally:
            self._sealing_bytes -= size

    def _put(self, lookup: Lookup, entry: bytes) -> None:
        self.memory.put(lookup.key, entry, lookup.caller.tenant)
        if self.disk is not None:
            self.disk.put(lookup.key, entry, lookup.caller.tenant)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _expire(waiter: asyncio.Future[Result]) -> None:
    if not waiter.done():
        waiter.set_result(DeadlineExceeded("the deadline passed before this sequence was scored"))


def _has_answer(work: asyncio.Future[Result]) -> bool:
    return work.done() and not work.cancelled() and not isinstance(work.result(), DeadlineExceeded)


def _flow(lookup: Lookup) -> tuple[str, str, str]:
    """Whose place in the queue it has."""
    return lookup.caller.tenant, lookup.caller.experiment, lookup.caller.priority


def _source_of(lookup: Lookup, flight: _Flight) -> Source:
    return "engine" if lookup is flight.first else "flight"


def _for(lookup: Lookup, result: Result, first: Lookup) -> Result:
    """`result` as the answer to `lookup`."""
    if isinstance(result, TeacherError):
        return copy.copy(result)  # it gets each caller's request id
    if lookup is first:
        return result if result.id == lookup.job.id else replace(result, id=lookup.job.id)
    return replace(result, id=lookup.job.id, computed_tokens=0, cached_tokens=lookup.job.num_tokens)
