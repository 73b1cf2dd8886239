"""What Prometheus reads is what was sent: scraped from a real server, parsed by Prometheus' own parser."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from reliability import RecordProperty, holds
from serving import (
    PROTOBUF,
    Server,
    ask_grpc,
    ask_grpc_stream,
    ask_http,
    ask_http_stream,
    call,
    channel,
    post,
    request_of,
    serving,
)

from teacher_api import wire
from teacher_api.errors import KINDS, InvalidRequest
from teacher_api.types import Scores
from teacher_server.app import StartError
from teacher_server.backends.base import ModelFacts
from teacher_server.backends.fake import FakeBackend
from teacher_server.config import ServerConfig
from teacher_server.counts import Counts

pytestmark = pytest.mark.slow

SOAK_S = 3.0
NAN, DEATH, KEY = 401, 402, "a-key-for-this-test"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(server: Server) -> Samples:
    answer = httpx.get(server.metrics_url, timeout=30)
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def by(samples: Samples, name: str, label: str = "", **fixed: str) -> dict[str, float]:
    """The values of a metric that are not 0, by one of its labels."""
    found = {}
    for (got, labels), value in samples.items():
        if got == name and fixed.items() <= dict(labels).items() and value:
            found[dict(labels).get(label, "")] = value
    return found


def settled(server: Server) -> Samples:
    """A scrape in which everything that was received is over."""
    deadline = time.monotonic() + 30
    while True:
        samples = scrape(server)
        ends = ("requests", "sequences")
        open_work = [
            sum(by(samples, f"preceptor_{what}_received_total", "transport").values())
            - sum(sum(by(samples, f"preceptor_{what}_finished_total", "outcome", **fixed).values()) for fixed in split)
            for what, split in zip(ends, ([{"transport": "grpc"}, {"transport": "http"}], [{}]), strict=True)
        ]
        if open_work == [0, 0]:
            return samples
        assert time.monotonic() < deadline, open_work


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(metrics_port=0, fake_nan_token=NAN, max_sequence_tokens=64, queue_tokens=100) as running:
        yield running


def test_what_was_received_is_what_ended(server: Server) -> None:
    tokens = [1, 2, 3, 4]
    before = settled(server)
    for ask in (ask_http, ask_http_stream, ask_grpc, ask_grpc_stream):
        good, bad, nan = ask(server, request_of(tokens, [1, 600], [1, NAN, 2]))
        assert isinstance(good, Scores)
        assert isinstance(bad, InvalidRequest)
        assert not isinstance(nan, Scores)
    assert post(server, b"nonsense").status_code == 400
    assert server.http.get(f"{server.http_url}/nowhere").status_code == 404
    assert post(server, request_of(*[[1] * 60] * 2)).status_code == 413  # more than --queue-tokens
    with channel(server) as opened:
        for message in (b"\xff", wire.encode_request(request_of(tokens, top_k=300))):
            with pytest.raises(grpc.RpcError):
                call(opened, "Score", message)
        call(opened, "GetInfo", b"")
    server.http.get(f"{server.http_url}/readyz")  # a probe: not counted

    after = settled(server)
    samples = {key: value - before.get(key, 0) if key[0].endswith("_total") else value for key, value in after.items()}
    finished = "preceptor_requests_finished_total"
    assert by(samples, "preceptor_requests_received_total", "transport") == {"http": 5, "grpc": 5}
    refused = {"invalid_request": 1, "too_large": 1}
    assert by(samples, finished, "outcome", transport="http") == {"ok": 2, "not_found": 1, **refused}
    assert by(samples, finished, "outcome", transport="grpc") == {"ok": 3, **refused}
    assert by(samples, "preceptor_sequences_received_total") == {"": 12}
    assert by(samples, "preceptor_sequences_finished_total", "outcome") == {
        "ok": 4,
        "invalid_request": 4,
        "invalid_backend_output": 4,
    }
    assert by(samples, "preceptor_scored_tokens_total", "source") == {"computed": 4 * len(tokens)}
    assert by(samples, "preceptor_scored_positions_total") == {"": 4 * (len(tokens) - 1)}
    took = "preceptor_request_duration_seconds_count"  # its samples are not reset with the counters'
    for transport in ("http", "grpc"):
        assert sum(by(after, took, "method", transport=transport).values()) == sum(
            by(after, finished, "outcome", transport=transport).values()
        )
    assert by(after, took, "method", transport="grpc") == {"score": 3, "score_stream": 1, "info": 1}
    assert by(after, took, "method", transport="http") == {"score": 3, "score_stream": 1, "other": 1}
    tenant = {"tenant": "default"}
    assert by(samples, "preceptor_tenant_scored_tokens_total", "source", **tenant) == {"computed": 4 * len(tokens)}
    assert by(samples, "preceptor_tenant_requests_finished_total", "outcome", **tenant) == {
        "ok": 4,
        "invalid_request": 2,
        "too_large": 2,
    }
    assert by(samples, "preceptor_queue_tokens") == {}
    assert by(samples, "preceptor_queue_limit_tokens") == {"": 100}


def test_received_is_the_sum_of_outcomes_after_a_soak(record_property: RecordProperty) -> None:
    """Over both transports, in unary calls and streams, some of them wrong, some too many, some abandoned."""
    done = threading.Event()

    def good(server: Server) -> None:
        request = request_of([1, 2, 3], [4, 5])
        for ask in (ask_http, ask_grpc, ask_http_stream, ask_grpc_stream):
            with contextlib.suppress(grpc.RpcError, AssertionError):  # some are refused as overloaded
                ask(server, request)

    def wrong(server: Server) -> None:
        post(server, b"\xff")
        post(server, request_of([1, NAN, 2], [600]))
        server.http.get(f"{server.http_url}/nowhere")
        with channel(server) as opened, contextlib.suppress(grpc.RpcError):
            call(opened, "Score", b"\xff")

    def hasty(server: Server) -> None:
        message = wire.encode_request(request_of(*[[1] * 50] * 8)).SerializeToString()
        with contextlib.suppress(httpx.TransportError):
            httpx.post(f"{server.http_url}/v1/score", content=message, headers=PROTOBUF, timeout=0.005)
        with channel(server) as opened, contextlib.suppress(grpc.RpcError):
            call(opened, "Score", message, timeout=0.005)

    def over_and_over(server: Server, act: Callable[[Server], None]) -> None:
        while not done.is_set():
            act(server)

    with serving(
        metrics_port=0, fake_nan_token=NAN, fake_latency_s=0.003, queue_tokens=600, max_sequence_tokens=64
    ) as server:
        threads = [
            threading.Thread(target=over_and_over, args=(server, act)) for act in (good, wrong, hasty) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        done.wait(SOAK_S)
        done.set()
        for thread in threads:
            thread.join()
        samples = settled(server)  # received = the sum of outcomes: what this waits for
    received = by(samples, "preceptor_requests_received_total", "transport")
    outcomes = by(samples, "preceptor_requests_finished_total", "outcome", transport="http")
    assert {"ok", "invalid_request", "not_found", "cancelled"} <= set(outcomes)
    assert sum(outcomes.values()) == received["http"]
    sequences = by(samples, "preceptor_sequences_received_total")[""]
    told = f"{int(sum(received.values()))} requests and {int(sequences)} sequences, all of them among the outcomes"
    holds(record_property, "S19", told)


def test_every_outcome_of_the_table_is_there_and_no_other(server: Server) -> None:
    samples = scrape(server)
    for name in ("preceptor_requests_finished_total", "preceptor_sequences_finished_total"):
        outcomes = {dict(labels)["outcome"] for got, labels in samples if got == name}
        assert outcomes == {"ok", *KINDS}
    with pytest.raises(ValueError, match="outcome 'nonsense'; expected one of ok, invalid_request"):
        Counts().all.sequences.end("nonsense")
    with (
        pytest.raises(ValueError, match="transport 'ftp', method 'other'; expected one of grpc: score"),
        Counts().request("ftp"),
    ):
        pass


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here (Debian: apt-get install prometheus)")
def test_names_and_types_are_as_prometheus_own_linter_wants_them(server: Server) -> None:
    text = httpx.get(server.metrics_url, timeout=30).text
    ours = "".join(f"{line}\n" for line in text.splitlines() if "preceptor_" in line)
    done = subprocess.run(["promtool", "check", "metrics"], input=ours, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_the_process_is_in_the_metrics(server: Server) -> None:
    samples = scrape(server)
    assert samples["process_resident_memory_bytes", ()] > 1e6
    assert samples["preceptor_ready", ()] == samples["preceptor_live", ()] == samples["preceptor_engine_up", ()] == 1


def test_no_caller_can_make_a_series(server: Server) -> None:
    """Labels come from closed sets: whatever callers invent ends up in those that are there."""
    post(server, request_of([1, 2]))
    before = set(settled(server))
    for number in range(5):
        odd = {"preceptor-experiment": f"e{number}", "preceptor-run": f"r{number}", "x-request-id": f"i{number}"}
        post(server, request_of([1, number]), **odd)
        post(server, request_of([1, number]), **{"preceptor-tenant": f"t{number}"})
        server.http.request(f"ODD{number}", f"{server.http_url}/v1/odd{number}")
        server.http.get(f"{server.http_url}/v1/info?teacher=odd{number}")
        with channel(server) as opened, pytest.raises(grpc.RpcError):
            call(opened, f"Odd{number}", b"")
    assert set(settled(server)) == before


def test_who_is_served_is_what_the_description_says(server: Server) -> None:
    samples, info = scrape(server), server.info()
    ((_, labels),) = [key for key in samples if key[0] == "preceptor_teacher_info"]
    assert dict(labels) == {
        "model": info.model_name,
        "fingerprint": server.fingerprint,
        "engine": info.engine,
        "scoring_path": info.scoring_path,
    }
    assert samples["preceptor_scoring_path_fallback", ()] == 0
    assert info.scoring_path_note == ""


def test_a_fallback_is_in_the_metrics_and_in_the_description() -> None:
    class Fallen(FakeBackend):
        def load(self) -> ModelFacts:
            return replace(super().load(), scoring_path_note="fell back from fused: because")

    with serving(lambda config: Fallen(), metrics_port=0) as server:
        assert scrape(server)["preceptor_scoring_path_fallback", ()] == 1
        assert server.info().scoring_path_note == "fell back from fused: because"
        as_json = server.http.get(f"{server.http_url}/v1/info").json()
        assert as_json["scoring_path_note"] == "fell back from fused: because"


def test_a_caller_without_a_key_is_counted_and_the_metrics_ask_for_none() -> None:
    with serving(metrics_port=0, api_keys=[KEY]) as server:
        assert post(server, request_of([1, 2])).status_code == 401
        with channel(server) as opened, pytest.raises(grpc.RpcError):
            call(opened, "Score", wire.encode_request(request_of([1, 2])))
        samples = settled(server)
        for transport in ("http", "grpc"):
            outcomes = by(samples, "preceptor_requests_finished_total", "outcome", transport=transport)
            assert outcomes == {"unauthenticated": 1}


def test_callers_that_go_away_and_restarts_are_counted() -> None:
    with serving(metrics_port=0, fake_hang_token=NAN, fake_death_token=DEATH, fake_restart_s=0.1) as server:
        (died,) = ask_http(server, request_of([1, DEATH]))
        assert died.kind == "backend_failed"
        until(lambda: scrape(server)["preceptor_engine_restarts_total", ()] == 1)
        with channel(server) as opened:
            method = opened.unary_unary("/teacher.v1.TeacherService/Score")
            message = wire.encode_request(request_of([1, NAN, 3])).SerializeToString()
            pending = method.future(message, timeout=60)
            until(lambda: scrape(server)["preceptor_queue_tokens", ()] == 3)
            samples = scrape(server)
            assert samples["preceptor_sequences_received_total", ()] == 2
            assert samples["preceptor_queue_bytes", ()] > 0
            pending.cancel()
            settled(server)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.http_url}/v1/score", content=message, headers=PROTOBUF, timeout=0.2)
        samples = settled(server)
        finished = "preceptor_requests_finished_total"
        assert by(samples, finished, "outcome", transport="grpc") == {"cancelled": 1}
        assert by(samples, finished, "outcome", transport="http") == {"ok": 1, "cancelled": 1}
        outcomes = by(samples, "preceptor_sequences_finished_total", "outcome")
        assert outcomes.pop("backend_failed") == 1
        assert set(outcomes) == {"cancelled"}


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline


def test_weights_and_written_tokens_are_told() -> None:
    tenants = {"left": {"keys": [hashed(KEY)], "weight": 2.5}, "default": {"weight": 1}}
    with serving(metrics_port=0, generate=True, tenants=tenants) as server:
        asked = {"model": "fake", "prompt": [[1, 2, 3], [4, 5]], "max_tokens": 7, "ignore_eos": True}
        answer = server.http.post(
            f"{server.http_url}/v1/completions", json=asked, headers={"authorization": f"Bearer {KEY}"}
        )
        assert answer.status_code == 200, answer.text
        samples = settled(server)
    written = answer.json()["usage"]["completion_tokens"]
    assert samples["preceptor_written_tokens_total", ()] == written > 0
    assert by(samples, "preceptor_tenant_weight", "tenant") == {"left": 2.5, "default": 1}


def hashed(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def test_a_port_that_is_taken_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        message = f"cannot listen for metrics on 127.0.0.1:{number}"
        with pytest.raises(StartError, match=message), serving(metrics_port=number):
            pass


def test_the_port_is_gone_with_the_server() -> None:
    with serving(metrics_port=0) as server:
        assert scrape(server)
    with pytest.raises(httpx.ConnectError):
        scrape(server)


def test_without_the_option_there_are_none() -> None:
    with serving() as server:
        assert server.metrics_url == ""
        assert server.http.get(f"{server.http_url}/metrics").status_code == 404
    with pytest.raises(ValueError, match="metrics_host has no meaning without metrics_port"):
        ServerConfig(model="m", metrics_host="0.0.0.0")
    assert ServerConfig(model="m").metrics_host == "127.0.0.1"
