"""The server's life: starting, ready, draining. Answers the two probes, owns the signal handlers, knows no transport.

/livez: this process answers, and work does not wait behind an engine that has stopped. /readyz: the model is loaded
and has passed its self-check, its engine has not died since, the server is not draining, and there is room for work.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["starting", "ready", "draining"]


@dataclass(frozen=True, slots=True)
class Probe:
    ok: bool
    status: str  # one word or short clause, for people


class Lifecycle:
    def __init__(self, *, stall_s: float, high_water: float) -> None:
        self.phase: Phase = "starting"
        self.engine_up = True  # False while a dead engine is being started again
        self.closed = asyncio.Event()  # the lame-duck time is over: no new work
        self.ready = asyncio.Event()
        self.drain = asyncio.Event()  # the first SIGTERM or SIGINT, or a call to begin_drain
        self.quick_exit = asyncio.Event()  # the second one
        self._stall_s = stall_s
        self._high_water = high_water
        self._idle_s: Callable[[], float] = lambda: 0.0
        self._share: Callable[[], float] = lambda: 0.0
        self._listeners: list[Callable[[], None]] = []

    def watch_work(self, idle_s: Callable[[], float], share: Callable[[], float]) -> None:
        """Where the probes read how long the engine has been silent and how full the queue is."""
        self._idle_s, self._share = idle_s, share

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def become_ready(self) -> None:
        if self.phase == "starting":
            self._enter("ready")
            self.ready.set()

    @property
    def is_serving(self) -> bool:
        """Whether work that comes now is likely to be done, were there room for it."""
        return self.phase == "ready" and self.engine_up

    def engine_is(self, up: bool) -> None:
        if up != self.engine_up:
            self.engine_up = up
            self._tell()

    def begin_drain(self) -> None:
        """First call: drain. Second: leave at once."""
        if self.drain.is_set():
            self.quick_exit.set()
        self._enter("draining")
        self.drain.set()

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.begin_drain)

    def livez(self) -> Probe:
        idle_s = self._idle_s()
        if idle_s > self._stall_s:
            return Probe(False, f"stalled: work waits, and no forward has finished for {idle_s:.0f} s")
        return Probe(True, "alive")

    def readyz(self) -> Probe:
        if self.phase != "ready":
            return Probe(False, self.phase)
        if not self.engine_up:
            return Probe(False, "restarting: the engine died and is being started again")
        if self._share() > self._high_water:
            return Probe(False, f"busy: {self._share():.0%} of the queue is taken")
        return Probe(True, "ready")
