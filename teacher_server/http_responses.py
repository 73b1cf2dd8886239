"""How answers leave over HTTP: in pieces that the caller must take in time, so that what an answer holds is let go when
it has left or its caller has, and not when it was made. Knows nothing of requests or scores."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import structlog
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from teacher_api.errors import TeacherError
from teacher_server.answers import FRAME_BYTES
from teacher_server.stream import taken_within

log = structlog.get_logger("teacher_server.http")


class Whole(Response):
    """An answer in one message. `hold` is closed when the transport has sent it, the caller has gone, or the caller
    took nothing of it for `idle_s`."""

    def __init__(
        self,
        content: bytes,
        media_type: str,
        hold: contextlib.AsyncExitStack,
        idle_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._hold = hold
        self._idle_s = idle_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._hold, _given_up_after(self._idle_s, send) as send_in_time:
            await send_in_time({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(self.body), FRAME_BYTES):
                piece = bytes(self.body[start : start + FRAME_BYTES])
                await send_in_time({"type": "http.response.body", "body": piece, "more_body": True})
            # The server takes a message once those before it have left its buffer: this one waits for the last piece.
            await send_in_time({"type": "http.response.body", "body": b""})


class Frames(StreamingResponse):
    """A stream that is given up when the caller takes nothing of it for `idle_s`."""

    def __init__(self, content: AsyncGenerator[bytes, None], idle_s: float, **options: Any) -> None:
        super().__init__(content, **options)
        self._content = content
        self._idle_s = idle_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The content is closed at once: it holds the stream's budget.
        async with contextlib.aclosing(self._content), _given_up_after(self._idle_s, send) as send_in_time:
            await super().__call__(scope, receive, send_in_time)


@contextlib.asynccontextmanager
async def _given_up_after(idle_s: float, send: Send) -> AsyncGenerator[Send, None]:
    """`send`, of which each message must be taken within `idle_s`; where one is not, or what is sent ends with an
    error of ours, the block ends there."""

    async def in_time(message: Message) -> None:
        async with taken_within(idle_s):
            await send(message)

    try:
        yield in_time
    except TeacherError as error:  # an answer without its end: the connection is cut, which says that there is more
        log.info("refused", kind=error.kind, field=error.field)
