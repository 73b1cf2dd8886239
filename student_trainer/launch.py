"""Processes around the loop: a local `teacher-serve` child, and one training process per GPU. Both end with their
parent, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from student_trainer.scoring import HandshakeError
from student_trainer.teachers.config import TeacherConfig

TEACHERS = "PRECEPTOR_TEACHERS"
"""Environment variable by which ranks learn the URLs of the teachers, as JSON, from a launcher that serves some.
Not an option: their configuration, which they record, stays as the user wrote it."""
GRPC_FORKS = "GRPC_ENABLE_FORK_SUPPORT"
POLL_S = 0.1
STOP_GRACE_S = 40.0
"""From SIGTERM to SIGKILL: a rank may write its checkpoint in this time."""
TEACHER_STOP_S = CHILD_STOP_S = 10.0
TEACHER_LOAD_S = 1800.0
"""Longest wait for a local teacher to load; it exits at once where it can't."""


@contextlib.contextmanager
def teachers(configs: Mapping[str, TeacherConfig]) -> Iterator[dict[str, str]]:
    """URLs of the teachers, by name; those with a `model` are served from children for as long as this is open. The
    student's own past is not among them: there is no student yet."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(local_teacher(one, one.model)) if one.model else ",".join(one.url)
            for name, one in configs.items()
            if not one.is_past
        }


def expect_children() -> None:
    """For a process that starts children while gRPC is at work; called before that begins. They are other programs at
    once, and gRPC's handlers of forks would only get in the way."""
    os.environ.setdefault(GRPC_FORKS, "false")


def is_ours() -> bool:
    """Whether this process is a rank that `run_ranks` started."""
    return TEACHERS in os.environ


def urls_of_launcher() -> dict[str, str]:
    """What our own launcher told this rank; empty under somebody else's."""
    found: dict[str, str] = json.loads(os.environ.get(TEACHERS, "{}"))
    return found


@contextlib.contextmanager
def local_teacher(config: TeacherConfig, model: str) -> Iterator[str]:
    """Serves `model` from a child process on free loopback ports, as `config` says; yields its gRPC URL.

    Raises:
        HandshakeError: it ended before it was ready; its own line of cause is on standard error.
    """
    environment = _environment_of_a_child()
    for name in ("TEACHER_API_KEY", "TEACHER_API_KEYS"):
        environment.pop(name, None)  # of other teachers; the child's is ours
    environment.pop(GRPC_FORKS, None)
    if config.visible_devices:
        environment["CUDA_VISIBLE_DEVICES"] = config.visible_devices
    with tempfile.TemporaryDirectory(prefix="teacher-") as folder:
        announced = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "teacher_server", "--model", model, "--http-port", "0"]
        command += ["--grpc-port", "0", "--announce-file", str(announced)]
        command += ["--lame-duck-s", "0", *config.serve_args]  # nobody else has to be told that it goes away
        key = config.api_key.get_secret_value()
        if key:
            environment["TEACHER_API_KEYS"] = json.dumps([key])
        child = subprocess.Popen(
            command, env=environment, stdout=sys.stderr, start_new_session=True, preexec_fn=_die_with_parent()
        )
        try:
            yield _wait_ready(child, announced, model)
        finally:
            _stop([child], TEACHER_STOP_S)


def run_child(command: Sequence[str], stop_s: float = CHILD_STOP_S) -> int:
    """Runs a program that is none of our ranks, its standard output on our standard error; its exit code. Whatever ends
    the wait ends the program."""
    child = subprocess.Popen(
        command,
        env=_environment_of_a_child(),
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=_die_with_parent(),
    )
    try:
        return child.wait()
    finally:
        _stop([child], stop_s)


def _environment_of_a_child() -> dict[str, str]:
    """Ours, without what makes a process one of our ranks."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", TEACHERS)
    return {name: value for name, value in os.environ.items() if name not in ours}


def run_ranks(num_processes: int, arguments: Sequence[str], urls: Mapping[str, str]) -> int:
    """Runs `student-train` once per rank on this machine, with the teachers at `urls`, and returns the exit code of the
    first rank that failed, or 0.

    Signals that ask to stop are passed on; where one rank fails, the others are stopped.
    """
    shared = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared[TEACHERS] = json.dumps(dict(urls))
    command = [sys.executable, "-m", "student_trainer", *arguments]
    children: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(num_processes):
            if asked:
                break
            environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment["LOCAL_WORLD_SIZE"] = str(num_processes)
            children.append(
                subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_die_with_parent())
            )
        if asked:  # not all of them have heard of it
            name = signal.Signals(asked[0]).name
            print(
                f"student-train: stopped by {name} before all processes ran; run the same command again",
                file=sys.stderr,
            )
            return 128 + asked[0]
        return _wait_all(children)
    finally:
        _stop(children, STOP_GRACE_S)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_all(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended or one has failed."""
    while True:
        codes = [child.poll() for child in children]
        killed = [rank for rank, code in enumerate(codes) if code and code < 0]
        if killed:  # others may have failed because they lost it
            number = -(codes[killed[0]] or 0)
            what = f"process {killed[0]} of {len(children)} was killed by {signal.Signals(number).name}"
            cure = "the others are stopped; run the same command again to go on from the newest checkpoint"
            print(f"student-train: {what}; {cure}", file=sys.stderr)
            return 128 + number
        failed = [code for code in codes if code]
        if failed:
            return failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_S)


def _wait_ready(child: subprocess.Popen[bytes], announced: Path, model: str) -> str:
    deadline = time.monotonic() + TEACHER_LOAD_S
    while time.monotonic() < deadline:
        if announced.exists():
            return str(json.loads(announced.read_text())["grpc_url"])
        code = child.poll()
        if code is not None:
            raise HandshakeError(
                f"the local teacher for teacher.model {model!r} ended with code {code} before it was ready"
            )
        time.sleep(POLL_S)
    raise HandshakeError(f"the local teacher for {model!r} was not ready after {TEACHER_LOAD_S:.0f} s")


def _stop(children: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """SIGTERM, and after the grace SIGKILL, to each child's whole session."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + grace_s
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux: the kernel ends the child when this process dies, even by SIGKILL."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # found before the fork: nothing may be loaded after it
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)

    def ask() -> None:
        libc.prctl(set_parent_death_signal, signal.SIGTERM)

    return ask


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
