"""A teacher on another network, and the cable to it pulled in the middle of its work: real half-open connections
(C4)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import netns
import numpy as np
import pytest
from reliability import holds

from teacher_api.client import TeacherClient
from teacher_api.errors import DeadlineExceeded, Unavailable
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_retries"),
    pytest.mark.skipif(not netns.is_available(), reason="needs root, and Linux's network namespaces"),
]

START_S = 90.0
LATENCY_S = 0.3
DEADLINE_S = 2.0


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[netns.Network, dict[str, str]]]:
    """The network, and the URLs of the teacher in it."""
    announced = tmp_path_factory.mktemp("far") / "ready.json"
    options = ["--model", "fake", "--backend", "fake", "--http-port", "0", "--grpc-port", "0", "--log-level", "error"]
    options += ["--fake-latency-s", str(LATENCY_S), "--batch-sequences", "2", "--lame-duck-s", "0", "--anonymous"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with netns.Network() as network:
        command = [sys.executable, "-m", "teacher_server", *options, "--host", network.guest]
        server = subprocess.Popen(
            network.command(*command, "--announce-file", str(announced)), stdout=subprocess.DEVNULL, env=environment
        )
        try:
            deadline = time.monotonic() + START_S
            while not announced.exists():
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield network, json.loads(Path(announced).read_text())
        finally:
            server.terminate()
            server.wait(30)


def question(count: int) -> ScoreRequest:
    chance = np.random.default_rng(count)
    completions = [Completion(f"c{n}", chance.integers(0, 512, 9, dtype=np.int32)) for n in range(count)]
    return ScoreRequest(completions, options=ScoreOptions(top_k=2))


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_call_ends_at_its_deadline_while_the_cable_is_out_and_goes_on_afterwards(
    far: tuple[netns.Network, dict[str, str]], scheme: str, record_property: Any
):
    network, urls = far
    with TeacherClient(urls[f"{scheme}_url"], timeout_s=60, attempt_timeout_s=3.0) as client:
        wanted = client.score(question(8))
        with network.unplugged():
            started = time.monotonic()
            with pytest.raises((DeadlineExceeded, Unavailable)):
                client.score(ScoreRequest(question(8).completions, timeout_s=DEADLINE_S))
            took = time.monotonic() - started
            assert took < DEADLINE_S + 2
        # In the middle of a call: eight sequences take four batches.
        pulled = threading.Timer(LATENCY_S, lambda: _pull(network, 1.0))
        pulled.start()
        got = list(client.score_many([question(8)]))
        pulled.join()
    assert [scores.id for scores in sorted(got, key=lambda scores: scores.id)] == [scores.id for scores in wanted]
    assert all(_equal(scores, wanted) for scores in got)
    holds(
        record_property,
        "C4",
        f"{scheme}, cable pulled: ended {took - DEADLINE_S:+.2f} s from its deadline; pulled for 1 s in a call, "
        f"{len(got)} answers, each once",
    )


def _pull(network: netns.Network, seconds: float) -> None:
    with network.unplugged():
        time.sleep(seconds)


def _equal(scores: Scores, wanted: list[Scores]) -> bool:
    (same,) = [one for one in wanted if one.id == scores.id]
    return np.array_equal(scores.token_logprob, same.token_logprob) and np.array_equal(scores.topk_ids, same.topk_ids)
