"""Which server samples what, and that each has the current weights before it does. Lives on an event loop in a thread
of its own, so that servers are looked after while the trainer learns.

A server is usable from the moment it is known to have the current weights until one call to it fails. One that is not
is asked again and again; where it answers with other weights (it was started anew), rank 0 hands over the current ones
first. A completion whose server fails is sampled elsewhere, by the same random numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from student_trainer.rollout.base import RolloutError, RolloutGone
from student_trainer.rollout.servers.links import Link
from student_trainer.rollout.servers.remote import (
    PROBE_TIMEOUT_S,
    HasOtherWeights,
    Info,
    Remote,
    Unavailable,
)
from student_trainer.rollout.transfer import Packed, TransferError
from student_trainer.rollout.vllm_side.request import Draws, Record, Weights
from teacher_api.types import FloatArray, IntArray

T = TypeVar("T")
PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0)
"""Between looks at a server that is away, and before one that answers them but fails at completions is asked for more;
the last one from then on."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Weights on the host as they are now, and what the trainer computes with them."""

    packed: Packed
    text: IntArray
    logprobs: FloatArray  # of `text`, from its second token on
    compare: Callable[[FloatArray, FloatArray, str], float]
    """Of the trainer's and a server's logprobs and the server's URL: the difference; raises RolloutError over the
    bound."""


@dataclass(frozen=True, slots=True)
class Job:
    """One completion."""

    place: int
    prompt_ids: IntArray
    draws: Draws

    @property
    def tokens(self) -> int:
        """At most, for balancing."""
        return len(self.prompt_ids) + self.draws.max_new_tokens


@dataclass(eq=False)
class _Server:
    remote: Remote
    info: Info | None = None
    usable: bool = False
    cause: str = "not asked yet"  # why it is not usable
    failures: int = 0  # in a row, since it was last usable
    returns: int = 0  # with the weights it had, since it last finished a completion
    running: int = 0
    owed_tokens: int = 0
    link: Link | None = None
    linked_to: str = ""  # instance
    checked: tuple[str, Weights] | None = None  # instance, and weights that it was found to compute with
    wake: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class Batch:
    """Completions under way; results in any order."""

    results: queue.SimpleQueue[tuple[int, Record] | Exception] = field(default_factory=queue.SimpleQueue)
    future: Future[None] | None = None

    def cancel(self) -> None:
        if self.future is not None:
            self.future.cancel()

    def ended(self, future: Future[None]) -> None:
        """Nobody waits for what does not come any more."""
        if future.cancelled():
            self.results.put(RolloutError("sampling was given up: its servers are no longer asked"))


