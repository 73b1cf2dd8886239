"""The host's care for its vLLM engine, with a stand-in for the engine: tests/server/test_vllm_backend.py kills a
real one."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from teacher_api.errors import BackendFailed
from teacher_server.backends.vllm_engine import EngineHost

pytestmark = pytest.mark.slow


class Engine:
    def __init__(self) -> None:
        self.errored = False

    def shutdown(self, timeout: float) -> None:
        return


class Revivable(EngineHost):
    """Starts stand-ins: the next one when `gate` is open, or not at all while `broken`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False
        self.starts = 0

    async def _start(self) -> None:
        self.starts += 1
        await asyncio.to_thread(self.gate.wait, 20)
        if self.broken:
            raise ValueError("no memory")
        self._engine = Engine()


def until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, complaint


@pytest.fixture
def host() -> Iterator[Revivable]:
    made = Revivable()
    made.start(None, {}, timeout_s=20)
    made.starts = 0
    yield made
    made.gate.set()
    made.close()


def test_an_engine_that_dies_without_work_is_started_again_by_the_check_alone(host: Revivable):
    assert host.is_up()
    assert host.starts == 0
    host.gate.clear()
    host._engine.errored = True
    assert not host.is_up()
    until(lambda: host.starts == 1, "it was not started again")
    for _ in range(3):
        assert not host.is_up(), "it has not started yet"
    with pytest.raises(BackendFailed) as failed:
        host.require_up()
    assert failed.value.retry_after_s
    host.gate.set()
    until(host.is_up, "it is up and does not say so")
    assert host.starts == 1, "one start at a time"
    until(lambda: host.restarts == 1, "the start was not counted")


def test_an_engine_that_does_not_start_is_tried_again_after_a_pause(host: Revivable):
    host.broken = True
    host._engine.errored = True
    assert not host.is_up()
    until(lambda: host.starts == 1 and not host._is_reviving(), "the start did not end")
    for _ in range(100):
        assert not host.is_up()
    assert host.starts == 1, "no start follows a failed one at once"
    host.broken = False
    assert 5 < host._revive_from - time.monotonic() <= 10  # s: the pause that docs/operations.md names
    host._revive_from = time.monotonic()
    until(host.is_up, "it was not tried again")
    assert host.starts == 2
    until(lambda: host.restarts == 1, "the failed start was counted, or the good one was not")


def test_a_closed_host_is_not_up_and_starts_nothing(host: Revivable):
    host.close()
    assert not host.is_up()
    assert host.starts == 0


class Hanging(Revivable):
    """Waits for a process of its own, as vLLM does for an engine's, that never says anything; unless it `works`."""

    def __init__(self) -> None:
        super().__init__()
        self.works = False
        self.waited_for: list[multiprocessing.process.BaseProcess] = []

    async def _start(self) -> None:
        if not self.works:
            self.waited_for.append(multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,)))
            self.waited_for[-1].start()
            self.waited_for[-1].join()  # on the engine's loop, which stands still meanwhile
            raise ValueError("a process of the engine ended")
        self._engine = Engine()


def test_a_start_that_hangs_ends_in_one_line_and_leaves_nothing_behind():
    host = Hanging()
    bystander = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    bystander.start()
    try:
        with pytest.raises(ValueError, match=r"did not start within 0\.5 s \(engine_start_timeout_s\)"):
            host.start(None, {}, timeout_s=0.5)
        assert not host.waited_for[0].is_alive()
        assert bystander.is_alive(), "not the engine's"
        host.works = True
        host.start(None, {}, timeout_s=20)  # as the fallback to another path does
        assert host.is_up()
        with pytest.raises(ValueError, match=r"did not answer within 0\.1 s"):
            host.run_blocking(asyncio.Event().wait(), timeout_s=0.1)
    finally:
        host.close()
        bystander.kill()
        bystander.join()


def test_a_revival_that_hangs_is_killed_and_tried_again():
    host = Hanging()
    host.works = True
    host.start(None, {}, timeout_s=0.5)
    try:
        host.works = False
        host._engine.errored = True
        killed = -signal.SIGKILL
        until(lambda: not host.is_up() and host.waited_for and host.waited_for[0].exitcode == killed, "it hangs on")
        host.works = True
        until(lambda: not host._is_reviving(), "the start did not end")
        host._revive_from = time.monotonic()
        until(host.is_up, "it was not tried again")
    finally:
        host.close()
