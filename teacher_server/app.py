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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from teacher_api.tracing import Tracing
from teacher_server.config import ServerConfig
from teacher_server.front import Front, Probes
from teacher_server.http_server import HttpServer
from teacher_server.lifecycle import Lifecycle
from teacher_server.tls import Tls

if TYPE_CHECKING:
    from teacher_api.types import TeacherInfo
    from teacher_server.backends.base import ModelFacts, ScoringBackend
    from teacher_server.grpc_api import GrpcServer
    from teacher_server.metrics import MetricsServer
    from teacher_server.service import TeacherService

CLOSE_S = 10.0  # for the backend to free its model, after the last call has ended
QUICK_S = 0.3  # for the same things after a second SIGTERM
SEND_S = 0.5  # for traces that have not been sent
BACKLOG = 1024  # connections that wait to be accepted
T = TypeVar("T")


class StartError(Exception):
    """One line that says why the server can't start."""


def run(config: ServerConfig) -> int:
    """Serves until SIGTERM or SIGINT. The exit status: 0 after a drain, 1 when the server could not start."""
    try:
        return asyncio.run(_until_signalled(config))
    except StartError as error:
        print(f"teacher-serve: error: {error}", file=sys.stderr)
        _leave_if_busy(1)
        return 1


async def _until_signalled(config: ServerConfig) -> int:
    app = App(config)
    app.lifecycle.handle_signals()
    await app.run()
    _leave_if_busy(0)
    return 0


