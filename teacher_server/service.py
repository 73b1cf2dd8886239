"""The transport-free core: validate -> admit -> schedule -> check the output. Both transports call it and nothing
else; it knows neither bytes nor sockets.

Invariants: what was admitted is given back when its answer has left or its caller has gone; a failing sequence is its
own answer, never its neighbours'; nothing unchecked leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from teacher_api.errors import DeadlineExceeded, Overloaded, TeacherError, TooLarge, Unavailable, unknown_teacher
from teacher_api.tracing import Tracing
from teacher_api.types import ScoreOptions, ScoreRequest, Scores, TeacherInfo
from teacher_api.wire import DecodedRequest
from teacher_server.admission import Admission, Cost
from teacher_server.auth import tenants_of
from teacher_server.backends.base import ModelFacts, ScoreJob, ScoringBackend
from teacher_server.backends.generation import Generator
from teacher_server.cache import Lookup, ScoreCache
from teacher_server.caller import DEFAULT_TENANT, Caller
from teacher_server.config import ServerConfig
from teacher_server.counts import Counts
from teacher_server.fair import FairQueue
from teacher_server.forwards import Forwards
from teacher_server.head_share import (
    HeadAccess,
    HeadFile,
    as_client_has_it,
    check_can_share,
    check_head,
    offered,
    write_head,
)
from teacher_server.history import History
from teacher_server.identity import teacher_infos
from teacher_server.lifecycle import Lifecycle
from teacher_server.output_check import checked
from teacher_server.places import Places, Receiving
from teacher_server.scheduler import Scheduler
from teacher_server.usage import Usage
from teacher_server.validation import answer_bytes, check_fingerprint, jobs_of
from teacher_server.watch import called_by

RETRY_WHILE_STARTING_S = 1.0
RETRY_WHILE_FULL_S = 5.0
ENGINE_CHECK_S = 0.5
SELF_CHECK_TOKENS = 8
SELF_CHECK_TIMEOUT_S = 120.0
SELF_CHECK_NATS = 1e-3  # how far the log of a row's whole mass may be from 0


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one completion. `job` is what was scored; None where the request for it was refused. `fingerprint` is that of
    the teacher that was asked, the base's where there is no such teacher."""

    completion_id: str
    result: Scores | TeacherError
    job: ScoreJob | None
    fingerprint: str