class Pool:
    """Methods are called from the trainer's thread.

    Args:
        check: raises ValueError for a server that can't sample for this run, which ends the pool.
        make_link: for a server that is to get weights; None on ranks that hand none over.
        most_running: completions in flight at one server.
        timeout_s: how long none may be usable, or all completions may fail, before RolloutGone.
        attempt_timeout_s: of one completion and of one hand-over.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str,
        check: Callable[[str, Info], None],
        make_link: Callable[[str, Info], Link] | None,
        most_running: int,
        timeout_s: float,
        attempt_timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._urls = list(urls)
        self._check, self._make_link = check, make_link
        self._most_running = most_running
        self._timeout_s, self._attempt_timeout_s = timeout_s, attempt_timeout_s
        self._weights: Weights | None = None
        self._snapshot: Snapshot | None = None
        self._away_since = time.monotonic()
        self._failing_since: float | None = None  # the first failed completion after the last one that was not
        self._fatal: Exception | None = None
        self._changes = 0
        self.retried = self.handed_over = 0
        """Completions that were sampled again; hand-overs of weights, to all servers."""
        self.gap = 0.0
        """Largest difference that a hand-over of the current weights left, in nats."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-servers", daemon=True)
        self._thread.start()
        self._servers: list[_Server] = []
        self._watches: list[asyncio.Task[None]] = []
        self._run(self._begin(api_key, transport))

    def greet(self, timeout_s: float) -> None:
        """Waits until one server answers, and those that are there beside it have.

        Raises:
            RolloutGone: none does within `timeout_s`. ValueError: not a rollout server, the wrong key, or what `check`
            raised.
        """
        self._run(self._greet(timeout_s))

    def use(self, weights: Weights, snapshot: Snapshot) -> list[str]:
        """From here on, `weights` are current. Waits until every server that was usable has them or failed to get them,
        and one has.

        Returns:
            URLs of those that have them.
        Raises:
            RolloutGone: none got them within the budget. RolloutError: one computes something else with them.
        """
        return self._run(self._use(weights, snapshot))

    def adopt(self, weights: Weights, urls: Iterable[str]) -> None:
        """The same on the other ranks: the servers at `urls` have them."""
        self._run(self._adopt(weights, set(urls)))

    def forget(self) -> None:
        """No weights are current any more; what they took on the host is free."""
        self._run(self._forget())

    def sample(self, groups: Sequence[Sequence[Job]], stop_ids: Sequence[int], keep_top_k: int) -> Batch:
        """Begins; each group goes to one server. Results, or the failure that ends the batch, come in its queue; so
        does the pool's end."""
        batch = Batch()
        work = self._sample(batch, groups, stop_ids, keep_top_k)
        batch.future = asyncio.run_coroutine_threadsafe(work, self._loop)
        batch.future.add_done_callback(batch.ended)
        return batch

    @property
    def num_usable(self) -> int:
        return sum(server.usable for server in self._servers)

    def close(self) -> None:
        """Ends all calls and the thread. Idempotent."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(PROBE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PROBE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return running.result()
        except BaseException:  # a signal, too
            running.cancel()
            raise

    async def _begin(self, api_key: str, transport: httpx.AsyncBaseTransport | None) -> None:
        self._change = asyncio.Condition()
        self._servers = [_Server(Remote(url, api_key, transport)) for url in self._urls]
        self._watches = [asyncio.create_task(self._watch(server)) for server in self._servers]

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers:
            await server.remote.close()

    async def _greet(self, timeout_s: float) -> None:
        began = time.monotonic()
        await self._until(lambda: any(s.info for s in self._servers), began, timeout_s)
        # The others, unless they are away.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._until(lambda: all(s.info or s.failures for s in self._servers), began, math.inf)

    async def _use(self, weights: Weights, snapshot: Snapshot) -> list[str]:
        asked = [s for s in self._servers if s.info is not None and not s.failures]
        self._set(weights, snapshot)
        self.gap = 0.0
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):  # one that hangs is not waited for while others sample
            async with asyncio.timeout(self._timeout_s):
                await self._until(lambda: all(s.usable or s.failures for s in asked), began, math.inf)
        await self._until(lambda: any(s.usable for s in self._servers), self._away_since, self._timeout_s)
        return [s.remote.url for s in self._servers if s.usable]

    async def _adopt(self, weights: Weights, urls: set[str]) -> None:
        self._set(weights, None)
        for server in self._servers:
            if server.remote.url in urls:
                await self._now_usable(server)

    async def _forget(self) -> None:
        self._set(None, None)

    def _set(self, weights: Weights | None, snapshot: Snapshot | None) -> None:
        self._weights, self._snapshot = weights, snapshot
        self._away_since, self._failing_since = time.monotonic(), None
        for server in self._servers:
            server.usable = False
            server.cause = "has not got the weights yet"
            server.wake.set()

    async def _until(self, holds: Callable[[], bool], since: float, timeout_s: float) -> None:
        """Raises what ended the pool, or RolloutGone."""
        async with self._change:
            while not holds():
                if self._fatal is not None:
                    raise self._fatal
                left = since + timeout_s - time.monotonic()
                if left <= 0:
                    raise self._gone(time.monotonic() - since)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if left == math.inf else left):
                        await self._change.wait()

    def _gone(self, seconds: float) -> RolloutGone:
        away = [s for s in self._servers if s.cause]
        causes = "; ".join(s.cause if s.remote.url in s.cause else f"{s.remote.url}: {s.cause}" for s in away)
        return RolloutGone(", ".join(self._urls), seconds, causes)

    async def _notify(self) -> None:
        self._changes += 1
        async with self._change:
            self._change.notify_all()

    async def _ends(self, error: Exception) -> None:
        self._fatal = error
        await self._notify()

    async def _now_usable(self, server: _Server) -> None:
        server.usable, server.failures, server.cause = True, 0, ""
        await self._notify()

    async def _failed(self, server: _Server, error: Exception) -> None:
        """From now on it is watched until it is usable again."""
        if server.usable and self.num_usable == 1:
            self._away_since = time.monotonic()
        server.usable = False
        server.failures += 1
        server.cause = " ".join(str(error).split())[:300] or type(error).__name__
        server.wake.set()
        await self._notify()

    async def _watch(self, server: _Server) -> None:
        """For as long as the pool is there: brings the server to the current weights whenever it has not got them."""
        while True:
            if server.usable or (self._weights is None and server.info is not None):
                await server.wake.wait()
            server.wake.clear()
            if server.usable:
                continue
            try:
                await self._bring(server)
            except (Unavailable, HasOtherWeights, TransferError, TimeoutError, OSError) as error:
                server.link = None
                await self._failed(server, error)
            except (ValueError, RolloutError) as error:
                await self._ends(error)
                return
            except RuntimeError as error:  # of torch's and vLLM's transports, which have no types of their own
                server.link = None
                await self._failed(server, error)
            except Exception as error:  # a bug: whoever waits for this server must hear of it
                await self._ends(error)
                return
            if not server.usable:
                pause = PAUSES_S[min(server.failures, len(PAUSES_S)) - 1] if server.failures else PAUSES_S[0]
                server.wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await server.wake.wait()

    async def _bring(self, server: _Server) -> None:
        info = await server.remote.info()
        self._check(server.remote.url, info)
        server.info = info
        await self._notify()
        weights, snapshot = self._weights, self._snapshot
        if weights is None:
            return
        if snapshot is None or self._make_link is None:
            if info.weights != weights:
                server.cause = "has other weights"  # rank 0 is about to hand over the current ones
                return
        elif info.weights != weights or server.checked != (info.instance, weights):
            # What a server says it has counts once it was checked: a hand-over may have failed after it had them.
            await self._hand_over(server, info, weights, snapshot)
            server.returns = -1
        server.returns += 1
        if server.returns > 1:
            await asyncio.sleep(PAUSES_S[min(server.returns - 1, len(PAUSES_S)) - 1])
        if weights == self._weights:
            await self._now_usable(server)

    async def _hand_over(self, server: _Server, info: Info, weights: Weights, snapshot: Snapshot) -> None:
        """Raises RolloutError where the server computes something else than the trainer afterwards."""
        assert self._make_link is not None, "only rank 0 hands over"
        remote, limit = server.remote, self._attempt_timeout_s
        if server.link is None or server.linked_to != info.instance:
            link = await self._in_thread(self._make_link, remote.url, info)
            await self._in_thread(link.open, lambda p: self._future(remote.connect(p, limit)))
            server.link, server.linked_to = link, info.instance
        take = await self._in_thread(
            server.link.send, snapshot.packed, lambda p: self._future(remote.take(weights, p, limit))
        )
        if take and take != snapshot.packed.digest:
            raise Unavailable(f"{remote.url}: other bytes arrived than were sent")
        theirs = await remote.logprobs(weights, snapshot.text, limit)
        self.gap = max(self.gap, snapshot.compare(snapshot.logprobs, theirs, remote.url))
        self.handed_over += 1
        server.checked = (info.instance, weights)

    def _future(self, call: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """In a thread of its own, which nobody waits for where the work hangs: longer than two timeouts is hung."""
        done: asyncio.Future[T] = self._loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if not done.done():
                done.set_exception(error) if error is not None else done.set_result(value)

        def run() -> None:
            try:
                value, error = work(*arguments), None
            except BaseException as caught:  # whatever it is, the waiting side must hear of it
                value, error = None, caught
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(settle, value, error)

        threading.Thread(target=run, name="rollout-weights", daemon=True).start()
        async with asyncio.timeout(2 * self._attempt_timeout_s):
            return await done

    async def _sample(
        self, batch: Batch, groups: Sequence[Sequence[Job]], stop_ids: Sequence[int], keep_top_k: int
    ) -> None:
        waiting = deque(list(group) for group in groups)
        running = 0

        async def complete(server: _Server, job: Job) -> None:
            nonlocal running
            record = await self._one(server, job, stop_ids, keep_top_k)
            if record is None:
                self._require_budget()
                self.retried += 1
                waiting.appendleft([job])
            else:
                self._failing_since = None
                batch.results.put((job.place, record))
            running -= 1
            await self._notify()

        try:
            async with asyncio.TaskGroup() as tasks:
                while waiting or running:
                    seen = self._changes
                    while waiting and (server := self._free()) is not None:
                        for job in waiting.popleft():
                            server.running += 1
                            server.owed_tokens += job.tokens
                            running += 1
                            tasks.create_task(complete(server, job))
                    # While one is usable, every call's own deadline sees to it that something happens.
                    limit = math.inf if self.num_usable else self._timeout_s
                    await self._until(functools.partial(self._has_changed, seen), self._away_since, limit)
        except* Exception as errors:
            batch.results.put(_first(errors))

    def _require_budget(self) -> None:
        """After a completion that failed: servers may answer every look and fail at all that they are asked for."""
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        elif now - self._failing_since > self._timeout_s:
            raise self._gone(now - self._failing_since)

    def _has_changed(self, since: int) -> bool:
        return self._changes != since

    def _free(self) -> _Server | None:
        """The usable server with the least left to do."""
        free = [s for s in self._servers if s.usable and s.running < self._most_running]
        return min(free, key=lambda s: s.owed_tokens, default=None)

    async def _one(self, server: _Server, job: Job, stop_ids: Sequence[int], keep_top_k: int) -> Record | None:
        """None where it has to be sampled again."""
        weights = self._weights
        assert weights is not None, "use() or adopt() comes first"
        try:
            record = await server.remote.sample(
                weights, job.prompt_ids, job.draws, stop_ids, keep_top_k, self._attempt_timeout_s
            )
            if not (record.versions == weights.version).all():
                raise HasOtherWeights(
                    f"{server.remote.url}: tokens of versions {sorted(set(record.versions.tolist()))}"
                )
        except (Unavailable, HasOtherWeights) as error:
            await self._failed(server, error)
            return None
        else:
            server.returns = 0
            return record
        finally:
            server.running -= 1
            server.owed_tokens -= job.tokens


def _first(errors: BaseExceptionGroup[Exception]) -> Exception:
    """Of a group, groups inside it included."""
    inner: BaseException = errors
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    assert isinstance(inner, Exception), "except* takes no others"
    return inner
