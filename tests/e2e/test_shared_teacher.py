"""Four runs share one teacher, and one of them misbehaves: the other three end with the weights of their solo runs, bit
for bit (reference mode), and the fourth gets no more than its share while they want something."""

from __future__ import annotations

import hashlib
import itertools
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reliability import holds
from serving import Server, post, serving
from tinymodels import save_tiny
from training import PROMPTS, arguments, assert_same_bits, finish, metrics, trainer, wait_until

from teacher_api.types import CallMetadata, Completion, ScoreRequest
from teacher_api.wire import encode_request
from teacher_server.batching import Entry
from teacher_server.fair import FairQueue

pytestmark = pytest.mark.slow

RUNS = {
    "kl": ["loss.objective=forward_kl", "train.seed=1"],
    "reverse": ["loss.objective=reverse_kl", "train.seed=2", "rollout.group_size=2"],
    "gradient": ["loss.objective=policy_gradient", "train.seed=3", "rollout.group_size=2"],
}
BAD = "flood"
KEYS = {name: f"pk_{name}-0123456789abcdef0123456789abcdef" for name in (*RUNS, BAD)}
FLOODERS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("shared")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    save_tiny(place / "student", seed=2)
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place


@pytest.fixture(scope="module")
def served(place) -> Iterator[Server]:
    tenants = {name: {"keys": [f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"]} for name, key in KEYS.items()}
    options = {"model": str(place / "teacher"), "backend": "torch", "reference": True, "queue_tokens": 20_000}
    with serving(tenants=tenants, **options) as server:
        yield server


def begin(place: Path, server: Server, name: str, folder: Path, *more: str) -> Any:
    url = f"grpc://{server.grpc_target}"
    argv = arguments(folder / name, place / "student", place / "prompts.txt", url, "--steps=4", *more)
    return trainer([*argv, f"teacher.api_key={KEYS[name]}"], folder / f"{name}.log")


class Flood:
    """Everything that a caller can do wrong, all the time, with the key of one tenant."""

    def __init__(self, server: Server) -> None:
        self._server, self._stop = server, threading.Event()
        self.statuses: list[int] = []
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(FLOODERS)]

    def __enter__(self) -> Flood:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        headers = {"authorization": f"Bearer {KEYS[BAD]}"}
        for attempt in itertools.count():
            if self._stop.is_set():
                return
            size = chance.choice((10, 100))  # below half of a quarter of the queue, and above all of it
            ids = [np.asarray([chance.randrange(60) for _ in range(48)], np.int32) for _ in range(size)]
            if attempt % 4 == 1:
                ids[0][3] = 10**6  # no such token
            request = ScoreRequest(
                [Completion(str(n), one) for n, one in enumerate(ids)], metadata=CallMetadata(experiment=str(attempt))
            )
            if attempt % 4 == 2:
                self._leave(encode_request(request).SerializeToString())
            elif attempt % 4 == 3:
                self.statuses.append(post(self._server, b"\xff" * 999, **headers).status_code)
            else:
                self.statuses.append(post(self._server, request, **headers).status_code)

    def _leave(self, body: bytes) -> None:
        """Sends a whole request and closes the connection at once."""
        host, port = self._server.http_url.removeprefix("http://").split(":")
        head = (
            f"POST /v1/score HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/x-protobuf\r\n"
            f"authorization: Bearer {KEYS[BAD]}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)


class Watched:
    """Each choice of the queue: who waited, who was served, and with how much."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[tuple[set[str], list[Entry]]] = []
        take = FairQueue.take

        def watched(queue: FairQueue, policy: Any) -> list[Entry]:
            waiting = set(queue.tokens_of())
            batch = take(queue, policy)
            self.taken.append((waiting, batch))
            return batch

        monkeypatch.setattr(FairQueue, "take", watched)

    def most_ahead(self, greedy: str, other: str) -> int:
        """The most tokens by which `greedy` was served beyond `other`, in any time in which both waited all along."""
        most = ahead = 0
        for waiting, batch in self.taken:
            if not {greedy, other} <= waiting:
                ahead = 0
                continue
            for entry in batch:
                ahead += entry.tokens * ((entry.caller.tenant == greedy) - (entry.caller.tenant == other))
            ahead = max(ahead, 0)
            most = max(most, ahead)
        return most


def test_three_runs_beside_one_that_misbehaves_end_as_alone(place, served, tmp_path, monkeypatch, record_property):
    solo, together = tmp_path / "solo", tmp_path / "together"
    for folder in (solo, together):
        folder.mkdir()
    for name, options in RUNS.items():
        assert finish(begin(place, served, name, solo, *options), solo / f"{name}.log") == 0
    watched = Watched(monkeypatch)
    with Flood(served) as flood:
        bad = begin(place, served, BAD, together, "--steps=1000", "teacher.max_concurrency=64")
        wait_until(lambda: len(metrics(together / BAD)) >= 1 or not bad.is_alive(), what="the fourth run's first step")
        running = {name: begin(place, served, name, together, *options) for name, options in RUNS.items()}
        bad.kill()  # in the middle of whatever it asked for
        codes = {name: finish(process, together / f"{name}.log") for name, process in running.items()}
    assert codes == dict.fromkeys(RUNS, 0), {name: (together / f"{name}.log").read_text()[-500:] for name in RUNS}
    for name in RUNS:
        assert_same_bits(solo / name / "final", together / name / "final")
    assert {200, 400, 429} <= set(flood.statuses), "it asked rightly, wrongly, and for more than its part"
    for name in RUNS:
        assert any({BAD, name} <= waiting for waiting, _ in watched.taken), "they wanted something at the same time"
    longest = max(entry.call_tokens for _, batch in watched.taken for entry in batch)
    ahead = {name: watched.most_ahead(BAD, name) for name in RUNS}
    assert max(ahead.values()) <= 2 * longest, "start-time fair queueing: a turn of each, which is a call at most"
    rows = served.http.get(
        f"{served.http_url}/v1/usage", params={"by": "tenant"}, headers={"authorization": f"Bearer {KEYS['kl']}"}
    ).json()["rows"]
    assert [row["tenant"] for row in rows] == ["kl"], "of the others it is told nothing"
    holds(record_property, "S9", f"a run that floods was at most {max(ahead.values())} tokens ahead of another")
