"""One engine on two machines: its options, how a node notices that the first has gone, and, in the long form, two
nodes on this machine that score as a float64 forward does, lose the first, and come back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from ports import free_port
from pydantic import ValidationError
from training import wait_until
from transformers import AutoModelForCausalLM

from teacher_api.client import TeacherClient
from teacher_api.types import Completion, ScoreOptions, ScoreRequest
from teacher_server.backends.vllm_node import FirstNode, NodeEnded
from teacher_server.config import ServerConfig
from teacher_server.node import Node

TWO = {"model": "m", "backend": "vllm", "nnodes": 2, "node_rank": 1, "master_addr": "first", "scoring_path": "fused"}
START_S = 500.0
GONE = 75


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"node_rank": None}, "node_rank and master_addr"),
        ({"master_addr": None}, "node_rank and master_addr"),
        ({"node_rank": 2}, "expected 0 to 1"),
        ({"nnodes": None}, "node_rank has no meaning without nnodes"),
        ({"nnodes": 1}, "node_rank has no meaning without nnodes"),
        ({"scoring_path": "auto"}, "can't follow a choice"),
        ({"generate": True}, "neither generate nor data_parallel_size"),
        ({"data_parallel_size": 2}, "neither generate nor data_parallel_size"),
        ({"backend": "torch", "scoring_path": "auto"}, "nnodes"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    given = {name: value for name, value in {**TWO, **change}.items() if value is not None}
    with pytest.raises(ValidationError, match=said):
        ServerConfig.model_validate(given)


def test_where_the_nodes_are_goes_to_vllm_by_its_own_names() -> None:
    config = ServerConfig.model_validate({**TWO, "master_port": 4000, "tensor_parallel_size": 16})
    assert config.engine_arguments == {
        "nnodes": 2,
        "node_rank": 1,
        "master_addr": "first",
        "master_port": 4000,
        "tensor_parallel_size": 16,
    }
    assert config.engine_port == 4000


def test_port_where_nodes_meet_is_vllms() -> None:
    parallel = pytest.importorskip("vllm.config.parallel")
    assert ServerConfig.model_validate(TWO).engine_port == parallel.ParallelConfig.master_port


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_first_node_is_there_until_its_process_ends(listening: socket.socket) -> None:
    first = FirstNode("127.0.0.1", listening.getsockname()[1])
    accepted, _ = listening.accept()
    first.wait(0.05)  # nothing is sent, and nothing need be
    threading.Timer(0.2, accepted.close).start()
    start = time.monotonic()
    with pytest.raises(NodeEnded, match="has ended"):
        first.wait(30.0)
    assert time.monotonic() - start < 5.0
    first.close()


def test_first_node_that_is_not_there_is_named() -> None:
    port = free_port()
    with pytest.raises(NodeEnded, match=f"127.0.0.1:{port} has gone: Connection refused"):
        FirstNode("127.0.0.1", port)


def test_a_node_stays_while_the_first_drains() -> None:
    node = Node(ServerConfig.model_validate({**TWO, "lame_duck_s": 100.0, "grace_s": 1000.0}))
    assert not node.must_leave
    node.on_signal(signal.SIGTERM, None)
    assert node.leave_at is not None
    assert 1100.0 < node.leave_at - time.monotonic() < 1120.0
    assert not node.must_leave
    node.on_signal(signal.SIGTERM, None)
    assert node.must_leave


class Nodes:
    """`teacher-serve` twice, as two machines would run it."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self._folder = folder
        self.http, self.grpc = free_port(), free_port()
        self._options = [
            *(f"--model={checkpoint}", "--backend=vllm", "--scoring-path=fused", "--tensor-parallel-size=2"),
            *("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}", "--lame-duck-s=0"),
            *("--max-num-batched-tokens=100", "--max-num-seqs=8", "--vllm.kv_cache_memory_bytes=134217728"),
            *(f"--http-port={self.http}", f"--grpc-port={self.grpc}"),
        ]
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, rank: int) -> None:
        command = [sys.executable, "-m", "teacher_server", *self._options, f"--node-rank={rank}"]
        with self.log(rank).open("ab") as log:
            self.running[rank] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def log(self, rank: int) -> Path:
        return self._folder / f"node-{rank}.log"

    def readiness(self) -> int:
        assert self.running[0].poll() is None, self.log(0).read_text()[-3000:]
        try:
            return httpx.get(f"http://127.0.0.1:{self.http}/readyz", timeout=10).status_code
        except httpx.TransportError:
            return 0

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.readiness() == 200, timeout_s=START_S, what="the first node's readiness")

    def kill(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.timeout(2400)
def test_two_nodes_score_right_lose_the_first_and_come_back(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm_jobs import checkpoint_for_vllm, random_tokens

    sizes = {"tokenizer_size": 490, "vocab_size": 500, "max_position_embeddings": 420}
    checkpoint = checkpoint_for_vllm(tmp_path / "teacher", **sizes)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    tokens = random_tokens(1, 60, 490)
    with torch.inference_mode():
        log_p = reference(torch.tensor(tokens[None])).logits[0].log_softmax(-1).numpy()
    expected = log_p[np.arange(59), tokens[1:]]
    nodes = Nodes(tmp_path, checkpoint)

    def check() -> str:
        nodes.wait_until_ready()
        with TeacherClient(f"grpc://127.0.0.1:{nodes.grpc}") as client:
            (scores,) = client.score(ScoreRequest([Completion("a", tokens)], options=ScoreOptions(top_k=4)))
            np.testing.assert_allclose(scores.token_logprob[-59:], expected, atol=1e-5, rtol=0)
            return client.info().fingerprint

    try:
        nodes.start(0)
        nodes.start(1)
        fingerprint = check()
        assert "ready node 1 of 2" in nodes.log(1).read_text()

        nodes.running[0].kill()  # the first: the other ends, and says that it may be started again
        nodes.running[0].wait()
        assert nodes.running[1].wait(60) == GONE, nodes.log(1).read_text()[-3000:]
        assert "the first node's engine" in nodes.log(1).read_text()

        nodes.start(1)  # in the other order
        nodes.start(0)
        assert check() == fingerprint, "where the nodes are is no part of it"

        nodes.running[0].send_signal(signal.SIGTERM)  # both are told to stop: the second stays until the first is done
        nodes.running[1].send_signal(signal.SIGTERM)
        assert nodes.running[0].wait(60) == 0, nodes.log(0).read_text()[-3000:]
        assert nodes.running[1].wait(60) == 0, nodes.log(1).read_text()[-3000:]
    finally:
        nodes.kill()
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(checkpoint) in _read(path)]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace") if path.parent.name != str(os.getpid()) else ""
    except OSError:
        return ""
