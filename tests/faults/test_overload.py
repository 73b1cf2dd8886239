"""Too much work, and callers that leave: who comes too late is told when to come back, on time, and every place taken
becomes free again."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from reliability import holds
from serving import (
    PROTOBUF,
    Server,
    ask_grpc,
    ask_grpc_stream,
    ask_http,
    call,
    channel,
    post,
    refused,
    request_of,
    serving,
    status_of,
    unread,
)

from teacher_api import wire
from teacher_api.errors import InvalidRequest, TeacherError
from teacher_api.types import Completion, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.fake import FakeBackend

pytestmark = pytest.mark.slow


def ready(server: Server) -> bool:
    return server.http.get(f"{server.http_url}/readyz").status_code == 200


def until(condition: Callable[[], bool], limit_s: float, complaint: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, complaint


class Gated(FakeBackend):
    """Holds every batch while its gate is closed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(max_sequence_tokens=64, batch_sequences=1, **settings)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        if not self.gate.is_set():
            self.entered.set()
        while not self.gate.is_set():
            await asyncio.sleep(0.002)
        return await super().score(jobs)


@pytest.fixture(scope="module")
def gated_server() -> Iterator[Server]:
    with serving(lambda config: Gated(), max_sequence_tokens=64, queue_tokens=256, grace_s=10) as running:
        yield running


@pytest.fixture
def held(gated_server: Server) -> Iterator[Server]:
    """A server whose engine is busy with one sequence of 64 tokens, called `holder`, until the gate opens."""
    backend = gated_server.backend
    backend.gate.clear()
    backend.entered.clear()
    backend.scored_ids.clear()
    blocker = ScoreRequest([Completion("holder", np.ones(64, np.int32))])
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(ask_grpc, gated_server, blocker)
        assert backend.entered.wait(10)
        yield gated_server
        backend.gate.set()
        assert isinstance(holding.result(30)[0], Scores)


def test_over_the_bound_callers_are_told_when_to_come_back_and_the_rest_is_served(held: Server):
    request = request_of([1] * 64)
    with ThreadPoolExecutor(12) as pool:
        accepted = [pool.submit(post, held, request) for _ in range(3)]  # 192 of the 192 tokens that are left
        until(lambda: not ready(held), 10, "the bound was never reached")
        started = time.monotonic()
        answers = [post(held, request) for _ in range(10)]
        took = (time.monotonic() - started) / 10
        for answer in answers:
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["retryable"]
            assert answer.json()["retry_after_s"] > 0
        assert took < 0.5
        code, info, retry = refused(held, request)
        assert (code.name, info.reason) == ("RESOURCE_EXHAUSTED", "overloaded")
        assert retry.retry_delay.ToMilliseconds() > 0
        assert held.http.get(f"{held.http_url}/readyz").status_code == 503
        assert held.http.get(f"{held.http_url}/livez").status_code == 200
        held.backend.gate.set()
        assert [future.result(30).status_code for future in accepted] == [200] * 3
    assert held.http.get(f"{held.http_url}/readyz").status_code == 200
    assert len(held.backend.scored_ids) == 4, "refused work never reaches the engine"


def late_over_http(server: Server, way: str) -> None:
    """Asks with 0.3 s to go, and checks the answer."""
    timed = {"grpc-timeout": "300m"}
    if way == "http-field":
        answer = post(server, request_of([1, 2, 3], timeout_s=0.3))
    elif way == "http-header":
        answer = post(server, request_of([1, 2, 3], timeout_s=40.0), **timed)
    elif way == "http-json":
        body = {"completions": [{"id": "c0", "token_ids": [1, 2, 3]}]}
        answer = server.http.post(f"{server.http_url}/v1/score", json=body, headers=timed)
    elif way == "http-openai":
        body = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 0, "prompt_logprobs": 0}
        answer = server.http.post(f"{server.http_url}/v1/completions", json=body, headers=timed)
        assert (answer.status_code, "deadline" in answer.json()["error"]["message"]) == (504, True)
        return
    else:
        body = wire.encode_request(request_of([1, 2, 3])).SerializeToString()
        answer = server.http.post(f"{server.http_url}/v1/score/stream", content=body, headers={**PROTOBUF, **timed})
        assert answer.status_code == 200, "it had begun: the stream tells it of each sequence"
        frame = pb.ScoreFrame.FromString(answer.content[4:])
        assert pb.ScoreRows.FromString(frame.rows).error.kind == "deadline_exceeded"
        return
    assert (answer.status_code, answer.json()["kind"]) == (504, "deadline_exceeded")
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "way",
    [
        *("http-field", "http-header", "http-json", "http-stream", "http-openai"),
        *("grpc-field", "grpc-deadline"),
    ],
)
def test_a_deadline_behind_a_long_job_comes_on_time_and_nothing_is_run(held: Server, way: str, record_property: Any):
    started = time.monotonic()
    if way.startswith("http"):
        late_over_http(held, way)
    elif way == "grpc-field":
        code, info, _ = refused(held, request_of([1, 2, 3], timeout_s=0.3))
        assert (code.name, info.reason) == ("DEADLINE_EXCEEDED", "deadline_exceeded")
    else:
        with channel(held) as opened, pytest.raises(grpc.RpcError) as raised:
            call(opened, "Score", wire.encode_request(request_of([1, 2, 3])), timeout=0.3)
        assert raised.value.code().name == "DEADLINE_EXCEEDED"
    took = time.monotonic() - started
    assert 0.25 < took < 3
    held.backend.gate.set()
    assert isinstance(ask_http(held, ScoreRequest([Completion("after", np.ones(3, np.int32))]))[0], Scores)
    assert held.backend.scored_ids == ["holder", "after"]
    holds(record_property, "S6", f"{way}: {took - 0.3:+.2f} s from a deadline of 0.3 s, never run")


