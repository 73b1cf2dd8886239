"""Between the service and a backend: a queue of jobs, batches formed as the backend's policy allows, and the one place
that survives a failing batch. Knows no requests, no transports, no limits.

Invariants: a job whose future is done (deadline, caller gone) never reaches the backend; every future ends; a job that
makes its batch fail fails alone. The queue is a seam: a fairer one has the same four methods.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import structlog

from teacher_api.errors import BackendFailed, DeadlineExceeded, InvalidBackendOutput, TeacherError
from teacher_api.tracing import Tracing
from teacher_api.types import Scores
from teacher_server.backends.base import BatchPolicy, ScoreJob, ScoringBackend
from teacher_server.caller import Caller
from teacher_server.forwards import UNMARKED, Forwards, Mark

log = structlog.get_logger("teacher_server.scheduler")

Result = Scores | TeacherError
WINDOW = 256  # jobs behind the oldest one among which its company is looked for
MAX_PADDING = 0.25  # share of a batch's padded tokens that may be padding
RATE_HALF_LIFE = 0.8  # weight of the past in the moving average of tokens per second


OWN = Caller()
"""Whose the server's own checks are."""


@dataclass(eq=False, slots=True)
class Entry:
    job: ScoreJob
    future: asyncio.Future[Result]
    caller: Caller = OWN
    mark: Mark = UNMARKED


class JobQueue(Protocol):
    """Decides who is next. Called from the event loop only."""

    def put(self, entry: Entry) -> None: ...
    def discard(self, entry: Entry) -> None: ...
    def take(self, policy: BatchPolicy) -> list[Entry]: ...
    def __len__(self) -> int: ...


class FifoQueue:
    """The oldest job is always next; among the jobs close behind it those of the same prompt, then those of similar
    length join its batch."""

    def __init__(self) -> None:
        self._entries: dict[Entry, None] = {}

    def put(self, entry: Entry) -> None:
        self._entries[entry] = None

    def discard(self, entry: Entry) -> None:
        self._entries.pop(entry, None)

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, policy: BatchPolicy) -> list[Entry]:
        """At least one entry, from a queue that is not empty; at most what `policy` allows, unless the oldest job is
        longer than a whole batch: then that one alone."""
        window = list(islice(self._entries, WINDOW))
        batch = _company(window[0], window[1:], policy)
        for entry in batch:
            del self._entries[entry]
        return batch


def _company(head: Entry, others: Iterable[Entry], policy: BatchPolicy) -> list[Entry]:
    def distance(entry: Entry) -> tuple[bool, int]:
        same_prompt = bool(head.job.prompt_key) and entry.job.prompt_key == head.job.prompt_key
        return (not same_prompt, abs(entry.job.num_tokens - head.job.num_tokens))

    batch, longest, total, saved = [head], head.job.num_tokens, head.job.num_tokens, 0
    prompts = {head.job.prompt_key}
    for entry in sorted(others, key=distance):
        if len(batch) >= policy.max_sequences:
            break
        new_longest = max(longest, entry.job.num_tokens)
        padded, new_total = new_longest * (len(batch) + 1), total + entry.job.num_tokens
        again = policy.shares_prompts and bool(entry.job.prompt_key) and entry.job.prompt_key in prompts
        new_saved = saved + (entry.job.prompt_tokens if again else 0)
        if padded - new_saved > policy.max_tokens or padded - new_total > MAX_PADDING * padded:
            continue
        batch.append(entry)
        longest, total, saved = new_longest, new_total, new_saved
        prompts.add(entry.job.prompt_key)
    first_of_prompt: dict[bytes, int] = {}
    for place, entry in enumerate(batch):
        first_of_prompt.setdefault(entry.job.prompt_key, place)
    return sorted(batch, key=lambda entry: first_of_prompt[entry.job.prompt_key])


class Scheduler:
    def __init__(
        self, backend: ScoringBackend, queue: JobQueue | None = None, forwards: Forwards | None = None
    ) -> None:
        self._backend = backend
        self._forwards = Forwards(Tracing()) if forwards is None else forwards
        self._queue: JobQueue = FifoQueue() if queue is None else queue
        self._arrived = asyncio.Event()
        self._slots = asyncio.Semaphore(backend.policy.max_concurrent_batches)
        self._running = 0  # batches
        self._progress_at = time.monotonic()
        self.tokens_per_s = 0.0

    def submit(self, job: ScoreJob, deadline: float, caller: Caller = OWN) -> asyncio.Future[Result]:
        """Queues `job`; its future gets the scores or a typed error, at the latest at `deadline` (event-loop time).
        Cancelling the future takes the job out of the queue."""
        loop = asyncio.get_running_loop()
        if not len(self._queue) and not self._running:
            self._progress_at = time.monotonic()
        entry = Entry(job, loop.create_future(), caller, self._forwards.queued())
        timer = loop.call_at(deadline, _expire, entry)

        def done(_: asyncio.Future[Result]) -> None:
            timer.cancel()
            self._queue.discard(entry)

        entry.future.add_done_callback(done)
        self._queue.put(entry)
        self._arrived.set()
        return entry.future

    @property
    def idle_s(self) -> float:
        """Seconds since a batch finished while there is work, 0 without work."""
        return time.monotonic() - self._progress_at if len(self._queue) or self._running else 0.0

    async def run(self) -> None:
        """Feeds the backend until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._slots.acquire()
                while not len(self._queue):
                    self._arrived.clear()
                    await self._arrived.wait()
                batch = [entry for entry in self._queue.take(self._backend.policy) if not entry.future.done()]
                if batch:
                    self._running += 1
                    group.create_task(self._run_batch(batch))
                else:
                    self._slots.release()

    async def _run_batch(self, batch: list[Entry]) -> None:
        started, tokens = time.monotonic(), sum(entry.job.num_tokens for entry in batch)
        self._forwards.began()
        try:
            await self._score(batch)
        finally:
            self._progress_at = time.monotonic()
            self._forwards.ended([entry.mark for entry in batch], started, tokens)
            of_this = tokens / max(self._progress_at - started, 1e-6)
            rate = of_this * self._running  # those beside it are as fast, more or less
            self._running -= 1
            self._slots.release()
            past = RATE_HALF_LIFE if self.tokens_per_s else 0.0
            self.tokens_per_s = past * self.tokens_per_s + (1 - past) * rate

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


def _expire(entry: Entry) -> None:
    if not entry.future.done():
        entry.future.set_result(DeadlineExceeded("the deadline passed before this sequence was scored"))


def _as_teacher_error(error: Exception) -> TeacherError:
    if isinstance(error, TeacherError):
        return error
    return BackendFailed(f"the engine failed on this sequence: {type(error).__name__}; the server's log says more")
