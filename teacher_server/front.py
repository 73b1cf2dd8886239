"""The outermost HTTP layer: answers the probes by itself from the first moment, and everything else once the
application behind it is built. Imports nothing slow: it must answer within a second of the process's start."""

from __future__ import annotations

import json
from typing import Any

from teacher_api.errors import NotFound, Unavailable
from teacher_server.lifecycle import Lifecycle
from teacher_server.openai_errors import openai_error, speaks_openai
from teacher_server.problem import problem, request_id_of


class Probes:
    """Answers the probes, and nothing else."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        # /health is /readyz by the name that vLLM's clients ask for.
        self._probes = {"/livez": lifecycle.livez, "/readyz": lifecycle.readyz, "/health": lifecycle.readyz}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not await self.answered(scope, send):
            await _respond(send, *problem(NotFound("the probes alone are here"), request_id_of(None)))

    async def answered(self, scope: Any, send: Any) -> bool:
        """Whether this was for a probe."""
        if scope["path"] not in self._probes:
            return False
        probe = self._probes[scope["path"]]()
        body = json.dumps({"ok": probe.ok, "status": probe.status}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await _respond(send, 200 if probe.ok else 503, headers, body)
        return True


class Front:
    def __init__(self, lifecycle: Lifecycle) -> None:
        self._probes = Probes(lifecycle)
        self.inner: Any = None  # the ASGI application, once there is one

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if await self._probes.answered(scope, send):
            return
        if self.inner is None:
            starting = Unavailable("the server is starting; /readyz says when it is ready", retry_after_s=1.0)
            told = openai_error if speaks_openai(scope["path"]) else problem
            await _respond(send, *told(starting, request_id_of(None)))
        else:
            await self.inner(scope, receive, send)


async def _respond(send: Any, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