def test_a_deadline_over_http_runs_while_the_body_is_sent(gated_server: Server):
    host, port = gated_server.http_url.removeprefix("http://").split(":")
    head = "POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\ncontent-length: 64\r\n"
    gated_server.backend.scored_ids.clear()
    started = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=20) as half:
        half.sendall(f"{head}grpc-timeout: 300m\r\n\r\n".encode() + b"half")
        answer = half.recv(4096)
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert 0.25 < time.monotonic() - started < 3
    assert gated_server.backend.scored_ids == []


@pytest.mark.parametrize(
    "value", ["", "0m", "000S", "5", "m", "-1m", "+1m", "1.5S", "123456789m", "1 m", "1s", "1mm", "²m"]
)
def test_a_deadline_of_no_meaning_over_http_is_refused(gated_server: Server, value: str):
    gated_server.backend.scored_ids.clear()
    sent = {**PROTOBUF, "grpc-timeout": value.encode()}
    body = wire.encode_request(request_of([1, 2, 3])).SerializeToString()
    answer = gated_server.http.post(f"{gated_server.http_url}/v1/score", content=body, headers=sent)
    assert (answer.status_code, answer.json()["field"]) == (400, "grpc-timeout")
    assert "2500m is 2.5 s" in answer.json()["detail"]
    assert gated_server.backend.scored_ids == []


@pytest.mark.parametrize("value", ["1H", "00000001H", "60M", "3600S", "3600000m", "99999999u", "99999999n"])
def test_every_unit_of_a_deadline_is_understood_over_http(gated_server: Server, value: str):
    answer = post(gated_server, request_of([1, 2, 3]), **{"grpc-timeout": value})
    assert answer.status_code == 200 or (value[-1] == "n" and answer.status_code == 504)


@pytest.mark.parametrize("way", ["http", "http-stream", "grpc", "grpc-stream"])
def test_the_queued_work_of_a_caller_that_leaves_is_dropped(held: Server, way: str, record_property: Any):
    request = wire.encode_request(ScoreRequest([Completion("gone", np.ones(64, np.int32))]))
    body = request.SerializeToString()
    full = ScoreRequest([Completion("fills", np.ones(64, np.int32))])
    if way.startswith("http"):
        host, port = held.http_url.removeprefix("http://").split(":")
        path = "/v1/score/stream" if way == "http-stream" else "/v1/score"
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        caller = socket.create_connection((host, int(port)), timeout=10)
        caller.sendall(head.encode() + body)
        leave = caller.close
    elif way == "grpc":
        opened = grpc.insecure_channel(held.grpc_target)
        future = opened.unary_unary("/teacher.v1.TeacherService/Score").future(body)
        leave = future.cancel
    else:
        opened = grpc.insecure_channel(held.grpc_target)
        stream = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")(iter([body]))
        leave = stream.cancel
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(post, held, full) for _ in range(2)]  # with the holder and ours: all 256 tokens
        until(lambda: not ready(held), 10, "the bound was never reached")
        leave()
        left = time.monotonic()
        until(lambda: ready(held), 2, "the place of the caller that left never became free")
        took = time.monotonic() - left
        held.backend.gate.set()
        assert [other.result(30).status_code for other in others] == [200, 200]
    assert "gone" not in held.backend.scored_ids
    holds(record_property, "S7", f"{way}: dropped {took:.2f} s after its caller left, never run")
    if not way.startswith("http"):
        opened.close()


