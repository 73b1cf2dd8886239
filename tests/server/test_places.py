"""Streams, calls and bodies that are being received are bounded, and of several tenants none can hold all of them."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator

import grpc
import pytest

from teacher_api import wire
from tests.serving import PROTOBUF, Server, channel, request_of, serving

KEYS = {"greedy": "pk_greedy-0123456789abcdef0123456789", "other": "pk_other-0123456789abcdef01234567890"}
BODY = wire.encode_request(request_of([1, 2, 3])).SerializeToString()
METHOD = "/teacher.v1.TeacherService/"
STREAMS, CALLS, BYTES = 4, 16, 100_000
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    tenants = {name: {"keys": [f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"]} for name, key in KEYS.items()}
    limits = {"max_streams": STREAMS, "max_calls": CALLS, "max_request_bytes": 40_000, "receiving_bytes": BYTES}
    with serving(tenants=tenants, body_idle_s=60, **limits) as one:
        yield one


def of(tenant: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {KEYS[tenant]}"),)


@contextlib.contextmanager
def silent(server: Server, tenant: str, method: str, number: int, *, first: bytes = b"") -> Iterator[list[grpc.Call]]:
    """Calls that send `first` and then nothing, until the block ends."""
    over = threading.Event()

    def requests() -> Iterator[bytes]:
        yield from [first] if first else []
        over.wait(60)

    with channel(server) as opened:
        yield [opened.stream_stream(METHOD + method)(requests(), metadata=of(tenant)) for _ in range(number)]
        over.set()


def codes(calls: list[grpc.Call]) -> set[grpc.StatusCode]:
    """Of the calls that end before they have answered."""
    found = set()
    for call in calls:
        try:
            next(call)
        except grpc.RpcError as error:
            found.add(error.code())
    return found


def test_one_tenants_open_streams_leave_others_some(server: Server):
    with silent(server, "greedy", "ScoreStream", STREAMS + 1, first=BODY) as calls, channel(server) as opened:
        assert codes(calls) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        answers = opened.stream_stream(METHOD + "ScoreStream")(iter([BODY]), metadata=of("other"), timeout=10)
        assert len(list(answers)) == 1


def test_one_tenants_open_calls_leave_others_some(server: Server):
    with silent(server, "greedy", "Score", CALLS + 1) as calls, channel(server) as opened:
        assert any(call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED for call in calls[-1:])
        assert opened.unary_unary(METHOD + "Score")(BODY, metadata=of("other"), timeout=10)


def test_one_tenants_slow_bodies_leave_others_some(server: Server):
    host, port = server.http_url.removeprefix("http://").split(":")
    head = "POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\n"
    head += f"authorization: Bearer {KEYS['greedy']}\r\ncontent-length: 40000\r\n\r\n"
    refused = 0
    with contextlib.ExitStack() as halves:
        for _ in range(3):
            half = halves.enter_context(socket.create_connection((host, int(port)), timeout=1))
            half.sendall(head.encode() + bytes(33_000))
            with contextlib.suppress(TimeoutError):
                refused += half.recv(100).startswith(b"HTTP/1.1 429")
        headers = {**PROTOBUF, **dict(of("other"))}
        assert (
            server.http.post(f"{server.http_url}/v1/score", content=bytes(20_000), headers=headers).status_code == 400
        )
    assert refused == 1


def test_a_tenant_alone_may_hold_everything():
    with serving(max_streams=2) as server, channel(server) as opened:
        over = threading.Event()

        def requests() -> Iterator[bytes]:
            yield BODY
            over.wait(60)

        calls = [opened.stream_stream(METHOD + "ScoreStream")(requests()) for _ in range(2)]
        assert codes(calls) == set()
        over.set()
