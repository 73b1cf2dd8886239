"""How vLLM's processes wait for each other on a CPU: asleep. By default each polls for a second after every message, on
a core that the arithmetic of the engine, or of whoever shares the machine with the teacher, would use.
"""

from __future__ import annotations

import inspect

POLL_S = 0.001
"""Long enough for the messages of one step that follow each other; a reader that sleeps is woken within 0.1 ms."""
_POLLING = "busy_loop_s"


def sleep_between_messages() -> None:
    """For the message queues that this process makes from now on.

    Raises:
        RuntimeError: this vLLM's queues are not made as the one known here makes them.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    make = SpinCondition.__init__
    with_default = [p.name for p in inspect.signature(make).parameters.values() if p.default is not p.empty]
    if with_default != [_POLLING]:
        raise RuntimeError(f"vLLM's SpinCondition has defaults for {with_default}; expected {_POLLING} alone")
    make.__defaults__ = (POLL_S,)