def test_streams_over_the_bound_are_told_to_come_back():
    release = threading.Event()

    def silent() -> Iterator[bytes]:
        yield wire.encode_request(request_of([1, 2, 3])).SerializeToString()
        release.wait(60)

    with serving(max_streams=1) as server, channel(server) as opened:
        method = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")
        first = method(silent(), timeout=60)
        next(first)
        with pytest.raises(grpc.RpcError) as raised:
            next(method(silent(), timeout=60))
        _, info, retry = status_of(raised.value)
        assert info.reason == "overloaded"
        assert retry is not None
        body = wire.encode_request(request_of([1, 2])).SerializeToString()
        over_http = server.http.post(f"{server.http_url}/v1/score/stream", content=body, headers=PROTOBUF)
        assert (over_http.status_code, over_http.headers["retry-after"]) == (429, "5")
        release.set()
        assert list(first) == []
        until(lambda: all(isinstance(one, Scores) for one in ask_grpc_stream(server, request_of([1, 2]))), 10, "full")


def test_a_stream_whose_client_is_silent_ends_when_the_server_closes():
    """What was accepted is answered, then the stream ends with a retryable error, long before the grace is over."""
    asked, release = wire.encode_request(request_of([1, 2, 3])).SerializeToString(), threading.Event()

    def requests() -> Iterator[bytes]:
        yield asked
        release.wait(60)

    with serving(grace_s=30, lame_duck_s=0.1) as server, channel(server) as opened:
        frames = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")(requests(), timeout=60)
        assert pb.ScoreFrame.FromString(next(frames)).completion_id == "c0"
        started = time.monotonic()
        server.drain()
        with pytest.raises(grpc.RpcError) as raised:
            next(frames)
        _, info, _ = status_of(raised.value)
        assert info.reason == "unavailable"
        assert time.monotonic() - started < 10
        release.set()


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_a_stream_that_nobody_reads_gives_its_place_back(way: str):
    """128 MiB of answers, of which the caller takes what the transport does by itself."""
    sequences = [np.ones(1024, np.int32)] * 8
    message = wire.encode_request(request_of(*sequences, top_k="all")).SerializeToString()
    settings = {"fake_vocabulary": 4096, "queue_bytes": 256 << 20, "high_water": 0.01, "answer_idle_s": 0.5}
    with serving(**settings, grace_s=1.0) as server:
        if way == "grpc":
            opened = grpc.insecure_channel(server.grpc_target)
            frames = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")(iter([message]), timeout=60)
        else:
            host, port = server.http_url.removeprefix("http://").split(":")
            opened = socket.create_connection((host, int(port)), timeout=60)
            head = f"POST /v1/score/stream HTTP/1.1\r\nhost: x\r\ncontent-length: {len(message)}\r\n"
            opened.sendall(f"{head}content-type: {PROTOBUF['content-type']}\r\n\r\n".encode() + message)
        until(lambda: not ready(server), 20, "the answers never took their place")
        until(lambda: ready(server), 20, "the place was never given back")
        if way == "grpc":
            with pytest.raises(grpc.RpcError) as raised:
                list(frames)
            assert raised.value.code() == grpc.StatusCode.CANCELLED
        else:
            size = sum(len(chunk) for chunk in iter(lambda: opened.recv(1 << 20), b""))
            assert size < 128 << 20, "it ends early"
        opened.close()


def test_calls_cut_off_by_the_end_of_the_grace_may_be_asked_again():
    backend = Gated()
    with serving(lambda config: backend, grace_s=0.2) as server, ThreadPoolExecutor(1) as pool:
        backend.gate.clear()
        waiting = pool.submit(post, server, request_of([1, 2, 3]))
        assert backend.entered.wait(10)
        server.drain()
        answer = waiting.result(30)
        assert (answer.status_code, answer.json()["kind"], answer.json()["retryable"]) == (503, "unavailable", True)


def test_all_of_it_together_leaves_nothing_behind(gated_server: Server):
    """After the drills above the budget is whole again: a request that needs all of it is accepted."""
    request = ScoreRequest([Completion(str(n), np.ones(64, np.int32)) for n in range(4)])
    response = post(gated_server, request)
    assert response.status_code == 200, response.text
    answers = unread(request, pb.ScoreResponse.FromString(response.content), 512)
    assert all(isinstance(one, Scores) for one in answers)
    assert not any(isinstance(one, InvalidRequest) for one in answers)
