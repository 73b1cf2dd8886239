"""How vLLM's processes wait for each other on a CPU: asleep. By default each polls for a second after every message, on
a core that the arithmetic of the engine, or of whoever shares the machine with the teacher, would use.

A reader that sleeps is woken by a notification, and vLLM's writers lose some: their sockets keep one and drop the next
until they hear that it was taken. vLLM looks after five seconds whether a message came without one; here a reader looks
again after a tenth of the time that it has waited.
"""

from __future__ import annotations

import functools
import inspect
import time
from typing import Any

POLL_S = 0.001
"""Long enough for the messages of one step that follow each other; a reader that sleeps is woken within 0.1 ms."""
LOOK_AGAIN = 0.1
"""After this share of the time since the last message, and at least a millisecond: what a lost notification costs."""
_DEFAULTS = {"__init__": ["busy_loop_s"], "wait": ["timeout_ms"]}


@functools.cache  # once in a process
def sleep_between_messages() -> None:
    """For the message queues that this process makes from now on.

    Raises:
        RuntimeError: this vLLM's queues are not made as the one known here makes them.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    for name, expected in _DEFAULTS.items():
        parameters = inspect.signature(getattr(SpinCondition, name)).parameters.values()
        found = [p.name for p in parameters if p.default is not p.empty]
        if found != expected:
            raise RuntimeError(f"vLLM's SpinCondition.{name} has defaults for {found}; expected {expected} alone")
    sleep = SpinCondition.wait

    @functools.wraps(sleep)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        look_ms = max(1, round(1000 * LOOK_AGAIN * (time.monotonic() - self.last_read)))
        sleep(self, look_ms if timeout_ms is None else min(timeout_ms, look_ms))

    SpinCondition.__init__.__defaults__ = (POLL_S,)
    SpinCondition.wait = wait
