"""The two programs as a user would run them: `teacher-serve` in the background, `student-train` in the foreground."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

START_S, STOP_S, POLL_S = 180.0, 20.0, 0.05


class QuickstartError(Exception):
    """A program ended that should not have; one line, shown without a traceback."""


def program(name: str) -> str:
    """Path of one of this project's commands in the environment that runs us."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise QuickstartError(f"{name} is not installed beside {sys.executable}; run `make setup`")
    return str(path)


def _environment() -> dict[str, str]:
    """Ours, without settings of either program, and with threads that sleep while the other program computes."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TEACHER_", "STUDENT_"))}
    return {**kept, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def show(console: Console, command: Sequence[str]) -> None:
    """Prints a command as one could type it."""
    typed = [Path(command[0]).name, *command[1:]]
    console.print(f"[dim]$[/dim] {shlex.join(typed)}", highlight=False, soft_wrap=True, markup=True)


@contextlib.contextmanager
def teacher_serve(model: Path, log: Path, console: Console, extra: Sequence[str] = ()) -> Iterator[str]:
    """Serves `model` on free ports of the loopback interface; yields its gRPC URL. Its output goes to `log`."""
    command = [program("teacher-serve"), "--model", str(model), *extra]
    show(console, command)
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        ready = Path(folder) / "ready.json"
        command += ["--http-port", "0", "--grpc-port", "0", "--announce-file", str(ready), "--lame-duck-s", "0"]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
        try:
            yield _wait_ready(process, ready, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if ready.exists():
            return str(json.loads(ready.read_text())["grpc_url"])
        if process.poll() is not None:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise QuickstartError(f"teacher-serve ended with code {process.returncode}: {tail[0]} (see {log})")
        time.sleep(POLL_S)
    raise QuickstartError(f"teacher-serve was not ready after {START_S:.0f} s (see {log})")


def student_train(arguments: Sequence[str], overrides: Mapping[str, str], console: Console) -> None:
    """Runs `student-train` to its end; its progress goes straight to the terminal."""
    command = [program("student-train"), *arguments, *(f"{key}={value}" for key, value in overrides.items())]
    show(console, command)
    code = subprocess.run(command, env=_environment(), check=False).returncode
    if code:
        raise QuickstartError(f"student-train ended with code {code}; its last lines say why")
