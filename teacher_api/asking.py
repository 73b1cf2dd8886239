"""How a request is put to a teacher until each of its completions has an answer: cut to the teacher's limits, sent,
checked against the questions, and the completions that failed asked again. The one layer that retries.

Invariants: one deadline over everything; only errors whose kind is retryable are retried; no completion is answered
twice; an answer that fails a check is never handed out.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

import stamina
from stamina.instrumentation import RetryDetails

from teacher_api import wire
from teacher_api.errors import CorruptResponse, DeadlineExceeded, FingerprintMismatch, TeacherError, Unavailable
from teacher_api.transport import Transport
from teacher_api.types import Completion, ScoreRequest, Scores, TeacherInfo
from teacher_api.v1 import teacher_pb2 as pb

T = TypeVar("T")
Answers = dict[str, Scores | TeacherError]
Tell = Callable[[Scores | TeacherError], None]

_log = logging.getLogger("teacher_api")

FILL = 0.5
"""Share of a teacher's stated limits that we fill: our estimate of a message need not be the server's."""
PART_TOKENS = 1 << 17
"""Of the sequences of one part, which a teacher takes or refuses as a whole: a small share of what it accepts at a time
(2,000,000 unless configured otherwise), and soon scored, so that an attempt ends within its time."""
WAIT_INITIAL_S, WAIT_MAX_S, WAIT_JITTER_S = 0.1, 5.0, 0.5
RETRY_AFTER_JITTER = 0.25
"""Share added at random to a delay the server asks for, so that its callers don't all come back at once."""
WHO_S = 3.0  # for the answer to who is there, before a mismatch is believed


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant of the running loop's (monotonic) clock, and what it was made from, for messages."""

    at: float
    timeout_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        return cls(asyncio.get_running_loop().time() + timeout_s, timeout_s)

    def left_s(self) -> float:
        return self.at - asyncio.get_running_loop().time()


class _Told(Answers):
    """Answers that somebody hears of when they are put here."""

    def __init__(self, tell: Tell | None) -> None:
        super().__init__()
        self._tell = tell

    def __setitem__(self, name: str, answer: Scores | TeacherError) -> None:
        super().__setitem__(name, answer)
        if self._tell is not None:
            self._tell(answer)


@dataclass(frozen=True, slots=True)
class Part:
    """Completions of one request that travel together."""

    questions: Mapping[str, tuple[Completion, wire.Question]]  # by completion id, in the order asked
    streamed: bool


# ---- cutting to limits -----------------------------------------------------------------------------------------------


def _answer_bytes(question: wire.Question, info: TeacherInfo) -> int:
    options, candidates = question.options, question.candidates
    columns = info.tokenizer_size if options.top_k == "all" else 2 * options.top_k
    per_row = 4 * (2 + columns + options.entropy + options.rank + options.hidden * info.hidden_size)
    return 256 + per_row * len(question.positions) + (4 * len(candidates.ids) if candidates is not None else 0)


def _num_tokens(request: ScoreRequest, completion: Completion) -> int:
    prompt = 0 if completion.prompt_index is None else len(request.prompts[completion.prompt_index])
    return prompt + len(completion.token_ids)


def _request_bytes(request: ScoreRequest, completion: Completion) -> int:
    values = _num_tokens(request, completion)
    if completion.candidates is not None:
        values += len(completion.candidates.ids) + len(completion.candidates.row_offsets)
    return 256 + 4 * values