class TeacherService:
    def __init__(self, config: ServerConfig, lifecycle: Lifecycle, tracing: Tracing | None = None) -> None:
        self.config = config
        self.tracing = tracing or Tracing()
        self.forwards = Forwards(self.tracing)
        self.lifecycle = lifecycle
        self._infos: dict[str, TeacherInfo] = {}  # by teacher, the base's under ""; empty while the model loads
        self._scheduler: Scheduler | None = None
        self._backend: ScoringBackend | None = None
        self.counts = Counts()
        self.began = time.monotonic()
        self.generator: Generator | None = None  # what writes text, once the model is loaded
        self._head_access = HeadAccess(config)
        self._head_file: HeadFile | None = None
        self.tenants = tenants_of(config)
        self.usage = Usage(config.usage_file)
        self.admission = Admission(
            config.queue_tokens,
            config.queue_bytes,
            self._tokens_per_s,
            weight_of=self.tenants.weight_of,
            rate_of=self.tenants.rate_of,
        )
        self.streams = Places(config.max_streams, self._is_shared)
        self.calls = Places(config.max_calls, self._is_shared)
        self.receiving = Receiving(Places(config.receiving_bytes, self._is_shared))
        self.history = History(self.counts, lambda: self.admission.tokens, self.admission.held_by_tenant)
        self.cache = ScoreCache(
            config.cache,
            submit=self._submit,
            check=self._checked,
            fingerprint_of=lambda teacher: self.info_of(teacher).fingerprint,
            admission=self.admission,
            spared=self.usage.cached,
        )
        lifecycle.watch_work(lambda: self.idle_s, lambda: self.admission.share)

    def _is_shared(self) -> bool:
        """Whether several tenants have keys."""
        return len({*self.tenants.names, *((DEFAULT_TENANT,) if self.config.api_keys else ())}) > 1

    def _tokens_per_s(self) -> float:
        return self._scheduler.tokens_per_s if self._scheduler else 0.0

    @property
    def idle_s(self) -> float:
        """Seconds for which work has waited without a forward having finished."""
        return self._scheduler.idle_s if self._scheduler else 0.0

    async def serve(self, backend: ScoringBackend, facts: ModelFacts) -> None:
        """Runs the scheduler until cancelled; ready once the self-check has passed.

        Raises:
            ValueError: the model can't be served with these settings, or fails its self-check.
        """
        self.generator = backend.generator
        features = backend.features | ({"generate"} if backend.generator else set())
        infos = teacher_infos(self.config, features, facts)
        info = infos[""]
        if info.max_sequence_tokens > self.config.queue_tokens:
            raise ValueError(
                f"queue_tokens {self.config.queue_tokens} is below the model's longest sequence of "
                f"{info.max_sequence_tokens} tokens; raise queue_tokens or lower max_sequence_tokens"
            )
        self._scheduler = scheduler = Scheduler(
            backend,
            FairQueue(self.tenants.weight_of),
            self.forwards,
            ledger=self.usage,
            contended_s=self.config.contended_s,
        )
        self._backend = backend
        watching = asyncio.create_task(self.tenants.watch())
        tasks = [asyncio.create_task(scheduler.run()), asyncio.create_task(self.usage.keep())]
        scratch = tempfile.TemporaryDirectory(prefix="teacher-head-") if self.config.share_head != "none" else None
        try:
            for name, each in infos.items():
                await self_check(scheduler, each, name)
            if scratch is not None:  # adapters have their base's
                infos[""] = await self._share_head(backend, scheduler, infos[""], Path(scratch.name))
            await self.cache.open()
            self._infos = infos
            self.lifecycle.become_ready()
            tasks.append(asyncio.create_task(self._watch_engine(backend)))
            tasks.append(asyncio.create_task(self.history.run()))
            await asyncio.gather(*tasks)
        finally:
            for task in (watching, *tasks):
                task.cancel()
            await asyncio.gather(watching, *tasks, return_exceptions=True)
            await self.cache.close()
            if scratch is not None:
                scratch.cleanup()

    async def _share_head(
        self, backend: ScoringBackend, scheduler: Scheduler, info: TeacherInfo, directory: Path
    ) -> TeacherInfo:
        """Makes the head's file once the head is known to be the model's. Raises ValueError where it is not."""
        check_can_share(info)
        head = await asyncio.to_thread(backend.output_head)

        async def ask(job: ScoreJob) -> Scores | TeacherError:
            deadline = asyncio.get_running_loop().time() + SELF_CHECK_TIMEOUT_S
            return checked(job, await scheduler.submit(job, deadline), info.tokenizer_size)

        await check_head(await asyncio.to_thread(as_client_has_it, head, info), info, ask)
        self._head_file = await asyncio.to_thread(write_head, head, info, directory)
        return offered(info, self._head_file)

    def head_file(self, authorization: str | None, expect_fingerprint: str, caller: Caller) -> HeadFile:
        """The output head, for a caller who may have it.

        Raises:
            PermissionDenied: it is not shared, or not with this key.
            FingerprintMismatch: the caller expects another teacher.
            TeacherError: the server is not ready, or full.
        """
        info = self.open_info()
        self._head_access.check(authorization)
        check_fingerprint(expect_fingerprint, info)
        self.refuse_stream_if_full(caller)
        assert self._head_file is not None, "share_head without a head"
        return self._head_file

    async def head_pieces(
        self, file: HeadFile, piece_bytes: int, caller: Caller, check: Callable[[], Caller]
    ) -> AsyncGenerator[bytes, None]:
        """The file; while it is being sent it counts as a stream.

        Args:
            check: whose key it was asked for with. Raises Unauthenticated once it is nobody's: no more is sent then.
        """
        with self.streams.held(caller.tenant):
            async with contextlib.aclosing(file.pieces(piece_bytes)) as pieces:
                async for piece in pieces:
                    check()
                    yield piece

    async def _watch_engine(self, backend: ScoringBackend) -> None:
        """Tells the probes of an engine that died or hangs. It is asked, for no work comes to a server that is not
        ready."""
        while True:
            if not backend.is_up():
                trouble = "restarting: the engine died and is being started again"
            else:
                trouble = "hanging: a process of the engine was stopped" if backend.is_frozen() else ""
            self.lifecycle.engine_is(trouble)
            await asyncio.sleep(ENGINE_CHECK_S)

    @property
    def engine_restarts(self) -> int:
        return self._backend.restarts if self._backend else 0

    @property
    def known_info(self) -> TeacherInfo | None:
        """Who is here; None while the model loads."""
        return self._infos.get("")

    @property
    def info(self) -> TeacherInfo:
        """Who is here: the base. Raises Unavailable while the model loads."""
        return self.info_of("")

    def info_of(self, teacher: str) -> TeacherInfo:
        """As `info`, of an adapter by its name. Raises NotFound where there is none."""
        if not self._infos:
            raise Unavailable("the model is still loading; /readyz says when", retry_after_s=RETRY_WHILE_STARTING_S)
        if teacher not in self._infos:
            raise unknown_teacher(teacher, self.info.teachers)
        return self._infos[teacher]

    def open_info(self, teacher: str = "") -> TeacherInfo:
        """As `info_of`, for new work. Raises Unavailable when the server no longer takes any."""
        if self.lifecycle.closed.is_set():
            raise Unavailable("the server is shutting down; try another, or this one again after its restart")
        return self.info_of(teacher)

    def refuse_stream_if_full(self, caller: Caller) -> None:
        if not self.streams.has_room(caller.tenant):
            raise Overloaded(
                f"as many streams are open as this server keeps, {self.streams.most}, or as are this tenant's part; "
                "come back later",
                retry_after_s=RETRY_WHILE_FULL_S,
            )

    def deadline(self, request: ScoreRequest, transport_s: float | None) -> float:
        """Event-loop time at which the nearest of the request's, the transport's and the server's limits is over."""
        limits = [self.config.default_timeout_s] if request.timeout_s is None else [request.timeout_s]
        if transport_s is not None:
            limits.append(transport_s)
        return asyncio.get_running_loop().time() + min(limits)

    @contextlib.asynccontextmanager
    async def scored(
        self,
        decoded: DecodedRequest,
        caller: Caller,
        *,
        transport_s: float | None = None,
        max_bytes: int | None = None,
    ) -> AsyncIterator[list[Answer]]:
        """Scores one request whole: one answer per completion, in order. Its budget is held until the block ends,
        which is when the answer has been delivered.

        Args:
            caller: whoever has the key; the request says for which of its experiments.
            transport_s: time that the transport's own deadline leaves; None: it has none.
            max_bytes: largest answer of this way in, where it takes less than `max_response_bytes`.

        Raises:
            TeacherError: nothing of the request was scored: it is wrong as a whole, none of its completions is
                acceptable (the first one's error), the answer would be too large for one message, the server is
                full or not ready, or the deadline passed.
        """
        info = self.open_info(decoded.request.teacher)
        caller = caller.named(decoded.request.metadata)
        called_by(caller)
        jobs = jobs_of(decoded, info)
        good = [job for job in jobs if isinstance(job, ScoreJob)]
        if not good:
            raise next(job for job in jobs if isinstance(job, TeacherError))
        sizes = [answer_bytes(job, info) for job in good]
        limit = info.max_response_bytes if max_bytes is None else min(max_bytes, info.max_response_bytes)
        if sum(sizes) > limit:
            raise TooLarge(
                f"the answer would take about {sum(sizes)} bytes; this call gives at most {limit}: "
                "use the stream, or send fewer completions",
                field="completions",
            )
        deadline = self.deadline(decoded.request, transport_s)
        lookups = await self.cache.look(good, caller, shares_prompts=self._shares_prompts)
        cost = Cost(sum(lookup.tokens for lookup in lookups), sum(sizes), caller, hash((*decoded.ids,)))
        self.admit(cost)
        try:
            results = iter(await self._counted(jobs, lookups, deadline, caller))
            yield _paired(decoded.ids, jobs, results, info.fingerprint)  # not kept here while they are sent
        finally:
            self.admission.give(cost)

    async def _counted(
        self,
        jobs: Sequence[ScoreJob | TeacherError],
        lookups: Sequence[Lookup],
        deadline: float,
        caller: Caller,
    ) -> list[Scores | TeacherError]:
        for job in jobs:
            if isinstance(job, TeacherError):
                self.counts.refused(job, caller.tenant)
        with self.counts.scoring(len(lookups), caller.tenant) as done:
            done.extend(await self._run(lookups, deadline))
        return done

    def admit(self, cost: Cost) -> None:
        """Takes `cost` at once, or refuses and notes what was refused. Raises Overloaded or TooLarge."""
        try:
            self.admission.take(cost)
        except Overloaded:
            self.usage.refused(cost.caller, cost.tokens)
            raise

    @property
    def _shares_prompts(self) -> bool:
        return self._backend is not None and self._backend.policy.shares_prompts

    async def _run(self, lookups: Sequence[Lookup], deadline: float) -> list[Scores | TeacherError]:
        futures = [self.cache.start(lookup, deadline) for lookup in lookups]
        try:
            results = [await future for future in futures]
        finally:
            for future in futures:
                future.cancel()
        late = next((result for result in results if isinstance(result, DeadlineExceeded)), None)
        if late is not None:
            raise late
        return results

    async def run_one(self, lookup: Lookup, deadline: float) -> Scores | TeacherError:
        """Scores one admitted job; for the stream. Cancelling the call takes it out of the queue."""
        with self.counts.scoring(1, lookup.caller.tenant) as done:
            done.append(await self.cache.start(lookup, deadline))
        return done[0]

    def _submit(
        self, lookup: Lookup, deadline: float, begun: Callable[[], None]
    ) -> asyncio.Future[Scores | TeacherError]:
        assert self._scheduler is not None, "ready without a scheduler"
        tokens = {"tokens": lookup.tokens, "call_tokens": lookup.call_tokens}
        return self._scheduler.submit(lookup.job, deadline, lookup.caller, begun=begun, **tokens)

    def _checked(self, job: ScoreJob, result: Scores | TeacherError) -> Scores | TeacherError:
        info = self.info_of(job.teacher)
        answer = checked(job, result, info.tokenizer_size)
        return answer if isinstance(answer, TeacherError) else replace(answer, fingerprint=info.fingerprint)


