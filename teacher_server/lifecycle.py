"""The server's life: starting, ready, draining. Answers the two probes, owns the signal handlers, knows no transport.

/livez: this process answers, and work does not wait behind an engine that has stopped. /readyz: the model is loaded
and has passed its self-check, its engine neither died since nor hangs, the server is not draining, and there is room
for work.
"""

from __future__ import annotations

import asyncio
import math
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

PATIENCE = 3.0  # times the longest forward of late, before an engine is taken to hang
GAPS_KEPT = 64
Phase = Literal["starting", "ready", "draining"]


@dataclass(frozen=True, slots=True)
class Probe:
    ok: bool
    status: str  # one word or short clause, for people


class Lifecycle:
    def __init__(self, *, stall_s: float, high_water: float, hang_s: float = math.inf) -> None:
        self.phase: Phase = "starting"
        self.engine_up = True  # False while a dead engine is being started again, or one hangs
        self.closed = asyncio.Event()  # the lame-duck time is over: no new work
        self.ready = asyncio.Event()
        self.drain = asyncio.Event()  # the first SIGTERM or SIGINT, or a call to begin_drain
        self.quick_exit = asyncio.Event()  # the second one
        self._engine_trouble = ""
        self._stall_s = stall_s
        self._hang_s = hang_s
        self._last_idle_s = 0.0  # when it was looked at last
        self._gaps_s: deque[float] = deque(maxlen=GAPS_KEPT)  # between the ends of forwards, while work waited
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

    def engine_is(self, trouble: str) -> None:
        """To be called about twice a second, with what is known to be wrong with the engine; empty: nothing."""
        trouble = trouble or self._hanging()
        up = not trouble
        self._engine_trouble = trouble
        if up != self.engine_up:
            self.engine_up = up
            self._tell()

    def _hanging(self) -> str:
        idle_s = self._idle_s()
        if idle_s < self._last_idle_s:
            self._gaps_s.append(self._last_idle_s)
        self._last_idle_s = idle_s
        patience_s = min(max(self._hang_s, PATIENCE * max(self._gaps_s, default=0.0)), self._stall_s)
        return f"hanging: work waits, and no forward has finished for {idle_s:.0f} s" if idle_s > patience_s else ""

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
            return Probe(False, self._engine_trouble)
        if self._share() > self._high_water:
            return Probe(False, f"busy: {self._share():.0%} of the queue is taken")
        return Probe(True, "ready")
