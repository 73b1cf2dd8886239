"""`teacher-serve` with a `node_rank` above 0: no server, but this machine's workers of the engine behind the server on
the first node. It ends when they or the first node's do, to be started again by whatever supervises it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

from teacher_server.config import ServerConfig

FAILED, GONE = 1, 75
"""75: started again by the same command, it goes on."""
TICK_S = 0.5
CLOSE_S = 10.0  # the first node's time to free its model, after its last call has ended


class Node:
    """State between the signal handlers and the loop below."""

    def __init__(self, config: ServerConfig) -> None:
        self._longest_s = config.lame_duck_s + config.grace_s + CLOSE_S
        self.leave_at: float | None = None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """First: stay for as long as the first node, told the same, takes to drain. Second: leave at once."""
        now = time.monotonic()
        self.leave_at = now + self._longest_s if self.leave_at is None else now

    @property
    def must_leave(self) -> bool:
        return self.leave_at is not None and time.monotonic() >= self.leave_at


def run(config: ServerConfig) -> NoReturn:
    """Ends the process: status 0 after a signal, 1 when this node can't start, 75 when its part is over."""
    node = Node(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, node.on_signal)
    try:
        status, line = _follow(config, node)
    except (ValueError, OSError) as error:
        status, line = FAILED, " ".join(str(error).split())
    if line:
        print(f"teacher-serve: error: node {config.node_rank}: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(status)  # vLLM's threads are not waited for


def _follow(config: ServerConfig, node: Node) -> tuple[int, str]:
    from teacher_server import backends
    from teacher_server.backends.vllm_node import FirstNode, NodeEnded

    workers = backends.create_node(config)
    workers.start()
    latest = time.monotonic() + config.engine_start_timeout_s
    try:
        while not workers.is_up(TICK_S):
            if node.leave_at is not None:  # nothing is being served yet
                return 0, ""
            if time.monotonic() > latest:
                return (
                    GONE,
                    f"the nodes did not meet within {config.engine_start_timeout_s:g} s (engine_start_timeout_s)",
                )
        first = FirstNode(str(config.master_addr), config.engine_port)
        print(f"ready node {config.node_rank} of {config.nnodes}, with {config.master_addr}", flush=True)
        while not node.must_leave:
            first.wait(TICK_S)
            workers.is_up(0)
    except NodeEnded as ended:
        return (0, "") if node.leave_at is not None else (GONE, str(ended))
    return 0, ""
