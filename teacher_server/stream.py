"""One stream of requests and its answers, transport-free: reads a message only when there is room, answers sequences
as they finish, and holds a bounded number of them whatever the client sends or fails to read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from teacher_api.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    TeacherError,
    TooLarge,
    Unauthenticated,
)
from teacher_api.types import Scores
from teacher_api.wire import DecodedRequest
from teacher_server.admission import Cost
from teacher_server.backends.base import ScoreJob
from teacher_server.caller import Caller
from teacher_server.service import Answer, TeacherService
from teacher_server.validation import answer_bytes, jobs_of
from teacher_server.watch import called_by

MAX_STREAM_COMPLETIONS = 1 << 18  # ids remembered to refuse repeats; a few MiB a stream
KEY_CHECK_S = 0.25  # between two looks whether the keys have changed


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing in the queue of answers: no more requests, or the error that ends the stream."""

    error: Exception | None


@contextlib.asynccontextmanager
async def taken_within(idle_s: float) -> AsyncIterator[None]:
    """Around the writing of one frame. Raises Cancelled when the caller does not take it in time."""
    try:
        async with asyncio.timeout(idle_s):
            yield
    except TimeoutError:
        raise Cancelled(f"the caller took nothing of its answer for {idle_s:g} s") from None


class StreamSession:
    """`async with StreamSession(...) as session: async for answer in session.answers(): …`

    An answer's budget is held until the next one is asked for, that is, until the transport has let go of it.

    Args:
        check: whose key the stream was opened with; raises Unauthenticated once it is nobody's. Asked when the keys
            have changed: the stream ends then, with what it has in work.
    """

    def __init__(
        self,
        service: TeacherService,
        requests: AsyncIterator[DecodedRequest],
        caller: Caller,
        transport_s: float | None,
        check: Callable[[], Caller],
    ) -> None:
        self._service = service
        self._check = check
        self._revoked: TeacherError | None = None
        self._caller = caller
        self._requests = requests
        self._transport_s = transport_s
        self._started = asyncio.get_running_loop().time()
        self._room = asyncio.Semaphore(service.config.stream_sequences)
        self._answers: asyncio.Queue[tuple[Answer, Cost | None] | _End] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Scores | TeacherError]] = set()
        self._seen: set[int] = set()
        self.in_work = 0  # sequences read and not yet delivered
        self.most_in_work = 0

    async def __aenter__(self) -> StreamSession:
        self._service.refuse_stream_if_full(self._caller)
        self._service.streams.take(self._caller.tenant)
        self._reader = asyncio.create_task(self._read())
        self._watcher = asyncio.create_task(self._watch_key())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._service.streams.give(self._caller.tenant)
        tasks = [self._reader, self._watcher, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while not self._answers.empty():
            item = self._answers.get_nowait()
            if not isinstance(item, _End):
                self._let_go(item[1])

    async def answers(self) -> AsyncGenerator[Answer, None]:
        """Answers in the order they finish. Raises the error that ended the reading once all of them are out."""
        while True:
            item = await self._answers.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            try:
                if self._revoked is not None:
                    raise self._revoked
                yield item[0]
            finally:
                self._let_go(item[1])

    def _let_go(self, cost: Cost | None) -> None:
        if cost is not None:
            self._service.admission.give(cost)
        self.in_work -= 1
        self._room.release()

    async def _watch_key(self) -> None:
        """Ends the stream when its key is revoked, or given to another tenant."""
        tenants = self._service.tenants
        seen = tenants.digests
        while self._revoked is None:
            await asyncio.sleep(KEY_CHECK_S)
            if tenants.digests is seen:
                continue
            seen = tenants.digests
            try:
                if self._check().tenant != self._caller.tenant:
                    raise Unauthenticated("the key is another tenant's now", field="authorization")
            except TeacherError as error:
                self._revoked = error
                self._reader.cancel()
                self._answers.put_nowait(_End(error))

    async def _read(self) -> None:
        error: Exception | None = None
        try:
            while (decoded := await self._next_request()) is not None:
                await self._accept(decoded)
            await asyncio.gather(*self._tasks)
        except TeacherError as refused:
            error = refused
            await asyncio.gather(*self._tasks, return_exceptions=True)
        except Exception as broken:  # whatever the transport raised: the consumer, not this task, reports it
            error = broken
        self._answers.put_nowait(_End(error))

    async def _next_request(self) -> DecodedRequest | None:
        """The next message once there is room for a sequence, None after the last. Raises Unavailable when the
        server closes to new work, though the client may be silent."""
        await self._room.acquire()
        self._room.release()
        coming = asyncio.ensure_future(anext(self._requests, None))
        closing = asyncio.ensure_future(self._service.lifecycle.closed.wait())
        try:
            await asyncio.wait({coming, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                self._service.open_info()
            return await coming
        finally:
            coming.cancel()
            closing.cancel()

    async def _accept(self, decoded: DecodedRequest) -> None:
        service = self._service
        info = service.open_info()
        self._remember(decoded.ids)
        deadline, caller = service.deadline(decoded.request, self._remaining_s()), self._caller
        try:
            caller = self._caller.named(decoded.request.metadata)
            called_by(caller)
            info = service.info_of(decoded.request.teacher)
            jobs = jobs_of(decoded, info)
        except TeacherError as refused:  # of this message only: the stream goes on
            jobs = [refused for _ in decoded.ids]
        for name, job in zip(decoded.ids, jobs, strict=True):
            await self._room.acquire()
            self.in_work += 1
            self.most_in_work = max(self.most_in_work, self.in_work)
            if isinstance(job, TeacherError):
                self._refuse(name, job, None, info.fingerprint)
                continue
            await self._start(job, answer_bytes(job, info), deadline, caller, info.fingerprint)

    def _refuse(self, name: str, error: TeacherError, job: ScoreJob | None, fingerprint: str) -> None:
        self._service.counts.refused(error, self._caller.tenant)
        self._answers.put_nowait((Answer(name, error, job, fingerprint), None))

    async def _start(self, job: ScoreJob, num_bytes: int, deadline: float, caller: Caller, fingerprint: str) -> None:
        granted = None
        try:
            if num_bytes > self._service.config.max_completion_bytes:
                raise TooLarge(
                    f"the answer would take about {num_bytes} bytes; expected at most "
                    f"{self._service.config.max_completion_bytes}: ask for fewer positions or values at a time"
                )
            (lookup,) = await self._service.cache.look([job], caller)
            cost = Cost(lookup.tokens, num_bytes, caller, (job.id,))
            async with asyncio.timeout_at(deadline):
                await self._service.admission.wait(cost)
                granted = lookup, cost
        except TimeoutError:
            late = DeadlineExceeded("the deadline passed while the server was full")
            self._refuse(job.id, late, job, fingerprint)
        except TeacherError as refused:
            self._refuse(job.id, refused, job, fingerprint)
        except asyncio.CancelledError:
            self._let_go(None)
            raise
        if granted:
            lookup, cost = granted
            task = asyncio.create_task(self._service.run_one(lookup, deadline))
            self._tasks.add(task)
            task.add_done_callback(lambda task: self._scored(task, job, cost, fingerprint))

    def _scored(self, task: asyncio.Task[Scores | TeacherError], job: ScoreJob, cost: Cost, fingerprint: str) -> None:
        """A callback, for a task that is cancelled before it has begun runs nothing of its own."""
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is not None:  # a cancelled stream, or a bug: the budget outlives both
            self._let_go(cost)
        else:
            self._answers.put_nowait((Answer(job.id, task.result(), job, fingerprint), cost))

    def _remaining_s(self) -> float | None:
        if self._transport_s is None:
            return None
        return max(self._transport_s - (asyncio.get_running_loop().time() - self._started), 0.0)

    def _remember(self, ids: Sequence[str]) -> None:
        for index, name in enumerate(ids):
            key = hash(name)
            if key in self._seen:
                raise InvalidRequest(
                    "the id was used before in this stream; expected unique ids", field=f"completions[{index}].id"
                )
            self._seen.add(key)
        if len(self._seen) > MAX_STREAM_COMPLETIONS:
            raise TooLarge(f"more than {MAX_STREAM_COMPLETIONS} completions in one stream; open a new one")
