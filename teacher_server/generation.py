"""Writing text, without a transport: admit -> wait for a place -> write -> check -> score what was written.

Owns how much may be written at a time, so that scoring is never kept out: text holds at most a share of the queue, and
at most `max_generations` completions are in the engine, of several tenants by their weights (turns.py). Knows neither
JSON nor strings.

Invariants: what was admitted is given back when the answer has left or its caller has gone; a caller that goes stops
its work in the engine; logprobs of a text are those that scoring it gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from teacher_api.errors import (
    BackendFailed,
    DeadlineExceeded,
    InvalidBackendOutput,
    Overloaded,
    TeacherError,
    TooLarge,
    Unsupported,
)
from teacher_api.types import ScoreOptions, Scores, TeacherInfo
from teacher_server.admission import Admission, Cost
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.generation import Generated, GenerationJob, Generator
from teacher_server.caller import Caller
from teacher_server.service import TeacherService
from teacher_server.turns import Turns
from teacher_server.validation import answer_bytes

log = structlog.get_logger("teacher_server.generation")

SHARE = 0.5
"""Of `queue_tokens` and `queue_bytes` that text may hold: the rest stays for scoring."""
BYTES_PER_TOKEN = 64  # of a written token in memory and in an answer


@dataclass(frozen=True, slots=True)
class Written:
    generated: Generated
    scores: Scores | None  # of the written tokens, where they were asked for


class Writer:
    """Writes for one server."""

    def __init__(self, service: TeacherService) -> None:
        config = service.config
        self._service = service
        self._turns = Turns(config.max_generations, service.tenants.weight_of)
        tokens, num_bytes = int(SHARE * config.queue_tokens), int(SHARE * config.queue_bytes)
        self._admission = Admission(tokens, num_bytes, lambda: 0.0, weight_of=service.tenants.weight_of)

    @contextlib.asynccontextmanager
    async def written(
        self, jobs: Sequence[GenerationJob], options: ScoreOptions | None, caller: Caller
    ) -> AsyncIterator[list[Written]]:
        """Writes all jobs, in order. Their budget is held until the block ends, which is when the answer has been
        delivered.

        Args:
            options: with which the written tokens are scored; None: they are not.

        Raises:
            TeacherError: of the first that failed, the others are stopped; or the server is full, or not ready, or the
                deadline passed.
        """
        info = self._service.open_info()
        generator = self._service.generator
        if generator is None:
            raise Unsupported("this server only scores; one started with --generate also writes", field="max_tokens")
        cost = _cost(jobs, options, info, caller)
        with contextlib.ExitStack() as held:
            self._admit(cost)
            held.callback(self._admission.give, cost)
            self._service.admit(cost)
            held.callback(self._service.admission.give, cost)
            yield await self._all(generator, jobs, options, info, caller)

    def _admit(self, cost: Cost) -> None:
        """Into the part of the queue that text may hold. Raises Overloaded or TooLarge."""
        try:
            self._admission.take(cost)
        except Overloaded:
            self._service.usage.refused(cost.caller, cost.tokens)
            raise
        except TooLarge as error:  # the whole queue is larger: what does not fit here alone is the prompt's to say
            raise TooLarge(error.message, field="prompt") from None

    async def _all(
        self,
        generator: Generator,
        jobs: Sequence[GenerationJob],
        options: ScoreOptions | None,
        info: TeacherInfo,
        caller: Caller,
    ) -> list[Written]:
        timeout_s = self._service.config.default_timeout_s
        deadline = asyncio.get_running_loop().time() + timeout_s
        tasks = [asyncio.create_task(self._one(generator, job, options, info, deadline, caller)) for job in jobs]
        try:
            async with asyncio.timeout_at(deadline):
                return list(await asyncio.gather(*tasks))
        except TimeoutError as error:
            if isinstance(error, TeacherError):
                raise
            raise DeadlineExceeded(f"the deadline of {timeout_s:g} s passed before everything was written") from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(
        self,
        generator: Generator,
        job: GenerationJob,
        options: ScoreOptions | None,
        info: TeacherInfo,
        deadline: float,
        caller: Caller,
    ) -> Written:
        generated, turn = None, None
        try:
            async with self._turns.of(caller.tenant) as turn:
                generated = _checked(job, await _generated(generator, job), info)
        finally:
            if turn is not None:
                tokens = 0 if generated is None else len(job.prompt_ids) + len(generated.token_ids)
                self._service.usage.written(caller, tokens, turn.seconds)
        self._service.counts.written_tokens += len(generated.token_ids)
        if options is None:
            return Written(generated, None)
        (lookup,) = await self._service.cache.look([_scoring_of(job, generated, options)], caller)
        scores = await self._service.run_one(lookup, deadline)
        if isinstance(scores, TeacherError):
            raise scores
        return Written(generated, scores)


async def _generated(generator: Generator, job: GenerationJob) -> Generated:
    try:
        return await generator.generate(job)
    except TeacherError:
        raise
    except Exception as error:  # the boundary to foreign code: an engine may raise anything
        log.warning("generation_failed", error=type(error).__name__, exc_info=error)
        raise BackendFailed(
            f"the engine failed on this completion: {type(error).__name__}; the server's log says more"
        ) from error


def _checked(job: GenerationJob, generated: Generated, info: TeacherInfo) -> Generated:
    ids = generated.token_ids
    if not 1 <= len(ids) <= job.max_tokens or min(ids) < 0 or max(ids) >= info.tokenizer_size:
        raise InvalidBackendOutput(
            f"completion {job.id!r}: {len(ids)} tokens; expected 1 to {job.max_tokens}, of ids 0 to "
            f"{info.tokenizer_size - 1}"
        )
    return generated


def _scoring_of(job: GenerationJob, generated: Generated, options: ScoreOptions) -> ScoreJob:
    """The written tokens after their prompt."""
    num_prompt = len(job.prompt_ids)
    token_ids = np.concatenate([job.prompt_ids, np.asarray(generated.token_ids, np.int32)])
    return ScoreJob(
        id=job.id,
        token_ids=token_ids,
        prompt_tokens=num_prompt,
        positions=np.arange(num_prompt, len(token_ids), dtype=np.int32),
        options=options,
        prompt_key=hashlib.blake2b(np.ascontiguousarray(job.prompt_ids).tobytes(), digest_size=16).digest(),
    )


def _cost(jobs: Sequence[GenerationJob], options: ScoreOptions | None, info: TeacherInfo, caller: Caller) -> Cost:
    """As many tokens and bytes as the jobs may come to.

    Raises:
        TooLarge: the answer would be larger than one may be.
    """
    num_bytes = 0
    for job in jobs:
        num_bytes += BYTES_PER_TOKEN * job.max_tokens
        if options is not None:
            longest = Generated((0,) * job.max_tokens, "length")
            num_bytes += answer_bytes(_scoring_of(job, longest, options), info)
    if num_bytes > info.max_response_bytes:
        raise TooLarge(
            f"the answer could take {num_bytes} bytes; this call gives at most {info.max_response_bytes}: ask for "
            "fewer tokens, completions or logprobs",
            field="max_tokens",
        )
    return Cost(sum(len(job.prompt_ids) + job.max_tokens for job in jobs), num_bytes, caller)
