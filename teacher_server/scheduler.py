"""Between the service and a backend: a queue of jobs, batches formed as the backend's policy allows, and the one place
that survives a failing batch. Knows no requests, no transports, no limits.

Invariants: a job whose future is done (deadline, caller gone) never reaches the backend; every future ends; a job that
makes its batch fail fails alone. The queue is a seam: a fairer one has the same four methods.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import structlog

from teacher_api.errors import BackendFailed, Cancelled, DeadlineExceeded, InvalidBackendOutput, TeacherError
from teacher_api.tracing import Tracing
from teacher_api.types import Scores
from teacher_server.backends.base import BatchPolicy, ScoreJob, ScoringBackend
from teacher_server.batching import Entry, Result
from teacher_server.caller import SERVER, Caller
from teacher_server.fair import FairQueue, within
from teacher_server.forwards import Forwards

log = structlog.get_logger("teacher_server.scheduler")

RATE_HALF_LIFE = 0.8  # weight of the past in the moving average of tokens per second
RECENT_S = 5.0  # for which a caller that has no work now is expected back
TURNS_S = 1.0  # for which the number of those who share the engine is remembered
HURRIED_TURNS = 4.0  # of others to each of its own, beside which a caller would notice a longer batch,
MOST_HURRIED = 10.0  # and how many times longer batches may be beside many more
LEAST_TOKENS = 256  # in the engine at a time, however slow it is


class JobQueue(Protocol):
    """Decides who is next. Called from the event loop only."""

    def put(self, entry: Entry) -> bool:
        """Gives whether its caller uses less than its share, and so waits only for what the engine holds."""
        ...

    def discard(self, entry: Entry) -> None: ...
    def take(self, policy: BatchPolicy) -> list[Entry]: ...
    def settle(self, entry: Entry, computed_tokens: int) -> None: ...
    def __len__(self) -> int: ...

    @property
    def turns(self) -> float:
        """One over the largest share that a caller who waits now has in the engine."""
        ...


class Ledger(Protocol):
    """Is told what was done, and for whom."""

    def served(self, caller: Caller, answer: Result, engine_s: float) -> None: ...


class Scheduler:
    """Feeds one backend.

    Args:
        queue: who is next; None: everybody by a fair share.
        ledger: is told what was done.
        contended_s: how much work the engine holds, in seconds of its speed, while one of several callers uses less
            than its share, or they are few; up to MOST_HURRIED times as much while there are many.
        clock: seconds, of the event loop.
    """

    def __init__(
        self,
        backend: ScoringBackend,
        queue: JobQueue | None = None,
        forwards: Forwards | None = None,
        *,
        ledger: Ledger | None = None,
        contended_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._ledger = ledger
        self._contended_s = contended_s
        self._clock = clock
        self._forwards = Forwards(Tracing()) if forwards is None else forwards
        self._queue: JobQueue = FairQueue() if queue is None else queue
        self._arrived = asyncio.Event()
        self._ended = asyncio.Event()
        self._in_engine = 0  # tokens
        self._last: tuple[str, str, str] | None = None  # who came last,
        self._last_at = self._other_at = -math.inf  # when, and when somebody else did
        self._light_at = -math.inf  # when somebody came who uses less than its share
        self._turns, self._turns_at = math.inf, -math.inf  # fewest of late, and when
        self._slots = asyncio.Semaphore(backend.policy.max_concurrent_batches)
        self._running = 0  # batches
        self._progress_at = clock()
        self.tokens_per_s = 0.0

    def submit(
        self,
        job: ScoreJob,
        deadline: float,
        caller: Caller = SERVER,
        *,
        tokens: int = 0,
        call_tokens: int = 0,
        begun: Callable[[], None] | None = None,
    ) -> asyncio.Future[Result]:
        """Queues `job`; its future gets the scores or a typed error, at the latest at `deadline` (event-loop time).
        Cancelling the future takes the job out of the queue. `tokens`, `call_tokens` and `begun` are as of Entry."""
        loop = asyncio.get_running_loop()
        if not len(self._queue) and not self._running:
            self._progress_at = self._clock()
        entry = Entry(job, loop.create_future(), caller, self._forwards.queued(), tokens, call_tokens, begun)
        self._saw(caller)
        timer = loop.call_at(deadline, _expire, entry)

        def done(_: asyncio.Future[Result]) -> None:
            timer.cancel()
            self._queue.discard(entry)

        entry.future.add_done_callback(done)
        if self._queue.put(entry):
            self._light_at = self._clock()
        self._arrived.set()
        return entry.future

    @property
    def idle_s(self) -> float:
        """Seconds since a batch finished while there is work, 0 without work."""
        return self._clock() - self._progress_at if len(self._queue) or self._running else 0.0

    def _saw(self, caller: Caller) -> None:
        who = (caller.tenant, caller.experiment, caller.priority)
        if who != self._last:
            self._last, self._other_at = who, self._last_at
        self._last_at = self._clock()

    def _room(self) -> float:
        """Tokens that the engine may be given now. Among several callers it holds little at a time, so that who waits
        for no more than a few turns does not wait much longer for what another sent before."""
        now, turns = self._clock(), self._queue.turns
        if turns <= self._turns or now - self._turns_at > TURNS_S:
            self._turns, self._turns_at = turns, now
        if now - self._other_at > RECENT_S or not self.tokens_per_s:
            return math.inf
        longer = min(max(self._turns / HURRIED_TURNS, 1.0), MOST_HURRIED)
        held_s = self._contended_s * (1.0 if now - self._light_at <= RECENT_S else longer)
        return max(held_s * self.tokens_per_s, LEAST_TOKENS) - self._in_engine

    async def run(self) -> None:
        """Feeds the backend until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._slots.acquire()
                await self._until_there_is_work()
                policy = within(self._backend.policy, max(self._room(), 1))
                batch = list(_begun(self._queue.take(policy)))
                if batch:
                    self._running += 1
                    self._in_engine += sum(entry.tokens for entry in batch)
                    group.create_task(self._run_batch(batch))
                else:
                    self._slots.release()

    async def _until_there_is_work(self) -> None:
        """And room for it in the engine."""
        while True:
            if not len(self._queue):
                self._arrived.clear()
                await self._arrived.wait()
            elif self._running and self._room() <= 0:
                self._ended.clear()
                await self._ended.wait()
            else:
                return

    async def _run_batch(self, batch: list[Entry]) -> None:
        started, tokens = self._clock(), sum(entry.tokens for entry in batch)
        self._forwards.began()
        try:
            await self._score(batch)
        finally:
            self._progress_at = self._clock()
            took_s = max(self._progress_at - started, 1e-6)
            self._forwards.ended([entry.mark for entry in batch], started, tokens)
            self._settle(batch, took_s / self._running)
            rate = tokens / took_s * self._running  # those beside it are as fast, more or less
            self._running -= 1
            self._in_engine -= tokens
            self._slots.release()
            self._ended.set()
            past = RATE_HALF_LIFE if self.tokens_per_s else 0.0
            self.tokens_per_s = past * self.tokens_per_s + (1 - past) * rate

    def _settle(self, batch: list[Entry], engine_s: float) -> None:
        """Charges each caller what was done for it: the tokens that were computed, and its part of the time."""
        total = sum(entry.tokens for entry in batch)
        for entry in batch:
            if not entry.future.done() or entry.future.cancelled():  # of no use to anybody, and done nevertheless
                answer: Result = Cancelled("the caller had gone")
            else:
                answer = entry.future.result()
                if isinstance(answer, Scores) and answer.computed_tokens + answer.cached_tokens:
                    self._queue.settle(entry, answer.computed_tokens)
            if self._ledger is not None and entry.caller is not SERVER:
                self._ledger.served(entry.caller, answer, engine_s * entry.tokens / total)

    async def _score(self, batch: list[Entry]) -> None:
        try:
            answers = await self._backend.score([entry.job for entry in batch])
            if len(answers) != len(batch):
                raise InvalidBackendOutput(f"the engine answered {len(answers)} of {len(batch)} sequences")
        except Exception as error:  # the boundary to foreign code: an engine may raise anything
            log.warning("batch_failed", sequences=len(batch), error=type(error).__name__, exc_info=error)
            if len(batch) > 1:
                for entry in batch:
                    if not entry.future.done():
                        await self._score([entry])
                return
            answers = [_as_teacher_error(error)]
        for entry, answer in zip(batch, answers, strict=True):
            if not entry.future.done():
                entry.future.set_result(answer)


def _begun(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Those that are still wanted, one by one: the begin of one may end another."""
    for entry in entries:
        if entry.future.done():
            continue
        if entry.begun is not None:
            entry.begun()
        yield entry


def _expire(entry: Entry) -> None:
    if not entry.future.done():
        entry.future.set_result(DeadlineExceeded("the deadline passed before this sequence was scored"))


def _as_teacher_error(error: Exception) -> TeacherError:
    if isinstance(error, TeacherError):
        return error
    return BackendFailed(f"the engine failed on this sequence: {type(error).__name__}; the server's log says more")
