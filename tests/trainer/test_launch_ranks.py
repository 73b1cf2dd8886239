"""A launcher that is told to stop while it starts its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from student_trainer import launch

LONG_S = 30


@pytest.mark.parametrize("during", [1, 2])
def test_a_stop_while_processes_are_started_reaches_all_of_them(during: int, monkeypatch, capfd) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, _command: Any, **kwargs: Any) -> None:
            started.append(self)
            if len(started) == during:
                os.kill(os.getpid(), signal.SIGTERM)
            super().__init__([sys.executable, "-c", f"import time; time.sleep({LONG_S})"], **kwargs)

    monkeypatch.setattr(launch.subprocess, "Popen", Interrupted)
    began = time.monotonic()
    assert launch.run_ranks(2, [], {}) == 128 + signal.SIGTERM
    assert time.monotonic() - began < LONG_S / 2
    assert all(child.returncode is not None for child in started)
    assert "stopped by SIGTERM before all processes ran" in capfd.readouterr().err
