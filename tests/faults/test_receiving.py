"""Requests on their way in: what all connections together may make the server hold is bounded, and who comes beyond
the bound is told to come back."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import httpx
import pytest
from serving import PROTOBUF, Server, ask_grpc, ask_http, channel, request_of, serving

from teacher_api import compression, wire
from teacher_api.client import TeacherClient
from teacher_api.errors import Overloaded
from teacher_api.types import Scores

pytestmark = pytest.mark.slow

BOUND, PART, LARGE = 100_000, 60_000, 50_000  # PART and LARGE do not fit together, each alone does


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(max_request_bytes=65536, receiving_bytes=BOUND, body_idle_s=60, metrics_port=0) as running:
        yield running


@contextlib.contextmanager
def half_sent(server: Server, *, declared: bool = True) -> Iterator[None]:
    """A connection that sends PART bytes of a body and then nothing, until the block ends."""
    host, port = server.http_url.removeprefix("http://").split(":")
    head = "POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as half:
        if declared:
            half.sendall(f"{head}content-length: {PART + 1}\r\n\r\n".encode() + bytes(PART))
        else:
            half.sendall(f"{head}transfer-encoding: chunked\r\n\r\n{PART:x}\r\n".encode() + bytes(PART) + b"\r\n")
        yield


def send(server: Server, size: int, *, path: str = "/v1/score", chunked: bool = False) -> httpx.Response:
    """A body of `size` bytes that is no request: 400 where the server has read all of it."""
    pieces = [bytes(1000)] * (size // 1000)
    content = iter(pieces) if chunked else b"".join(pieces)
    return server.http.post(server.http_url + path, content=content, headers=PROTOBUF)


def until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, complaint


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
@pytest.mark.parametrize("path", ["/v1/score", "/v1/score/stream"])
def test_bodies_beyond_the_bound_over_all_connections_are_told_to_come_back(server: Server, path: str, declared: bool):
    assert send(server, LARGE, path=path).status_code == 400
    with half_sent(server, declared=declared):
        until(lambda: send(server, LARGE, path=path).status_code == 429, "the bound was never reached")
        for chunked in (False, True):
            refused = send(server, LARGE, path=path, chunked=chunked)
            document = refused.json()
            assert (refused.status_code, document["kind"], document["retryable"]) == (429, "overloaded", True)
            assert int(refused.headers["retry-after"]) >= 1
            assert document["retry_after_s"] > 0
        assert isinstance(ask_http(server, request_of([1, 2, 3]))[0], Scores), "a small one still fits"
    until(lambda: send(server, LARGE, path=path).status_code == 400, "the place was never given back")


def test_a_hundred_bodies_leave_nothing_behind(server: Server):
    """Read, refused for their size, and left in the middle: then one that needs more than half of the bound."""
    for n in range(25):
        assert send(server, 1000).status_code == 400
        assert send(server, 70_000).status_code == 413
        assert send(server, LARGE, chunked=True).status_code == 400
        with half_sent(server, declared=bool(n % 2)):
            pass
    until(lambda: send(server, PART).status_code == 400, "some of the bound leaked")
    with half_sent(server):
        until(lambda: send(server, LARGE).status_code == 429, "more than the body in hand is counted, or less")
        assert send(server, BOUND - PART - 1000).status_code == 400


def test_a_compressed_body_counts_as_what_comes_out_of_it(server: Server):
    """A few bytes that become 60,000, and hold their place no longer than their request."""
    body = compression.compress(bytes(PART))
    assert len(body) < 1000

    def sent() -> int:
        headers = {**PROTOBUF, "content-encoding": "zstd"}
        return server.http.post(f"{server.http_url}/v1/score", content=body, headers=headers).status_code

    for _ in range(3):
        assert sent() == 400
    with half_sent(server):
        held = f"preceptor_receiving_bytes {PART}.0\n"
        until(lambda: held in httpx.get(server.metrics_url).text, "what was sent has not come")
        assert sent() == 429
        assert isinstance(ask_http(server, request_of([1, 2, 3]))[0], Scores)
    until(lambda: sent() == 400, "the place was never given back")


def test_grpc_calls_beyond_the_bound_are_told_to_come_back():
    release = threading.Event()

    def silent() -> Iterator[bytes]:
        yield wire.encode_request(request_of([1, 2, 3])).SerializeToString()
        release.wait(60)

    with serving(max_calls=2) as server, channel(server) as opened:
        method = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")
        streams = [method(silent(), timeout=60) for _ in range(2)]
        for stream in streams:
            next(stream)
        with pytest.raises(grpc.RpcError) as refused:
            opened.unary_unary("/teacher.v1.TeacherService/GetInfo")(b"", timeout=30)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with TeacherClient(f"grpc://{server.grpc_target}", timeout_s=1) as client, pytest.raises(Overloaded):
            client.info()  # its own tests show that it asks again after such an error
        release.set()
        assert [list(stream) for stream in streams] == [[], []]
        assert isinstance(ask_grpc(server, request_of([1, 2, 3]))[0], Scores)
