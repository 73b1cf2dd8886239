"""`rollout-serve` as a process of its own, on a port that stays the same over restarts; tests are its supervisor."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import httpx
import tinymodels
import training
from ports import free_port

SHAPE = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
"""What vLLM's kernels for CPUs can do."""
OPTIONS = (
    "--dtype=float32", "--enforce-eager", "--max-model-len=128", f"--kv-cache-memory-bytes={16 << 20}",
    "--disable-uvicorn-access-log",
)  # fmt: skip


class RolloutServer:
    def __init__(self, folder: Path, model: Path | str, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "rollout.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [
            sys.executable, "-m", "student_trainer.rollout.vllm_side.serve", str(model), "--host=127.0.0.1",
            f"--port={self.port}", *OPTIONS, *options,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self) -> RolloutServer:
        """Starts it without waiting until it is ready."""
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(self._command, stdout=stream, stderr=stream, env=dict(os.environ))
        return self

    def wait(self) -> RolloutServer:
        training.wait_until(self._is_up, timeout_s=900.0, what="the rollout server's start")
        return self

    def kill(self) -> None:
        assert self.process is not None, "begin() comes first"
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _is_up(self) -> bool:
        assert self.process is not None, "begin() comes first"
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        time.sleep(0.1)
        return self.serves()

    def serves(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1.0).close()
            return httpx.get(f"{self.url}/v1/rollout/info", timeout=5.0, verify=False).status_code == 200
        except (OSError, httpx.TransportError):
            return False


def save_student(path: Path, seed: int = 0) -> Path:
    """A tiny student with tied embeddings, a tokenizer smaller than its head, and a shape that vLLM can do."""
    return tinymodels.save_tiny(path, "qwen3", seed=seed, **SHAPE)


def recording_trainer(argv: list[str], log: Path, records: Path) -> ForkServerProcess:
    """`student-train` in a process of its own that writes a JSON line for each sample that a gradient is taken of."""
    return training._forked(functools.partial(_train_recording, records=str(records)), argv, log)


def recorded(records: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []


def _train_recording(argv: list[str], *, records: str) -> int:
    from student_trainer import train

    backward = train.backward

    def noting(run: Any, members: Sequence[Any], *rest: Any) -> Any:
        with open(records, "a") as stream:
            for rollout in (member.rollout for member in members):
                line = {"step": run.step, "uid": rollout.uid, "versions": sorted(set(rollout.versions.tolist()))}
                stream.write(json.dumps(line) + "\n")
        return backward(run, members, *rest)

    train.backward = noting
    return training._train(argv)