def _paired(
    ids: Sequence[str],
    jobs: Sequence[ScoreJob | TeacherError],
    scored: Iterator[Scores | TeacherError],
    fingerprint: str,
) -> list[Answer]:
    """One answer per id: the next of `scored`, or what its request was refused with."""
    answers = [
        Answer(name, next(scored), job, fingerprint)
        if isinstance(job, ScoreJob)
        else Answer(name, job, None, fingerprint)
        for name, job in zip(ids, jobs, strict=True)
    ]
    assert next(scored, None) is None, "one result per job"  # asked at its end, an iterator lets go of its list
    return answers


async def self_check(scheduler: Scheduler, info: TeacherInfo, teacher: str = "") -> None:
    """One short sequence through the whole path: is the output well-formed, and is each row's mass one?

    Raises:
        ValueError: it isn't.
    """
    num_tokens = min(SELF_CHECK_TOKENS, info.max_sequence_tokens)
    job = ScoreJob(
        id="self-check",
        token_ids=(np.arange(num_tokens) % info.tokenizer_size).astype(np.int32),
        prompt_tokens=1,
        positions=np.arange(1, num_tokens, dtype=np.int32),
        options=ScoreOptions(top_k=min(4, info.max_top_k) if "top_k" in info.features else 0),
        teacher=teacher,
    )
    deadline = asyncio.get_running_loop().time() + SELF_CHECK_TIMEOUT_S
    scores = checked(job, await scheduler.submit(job, deadline), info.tokenizer_size)
    if isinstance(scores, TeacherError):
        raise ValueError(f"the self-check failed: {scores}")
    if "exact_tail" not in info.features:
        return
    parts = [scores.log_tail[:, None].astype(np.float64)]
    alone = np.ones(scores.num_rows, dtype=bool)
    if scores.topk_ids is not None and scores.topk_logprob is not None:
        parts.append(scores.topk_logprob.astype(np.float64))
        alone = ~(scores.topk_ids == job.token_ids[job.positions][:, None]).any(axis=1)
    parts.append(np.where(alone, scores.token_logprob, -np.inf)[:, None])
    mass_N = np.logaddexp.reduce(np.concatenate(parts, axis=1), axis=1)
    if np.abs(mass_N).max() > SELF_CHECK_NATS:
        raise ValueError(f"the self-check failed: the mass of a row is off by {np.abs(mass_N).max():.2g} nats")