def parts_of(request: ScoreRequest, info: TeacherInfo, *, streamed: bool) -> Iterator[Part]:
    """Cuts a request so that each part stays within the teacher's limits; answers too large for a unary call stream.

    Raises:
        InvalidRequest: a completion can't be asked as it is; names the field.
    """
    group: dict[str, tuple[Completion, wire.Question]] = {}
    sent = received = tokens = 0
    for i, completion in enumerate(request.completions):
        question = wire.question(
            request,
            completion,
            fingerprint=info.fingerprint,
            tokenizer_size=info.tokenizer_size,
            field=f"completions[{i}]",
        )
        length = _num_tokens(request, completion)
        out, back = _request_bytes(request, completion), _answer_bytes(question, info)
        if not streamed and back > FILL * info.max_response_bytes:
            yield Part({completion.id: (completion, question)}, streamed=True)
            continue
        full = (
            len(group) >= info.max_completions
            or tokens + length > PART_TOKENS
            or sent + out > FILL * info.max_request_bytes
            or (not streamed and received + back > FILL * info.max_response_bytes)
        )
        if group and full:
            yield Part(group, streamed)
            group, sent, received, tokens = {}, 0, 0, 0
        group[completion.id] = (completion, question)
        sent, received, tokens = sent + out, received + back, tokens + length
    if group:
        yield Part(group, streamed)


def _used_prompts(completions: Sequence[Completion]) -> list[int]:
    return sorted({c.prompt_index for c in completions if c.prompt_index is not None})


_PLACE = re.compile(r"(completions|prompts)\[(\d+)\]")


def _in_callers_places(error: TeacherError, request: ScoreRequest, sent: Sequence[Completion]) -> TeacherError:
    """`error`, its field counted in `request` and no longer in the message that held some of its completions."""
    found = _PLACE.match(error.field)
    if found is None:
        return error
    places = _used_prompts(sent)
    if found[1] == "completions":
        place_of = {c.id: i for i, c in enumerate(request.completions)}
        places = [place_of[c.id] for c in sent]
    place = int(found[2])
    if place < len(places):
        error.field = f"{found[1]}[{places[place]}]{error.field[found.end() :]}"
    return error


def _subset(
    request: ScoreRequest, completions: Sequence[Completion], fingerprint: str, timeout_s: float
) -> ScoreRequest:
    """The request for some of its completions, with only the prompts that they use."""
    used = _used_prompts(completions)
    place = {index: i for i, index in enumerate(used)}
    moved = [replace(c, prompt_index=None if c.prompt_index is None else place[c.prompt_index]) for c in completions]
    return replace(
        request,
        completions=moved,
        prompts=[request.prompts[i] for i in used],
        expect_fingerprint=fingerprint,
        timeout_s=timeout_s,
    )


# ---- asking ----------------------------------------------------------------------------------------------------------


async def retrying(once: Callable[[], Awaitable[T]], deadline: Deadline) -> T:
    """Awaits `once` until it succeeds, fails for good, or the deadline is over; then the last error says how often it
    was tried. A delay that the teacher asks for is kept, if there is time for it."""
    tried: list[TeacherError] = []

    def backoff(error: Exception) -> bool | float:
        if not isinstance(error, TeacherError) or not error.retryable:
            return False
        if error.retry_after_s is None:
            return True
        wait_s = error.retry_after_s * (1 + RETRY_AFTER_JITTER * random.random())
        return max(wait_s, WAIT_INITIAL_S) if wait_s < deadline.left_s() else False

    waits = {"wait_initial": WAIT_INITIAL_S, "wait_max": WAIT_MAX_S, "wait_jitter": WAIT_JITTER_S}
    try:
        async with asyncio.timeout_at(deadline.at):
            left_s = max(deadline.left_s(), 1e-3)
            async for attempt in stamina.retry_context(on=backoff, attempts=None, timeout=left_s, **waits):
                with attempt:
                    try:
                        return await once()
                    except TeacherError as error:
                        tried.append(error)
                        del tried[:-1]
                        raise
    except TeacherError:
        raise
    except TimeoutError:
        if not tried:
            raise DeadlineExceeded(f"no answer within the call's {deadline.timeout_s:g} s") from None
        raise _gave_up(tried[-1], deadline) from tried[-1]
    raise AssertionError("stamina ended without a result")


def log_retries_plainly() -> None:
    """Makes every retry one line of Python's own logging (logger `teacher_api`, level INFO). For the main function of a
    program: the setting is the whole process'."""

    def log(details: RetryDetails) -> None:
        _log.info("%s; trying again in %.1f s", details.caused_by, details.wait_for)

    stamina.instrumentation.set_on_retry_hooks([log])


