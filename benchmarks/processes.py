"""Starts the project's own programs as children, and stops them."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0


@contextlib.contextmanager
def teacher(model: Path, scratch: Path, *arguments: str) -> Iterator[dict[str, Any]]:
    """A `teacher-serve` on free ports; yields what it announces (grpc_url, http_url, fingerprint, …)."""
    announced = scratch / "announced.json"
    announced.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "teacher_server", "--model", str(model), "--http-port", "0", "--grpc-port", "0",
        "--announce-file", str(announced), "--log-level", "warning", "--lame-duck-s", "0", *arguments,
    ]  # fmt: skip
    with (scratch / "teacher.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not announced.exists():
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"teacher-serve did not start: {(scratch / 'teacher.log').read_text()[-1000:]}")
            time.sleep(0.1)
        yield json.loads(announced.read_text())
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
