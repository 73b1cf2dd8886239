"""The service over HTTP: protobuf for programs, JSON for people, problem+json for errors. Maps messages and nothing
else; rules live in service.py, the OpenAI-compatible routes in openai_api.py.

A client that goes away cancels its queued work.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator

import structlog
from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from google.protobuf.message import DecodeError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teacher_api import info as info_api
from teacher_api import wire
from teacher_api.errors import (
    InternalError,
    InvalidRequest,
    NotFound,
    TeacherError,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server import json_models, openai_api
from teacher_server.answers import FRAME_BYTES, encoded, streamed_frames
from teacher_server.auth import KeyRing
from teacher_server.caller import Caller
from teacher_server.counts import OK, Outcome
from teacher_server.http_coding import accepts_zstd, coded, coded_pieces, coding_headers
from teacher_server.http_deadline import ends_at, left_s
from teacher_server.http_requests import JSON, PROTOBUF, caller_of, content_type, id_of, received, unless_gone
from teacher_server.http_responses import Frames, Whole
from teacher_server.http_status import add_status, refusing_page, wants_page
from teacher_server.http_usage import add_usage
from teacher_server.openai_errors import openai_error, speaks_openai
from teacher_server.openapi import describe
from teacher_server.problem import REQUEST_ID_HEADER, problem, request_id_of
from teacher_server.service import TeacherService
from teacher_server.stream import StreamSession
from teacher_server.validation import decoded_of, jobs_of
from teacher_server.watch import watched

log = structlog.get_logger("teacher_server.http")
METHOD_OF = {
    "/v1/score": "score",
    "/v1/score/stream": "score_stream",
    "/v1/completions": "completions",
    "/v1/info": "info",
    "/v1/head": "head",
    "/v1/models": "models",
    "/v1/usage": "usage",
    "/v1/status": "status",
}
"""How counts.py calls what a path is for."""


def build(service: TeacherService, keys: KeyRing) -> ASGIApp:
    """The ASGI application: every route needs a key where keys are set. The probes are not here but in front.py."""
    app: FastAPI = FastAPIOffline(title="Preceptor teacher", version="1", redoc_url=None)
    app.add_exception_handler(TeacherError, _teacher_error)
    app.add_exception_handler(HTTPException, _http_exception)
    _add_routes(app, service)
    _add_head(app, service)
    add_usage(app, service)
    add_status(app, service)
    openai_api.add_routes(app, service)
    describe(app, generate=service.config.generate)
    return _Envelope(app, keys, service)


def _add_routes(app: FastAPI, service: TeacherService) -> None:
    @app.post("/v1/score", response_model=json_models.JsonScoreResponse, summary="Score a handful of sequences")
    async def score(request: Request) -> Response:
        kind, decoded = await _received(request, service, (PROTOBUF, JSON))
        async with contextlib.AsyncExitStack() as hold:
            zstd = accepts_zstd(request)
            scored = _scored(service, decoded, request, kind, hold)
            content = await unless_gone(request, coded(scored, zstd))
            return Whole(content, kind, hold.pop_all(), service.config.answer_idle_s, coding_headers(zstd))

    @app.post("/v1/score/stream", summary="The same as length-delimited protobuf frames, for large answers")
    async def score_stream(request: Request) -> Response:
        _, decoded = await _received(request, service, (PROTOBUF,))
        service.refuse_stream_if_full(caller_of(request))
        info = service.open_info(decoded.request.teacher)
        caller = caller_of(request).named(decoded.request.metadata)
        jobs_of(decoded, info)  # what is wrong with the whole request is a status, not a frame
        zstd = accepts_zstd(request)
        return Frames(
            coded_pieces(_frames(service, decoded, caller, request, left_s(request)), zstd),
            service.config.answer_idle_s,
            media_type="application/octet-stream",
            headers=coding_headers(zstd),
        )

    @app.get("/v1/info", summary="Model, tokenizer, limits and features")
    async def info(request: Request, teacher: str = "") -> Response:
        found = service.info_of(teacher)
        if PROTOBUF in request.headers.get("accept", ""):
            return Response(info_api.sealed(found), media_type=PROTOBUF)
        return Response(info_api.to_json(found), media_type=JSON)


def _add_head(app: FastAPI, service: TeacherService) -> None:
    @app.get("/v1/head", summary="The output head as a safetensors file, where it is shared")
    async def head(request: Request, expect_fingerprint: str = "") -> Response:
        caller = caller_of(request)
        file = service.head_file(request.headers.get("authorization"), expect_fingerprint, caller)
        return Frames(
            service.head_pieces(file, FRAME_BYTES, caller, request.scope["check_key"]),
            service.config.answer_idle_s,
            media_type="application/octet-stream",
            headers={"content-length": str(file.num_bytes), "etag": f'"{file.digest}"'},
        )


async def _scored(
    service: TeacherService,
    decoded: wire.DecodedRequest,
    request: Request,
    kind: str,
    hold: contextlib.AsyncExitStack,
) -> bytes:
    """The body of the answer. What it counts as is given back when `hold` is closed."""
    fingerprint = service.open_info(decoded.request.teacher).fingerprint
    max_bytes = json_models.MAX_JSON_ANSWER_BYTES if kind == JSON else None
    scoring = service.scored(decoded, caller_of(request), transport_s=left_s(request), max_bytes=max_bytes)
    answers = await hold.enter_async_context(scoring)
    if kind == JSON:
        return json_models.response_to_json(answers, fingerprint, id_of(request))
    return await encoded(answers, fingerprint, id_of(request), decoded.compression)


async def _frames(
    service: TeacherService, decoded: wire.DecodedRequest, caller: Caller, request: Request, transport_s: float | None
) -> AsyncGenerator[bytes, None]:
    async def once() -> AsyncIterator[wire.DecodedRequest]:
        yield decoded

    session = StreamSession(service, once(), caller, transport_s, request.scope["check_key"])
    async with session, contextlib.aclosing(session.answers()) as answers:
        async for answer in answers:
            async for frame in streamed_frames(answer, id_of(request), decoded.compression):
                data = frame.SerializeToString()
                yield struct.pack("<I", len(data)) + data


async def _received(
    request: Request, service: TeacherService, kinds: tuple[str, ...]
) -> tuple[str, wire.DecodedRequest]:
    """The content type, which must be of `kinds`, and the request. The body is not kept afterwards."""
    async with received(request, service) as body:
        kind = content_type(request, PROTOBUF, JSON)
        if kind not in kinds:
            raise Unsupported(f"the stream takes {PROTOBUF} only; expected that content type", field="content-type")
        if kind == PROTOBUF:
            return kind, _decoded(body)
        # Slow to read, so not on the event loop.
        return kind, decoded_of(await asyncio.to_thread(json_models.request_from_json, body))


def _decoded(body: bytes) -> wire.DecodedRequest:
    try:
        message = pb.ScoreRequest.FromString(body)
    except DecodeError:
        raise InvalidRequest("the body is not a teacher.v1.ScoreRequest; expected its protobuf encoding") from None
    return wire.decode_request(message)


async def _teacher_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TeacherError), "registered for TeacherError"
    return _problem(request, error)


async def _http_exception(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException), "registered for HTTPException"
    if error.status_code == 404:
        return _problem(request, NotFound("no such path; /docs lists them"))
    allowed = (error.headers or {}).get("Allow")
    detail = f"{request.method} has no meaning here; expected {allowed}" if allowed else str(error.detail)
    response = _problem(request, InvalidRequest(detail), error.status_code)
    response.headers.update(error.headers or {})
    return response


def _problem(request: Request, error: TeacherError, status: int | None = None) -> Response:
    request.scope["outcome"].refused(error)
    status, headers, body = _told(request.url.path, error, id_of(request), status)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


class _Envelope:
    """Around every request: its id in and out, the key, how it ended, and the boundary at which a bug becomes a 500."""

    def __init__(self, app: ASGIApp, keys: KeyRing, service: TeacherService) -> None:
        self._app = app
        self._keys = keys
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ended = False

        async def seen(message: Message) -> None:
            nonlocal ended
            await send(message)
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body", False))

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        method = METHOD_OF.get(scope["path"], "other")
        with watched(self._service.counts, self._service.tracing, "http", method, headers) as outcome:
            scope["outcome"] = outcome
            await self._handled(scope, receive, seen, headers, outcome)
            if not ended and outcome.name == OK:  # the caller has gone, or took nothing
                outcome.name = "cancelled"

    async def _handled(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], outcome: Outcome
    ) -> None:
        started = False

        async def with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                have = {name.lower() for name, _ in message["headers"]}
                if REQUEST_ID_HEADER.encode() not in have:
                    message["headers"] = [*message["headers"], (REQUEST_ID_HEADER.encode(), request_id.encode())]
            await send(message)

        scope["request_id"] = request_id = outcome.request_id
        try:
            request_id_of(headers.get(REQUEST_ID_HEADER))
            scope["check_key"] = lambda: self._keys.check(headers.get("authorization"))
            key = scope["check_key"]()
            outcome.tenant = key.tenant
            scope["caller"] = key.from_headers(headers)
            outcome.called_by(scope["caller"])
            scope["ends_at"] = ends_at(headers)
            await self._app(scope, receive, with_id)
        except TeacherError as error:
            outcome.refused(error)
            if started:
                raise  # too late for a status: the connection is cut, and the caller sees an answer without its end
            if isinstance(error, Unauthenticated) and wants_page(scope["path"], headers):
                await refusing_page(error)(scope, receive, with_id)
            else:
                await _send_error(error, scope["path"], request_id, with_id)
        except asyncio.CancelledError:  # the grace is over; uvicorn would say 500, which nobody asks again after
            outcome.name = Unavailable.kind
            if started:
                raise
            cut = Unavailable("the server shut down before this was answered; try another, or this one again")
            await _send_error(cut, scope["path"], request_id, with_id)
        except Exception as error:  # the process boundary: a bug must not take the server, nor show its insides
            outcome.name = InternalError.kind
            log.error("internal_error", path=scope["path"], exc_info=error)
            if started:
                raise
            bug = InternalError("a bug; the server's log has it")
            await _send_error(bug, scope["path"], request_id, with_id)


async def _send_error(error: TeacherError, path: str, request_id: str, send: Send) -> None:
    status, headers, body = _told(path, error, request_id)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _told(
    path: str, error: TeacherError, request_id: str, status: int | None = None
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of `error`, in the form that callers of `path` read."""
    return (openai_error if speaks_openai(path) else problem)(error, request_id, status)