def _gave_up(last: TeacherError, deadline: Deadline) -> TeacherError:
    text = f"gave up after the call's {deadline.timeout_s:g} s; the last attempt: {last.message}"
    return type(last)(text, field=last.field, retry_after_s=last.retry_after_s, request_id=last.request_id)


class Asker:
    """Puts parts to one teacher over one transport, at most `max_concurrency` at a time."""

    def __init__(self, transport: Transport, *, attempt_timeout_s: float, max_concurrency: int) -> None:
        self._transport = transport
        self._attempt_timeout_s = attempt_timeout_s
        self._slots = asyncio.Semaphore(max_concurrency)

    async def info(self, deadline: Deadline, teacher: str = "") -> pb.TeacherInfo:
        """Raises the last error once it is not retryable or the deadline is over."""

        async def once() -> pb.TeacherInfo:
            limit_s = self._limit_s(deadline)
            try:
                return await self._transport.info(timeout_s=limit_s, request_id=uuid.uuid4().hex, teacher=teacher)
            except DeadlineExceeded as error:
                raise self._own_or_overall(error, deadline) from error

        return await retrying(once, deadline)

    async def head(
        self, receive: Callable[[AsyncIterator[pb.HeadChunk]], Awaitable[None]], fingerprint: str, deadline: Deadline
    ) -> None:
        """Hands each attempt's pieces of the output head to `receive`. An attempt has all the time that is left: how
        long it takes is a matter of the head's size."""

        async def once() -> None:
            left_s = deadline.left_s()
            if left_s <= 0:
                raise DeadlineExceeded(f"the call's {deadline.timeout_s:g} s are over")
            request = pb.GetHeadRequest(expect_fingerprint=fingerprint)
            chunks = self._transport.head(request, timeout_s=left_s, request_id=uuid.uuid4().hex)
            async with aclosing(chunks):  # type: ignore[type-var]
                await receive(chunks)

        await retrying(once, deadline)

    async def ask(
        self, request: ScoreRequest, part: Part, fingerprint: str, deadline: Deadline, tell: Tell | None = None
    ) -> Answers:
        """An answer or an error for each completion of the part; `tell` is given each as soon as it is final. Raises
        nothing but bugs and cancellation."""
        answers = _Told(tell)
        try:
            await retrying(lambda: self._attempt(request, part, fingerprint, deadline, answers), deadline)
        except TeacherError as error:
            for name in part.questions:
                if name not in answers:
                    answers[name] = error
        return answers

    def _limit_s(self, deadline: Deadline) -> float:
        left_s = deadline.left_s()
        if left_s <= 0:
            raise DeadlineExceeded(f"the call's {deadline.timeout_s:g} s are over")
        return min(self._attempt_timeout_s, left_s)

    def _own_or_overall(self, error: DeadlineExceeded, deadline: Deadline) -> TeacherError:
        """A limit that ran out: the whole call's, which is final, or this attempt's, after which we ask again."""
        if deadline.left_s() <= 0.01:
            return DeadlineExceeded(f"no answer within the call's {deadline.timeout_s:g} s: {error.message}")
        return Unavailable(f"no answer within {self._attempt_timeout_s:g} s (attempt_timeout_s): {error.message}")

    async def _attempt(
        self, request: ScoreRequest, part: Part, fingerprint: str, deadline: Deadline, answers: Answers
    ) -> None:
        """Asks what has no answer yet. Fills `answers` with what is final; raises the first error that is not."""
        open_ids = [name for name in part.questions if name not in answers]
        async with self._slots:  # retrying holds this wait to the deadline, too
            limit_s = self._limit_s(deadline)
            completions = [part.questions[name][0] for name in open_ids]
            questions = {name: part.questions[name][1] for name in open_ids}
            try:
                message = wire.encode_request(_subset(request, completions, fingerprint, limit_s))
                if part.streamed:
                    found = await self._streamed(message, questions, limit_s, answers)
                else:
                    found = await self._unary(message, questions, limit_s, fingerprint)
            except DeadlineExceeded as error:
                raise self._own_or_overall(error, deadline) from error
            except FingerprintMismatch as error:
                raise await self._mismatch(error, fingerprint, deadline, request.teacher) from error
            except TeacherError as error:
                _in_callers_places(error, request, completions)
                raise
        first: TeacherError | None = None
        for name, answer in found.items():
            if isinstance(answer, TeacherError):
                answer = _in_callers_places(answer, request, completions)
            if isinstance(answer, DeadlineExceeded):
                answer = self._own_or_overall(answer, deadline)
            if isinstance(answer, TeacherError) and answer.retryable:
                first = first or answer
            else:
                answers[name] = answer
        if first is not None:
            raise first

    async def _mismatch(
        self, error: FingerprintMismatch, fingerprint: str, deadline: Deadline, teacher: str
    ) -> TeacherError:
        """`error`, unless the teacher is the one that was asked for after all: then the question, or the refusal, was
        damaged on its way, and is worth asking again."""
        try:
            limit_s = min(self._limit_s(deadline), WHO_S)
            async with asyncio.timeout(limit_s):  # replicas that are left out are waited for
                found = await self._transport.info(timeout_s=limit_s, request_id=uuid.uuid4().hex, teacher=teacher)
        except (TeacherError, TimeoutError):
            return error
        if found.fingerprint != fingerprint:
            return error
        return CorruptResponse(f"the teacher is the one expected, and says otherwise: {error.message}")

    async def _unary(
        self, message: pb.ScoreRequest, questions: Mapping[str, wire.Question], limit_s: float, fingerprint: str
    ) -> Answers:
        request_id = uuid.uuid4().hex
        response = await self._transport.score(message, timeout_s=limit_s, request_id=request_id)
        if response.fingerprint != fingerprint:
            raise FingerprintMismatch(
                f"expected teacher {fingerprint!r:.80}, the answer is from {response.fingerprint!r:.80}"
            )
        if response.request_id != request_id:
            raise CorruptResponse(f"answers request {response.request_id!r:.80}; expected {request_id}")
        if len(response.frames) != len(questions):
            raise CorruptResponse(f"{len(response.frames)} frames; expected {len(questions)}, one per completion")
        found: Answers = {}
        for frame, question in zip(response.frames, questions.values(), strict=True):
            found[question.id] = _checked(wire.Assembler(question), frame) or CorruptResponse(
                f"rows of completion {question.id!r:.80} are missing from the answer"
            )
        return found

    async def _streamed(
        self, message: pb.ScoreRequest, questions: Mapping[str, wire.Question], limit_s: float, answers: Answers
    ) -> Answers:
        """What a stream brings goes into `answers` at once where it is final: the stream may still break."""
        found: Answers = {}
        assemblers = {name: wire.Assembler(question) for name, question in questions.items()}
        frames = self._transport.stream(message, timeout_s=limit_s, request_id=uuid.uuid4().hex)
        async with aclosing(frames):  # type: ignore[type-var]
            async for frame in frames:
                name = frame.completion_id
                if name not in assemblers:
                    if isinstance(found.get(name), TeacherError):
                        continue  # what follows a frame that failed its checks
                    raise CorruptResponse(f"a frame of completion {name!r:.80}, which expects none")
                answer = _checked(assemblers[name], frame)
                if answer is None:
                    continue
                del assemblers[name]
                if isinstance(answer, TeacherError):
                    found[name] = answer
                else:
                    answers[name] = answer
        for name in assemblers:
            found[name] = Unavailable(f"the stream ended before completion {name!r:.80} was answered")
        return found


def _checked(assembler: wire.Assembler, frame: pb.ScoreFrame) -> Scores | TeacherError | None:
    try:
        return assembler.add(frame)
    except CorruptResponse as error:
        return error
