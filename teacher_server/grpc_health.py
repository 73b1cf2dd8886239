"""grpc.health.v1, the one gRPC service that asks for no key: what /readyz says but for a full queue.

Invariant: whoever has no key holds few calls at a time, none for long before it has said what it asks for, and nothing
of it is kept; the calls of those who have one find room beside them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

from teacher_server.lifecycle import Lifecycle

SERVICE: str = health.SERVICE_NAME
MAX_READING = 16  # calls that have not said yet what they ask for; each may hold a message
WATCHERS_SHARE = 1 / 8  # of `max_calls`

_Status = health_pb2.HealthCheckResponse


class Health:
    """
    Args:
        services: those that are asked for by name; "" is the server.
        max_calls: gRPC calls that the server takes at a time.
        message_s: longest time from the begin of a call to the end of its message.
    """

    def __init__(self, lifecycle: Lifecycle, services: Sequence[str], *, max_calls: int, message_s: float) -> None:
        self._lifecycle = lifecycle
        self._services = {"", *services}
        self._max_reading = min(MAX_READING, max(max_calls // 2, 1))
        self._max_watchers = max(int(max_calls * WATCHERS_SHARE), 1)
        self._message_s = message_s
        self._reading = 0
        self._watchers: set[asyncio.Event] = set()
        self._closing = False
        lifecycle.on_change(self._tell)

    def handler(self) -> grpc.GenericRpcHandler:
        """Of streams, as grpc_api.py's are: gRPC itself would wait for a message for ever."""
        codec = {
            "request_deserializer": health_pb2.HealthCheckRequest.FromString,
            "response_serializer": _Status.SerializeToString,
        }
        methods = {
            name: grpc.stream_stream_rpc_method_handler(method, **codec)
            for name, method in (("Check", self._check), ("Watch", self._watch))
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def close(self) -> None:
        """Ends those that watch, after they have been told."""
        self._closing = True
        self._tell()

    def _tell(self) -> None:
        for changed in self._watchers:
            changed.set()

    def _state(self, service: str) -> Any:
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._lifecycle.is_serving else _Status.NOT_SERVING

    async def _check(self, requests: AsyncIterator[Any], context: Any) -> None:
        service = await self._asked(requests, context)
        if service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service here")
        await context.write(_Status(status=self._state(service)))

    async def _watch(self, requests: AsyncIterator[Any], context: Any) -> None:
        service = await self._asked(requests, context)
        if len(self._watchers) >= self._max_watchers:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{len(self._watchers)} watch already; use Check")
        changed, told = asyncio.Event(), None
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                if (state := self._state(service)) != told:
                    told = state
                    await context.write(_Status(status=state))
                if self._closing:
                    return
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    async def _asked(self, requests: AsyncIterator[Any], context: Any) -> str:
        """The service that the call's one message names."""
        if self._reading >= self._max_reading:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls are about to ask; come back later")
        self._reading += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._message_s):
                    async for request in requests:
                        return str(request.service)
        finally:
            self._reading -= 1
        await context.abort(grpc.StatusCode.UNAVAILABLE, f"no message came within {self._message_s:g} s")
        raise AssertionError("abort returned")
