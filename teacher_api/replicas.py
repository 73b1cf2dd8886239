"""Several servers with one teacher as one transport: chooses who is asked, leaves alone who is away until it answers
again, and holds all to one fingerprint. A single server is the simplest case. Retries nothing: a call that failed is
asked again by asking.py, and then goes to another server.

Invariants: work goes only to servers whose fingerprint is the agreed one, and, while there is one, to those that can do
what callers were told; while none is up calls wait and nothing but one small question at a time is asked of each; a
server that came back gets one call, then two, then four at a time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from teacher_api import errors
from teacher_api.endpoints import Endpoint, endpoints_of
from teacher_api.errors import FingerprintMismatch, TeacherError, Unavailable, Unsupported
from teacher_api.frames import error_in
from teacher_api.placing import Placing, groups_of, num_tokens
from teacher_api.replica import Replica
from teacher_api.transport import Transport
from teacher_api.v1 import teacher_pb2 as pb

_log = logging.getLogger("teacher_api")

PROBE_TIMEOUT_S = 5.0
LAST_ANSWERS_S = 2.0
"""After the first server has said who it is, the others have this long; who has not then is looked at later."""
LOOK_UP_S = 30.0  # between two look-ups of a name's addresses
REFUSED_PROBE_S = 30.0  # between two looks at a server with another teacher
CORRUPT_PAUSE_S = 1.0  # for which a server whose answer was damaged is asked only where there is no other
FAILED_PAUSE_S = 5.0  # the same of one whose engine failed: the server may answer all the while
FAILED = (errors.BackendFailed, errors.InvalidBackendOutput)
_FAILED_KINDS = frozenset(kind.kind for kind in FAILED)
_LIMITS = (
    "max_sequence_tokens", "max_top_k", "max_candidates", "max_completions", "max_request_bytes", "max_response_bytes",
)  # fmt: skip


class Replicas:
    """A Transport.

    Args:
        urls: of the servers; a name with several addresses is as many servers.
        open_one: makes the transport to one of them.
    """

    def __init__(self, urls: Sequence[str], open_one: Callable[[Endpoint], Transport]) -> None:
        self._urls = tuple(urls)
        self._open = open_one
        self._replicas = [Replica(Endpoint(url), open_one(Endpoint(url))) for url in self._urls]
        self._placing = Placing()
        self._fingerprints: dict[str, str] = {}  # agreed, by teacher
        self._told: dict[str, pb.TeacherInfo] = {}  # limits and features that callers were told of, by teacher
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking_up: asyncio.Task[None] | None = None
        self._beginning = asyncio.Lock()

    # ---- the transport -----------------------------------------------------------------------------------------------

    async def info(self, *, timeout_s: float, request_id: str, teacher: str = "") -> pb.TeacherInfo:
        """What all servers that answer say, with the lowest of their limits and the sum of what they compute at once.

        Raises:
            FingerprintMismatch: two of them are different teachers; names both.
            TeacherError: of a server that refuses, or of the last where none answers.
        """
        async with self._beginning:
            if self._looking_up is None:
                await self._look_up()
                self._looking_up = asyncio.get_running_loop().create_task(self._look_up_forever())
        asked = [replica for replica in self._replicas if not replica.down]
        if not asked:
            asked = [await self._waited_for(lambda: self._free(), timeout_s)]
        answers = await self._introductions(asked, timeout_s, request_id, teacher)
        found = self._agreed(answers, teacher)
        merged = pb.TeacherInfo()
        merged.CopyFrom(found[0])
        for other in found[1:]:
            _merge(merged, other)
        self._told[teacher] = told = pb.TeacherInfo()
        told.CopyFrom(merged)
        return merged

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float, request_id: str) -> pb.ScoreResponse:
        async with self._calling(request, timeout_s) as replica:
            response = await replica.transport.score(request, timeout_s=timeout_s, request_id=request_id)
            self._note(replica, response.frames)
            return response

    async def stream(
        self, request: pb.ScoreRequest, *, timeout_s: float, request_id: str
    ) -> AsyncIterator[pb.ScoreFrame]:
        async with self._calling(request, timeout_s) as replica:
            frames = replica.transport.stream(request, timeout_s=timeout_s, request_id=request_id)
            async with aclosing(frames):  # type: ignore[type-var]
                async for frame in frames:
                    self._note(replica, (frame,))
                    yield frame

    async def head(
        self, request: pb.GetHeadRequest, *, timeout_s: float, request_id: str
    ) -> AsyncIterator[pb.HeadChunk]:
        async with self._calling(None, timeout_s) as replica:
            chunks = replica.transport.head(request, timeout_s=timeout_s, request_id=request_id)
            async with aclosing(chunks):  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk

    async def close(self) -> None:
        tasks = [*self._tasks] + ([self._looking_up] if self._looking_up else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self._replicas:
            await replica.transport.close()

    # ---- choosing ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _calling(self, request: pb.ScoreRequest | None, timeout_s: float) -> AsyncIterator[Replica]:
        """Around one call: the server that it goes to, and what its end says of that server."""
        tokens, groups = (num_tokens(request), groups_of(request)) if request is not None else (0, [])

        def choose() -> Replica | None:
            free = self._free()
            return self._placing.choose(free, groups, tokens) if free else None

        replica = await self._waited_for(choose, timeout_s)
        replica.calls += 1
        replica.tokens += tokens
        try:
            yield replica
            replica.worked()
        except TeacherError as error:
            told = self._learn(replica, error)
            if told is error:
                raise
            raise told from error
        finally:
            replica.calls -= 1
            replica.tokens -= tokens
            self._tell()
            if replica.removed and not replica.calls:
                self._in_background(self._closed(replica))

    def _free(self) -> list[Replica]:
        """Servers that can be asked; those that are busy only where all are."""
        now = asyncio.get_running_loop().time()
        free = [replica for replica in self._replicas if replica.is_free]
        return [replica for replica in free if replica.busy_until <= now] or free

    async def _waited_for(self, choose: Callable[[], Any], timeout_s: float) -> Replica:
        """What `choose` gives as soon as it gives something. Raises Unavailable when it does not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (found := choose()):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            causes = "; ".join(replica.down for replica in self._replicas if replica.down) or "all are busy"
            raise Unavailable(f"no server answered within {timeout_s:.3g} s: {causes}") from None
        replica: Replica = found[0] if isinstance(found, list) else found
        return replica

    def _tell(self) -> None:
        self._changed.set()

    # ---- what a failure says -----------------------------------------------------------------------------------------

    def _learn(self, replica: Replica, error: TeacherError) -> TeacherError:
        """Draws the conclusions for `replica`. Gives the error for the caller, who is not to wait for one server while
        there is another."""
        now = asyncio.get_running_loop().time()
        if isinstance(error, Unavailable):
            self._goes(replica, error)
        elif isinstance(error, errors.DeadlineExceeded):
            self._in_background(self._suspect(replica))
        elif isinstance(error, errors.CorruptResponse):
            replica.busy_until = now + CORRUPT_PAUSE_S
        elif isinstance(error, FAILED):
            replica.busy_until = now + max(FAILED_PAUSE_S, error.retry_after_s or 0.0)
        elif isinstance(error, FingerprintMismatch) and len(self._replicas) > 1:
            self._goes(replica, error, refused=True)
            if any(not other.down for other in self._replicas):
                return Unavailable(f"{replica.endpoint} is another teacher now: {error.message}")
        elif error.retryable and error.retry_after_s is not None:
            replica.busy_until = now + error.retry_after_s
        if error.retryable and any(other.is_free and other.busy_until <= now for other in self._replicas):
            error.retry_after_s = None
        return error

    def _note(self, replica: Replica, frames: Iterable[pb.ScoreFrame]) -> None:
        """An engine's failure is told in the place of each completion."""
        if len(self._replicas) < 2:
            return
        found = [error for frame in frames if (error := error_in(frame)) is not None and error.kind in _FAILED_KINDS]
        if found:
            pause_s = max(FAILED_PAUSE_S, *(error.retry_after_s for error in found))
            replica.busy_until = asyncio.get_running_loop().time() + pause_s

    def _goes(self, replica: Replica, error: TeacherError, *, refused: bool = False) -> None:
        if replica.down or replica.removed:
            return
        replica.goes(f"{replica.endpoint}: {error.message}"[:400])
        self._placing.forget(replica)
        if len(self._replicas) > 1:
            _log.warning("teacher %s is left out: %s", replica.endpoint, error)
        self._in_background(self._return(replica, refused))

    async def _suspect(self, replica: Replica) -> None:
        """A call that got no answer in its time: is the server still there?"""
        try:
            await self._introduced(replica)
        except TeacherError as error:
            if error.retryable or isinstance(error, errors.DeadlineExceeded):
                self._goes(replica, Unavailable(error.message))

    async def _return(self, replica: Replica, refused: bool) -> None:
        """Looks at a server that is away until it is back with the agreed teacher."""
        tries = 0
        while not replica.removed:
            pause_s = REFUSED_PROBE_S * random.uniform(0.5, 1.5) if refused else replica.pause_s(tries)
            await asyncio.sleep(pause_s)
            try:
                await self._introduced(replica)
            except (FingerprintMismatch, Unsupported) as error:
                if not refused:
                    _log.warning("teacher %s stays left out: %s", replica.endpoint, error)
                refused, replica.down = True, f"{replica.endpoint}: {error.message}"[:400]
            except TeacherError as error:
                refused, replica.down, tries = False, f"{replica.endpoint}: {error.message}"[:400], tries + 1
            else:
                if len(self._replicas) > 1:
                    _log.info("teacher %s is back", replica.endpoint)
                replica.comes_back(was_away=tries > 0)
                self._tell()
                return

    async def _introduced(self, replica: Replica) -> None:
        """Asks a server who it is. Raises FingerprintMismatch where that is not the agreed teacher, and Unsupported
        where it can do less than callers were told: of one server alone that is for the client to say."""
        for teacher, agreed in list(self._fingerprints.items()) or [("", "")]:
            info = await replica.transport.info(timeout_s=PROBE_TIMEOUT_S, request_id=uuid.uuid4().hex, teacher=teacher)
            replica.fingerprints[teacher] = info.fingerprint
            if agreed and info.fingerprint != agreed and len(self._replicas) > 1:
                raise FingerprintMismatch(
                    f"expected teacher {agreed!r:.80}, at {replica.endpoint} is {info.fingerprint!r:.80}"
                )
            self._check_told(replica, info, teacher)

    def _check_told(self, replica: Replica, info: pb.TeacherInfo, teacher: str) -> None:
        """Requests are as large as the servers said that they take at first: one that takes less would refuse them.
        Where there is no other it is better than none."""
        told = self._told.get(teacher)
        if told is None or not (less := _less_than(told, info)):
            return
        if any(other is not replica and not other.down for other in self._replicas):
            raise Unsupported(f"{less}, and callers reckon with that; expected the limits and features of the others")
        if len(self._replicas) > 1:
            _log.warning("teacher %s is alone and does less than was agreed: %s", replica.endpoint, less)
        _merge(told, info)

    # ---- agreeing ----------------------------------------------------------------------------------------------------

    async def _introductions(
        self, asked: Sequence[Replica], timeout_s: float, request_id: str, teacher: str
    ) -> dict[Replica, pb.TeacherInfo | TeacherError]:
        """Who each is; those that are slower than the first by LAST_ANSWERS_S are left out."""

        async def ask(replica: Replica) -> pb.TeacherInfo | TeacherError:
            try:
                return await replica.transport.info(timeout_s=timeout_s, request_id=request_id, teacher=teacher)
            except TeacherError as error:
                return error

        tasks = {asyncio.ensure_future(ask(replica)): replica for replica in asked}
        try:
            waiting = set(tasks)
            while waiting and not any(t.done() and isinstance(t.result(), pb.TeacherInfo) for t in tasks):
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if waiting:
                await asyncio.wait(waiting, timeout=LAST_ANSWERS_S)
            late = Unavailable(f"said nothing within {LAST_ANSWERS_S:g} s of the first")
            return {replica: task.result() if task.done() else late for task, replica in tasks.items()}
        finally:
            for task in tasks:
                task.cancel()

    def _agreed(self, answers: dict[Replica, pb.TeacherInfo | TeacherError], teacher: str) -> list[pb.TeacherInfo]:
        found = {replica: info for replica, info in answers.items() if isinstance(info, pb.TeacherInfo)}
        for replica, error in answers.items():
            if isinstance(error, TeacherError):
                if not error.retryable and not isinstance(error, errors.DeadlineExceeded):
                    raise error
                if isinstance(error, Unavailable) or found:
                    self._goes(replica, error)
        if not found:
            raise next(error for error in answers.values() if isinstance(error, TeacherError))
        agreed = self._fingerprints.get(teacher)
        if agreed is not None and any(info.fingerprint == agreed for info in found.values()):
            for replica in [replica for replica, info in found.items() if info.fingerprint != agreed]:
                other = found.pop(replica).fingerprint
                error = FingerprintMismatch(f"expected teacher {agreed!r:.80}, here is {other!r:.80}")
                self._goes(replica, error, refused=True)
        first, *others = found
        for other_one in others:
            if found[other_one].fingerprint != found[first].fingerprint:
                raise FingerprintMismatch(
                    f"expected replicas of one teacher; at {first.endpoint} is {found[first].fingerprint!r:.80} "
                    f"({found[first].model_name!r:.80}), at {other_one.endpoint} is "
                    f"{found[other_one].fingerprint!r:.80} ({found[other_one].model_name!r:.80})"
                )
        self._fingerprints.setdefault(teacher, found[first].fingerprint)
        return list(found.values())

    # ---- addresses ---------------------------------------------------------------------------------------------------

    async def _look_up_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_UP_S * random.uniform(0.5, 1.5))
            await self._look_up()

    async def _look_up(self) -> None:
        """Servers at new addresses are introduced before they get work; those whose address is gone end what they have.
        A name that has no address at the moment changes nothing."""
        wanted: list[Endpoint] = []
        for url in self._urls:
            wanted += await endpoints_of(url) or [r.endpoint for r in self._replicas if r.endpoint.url == url]
        known = {replica.endpoint: replica for replica in self._replicas}
        if set(known) == set(wanted):
            return
        begun = bool(self._fingerprints)
        for endpoint, replica in known.items():
            if endpoint not in wanted:
                replica.removed = True
                self._placing.forget(replica)
                if not replica.calls:
                    self._in_background(self._closed(replica))
        added = [Replica(endpoint, self._open(endpoint)) for endpoint in wanted if endpoint not in known]
        self._replicas = [replica for replica in self._replicas if not replica.removed] + added
        for replica in added if begun else ():
            replica.down = f"{replica.endpoint}: not asked yet"
            self._in_background(self._return(replica, refused=False))
        self._tell()

    async def _closed(self, replica: Replica) -> None:
        await replica.transport.close()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _less_than(told: pb.TeacherInfo, info: pb.TeacherInfo) -> str:
    """What `info` has less of than `told`, in words; empty: nothing."""
    for name in _LIMITS:
        if getattr(info, name) < getattr(told, name):
            return f"its {name} is {getattr(info, name)}, that of the others {getattr(told, name)}"
    missing = [value for value in told.features if value not in info.features]
    return f"it has not the features {', '.join(missing)[:200]}" if missing else ""


def _merge(info: pb.TeacherInfo, other: pb.TeacherInfo) -> None:
    """What both can do."""
    for name in _LIMITS:
        setattr(info, name, min(getattr(info, name), getattr(other, name)))
    known = info.batch_tokens and other.batch_tokens
    info.batch_tokens = info.batch_tokens + other.batch_tokens if known else 0  # they work at the same time
    for name in ("features", "teachers"):
        both = [value for value in getattr(info, name) if value in getattr(other, name)]
        del getattr(info, name)[:]
        getattr(info, name).extend(both)
