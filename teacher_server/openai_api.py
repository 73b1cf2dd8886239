"""The OpenAI-compatible way in: `/v1/completions` and `/v1/models` in vLLM's JSON, from the same service as every other
way. Maps requests to the service's and nothing else; what may be asked is in openai_models.py, the answer's text in
openai_answer.py.

The token after a prompt is read off a row behind it: the prompt is scored with one token more, whose own logprob is
never told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator

import numpy as np
from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from teacher_api.errors import InvalidRequest, TeacherError, TooLarge, Unsupported
from teacher_api.types import Completion, IntArray, ScoreOptions, ScoreRequest, Scores, TeacherInfo
from teacher_server.caller import Caller
from teacher_server.config import ServerConfig
from teacher_server.generation import Writer
from teacher_server.http_deadline import in_time
from teacher_server.http_requests import JSON, caller_of, content_type, id_of, received, unless_gone
from teacher_server.http_responses import Frames
from teacher_server.openai_answer import Answer, Scored
from teacher_server.openai_generation import GenerationRequest, generation_from_json
from teacher_server.openai_models import (
    MAX_BODY_BYTES,
    CompletionRequest,
    model_list,
    now,
    request_from_json,
    teacher_of,
)
from teacher_server.openai_text import LazyTexts, Texts
from teacher_server.openai_writing import written_answer
from teacher_server.problem import REQUEST_ID_HEADER, request_id_of
from teacher_server.service import TeacherService
from teacher_server.validation import check_ids, check_options, decoded_of, jobs_of

Prompt = tuple[IntArray, str | None]  # ids, and the text that they came from


def add_routes(app: FastAPI, service: TeacherService) -> None:
    lazy, created = LazyTexts(service.config), now()
    writer = Writer(service)

    @app.post("/v1/completions", summary="Score prompts as OpenAI's and vLLM's clients ask for it")
    async def completions(request: Request) -> Response:
        async with received(request, service, MAX_BODY_BYTES) as body:
            content_type(request, JSON)
            asked = await asyncio.to_thread(_read, body, service.config)
        teacher = teacher_of(asked, service.open_info())
        answer_id = _answer_id(request, asked)
        async with contextlib.AsyncExitStack() as hold:
            work = _answered(service, writer, lazy, asked, teacher, caller_of(request), answer_id, hold)
            async with in_time(request):
                answer = await unless_gone(request, work)
            return _Held(_sent(answer.pieces()), service.config.answer_idle_s, hold.pop_all())

    @app.get("/v1/models", summary="The served models, in OpenAI's form: the base and its adapters")
    async def models() -> dict[str, object]:
        base = service.info
        return model_list([base, *(service.info_of(name) for name in base.teachers)], created)


class _Held(Frames):
    """`hold` is closed when the answer has been sent or given up."""

    def __init__(self, content: AsyncGenerator[bytes, None], idle_s: float, hold: contextlib.AsyncExitStack) -> None:
        super().__init__(content, idle_s, media_type=JSON)
        self._hold = hold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._hold:
            await super().__call__(scope, receive, send)


async def _sent(pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Each piece is made in a thread when the one before has been taken."""
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


def _read(body: bytes, config: ServerConfig) -> CompletionRequest:
    return generation_from_json(body, config) if config.generate else request_from_json(body)


def _answer_id(request: Request, asked: CompletionRequest) -> str:
    sent = None if REQUEST_ID_HEADER in request.headers else asked.request_id
    try:
        return f"cmpl-{id_of(request) if sent is None else request_id_of(sent)}"
    except InvalidRequest as error:
        raise InvalidRequest(error.message, field="request_id") from None


async def _answered(
    service: TeacherService,
    writer: Writer,
    lazy: LazyTexts,
    asked: CompletionRequest,
    teacher: str,
    caller: Caller,
    answer_id: str,
    hold: contextlib.AsyncExitStack,
) -> Answer:
    """The answer's budget is given back when `hold` is closed."""
    created, info = now(), service.info_of(teacher)
    if asked.writes and "generate" not in info.features:
        raise Unsupported(f"`{info.model_name}` is an adapter, which only scores; the base writes", field="model")
    options = _options(asked, info)
    check_options(options, info)
    texts = await lazy.get(info.tokenizer_size)
    prompts = await asyncio.to_thread(_prompts, asked, texts, info)
    wanted = _wanted(asked, prompts)
    asked_of = {completion.id for completion in wanted}  # whose ids the service looks at
    for n, (ids, _) in enumerate(prompts):
        if str(n) not in asked_of:
            check_ids(ids, f"completions[{n}].token_ids", info)
    scores: dict[str, Scores] = {}
    if wanted:
        decoded = decoded_of(ScoreRequest(wanted, options=options, teacher=teacher))
        for job in jobs_of(decoded, info):  # nothing is scored where one prompt can't be
            if isinstance(job, TeacherError):
                raise job
        for answer in await hold.enter_async_context(service.scored(decoded, caller)):
            if isinstance(answer.result, TeacherError):
                raise answer.result
            scores[answer.completion_id] = answer.result
    has_rows = asked.prompt_k is not None
    scored = [Scored(ids, text, scores.get(str(n)), has_rows) for n, (ids, text) in enumerate(prompts)]
    if asked.writes:
        assert isinstance(asked, GenerationRequest), "no other writes"
        return await written_answer(writer, asked, scored, texts, info, caller, answer_id, created, hold)
    return Answer(asked, scored, texts, info, answer_id, created)