def _leave_if_busy(status: int) -> None:
    """Ends the process here when a thread still runs: a load or a forward that can't be interrupted must not keep it.
    Everything that needs an orderly end has had it."""
    if any(thread is not threading.main_thread() for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class App:
    """One server in the running event loop.

    Args:
        create: makes the backend, in a thread; None: the one that `config` asks for.
        announce: gets the ready line's facts, in the event loop.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        create: Callable[[ServerConfig], ScoringBackend] | None = None,
        announce: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._config = config
        self._create = create or _create
        self._tell = announce or self._print_ready
        self.lifecycle = Lifecycle(stall_s=config.stall_s, hang_s=config.hang_s, high_water=config.high_water)
        self._front = Front(self.lifecycle)
        self.service: TeacherService | None = None
        self._backend: ScoringBackend | None = None
        self._grpc: GrpcServer | None = None
        self._metrics: MetricsServer | None = None
        self._tls: Tls | None = None
        self._http_url = self._probe_url = ""
        self._tracing = Tracing()
        self._ended_well = False  # all calls ended before the grace did, so that the engine is idle

    async def run(self) -> None:
        """Serves until `lifecycle.begin_drain` is called. Raises StartError."""
        if self._config.announce_file:
            path = Path(self._config.announce_file)
            if path.is_dir() or not path.parent.is_dir():
                raise StartError(f"announce_file {str(path)!r}: expected a file in a directory that exists")
        http = self._http_server()
        serving_http = asyncio.create_task(http.serve())
        probing = asyncio.create_task(self._answer_probes())
        serving = asyncio.create_task(self._serve())
        draining = asyncio.create_task(self.lifecycle.drain.wait())
        try:
            await asyncio.wait({serving, draining, serving_http}, return_when=asyncio.FIRST_COMPLETED)
            if probing.done():
                probing.result()
            if serving.done():
                serving.result()
                raise StartError("the scheduler ended by itself; this is a bug")
            self._ended_well = await self._drain(http, serving_http)
        finally:
            http.should_exit = http.force_exit = True
            serving.cancel()
            draining.cancel()
            probing.cancel()
            ending: set[asyncio.Task[Any]] = {serving, serving_http, probing}
            if self._metrics is not None:
                ending.add(asyncio.create_task(asyncio.to_thread(self._metrics.close)))
            limit_s = SEND_S if self._ended_well else QUICK_S
            ending.add(asyncio.create_task(asyncio.to_thread(self._tracing.close, limit_s)))
            if self._grpc is not None:  # a start that failed; after a drain it has been stopped already
                ending.add(asyncio.create_task(self._grpc.stop(0)))
            await asyncio.wait(ending, timeout=limit_s)
            await self._close_backend()

    def _http_server(self) -> HttpServer:
        try:
            self._tls = Tls.of(self._config)
        except ValueError as error:
            raise StartError(str(error)) from None
        listener = _listen(self._config.host, self._config.http_port)
        scheme = "http" if self._tls is None else "https"
        self._http_url = _url(scheme, self._config.host, listener.getsockname()[1])
        return HttpServer(
            self._front,
            listener,
            header_s=self._config.header_s,
            grace_s=self._config.grace_s,
            tls=self._tls.context if self._tls else None,
        )

    async def _answer_probes(self) -> None:
        """On their own port, where there is one, to the very end."""
        if self._config.probe_port is None:
            return
        listener = _listen(self._config.host, self._config.probe_port)
        self._probe_url = _url("http", self._config.host, listener.getsockname()[1])
        server = HttpServer(Probes(self.lifecycle), listener, header_s=self._config.header_s, grace_s=0)
        try:
            await server.serve()
        finally:
            server.close()

    async def _serve(self) -> None:
        """Opens gRPC, loads the model, and feeds the engine until cancelled."""
        try:
            await in_thread(_import_transports)
            from teacher_server import grpc_api, http_api, logs, service
            from teacher_server.auth import KeyRing

            logs.configure(self._config.log_format, self._config.log_level)
            self._tracing = open_tracing(self._config)
            core = self.service = service.TeacherService(self._config, self.lifecycle, self._tracing)
            keys = KeyRing.of(self._config, core.tenants)
            if self._config.metrics_port is not None:
                from teacher_server.metrics import MetricsServer

                self._metrics = MetricsServer(core, self._config.metrics_host, self._config.metrics_port)
            self._front.inner = http_api.build(core, keys)
            self._grpc = grpc_api.GrpcServer(core, self.lifecycle, keys, self._tls)
            await self._grpc.start(self._config.host, self._config.grpc_port)
            announcing = asyncio.create_task(self._announce(core))
            try:
                facts = await self._load()
                assert self._backend is not None, "loaded"
                serving = asyncio.create_task(core.serve(self._backend, facts))
                try:
                    await asyncio.wait({announcing, serving}, return_when=asyncio.FIRST_COMPLETED)
                    if announcing.done():
                        announcing.result()
                    await serving
                finally:
                    serving.cancel()
                    await asyncio.gather(serving, return_exceptions=True)
            finally:
                announcing.cancel()
        except (ValueError, OSError) as error:
            raise StartError(" ".join(str(error).split())) from error

    async def _load(self) -> ModelFacts:
        try:
            self._backend = await in_thread(lambda: self._create(self._config))
            return await in_thread(self._backend.load)
        except (ValueError, OSError):
            raise
        except Exception as error:  # the boundary to foreign code: a broken checkpoint may raise anything
            first = (str(error).strip().splitlines() or ["no message"])[0]
            raise StartError(f"cannot load {self._config.model!r}: {type(error).__name__}: {first[:300]}") from error

    async def _announce(self, core: Any) -> None:
        await self.lifecycle.ready.wait()
        assert self._grpc is not None, "ready without gRPC"
        info: TeacherInfo = core.info
        ready = {
            "grpc_url": _url("grpc" if self._tls is None else "grpcs", self._config.host, self._grpc.port),
            "http_url": self._http_url,
            "model": info.model_name,
            "fingerprint": info.fingerprint,
            "pid": os.getpid(),
        }
        if self._metrics is not None:
            ready["metrics_url"] = _url("http", self._config.metrics_host, self._metrics.port) + "/metrics"
        if self._probe_url:
            ready["probe_url"] = self._probe_url
        self._tell(ready)

    def _print_ready(self, ready: dict[str, Any]) -> None:
        """The ready line, and the file for a parent that waits: it appears whole or not at all."""
        if self._config.announce_file:
            path = Path(self._config.announce_file)
            partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(ready) + "\n")
            partial.replace(path)
        line = "ready {grpc_url} {http_url} model={model} fingerprint={fingerprint}".format_map(ready)
        print(line + (f" metrics={ready['metrics_url']}" if "metrics_url" in ready else ""), flush=True)

    async def _drain(self, http: HttpServer, serving_http: asyncio.Task[None]) -> bool:
        """The probes say no already. Serve on for a while, then stop both transports under one grace. True when
        nothing had to be cut off."""
        quick = asyncio.create_task(self.lifecycle.quick_exit.wait())
        try:
            if self.lifecycle.ready.is_set():
                await asyncio.wait({quick}, timeout=self._config.lame_duck_s)
            self.lifecycle.closed.set()
            http.should_exit = True
            stopping: set[asyncio.Task[Any]] = {serving_http}
            if self._grpc is not None:
                stopping.add(asyncio.create_task(self._grpc.stop(self._config.grace_s)))
            started = asyncio.get_running_loop().time()
            ended = asyncio.create_task(asyncio.wait(stopping))
            either: set[asyncio.Task[Any]] = {quick, ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if quick.done():
                http.force_exit = True
                if self._grpc is not None:
                    await asyncio.wait({asyncio.create_task(self._grpc.stop(0))}, timeout=QUICK_S)
                return False
            return asyncio.get_running_loop().time() - started < self._config.grace_s
        finally:
            quick.cancel()

    async def _close_backend(self) -> None:
        if self._backend is not None:
            limit_s = CLOSE_S if self._ended_well else QUICK_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._backend.close(), limit_s)


def _import_transports() -> None:
    """In a thread, so that the probes are answered meanwhile: FastAPI and gRPC take most of a second to import."""
    import teacher_server.grpc_api
    import teacher_server.http_api  # noqa: F401


def open_tracing(config: ServerConfig) -> Tracing:
    """Raises ValueError where traces are asked for and can't be sent."""
    try:
        return Tracing.to(config.otlp_endpoint, service="teacher-serve", share=config.trace_share)
    except ValueError as error:
        raise ValueError(f"otlp_endpoint: {error}") from None


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
