"""One machine's part of a vLLM engine that spans several: the workers of a node other than the first.

The first node has the engine's front end, its scheduler and the server; here there are workers alone, which meet the
others at `master_addr`:`master_port`. vLLM's workers don't notice when the first node's are gone, so this holds a
connection to that port, which the first worker's process listens on for as long as it lives.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from teacher_server.backends.vllm_engine import one_line, prepare_environment

CONNECT_S = 10.0
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds, seconds, times: a first node that vanishes without a word is noticed after 20 s."""


class NodeEnded(Exception):
    """One line: why this node's part is over. Started again, it takes its place in the engine's next start."""


class FirstNode:
    """A connection that is open for as long as the first node's worker lives. Raises NodeEnded where there is none."""

    def __init__(self, address: str, port: int) -> None:
        self._name = f"{address}:{port}"
        try:
            self._connection = socket.create_connection((address, port), CONNECT_S)
        except OSError as error:
            raise NodeEnded(f"the first node's engine at {self._name} has gone: {error.strerror or error}") from None
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):  # Linux has them
                self._connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def wait(self, timeout_s: float) -> None:
        """Returns after `timeout_s` if it is still there. Raises NodeEnded as soon as it isn't."""
        self._connection.settimeout(timeout_s)
        try:
            data = self._connection.recv(1)
        except TimeoutError:
            return
        except OSError as error:
            raise NodeEnded(f"the first node's engine at {self._name} has gone: {error.strerror or error}") from None
        if not data:
            raise NodeEnded(f"the first node's engine at {self._name} has ended")

    def close(self) -> None:
        self._connection.close()


class NodeWorkers:
    """The workers of this node, built from the arguments that the first node's engine has.

    Args:
        arguments: vllm's AsyncEngineArgs, with this node's `node_rank`.
        environment: of the workers, where ours says nothing else.
    """

    def __init__(self, arguments: Any, environment: Mapping[str, str]) -> None:
        prepare_environment()
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        self._arguments = arguments
        self._up = threading.Event()
        self._over = threading.Event()
        self._failure = ""
        # Workers end with the thread that started them (teacher_api/parent.py), which therefore stays.
        self._thread = threading.Thread(target=self._work, name="node", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def is_up(self, timeout_s: float) -> bool:
        """Whether all nodes have met and loaded the model; waits up to `timeout_s`. Raises NodeEnded."""
        deadline = time.monotonic() + timeout_s
        while not self._up.is_set() and not self._over.is_set() and time.monotonic() < deadline:
            self._over.wait(0.05)
        if self._over.is_set():
            raise NodeEnded(self._failure or "a worker of this node has ended; vLLM's log may say why")
        return self._up.is_set()

    def stop(self) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    def _work(self) -> None:
        try:
            from vllm.v1.executor.multiproc_executor import MultiprocExecutor

            executor = MultiprocExecutor(self._arguments.create_engine_config(headless=True), monitor_workers=False)
            self._up.set()
            executor.start_worker_monitor(inline=True)  # until one of them ends
        except Exception as error:  # the boundary to foreign code: whatever went wrong ends this node
            self._failure = f"vLLM could not start this node's workers: {one_line(error)}"
        finally:
            self._over.set()
