"""The score cache behind a real server: S17, reference mode, adapters, a restart, and what the metrics say of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from reliability import holds
from serving import (
    PROTOBUF,
    Server,
    ask_grpc,
    ask_grpc_stream,
    ask_http,
    ask_http_stream,
    post,
    request_of,
    serving,
    unread,
)
from test_cache import assert_same_bits

from teacher_api import wire
from teacher_api.errors import TeacherError
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server.app import StartError
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.fake import FakeBackend

pytestmark = pytest.mark.slow

WAYS = [ask_grpc, ask_http, ask_grpc_stream, ask_http_stream]


class Gated(FakeBackend):
    """Holds every batch while its gate is closed."""

    def __init__(self) -> None:
        super().__init__(batch_sequences=1, adapters={"math": "math"})
        self.gate = threading.Event()
        self.gate.set()

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        while not self.gate.is_set():
            await asyncio.sleep(0.002)
        return await super().score(jobs)


def until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.005)


def samples_of(server: Server) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(httpx.get(server.metrics_url, timeout=30).text)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if "_cache_" in sample.name
    }


@pytest.fixture(scope="module")
def server() -> Any:
    with serving(
        lambda config: Gated(), metrics_port=0, queue_tokens=40_000, cache={}, lora={"math": "math"}
    ) as running:
        yield running


def test_s17_duplicates_in_flight_over_every_way_in_are_one_backend_call_and_bitwise_equal(
    server: Server, record_property: Any
):
    backend = server.backend
    backend.gate.clear()
    backend.scored_ids.clear()
    request = request_of([1, 2, 3, 4, 5, 6], top_k=5, entropy=True)
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(way, server, request) for way in WAYS * 4]
        flights = server.app.service.cache._flights
        until(lambda: sum(len(flight.waiting) for flight in flights.values()) == 16, "not all of them came")
        assert server.app.service.admission.tokens == 6, "tokens to be computed once count once"
        backend.gate.set()
        answers = [future.result(60)[0] for future in asked]
    for answer in answers:
        assert_same_bits(answer, answers[0])
    assert backend.scored_ids == ["c0"]
    assert sum(answer.computed_tokens for answer in answers) == 6
    until(lambda: server.app.service.admission.tokens == 0, "tokens stayed taken")
    holds(record_property, "S17", "16 callers over gRPC, HTTP and their streams: 1 backend call, the same bits")


def test_a_caller_that_hangs_up_takes_nobodys_answer_away(server: Server):
    backend = server.backend
    backend.gate.clear()
    backend.scored_ids.clear()
    request = request_of([9, 8, 7, 6])
    flights = server.app.service.cache._flights
    with ThreadPoolExecutor(2) as pool:
        staying = pool.submit(ask_grpc, server, request)
        until(lambda: bool(flights), "it never began")
        leaving = pool.submit(_hang_up, server, request)
        until(lambda: any(len(flight.waiting) == 2 for flight in flights.values()), "the second never came")
        leaving.result(30)
        until(lambda: all(len(flight.waiting) == 1 for flight in flights.values()), "the second never left")
        backend.gate.set()
        assert isinstance(staying.result(30)[0], Scores)


def _hang_up(server: Server, request: ScoreRequest) -> None:
    body = wire.encode_request(request).SerializeToString()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.http_url}/v1/score", content=body, headers=PROTOBUF, timeout=0.5)


def test_what_is_kept_needs_no_room_in_a_full_queue(server: Server):
    """Its tokens are not computed, so that they don't count."""
    backend = server.backend
    kept = request_of([3, 1, 4, 1, 5])
    (first,) = ask_grpc(server, kept)
    backend.gate.clear()
    long = request_of(*(np.arange(n, n + 19_999) % 500 for n in (1, 2)))
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(ask_grpc, server, long)
        until(lambda: server.app.service.admission.tokens > 39_990, "the queue never filled")
        assert_same_bits(ask_grpc(server, kept)[0], first)
        assert_same_bits(ask_http_stream(server, kept)[0], first)
        backend.gate.set()
        assert all(isinstance(answer, Scores) for answer in filling.result(60))


def test_an_adapter_is_not_answered_with_its_bases_scores(server: Server):
    base = request_of([5, 5, 5, 5], top_k=2)
    info = {t.model_name: t.fingerprint for t in map(server.app.service.info_of, ("", "math"))}
    for _ in range(2):
        (of_base,) = ask_http(server, base)
        for name in ("", "math"):
            request = ScoreRequest(base.completions, options=base.options, teacher=name)
            response = pb.ScoreResponse.FromString(post(server, request).content)
            (answer,) = unread(request, response, 512)
            assert answer.fingerprint == info[name or "fake"]
            same = answer.token_logprob.tobytes() == of_base.token_logprob.tobytes()
            assert same == (name == "")


def test_the_metrics_are_what_happened(server: Server):
    before = samples_of(server)
    request = request_of([11, 12, 13], [11, 12, 13], [14, 15, 16])
    ask_grpc(server, request)
    ask_http(server, request)
    after = samples_of(server)
    grown = {key: after[key] - before.get(key, 0) for key in after if key[0] == "preceptor_cache_sequences_total"}
    assert grown == {
        ("preceptor_cache_sequences_total", source, "default"): n
        for source, n in {"engine": 2, "flight": 1, "memory": 3, "disk": 0}.items()
    }
    assert after["preceptor_cache_entries", "memory"] - before["preceptor_cache_entries", "memory"] == 2
    assert 0 < after["preceptor_cache_bytes", "memory"] <= after["preceptor_cache_limit_bytes", "memory"] == 256 << 20
    assert after["preceptor_cache_damaged_total",] == 0


def test_in_reference_mode_kept_answers_are_the_same_bits_in_any_company_and_after_a_restart(
    opened: Any, checkpoint: Any, tmp_path: Path
):
    rng = np.random.default_rng(3)
    sequences = [rng.integers(0, 90, length).astype(np.int32) for length in (7, 19, 12)]
    options = ScoreOptions(top_k=6, entropy=True, hidden=True)
    model = checkpoint("llama")
    backend = opened(model, reference=True)

    async def alone() -> list[Scores | TeacherError]:
        jobs = [
            ScoreJob(f"c{n}", ids, 0, np.arange(1, len(ids), dtype=np.int32), options)
            for n, ids in enumerate(sequences)
        ]
        return [(await backend.score([job]))[0] for job in jobs]

    wanted = asyncio.run(alone())
    size = 120
    settings = {"model": str(model), "backend": "torch", "reference": True, "threads": 1}
    for memory_bytes, company, computed in ((1 << 26, [2, 0], 2), (0, [0, 1, 2], 1)):
        with serving(**settings, cache={"dir": str(tmp_path), "memory_bytes": memory_bytes}) as kept:
            request = ScoreRequest([Completion(f"c{n}", sequences[n]) for n in company], options=options)
            for way in WAYS:
                for answer in way(kept, request, size):
                    assert_same_bits(answer, wanted[int(answer.id[1:])])
            tally = kept.app.service.cache.tallies["default"].sequences
            assert tally["engine"] == computed
            assert (tally["disk"] > 0) == (memory_bytes == 0)


def test_a_second_server_in_the_same_directory_does_not_start(tmp_path: Path):
    cache = {"dir": str(tmp_path)}
    refused = pytest.raises(StartError, match=r"cache\.dir .* is another server's")
    with serving(cache=cache), refused, serving(cache=cache):
        pass
