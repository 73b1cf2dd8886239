"""What the tests of whole training runs share: a teacher in a process of its own, and trainers that can be killed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from ports import free_port
from safetensors.torch import load_file

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "student_trainer.cli",
        "student_trainer.train",
        "student_trainer.plan",
        "teacher_server.cli",
        "teacher_server.backends.torch_backend",
        "transformers.models.qwen3.modeling_qwen3",
    ]
)
"""Teachers and trainers are forked from a process that has done their imports: a start costs a second, not ten."""
DEEPSPEED = Path(sys.prefix) / "deepspeed"
"""Where the Makefile puts it, for processes that ask for it only."""
START_S = 120.0
"""Longest wait for a program to start, on a machine that does ten other things."""
PROMPTS = ["the quick", "brown fox jumps", "over the lazy dog", "0123", "4 + 5 =", "the dog", "fox", "lazy lazy", "= ?"]


def wait_until(condition: Callable[[], Any], *, timeout_s: float = START_S, what: str = "a condition") -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"{what} did not come about within {timeout_s} s")


class TeacherProcess:
    """`teacher-serve` on ports that stay the same over restarts. It keeps no answers unless told to: what is compared
    is scored twice."""

    def __init__(self, folder: Path, model: Path | str, *options: str) -> None:
        self._announced, self.log = folder / "ready.json", folder / "teacher.log"
        kept = [] if any(option.startswith("--cache") for option in options) else ["--cache.enabled=false"]
        self._settings = [f"--model={model}", f"--announce-file={self._announced}", "--lame-duck-s=0", *kept, *options]
        self._ports = [f"--http-port={free_port()}", f"--grpc-port={free_port()}"]
        self.process: ForkServerProcess | None = None
        self.url = self.http_url = ""
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> TeacherProcess:
        self.begin()
        return self.wait()

    def begin(self) -> None:
        """Starts it without waiting until it is ready."""
        self._announced.unlink(missing_ok=True)
        self.process = _forked(_serve, [*self._settings, *self._ports], self.log)

    def wait(self) -> TeacherProcess:
        """Until it is ready."""
        process = self.process
        assert process is not None, "begin() comes first"
        wait_until(lambda: self._announced.exists() or process.exitcode is not None, what="the teacher's start")
        assert process.exitcode is None, self.log.read_text()
        ready = json.loads(self._announced.read_text())
        self.url, self.http_url = ready["grpc_url"], ready["http_url"]
        return self

    def kill(self) -> None:
        assert self.process is not None, "begin() comes first"
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        if self.process is not None and self.process.exitcode is None:
            self.process.terminate()
            self.process.join(20)
            self.process.kill()


def _port(url: str) -> str:
    return url.rsplit(":", 1)[1]


@contextlib.contextmanager
def teacher(folder: Path, model: Path | str, *options: str) -> Iterator[TeacherProcess]:
    served = TeacherProcess(folder, model, *options)
    try:
        yield served.start()
    finally:
        served.stop()


def arguments(run_dir: Path, student: Path, prompts: Path, url: str, *more: str) -> list[str]:
    """A small run that takes about a second: 6 steps of 4 prompts, at most 10 new tokens."""
    return [
        f"--student={student}",
        f"--prompts={prompts}",
        f"--teacher-url={url}",
        f"--output-dir={run_dir}",
        "--steps=6",
        "train.batch_size=4",
        "train.reference=true",
        "train.num_processes=1",
        "student.device=cpu",
        "rollout.max_new_tokens=10",
        "teacher.top_k=8",
        "optim.learning_rate=0.002",
        "checkpoint.save_every=2",
        "tracking.trackers=[]",
        "tracking.samples_every=0",
        *more,
    ]


def trainer(argv: list[str], log: Path) -> ForkServerProcess:
    """`student-train` in a process of its own; its exit code is the process' own."""
    return _forked(_train, argv, log)


def finish(process: ForkServerProcess, log: Path, *, timeout_s: float = START_S) -> int:
    """Waits for its end and returns the exit code."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running after {timeout_s} s:\n{log.read_text()}")
    return process.exitcode


def ranks(
    argv: list[str], world: int, log: Path, main: Callable[[list[str]], int] | None = None, **variables: str
) -> list[ForkServerProcess]:
    """`student-train` (or `main`) as `world` processes of one run, as torchrun would start them, with further
    variables."""
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), **variables}
    started = []
    for rank in range(world):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = FORKS.Process(target=_enter, args=(main or _train, argv, str(log), environment))
        process.start()
        started.append(process)
    return started


def _forked(main: Callable[[list[str]], int], argv: list[str], log: Path) -> ForkServerProcess:
    process = FORKS.Process(target=_enter, args=(main, argv, str(log)))
    process.start()
    return process


def _enter(
    main: Callable[[list[str]], int], argv: list[str], log: str, environment: dict[str, str] | None = None
) -> None:
    os.environ.update(environment or {})
    sys.path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(argv: list[str]) -> int:
    from student_trainer.cli import run

    return run(argv)


def _serve(argv: list[str]) -> int:
    from teacher_server.cli import main

    return main(argv)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_bits(a: Path, b: Path) -> None:
    """Two saved models are equal bit for bit."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8))]
    assert not different, f"{len(different)} of {len(left)} tensors differ, such as {different[0]}"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
