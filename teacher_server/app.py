"""Puts the server together and runs it: listen first, then load, then serve, then drain. The only module that knows
all parts. Slow imports happen behind the open HTTP port, in the loading thread.

Phases: `run` -> `_serve` (imports and load in threads) -> ready line -> SIGTERM -> `_drain`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn

from teacher_server.config import ServerConfig
from teacher_server.front import Front
from teacher_server.lifecycle import Lifecycle

if TYPE_CHECKING:
    from teacher_api.types import TeacherInfo
    from teacher_server.backends.base import ScoringBackend
    from teacher_server.grpc_api import GrpcServer

CLOSE_S = 10.0  # for the backend to free its model, after the last call has ended
QUICK_S = 0.3  # for the same things after a second SIGTERM
BACKLOG = 1024  # connections that wait to be accepted
T = TypeVar("T")


class StartError(Exception):
    """One line that says why the server can't start."""


def run(config: ServerConfig) -> int:
    """Serves until SIGTERM or SIGINT. The exit status: 0 after a drain, 1 when the server could not start."""
    try:
        status = asyncio.run(App(config).run())
    except StartError as error:
        print(f"teacher-serve: error: {error}", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if _busy_threads():
        os._exit(status)  # a forward or a load that can't be interrupted must not keep the process
    return status


def _busy_threads() -> bool:
    return any(thread is not threading.main_thread() for thread in threading.enumerate())


class App:
    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._lifecycle = Lifecycle(stall_s=config.stall_s, high_water=config.high_water)
        self._front = Front(self._lifecycle)
        self._backend: ScoringBackend | None = None
        self._grpc: GrpcServer | None = None
        self._http_url = ""

    async def run(self) -> int:
        self._lifecycle.handle_signals()
        listener = _listen(self._config.host, self._config.http_port)
        self._http_url = _url("http", self._config.host, listener.getsockname()[1])
        http = _HttpServer(
            uvicorn.Config(
                self._front,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=self._config.grace_s,  # type: ignore[arg-type]  # any number of seconds
            )
        )
        serving_http = asyncio.create_task(http.serve(sockets=[listener]))
        serving = asyncio.create_task(self._serve())
        draining = asyncio.create_task(self._lifecycle.drain.wait())
        try:
            await asyncio.wait({serving, draining, serving_http}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
                raise StartError("the scheduler ended by itself; this is a bug")
            await self._drain(http, serving_http)
            return 0
        finally:
            http.should_exit = http.force_exit = True
            serving.cancel()
            draining.cancel()
            await asyncio.wait({serving, serving_http}, timeout=QUICK_S)
            await self._close_backend()

    async def _serve(self) -> None:
        """Opens gRPC, loads the model, and feeds the engine until cancelled."""
        try:
            await in_thread(_import_transports)
            from teacher_server import grpc_api, http_api, logs, service
            from teacher_server.auth import KeyRing

            logs.configure(self._config.log_format, self._config.log_level)
            keys = KeyRing([key.get_secret_value() for key in self._config.api_keys])
            core = service.TeacherService(self._config, self._lifecycle)
            self._front.inner = http_api.build(core, keys)
            self._grpc = grpc_api.GrpcServer(core, self._lifecycle, keys)
            await self._grpc.start(self._config.host, self._config.grpc_port)
            announcing = asyncio.create_task(self._announce(core))
            try:
                self._backend = await in_thread(lambda: _create(self._config))
                facts = await in_thread(self._backend.load)
                await core.serve(self._backend, facts)
            finally:
                announcing.cancel()
        except (ValueError, OSError) as error:
            raise StartError(" ".join(str(error).split())) from error

    async def _announce(self, core: Any) -> None:
        await self._lifecycle.ready.wait()
        assert self._grpc is not None, "ready without gRPC"
        info: TeacherInfo = core.info
        grpc_url = _url("grpc", self._config.host, self._grpc.port)
        print(
            f"ready {grpc_url} {self._http_url} model={info.model_name} fingerprint={info.fingerprint}",
            flush=True,
        )
        if self._config.announce_file:
            ready = {
                "grpc_url": grpc_url,
                "http_url": self._http_url,
                "model": info.model_name,
                "fingerprint": info.fingerprint,
                "pid": os.getpid(),
            }
            path = Path(self._config.announce_file)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(ready) + "\n")
            partial.replace(path)

    async def _drain(self, http: uvicorn.Server, serving_http: asyncio.Task[None]) -> None:
        """The probes say no already. Serve on for a while, then stop both transports under one grace."""
        quick = asyncio.create_task(self._lifecycle.quick_exit.wait())
        try:
            if self._lifecycle.ready.is_set():
                await asyncio.wait({quick}, timeout=self._config.lame_duck_s)
            self._lifecycle.closed.set()
            http.should_exit = True
            stopping: set[asyncio.Task[Any]] = {serving_http}
            if self._grpc is not None:
                stopping.add(asyncio.create_task(self._grpc.stop(self._config.grace_s)))
            ended = asyncio.create_task(asyncio.wait(stopping))
            either: set[asyncio.Task[Any]] = {quick, ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if quick.done():
                http.force_exit = True
                if self._grpc is not None:
                    await asyncio.wait({asyncio.create_task(self._grpc.stop(0))}, timeout=QUICK_S)
        finally:
            quick.cancel()

    async def _close_backend(self) -> None:
        if self._backend is not None:
            limit_s = QUICK_S if self._lifecycle.quick_exit.is_set() else CLOSE_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._backend.close(), limit_s)


def _import_transports() -> None:
    """In a thread, so that the probes are answered meanwhile: FastAPI and gRPC take most of a second to import."""
    import teacher_server.grpc_api
    import teacher_server.http_api  # noqa: F401


def _create(config: ServerConfig) -> ScoringBackend:
    from teacher_server import backends

    return backends.create(config)


async def in_thread(work: Callable[[], T]) -> T:
    """As asyncio.to_thread, in a daemon thread: one that hangs does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def body() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:  # handed to the caller, whatever it is
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has gone: nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=body, daemon=True, name="load").start()
    return await future


class _HttpServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to Lifecycle: draining comes before stopping."""
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise StartError(f"cannot listen for HTTP on {host}:{port}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