def _options(asked: CompletionRequest, info: TeacherInfo) -> ScoreOptions:
    """One for all rows: those of the prompt and that of the next token may be told of at different widths."""
    widths = {"prompt_logprobs": asked.prompt_logprobs, "logprobs": asked.logprobs}
    for name, k in widths.items():
        if k is not None and (info.tokenizer_size if k == -1 else k) > info.max_top_k:
            raise InvalidRequest(
                f"got {k}{', the whole vocabulary' * (k == -1)}; this teacher gives at most {info.max_top_k}",
                field=name,
            )
    # Of the text that is given back as `logprobs`, a prompt's rows tell what prompt_logprobs are.
    told = [asked.prompt_k, asked.logprobs if asked.generates else None]
    columns = [info.tokenizer_size if k == -1 else k for k in told if k is not None]
    ranks = "rank" in info.features
    if asked.prompt_logprobs is not None and not ranks:
        raise Unsupported(
            f"this teacher ({info.engine}) gives no ranks, which are part of it; use echo with logprobs",
            field="prompt_logprobs",
        )
    return ScoreOptions(
        top_k=max([*columns, int(asked.generates)]),
        temperature=asked.teacher_temperature,
        rank=ranks and asked.prompt_k is not None,
    )


def _prompts(asked: CompletionRequest, texts: Texts, info: TeacherInfo) -> list[Prompt]:
    """Raises TeacherError for too many prompts, and for the first that is empty or too long."""
    given = asked.prompt
    one_alone = isinstance(given, str) or isinstance(given[0], int)
    if not one_alone and len(given) > info.max_completions:
        raise TooLarge(f"{len(given)} completions; expected at most {info.max_completions}", field="completions")
    new_tokens = (asked.max_tokens or 0) if asked.writes else int(asked.generates)
    room = info.max_sequence_tokens - new_tokens
    if room < 1:
        raise InvalidRequest(
            f"got {new_tokens}; this model's maximum context length is {info.max_sequence_tokens}, prompt included",
            field="max_tokens",
        )
    prompts: list[Prompt] = []
    for n, each in enumerate([given] if one_alone else given):
        path = "prompt" if one_alone else f"prompt[{n}]"
        text = each if isinstance(each, str) else None
        if isinstance(each, str):
            ids = texts.encode(each, add_special_tokens=asked.add_special_tokens, max_tokens=room, path=path)
        else:
            ids = each  # type: ignore[assignment]  # a list of ids: pydantic has looked
        if not ids:
            raise InvalidRequest("empty; expected at least one token", field=path)
        if len(ids) > room:
            raise InvalidRequest(
                f"this model's maximum context length is {info.max_sequence_tokens} tokens, but the prompt has "
                f"{len(ids)} and {new_tokens} are to be generated; shorten the prompt"
                + (", or send max_tokens 0" if len(ids) == info.max_sequence_tokens else ""),
                field=path,
            )
        prompts.append((_array(ids, path), text))
    return prompts


def _array(ids: list[int], path: str) -> IntArray:
    try:
        return np.asarray(ids, dtype=np.int32)
    except OverflowError:
        raise InvalidRequest("a token id is outside 0 to 2147483647", field=path) from None


def _wanted(asked: CompletionRequest, prompts: list[Prompt]) -> list[Completion]:
    """One per prompt that has a row to score, named by its place."""
    wanted = []
    for n, (ids, _) in enumerate(prompts):
        num_tokens = len(ids)
        first = 1 if asked.prompt_k is not None else num_tokens
        last = num_tokens + asked.generates
        if first < last:
            # The one token more is a copy: any would do, for what follows a row changes nothing.
            tokens = np.append(ids, ids[-1]) if asked.generates else ids
            wanted.append(Completion(str(n), tokens, ranges=((first, last),)))
    return wanted
