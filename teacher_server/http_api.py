"""The service over HTTP: protobuf for programs, JSON for people, problem+json for errors. Maps messages and nothing
else; rules live in service.py.

A client that goes away cancels its queued work; a body is bounded while it is read and given up when it stalls.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import structlog
from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from google.protobuf.message import DecodeError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from teacher_api import info as info_api
from teacher_api import wire
from teacher_api.errors import (
    Cancelled,
    InternalError,
    InvalidRequest,
    NotFound,
    TeacherError,
    TooLarge,
    Unavailable,
    Unsupported,
)
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server import json_models
from teacher_server.answers import FRAME_BYTES, encoded, frames_of
from teacher_server.auth import KeyRing
from teacher_server.http_responses import Frames, Whole
from teacher_server.openapi import describe
from teacher_server.problem import REQUEST_ID_HEADER, problem, request_id_of
from teacher_server.service import TeacherService
from teacher_server.stream import StreamSession
from teacher_server.validation import decoded_of, jobs_of

log = structlog.get_logger("teacher_server.http")
PROTOBUF = "application/x-protobuf"
JSON = "application/json"
T = TypeVar("T")


def build(service: TeacherService, keys: KeyRing) -> ASGIApp:
    """The ASGI application: every route needs a key where keys are set. The probes are not here but in front.py."""
    app: FastAPI = FastAPIOffline(title="Preceptor teacher", version="1", redoc_url=None)
    app.add_exception_handler(TeacherError, _teacher_error)
    app.add_exception_handler(HTTPException, _http_exception)
    _add_routes(app, service)
    describe(app)
    return _Envelope(app, keys)


def _add_routes(app: FastAPI, service: TeacherService) -> None:
    @app.post("/v1/score", response_model=json_models.JsonScoreResponse, summary="Score a handful of sequences")
    async def score(request: Request) -> Response:
        kind, decoded = await _received(request, service, (PROTOBUF, JSON))
        async with contextlib.AsyncExitStack() as hold:
            content = await _unless_gone(request, _scored(service, decoded, _id(request), kind, hold))
            return Whole(content, kind, hold.pop_all(), service.config.answer_idle_s)

    @app.post("/v1/score/stream", summary="The same as length-delimited protobuf frames, for large answers")
    async def score_stream(request: Request) -> Response:
        _, decoded = await _received(request, service, (PROTOBUF,))
        service.refuse_stream_if_full()
        jobs_of(decoded, service.open_info())  # what is wrong with the whole request is a status, not a frame
        return Frames(
            _frames(service, decoded, _id(request)), service.config.answer_idle_s, media_type="application/octet-stream"
        )

    @app.get("/v1/info", summary="Model, tokenizer, limits and features")
    async def info(request: Request) -> Response:
        message = info_api.to_proto(service.info)
        if PROTOBUF in request.headers.get("accept", ""):
            return Response(message.SerializeToString(), media_type=PROTOBUF)
        return Response(info_api.to_json(service.info), media_type=JSON)


async def _scored(
    service: TeacherService, decoded: wire.DecodedRequest, request_id: str, kind: str, hold: contextlib.AsyncExitStack
) -> bytes:
    """The body of the answer. What it counts as is given back when `hold` is closed."""
    fingerprint = service.open_info().fingerprint
    max_bytes = json_models.MAX_JSON_ANSWER_BYTES if kind == JSON else None
    answers = await hold.enter_async_context(service.scored(decoded, max_bytes=max_bytes))
    if kind == JSON:
        return json_models.response_to_json(answers, fingerprint, request_id)
    return await encoded(answers, fingerprint, request_id)


async def _frames(
    service: TeacherService, decoded: wire.DecodedRequest, request_id: str
) -> AsyncGenerator[bytes, None]:
    async def once() -> AsyncIterator[wire.DecodedRequest]:
        yield decoded

    fingerprint = service.info.fingerprint
    async with StreamSession(service, once(), None) as session, contextlib.aclosing(session.answers()) as answers:
        async for answer in answers:
            for frame in frames_of(answer, fingerprint, request_id, max_rows_bytes=FRAME_BYTES):
                data = frame.SerializeToString()
                yield struct.pack("<I", len(data)) + data


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and cancels it when the client closes the connection: uvicorn does not."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client went away")
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _received(
    request: Request, service: TeacherService, kinds: tuple[str, ...]
) -> tuple[str, wire.DecodedRequest]:
    """The content type, which must be of `kinds`, and the request. The body counts as being received until it is
    decoded, and is not kept afterwards."""
    limit = service.config.max_request_bytes
    declared = request.headers.get("content-length", "")
    announced = int(declared) if declared.isdigit() else 0
    if announced > limit:
        raise _too_large(limit)
    with service.receiving.body(announced) as came:
        body = await _body(request, limit, service.config.body_idle_s, came)
        kind = _content_type(request)
        if kind not in kinds:
            raise Unsupported(f"the stream takes {PROTOBUF} only; expected that content type", field="content-type")
        if kind == PROTOBUF:
            return kind, _decoded(body)
        # Slow to read, so not on the event loop.
        return kind, decoded_of(await asyncio.to_thread(json_models.request_from_json, body))


async def _body(request: Request, limit: int, idle_s: float, came: Callable[[int], None]) -> bytes:
    chunks: list[bytes] = []
    size = 0
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(idle_s):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise InvalidRequest(f"the body stopped for {idle_s:g} s before its end") from None
        except ClientDisconnect:
            raise Cancelled("the client went away before the end of its body") from None
        if chunk is None:
            return b"".join(chunks)
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        came(len(chunk))
        chunks.append(chunk)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {limit} bytes that this server takes", field="content-length")


def _decoded(body: bytes) -> wire.DecodedRequest:
    try:
        message = pb.ScoreRequest.FromString(body)
    except DecodeError:
        raise InvalidRequest("the body is not a teacher.v1.ScoreRequest; expected its protobuf encoding") from None
    return wire.decode_request(message)


def _content_type(request: Request) -> str:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in (PROTOBUF, JSON):
        raise InvalidRequest(f"expected {PROTOBUF} or {JSON}", field="content-type")
    return kind


def _id(request: Request) -> str:
    return str(request.scope["request_id"])


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
    status, headers, body = problem(error, _id(request), status)
    log.info("refused", kind=error.kind, field=error.field, status=status)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


class _Envelope:
    """Around every request: its id in and out, the key, one log line, and the boundary at which a bug becomes a 500."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}

        async def with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                have = {name.lower() for name, _ in message["headers"]}
                if REQUEST_ID_HEADER.encode() not in have:
                    message["headers"] = [*message["headers"], (REQUEST_ID_HEADER.encode(), request_id.encode())]
            await send(message)

        request_id = request_id_of(None)
        try:
            request_id = request_id_of(headers.get(REQUEST_ID_HEADER))
            scope["request_id"] = request_id
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                self._keys.check(headers.get("authorization"))
                await self._app(scope, receive, with_id)
        except TeacherError as error:
            if started:
                raise  # too late for a status: the connection is cut, and the caller sees an answer without its end
            await _send_problem(error, request_id, with_id)
        except asyncio.CancelledError:  # the grace is over; uvicorn would say 500, which nobody asks again after
            if started:
                raise
            cut = Unavailable("the server shut down before this was answered; try another, or this one again")
            await _send_problem(cut, request_id, with_id)
        except Exception as error:  # the process boundary: a bug must not take the server, nor show its insides
            log.error("internal_error", request_id=request_id, path=scope["path"], exc_info=error)
            if started:
                raise
            await _send_problem(InternalError("a bug; the server's log has it"), request_id, with_id)


async def _send_problem(error: TeacherError, request_id: str, send: Send) -> None:
    status, headers, body = problem(error, request_id)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
