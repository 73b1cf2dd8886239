"""The outermost HTTP layer: answers the probes by itself from the first moment, and everything else once the
application behind it is built. Imports nothing slow: it must answer within a second of the process's start."""

from __future__ import annotations

import json
from typing import Any

from teacher_api.errors import Unavailable
from teacher_server.lifecycle import Lifecycle
from teacher_server.problem import problem, request_id_of


class Front:
    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self.inner: Any = None  # the ASGI application, once there is one

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        probes = {"/livez": self._lifecycle.livez, "/readyz": self._lifecycle.readyz}
        if scope["path"] in probes:
            probe = probes[scope["path"]]()
            body = json.dumps({"ok": probe.ok, "status": probe.status}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await _respond(send, 200 if probe.ok else 503, headers, body)
        elif self.inner is None:
            starting = Unavailable("the server is starting; /readyz says when it is ready", retry_after_s=1.0)
            await _respond(send, *problem(starting, request_id_of(None)))
        else:
            await self.inner(scope, receive, send)


async def _respond(send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
