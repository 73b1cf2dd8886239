"""A vLLM engine and the event loop it lives on: started, asked, started again after it died, stopped.

The engine runs in processes of its own; its front end runs on an event loop in a thread of its own, because a backend
is loaded in a thread without one and because building the front end blocks for the whole start.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from teacher_api.errors import BackendFailed, InvalidRequest
from teacher_server.vllm_plugin import SERVER_PID

logger = logging.getLogger(__name__)

SHUTDOWN_S = 10.0
RETRY_AFTER_DEATH_S = 10.0  # a start takes about this long and longer
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # the checkpoint is on disk by then; the engine's processes have nothing to fetch
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # gRPC's threads do not survive a fork
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout carries the ready line
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Set at load, for this process and those it starts, where the environment says nothing else."""

Answer = TypeVar("Answer")
Ask = Callable[[Any, str], AsyncIterator[Any]]
"""Of (vLLM's AsyncLLM, request id): the outputs of one request."""


def prepare_environment() -> None:
    """Before vLLM is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[SERVER_PID] = str(os.getpid())


def progress() -> dict[str, bool]:
    """Engine arguments by which vLLM draws its progress bars for people only: among lines of a log they are none."""
    return {"use_tqdm_on_load": sys.stderr.isatty()}


class EngineHost:
    """One engine at a time. `run`, `is_up` and `require_up` are for the server's event loop, `last_output` for the
    engine's."""

    def __init__(self) -> None:
        self._engine: Any = None  # vllm's AsyncLLM
        self._arguments: Any = None  # vllm.AsyncEngineArgs
        self._environment: dict[str, str] = {}
        self._timeout_s = 0.0  # of a start
        self._others: set[Any] = set()  # processes from before the last start
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._revival: concurrent.futures.Future[None] | None = None
        self.restarts = 0
        """Starts after a death that went well."""
        self._revive_from = 0.0  # by the monotonic clock: no start before, for the last one failed
        self._revive_until = 0.0  # a start that takes longer is killed
        self._request_ids = itertools.count()

    def start(self, arguments: Any, environment: Mapping[str, str], *, timeout_s: float) -> None:
        """Blocks until the engine is up, or raises ValueError of one line: after `timeout_s` its processes are killed.

        Args:
            environment: of the engine's processes, where ours says nothing else. Ours is left as it is: the next
                engine, and what else this process starts, may need another.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-front-end", daemon=True)
            self._thread.start()
        self._arguments, self._environment, self._timeout_s = arguments, dict(environment), timeout_s
        self._others = set(multiprocessing.active_children())
        starting = asyncio.run_coroutine_threadsafe(self._start(), self._loop)
        if not concurrent.futures.wait([starting], timeout_s).done:
            self._kill()
            if not concurrent.futures.wait([starting], SHUTDOWN_S).done:
                self._loop, self._thread = asyncio.new_event_loop(), None  # the old one is left to its daemon thread
            self._engine = None
            raise ValueError(f"vLLM did not start within {timeout_s:g} s (engine_start_timeout_s); it was stopped")
        starting.result()

    def stop(self) -> None:
        """Stops the engine; another may be started."""
        if self._revival is not None and self._is_reviving():
            self._kill()
            concurrent.futures.wait([self._revival], SHUTDOWN_S)
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown(timeout=SHUTDOWN_S)

    def close(self) -> None:
        """Stops the engine and the loop. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            if not self._loop.is_running():
                self._loop.close()
            return
        self.stop()
        with contextlib.suppress(TimeoutError):  # a task that does not end is left to the thread, a daemon
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(SHUTDOWN_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        thread.join(SHUTDOWN_S)
        if not thread.is_alive():
            self._loop.close()

    def run_blocking(self, work: Coroutine[Any, Any, Answer], *, timeout_s: float) -> Answer:
        """For threads without an event loop. Raises ValueError when the work takes longer than `timeout_s`."""
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        if not concurrent.futures.wait([running], timeout_s).done:
            running.cancel()
            raise ValueError(f"vLLM started, but did not answer within {timeout_s:g} s (engine_start_timeout_s)")
        return running.result()

    async def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Runs `work` on the engine's loop; cancelling this cancels the work, which aborts the engine's requests."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    @property
    def batch_tokens(self) -> int:
        """Of one step, over all that work at the same time."""
        config = self._engine.vllm_config
        parallel = config.parallel_config
        engines = int(parallel.data_parallel_size) * int(parallel.pipeline_parallel_size)
        return int(config.scheduler_config.max_num_batched_tokens) * engines

    def is_dead(self) -> bool:
        return self._is_reviving() or self._engine is None or bool(self._engine.errored)

    def is_up(self) -> bool:
        """Whether it can be asked; a dead engine is started again, once at a time, after a failed start not at once."""
        if self._thread is None or self._engine is None:
            return False
        if self.is_dead():
            self._revive()
            return False
        return True

    def is_frozen(self) -> bool:
        """Whether one of the engine's processes is stopped, as by SIGSTOP: vLLM only notices those that end."""
        return any(_is_stopped(process.pid) for process in multiprocessing.active_children())

    def require_up(self) -> None:
        """Raises BackendFailed where the engine cannot be asked."""
        if self.is_up():
            return
        if self._engine is None:
            raise BackendFailed("the vLLM engine is not running")
        raise BackendFailed("the vLLM engine died and is being started again", retry_after_s=RETRY_AFTER_DEATH_S)

    async def load_adapter(self, adapter: Any) -> None:
        """Loads vLLM's LoRARequest. Raises ValueError where the engine can't; in a step, it would die of that."""
        try:
            loaded = await self._engine.add_lora(adapter)
        except Exception as error:  # what a worker raised comes back as a bare Exception
            raise ValueError(f"lora.{adapter.lora_name}: vLLM can't load it: {one_line(error)}") from error
        if not loaded:
            raise ValueError(f"lora.{adapter.lora_name}: vLLM did not load it; its log may say why")

    async def last_output(self, sequence: str, ask: Ask) -> Any:
        """The last output of one request about the sequence of this id.

        Raises:
            BackendFailed: the engine failed, or died. InvalidRequest: it refused the request.
        """
        from vllm.exceptions import VLLMClientError, VLLMServerError

        output = None
        try:
            async for answer in ask(self._engine, f"score-{next(self._request_ids)}"):
                output = answer
        except VLLMServerError as error:
            state = "died" if self.is_dead() else "failed"
            raise BackendFailed(f"the vLLM engine {state} on sequence {sequence!r}: {one_line(error)}") from error
        except (VLLMClientError, ValueError) as error:
            raise InvalidRequest(f"vLLM refused sequence {sequence!r}: {one_line(error)}") from error
        return output

    async def _start(self) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            with _added_to_environment(self._environment):
                self._engine = AsyncLLM.from_engine_args(self._arguments)
        except (RuntimeError, ValueError, OSError, NotImplementedError, AssertionError) as error:
            raise ValueError(
                f"vLLM could not start with {self._arguments.model!r}: {one_line(error)}; the cause is in its log above"
            ) from error

    def _kill(self) -> None:
        """Kills the processes of the start that is under way, which also ends the waiting for them."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()

    def _is_reviving(self) -> bool:
        return self._revival is not None and not self._revival.done()

    def _revive(self) -> None:
        if self._is_reviving():
            if time.monotonic() >= self._revive_until:
                self._kill()
            return
        if not self._engine.errored:  # a start may have ended since the caller looked
            return
        if time.monotonic() >= self._revive_from:
            logger.error("the vLLM engine died; starting it again")
            self._revive_until = time.monotonic() + self._timeout_s
            self._revival = asyncio.run_coroutine_threadsafe(self._restart(), self._loop)

    async def _restart(self) -> None:
        try:
            await asyncio.to_thread(self._engine.shutdown, timeout=SHUTDOWN_S)
            self._others = set(multiprocessing.active_children())
            await self._start()
            self.restarts += 1
        except Exception as error:  # the boundary to foreign code: whatever went wrong, it is tried again
            self._revive_from = time.monotonic() + RETRY_AFTER_DEATH_S
            logger.error("%s; trying again in %g s", error, RETRY_AFTER_DEATH_S)


def _is_stopped(pid: int | None) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has ended, or this is no Linux
        return False
    return text.rpartition(")")[2].split()[0] in ("T", "t")  # proc(5): stopped by a signal, or by a tracer


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _added_to_environment(names: Mapping[str, str]) -> Iterator[None]:
    added = names.keys() - os.environ.keys()
    os.environ.update({name: names[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
