"""How requests arrive over HTTP: a body that is bounded while it is read and given up when it stalls, and work that is
cancelled when its caller goes away. Knows neither routes nor what a body means."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from teacher_api.errors import Cancelled, Incomplete, InvalidRequest, TooLarge
from teacher_server.caller import Caller
from teacher_server.config import ServerConfig
from teacher_server.http_coding import without_coding
from teacher_server.http_deadline import in_time
from teacher_server.service import TeacherService

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
T = TypeVar("T")


@contextlib.asynccontextmanager
async def received(request: Request, service: TeacherService, max_bytes: int | None = None) -> AsyncIterator[bytes]:
    """The body without its content coding, which counts as being received until the block ends: decode it there.

    Args:
        max_bytes: largest body of this way in, where it takes less than `max_request_bytes`.
    """
    limit = service.config.max_request_bytes if max_bytes is None else min(max_bytes, service.config.max_request_bytes)
    declared = request.headers.get("content-length", "")
    announced = int(declared) if declared.isdigit() else 0
    if announced > limit:
        raise _too_large(limit)
    with service.receiving.body(announced, caller_of(request).tenant) as came:
        async with in_time(request):
            body = await _body(request, limit, service.config, came)
        yield await without_coding(request, body, limit, came)


def content_type(request: Request, *kinds: str) -> str:
    """Of the body. Raises InvalidRequest unless it is one of `kinds`."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in kinds:
        raise InvalidRequest(f"expected {' or '.join(kinds)}", field="content-type")
    return kind


def id_of(request: Request) -> str:
    return str(request.scope["request_id"])


def caller_of(request: Request) -> Caller:
    caller: Caller = request.scope["caller"]
    return caller


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
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


async def _body(request: Request, limit: int, config: ServerConfig, came: Callable[[int], None]) -> bytes:
    chunks: list[bytes] = []
    size = 0
    stream = request.stream()
    now, idle_s = asyncio.get_running_loop().time, config.body_idle_s
    started = now()
    while True:
        if now() - started > idle_s + size / config.body_bytes_per_s:
            raise Incomplete(f"the body came at less than {config.body_bytes_per_s} bytes per second")
        try:
            async with asyncio.timeout(idle_s):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise Incomplete(f"the body stopped for {idle_s:g} s before its end") from None
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
