"""uvicorn as this server runs it: signals are left to Lifecycle, and no caller holds a connection by sending half of
something. Owns what happens on a connection outside a request; bodies that stall are http_requests.py's.

Invariants: TLS handshake and headers each end within `header_s`; headers, and what comes of a body between its bytes,
have at most MAX_HEADER_BYTES; trailers are not kept; a connection whose request was answered before its end is closed
LINGER_S later, unless the rest comes by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from teacher_api.errors import Incomplete, InvalidRequest, TeacherError, TooLarge
from teacher_server.problem import problem, request_id_of

MAX_HEADER_BYTES = 1 << 16
KEEP_ALIVE_S = 75
"""For which a connection without requests stays open: longer than clients and balancers keep theirs (httpx for 5 s,
many balancers for 60), or one would ask in the moment in which we close."""
LINGER_S = 1.0  # an answer is lost where its connection is reset while the caller still sends


class HttpServer(uvicorn.Server):
    """`await serve()` until `should_exit`.

    Args:
        header_s: longest time from a connection's opening, and from a request's first byte, to the end of its headers.
        grace_s: time for requests in work to end, after `should_exit`.
    """

    def __init__(
        self, app: Any, listener: socket.socket, *, header_s: float, grace_s: float, tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=grace_s,  # type: ignore[arg-type]  # any number of seconds
            )
        )
        self.servers = []
        self._listener = listener
        self._header_s = header_s
        self._tls = tls

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """In place of uvicorn's, which knows no limit of the handshake."""
        await self.lifespan.startup()
        loop = asyncio.get_running_loop()

        def connected() -> Connection:
            return Connection(self.config, self.server_state, self.lifespan.state, loop, header_s=self._header_s)

        handshake_s = self._header_s if self._tls is not None else None
        opened = await loop.create_server(
            connected, sock=self._listener, ssl=self._tls, ssl_handshake_timeout=handshake_s
        )
        self.servers = [opened]
        self.started = True

    def close(self) -> None:
        """Closes what is open; for one that was cancelled."""
        for opened in self.servers:
            opened.close()
        for connection in list(self.server_state.connections):
            connection.transport.close()
        self._listener.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to Lifecycle: draining comes before stopping."""
        yield


class Connection(HttpToolsProtocol):
    def __init__(self, *arguments: Any, header_s: float, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._header_s = header_s
        self._header_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._header_bytes = 0  # since headers or a piece of a body ended: headers, sizes of chunks, trailers
        self._in_headers = False
        self._in_request = False  # it has begun, and its end has not come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        held = transport.get_extra_info("socket")
        if held is not None:  # asyncio does so itself, but not for listeners that were made with protocol number 0
            held.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget(header=True, linger=True)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._header_bytes += len(data)
        super().data_received(data)
        if self._header_bytes <= MAX_HEADER_BYTES or self.transport.is_closing():
            return
        if self.cycle is None or not self.cycle.response_started or (self._in_headers and self.cycle.response_complete):
            self._refuse(TooLarge(f"the headers or trailers have more than {MAX_HEADER_BYTES} bytes"), 431)
        else:  # in the middle of an answer, or after it
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = self._in_request = True
        if self._header_timer is None:
            self._expect_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # a trailer would come among the headers
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._header_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._in_headers, self._header_bytes = False, 0
        self._forget(header=True)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_request, self._header_bytes = False, 0
        self._forget(linger=True)
        super().on_message_complete()
        if self.cycle.response_complete and not self.transport.is_closing():  # uvicorn counts from answers alone
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_request and self._linger_timer is None and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """As a problem document, where uvicorn's is text."""
        self._refuse(InvalidRequest("this is not HTTP"), 400)

    def _expect_headers(self) -> None:
        self._header_timer = self.loop.call_later(self._header_s, self._headers_late)

    def _headers_late(self) -> None:
        self._header_timer = None
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self.flow.read_paused:  # the caller waits for us, or we do not read on
            self._expect_headers()
        elif self._in_headers:
            self._refuse(Incomplete(f"the headers did not end within {self._header_s:g} s"), 408)
        else:
            self.transport.close()

    def _refuse(self, error: TeacherError, status: int) -> None:
        status, headers, body = problem(error, request_id_of(None), status)
        reason = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}[status]
        lines = [f"HTTP/1.1 {status} {reason}".encode(), *(b": ".join(header) for header in headers)]
        self.transport.write(b"\r\n".join([*lines, b"connection: close", b"", body]))
        self.transport.close()

    def _forget(self, *, header: bool = False, linger: bool = False) -> None:
        if header and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        if linger and self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
