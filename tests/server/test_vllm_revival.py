"""The vLLM backend's care for its engine, with a stand-in for the engine: tests/server/test_vllm_backend.py kills a
real one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from teacher_api.errors import BackendFailed
from teacher_server.backends.vllm_backend import VllmBackend


class Engine:
    def __init__(self) -> None:
        self.errored = False

    def shutdown(self, timeout: float) -> None:
        return


class Revivable(VllmBackend):
    """Starts stand-ins: the next one when `gate` is open, or not at all while `broken`."""

    def __init__(self) -> None:
        super().__init__("m")
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False
        self.starts = 0

    async def _start(self, plan: Any) -> None:
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
def backend() -> Iterator[Revivable]:
    made = Revivable()
    made._thread = threading.Thread(target=made._loop.run_forever, daemon=True)
    made._thread.start()
    made._plan = object()  # type: ignore[assignment]  # handed through to _start
    made._engine = Engine()
    yield made
    made.gate.set()
    asyncio.run(made.close())


def test_an_engine_that_dies_without_work_is_started_again_by_the_check_alone(backend: Revivable):
    assert backend.is_up()
    assert backend.starts == 0
    backend.gate.clear()
    backend._engine.errored = True
    assert not backend.is_up()
    until(lambda: backend.starts == 1, "it was not started again")
    for _ in range(3):
        assert not backend.is_up(), "it has not started yet"
    with pytest.raises(BackendFailed) as failed:
        asyncio.run(backend.score([]))
    assert failed.value.retry_after_s
    backend.gate.set()
    until(backend.is_up, "it is up and does not say so")
    assert backend.starts == 1, "one start at a time"


def test_an_engine_that_does_not_start_is_tried_again_after_a_pause(backend: Revivable):
    backend.broken = True
    backend._engine.errored = True
    assert not backend.is_up()
    until(lambda: backend.starts == 1 and not backend._is_reviving(), "the start did not end")
    for _ in range(100):
        assert not backend.is_up()
    assert backend.starts == 1, "no start follows a failed one at once"
    backend.broken = False
    assert 5 < backend._revive_from - time.monotonic() <= 10  # s: the pause that docs/operations.md names
    backend._revive_from = time.monotonic()
    until(backend.is_up, "it was not tried again")
    assert backend.starts == 2


def test_a_closed_backend_is_not_up_and_starts_nothing(backend: Revivable):
    asyncio.run(backend.close())
    assert not backend.is_up()
    assert backend.starts == 0
