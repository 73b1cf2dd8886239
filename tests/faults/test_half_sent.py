"""Callers that send half of something and then nothing, or next to nothing (S16): their connections are closed, and
nobody else is slower for them. uvicorn by itself would keep them for ever."""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from reliability import holds
from serving import PROTOBUF, Server, ask_http, channel, post, refused, request_of, serving

from teacher_api import wire
from teacher_api.types import Scores
from teacher_server.http_server import MAX_HEADER_BYTES

pytestmark = pytest.mark.slow

HALF_HEADERS, HALF_BODIES = 200, 200
CLOSED_S = 10.0
NOISE_S = 0.05  # by which a p95 of milliseconds may differ for other reasons: the machine is shared
HEAD = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\ncontent-length: 100000\r\n"
HEADER_S = 1.0


@pytest.fixture(scope="module")
def quick() -> Iterator[Server]:
    """A server that gives up soon."""
    settings = {"max_request_bytes": 65536, "body_bytes_per_s": 60_000}
    with serving(header_s=HEADER_S, body_idle_s=HEADER_S, **settings) as running:
        yield running


def opened(server: Server, sent: bytes) -> socket.socket:
    host, port = server.http_url.split("://")[1].split(":")
    made = socket.create_connection((host, int(port)), timeout=30)
    made.sendall(sent)
    return made


def answer_of(caller: socket.socket) -> bytes:
    """One answer, its body included."""
    data = b""
    while b"\r\n\r\n" not in data or len(data) < data.index(b"\r\n\r\n") + 4 + length_of(data):
        piece = caller.recv(1 << 16)
        assert piece, data
        data += piece
    return data


def length_of(data: bytes) -> int:
    found = re.search(rb"content-length: (\d+)", data)
    assert found
    return int(found[1])


def everything(caller: socket.socket) -> bytes:
    """All that comes until the server closes."""
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: caller.recv(1 << 16), b""))
    return b""


def p95_s(server: Server, seconds: float) -> float:
    request, took = request_of([1, 2, 3]), []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.monotonic()
        assert post(server, request).status_code == 200
        took.append(time.monotonic() - started)
    return float(np.percentile(took, 95))


def test_half_sent_headers_and_bodies_are_closed_and_others_are_served(record_property: Any):
    """With the limits as they are unless told otherwise."""
    with serving() as server:
        p95_s(server, 0.5)
        alone_s = p95_s(server, 2)
        halves = [opened(server, HEAD[: 20 + n % 60]) for n in range(HALF_HEADERS)]
        halves += [opened(server, HEAD + b"\r\n" + bytes(n)) for n in range(HALF_BODIES)]
        started = time.monotonic()
        among_s = p95_s(server, 5)
        open_still = selectors.DefaultSelector()
        for half in halves:
            half.setblocking(False)
            open_still.register(half, selectors.EVENT_READ)
        last = started
        while open_still.get_map() and time.monotonic() < started + 3 * CLOSED_S:
            for key, _ in open_still.select(1.0):
                if ended(key.fileobj):
                    open_still.unregister(key.fileobj)
                    last = time.monotonic()
        assert not open_still.get_map(), f"{len(open_still.get_map())} were never closed"
        for half in halves:
            half.close()
        assert last - started <= CLOSED_S
        assert among_s <= 2 * alone_s + NOISE_S
        assert isinstance(ask_http(server, request_of([1, 2, 3]))[0], Scores)
    holds(
        record_property,
        "S16",
        f"{len(halves)} sockets closed within {last - started:.1f} s; p95 of others {among_s * 1e3:.0f} ms among them, "
        f"{alone_s * 1e3:.0f} ms without",
    )


def ended(half: Any) -> bool:
    try:
        return half.recv(1 << 16) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def test_headers_that_drip_end_as_late_as_those_that_stop(quick: Server):
    with opened(quick, b"GET /livez HTTP/1.1\r\n") as caller:
        started, answer = time.monotonic(), b""
        caller.settimeout(0.1)
        while time.monotonic() < started + 10:
            with contextlib.suppress(OSError):
                caller.sendall(b"x: y\r\n")
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                answer = caller.recv(4096)
                break
        assert time.monotonic() - started < HEADER_S + 2
        assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert b"application/problem+json" in answer


def test_a_body_that_drips_is_given_up(quick: Server):
    with opened(quick, HEAD.replace(b"100000", b"60000") + b"\r\n") as caller:
        started = time.monotonic()
        caller.settimeout(0.2)
        answer = b""
        while time.monotonic() < started + 20 and not answer:
            caller.sendall(bytes(100))  # never silent for as long as body_idle_s
            with contextlib.suppress(TimeoutError):
                answer = answer_of(caller)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"60000 bytes per second" in answer
        assert time.monotonic() - started < HEADER_S + 3


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"G"])
def test_a_connection_that_asks_nothing_is_closed(quick: Server, sent: bytes):
    with opened(quick, sent) as caller:
        started = time.monotonic()
        everything(caller)
        assert time.monotonic() - started < HEADER_S + 2


def test_a_second_request_that_stops_in_its_headers_is_closed(quick: Server):
    """On a connection that has served one."""
    with opened(quick, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n") as caller:
        assert answer_of(caller).startswith(b"HTTP/1.1 200")
        caller.sendall(b"GET /livez HT")
        started = time.monotonic()
        assert everything(caller).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < HEADER_S + 2


def test_a_caller_that_goes_on_sending_after_a_refusal_is_closed(quick: Server):
    """uvicorn forgets a connection's idle time at every byte that comes."""
    with opened(quick, HEAD + b"\r\n") as caller:  # 100,000 bytes are announced, 65,536 are taken
        assert answer_of(caller).startswith(b"HTTP/1.1 413")
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < started + 10:
                caller.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - started < 5


def test_a_refused_body_that_ends_leaves_the_connection_usable(quick: Server):
    with opened(quick, HEAD + b"\r\n") as caller:
        assert answer_of(caller).startswith(b"HTTP/1.1 413")
        caller.sendall(bytes(100_000) + b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer_of(caller).startswith(b"HTTP/1.1 200")


def test_endless_headers_are_refused(quick: Server):
    with opened(quick, b"GET /livez HTTP/1.1\r\n") as caller:
        line, sent, answer = b"x: " + b"y" * 8000 + b"\r\n", 0, b""
        caller.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while sent < 50 * MAX_HEADER_BYTES:
                caller.sendall(line)
                sent += len(line)
            answer = caller.recv(4096)
        assert sent < 50 * MAX_HEADER_BYTES or answer.startswith(b"HTTP/1.1 431")
    large = {"x-large": "y" * (MAX_HEADER_BYTES // 2)}
    assert quick.http.get(f"{quick.http_url}/livez", headers=large).status_code == 200
    with contextlib.suppress(httpx.TransportError):  # it hangs up while the rest is being sent
        assert quick.http.get(f"{quick.http_url}/livez", headers={"x-large": "y" * 200_000}).status_code == 431


CHUNKED = HEAD.replace(b"content-length: 100000", b"transfer-encoding: chunked") + b"\r\n1\r\nx\r\n"


@pytest.mark.parametrize("piece", [b"a:\r\n", b"x-long: " + b"v" * 1000, b""], ids=["many", "long", "size-of-a-chunk"])
def test_endless_trailers_are_refused(quick: Server, piece: bytes):
    begin, piece = (CHUNKED + b"0\r\n", piece) if piece else (CHUNKED + b"1;", b"v" * 1000)
    ended = quick.app.service.counts.requests["http"].by_outcome
    timed_out, data = ended["incomplete"], b""
    with opened(quick, begin) as caller:
        caller.setblocking(False)
        with contextlib.suppress(ConnectionError):  # what it sent beyond the answer
            while not data:
                with contextlib.suppress(BlockingIOError):
                    caller.send(piece * (1 << 14))
                with contextlib.suppress(BlockingIOError):
                    data = caller.recv(1 << 16)
    assert data == b"" or data.startswith(b"HTTP/1.1 431 ")
    assert ended["incomplete"] == timed_out, "the server read on until the body was late"


def test_a_trailer_is_no_header(quick: Server):
    message = wire.encode_request(request_of([1, 2, 3])).SerializeToString()
    head = CHUNKED.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    body = f"{len(message):x}\r\n".encode() + message + b"\r\n0\r\nx-request-id: a-trailer\r\n\r\n"
    with opened(quick, head + body) as caller:
        answer = answer_of(caller)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"a-trailer" not in answer


def test_what_is_not_http_gets_a_problem_document(quick: Server):
    with opened(quick, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)) as caller:
        answer = everything(caller)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"application/problem+json" in head
    assert f"content-length: {len(body)}".encode() in head


# ---- gRPC ------------------------------------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", PREFACE[:10], PREFACE])
def test_half_a_grpc_handshake_is_closed(quick: Server, sent: bytes):
    host, port = quick.grpc_target.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as caller:
        caller.sendall(sent)
        started = time.monotonic()
        everything(caller)
        assert time.monotonic() - started < HEADER_S + 3


def test_a_grpc_call_without_its_message_ends(quick: Server):
    """gRPC would wait for ever. The limit is that of the largest message at the least speed: 1 + 65536 / 60000 s."""
    never = threading.Event()

    def silent() -> Iterator[bytes]:
        never.wait(60)
        yield b""

    with channel(quick) as opened_channel:
        started = time.monotonic()
        call = opened_channel.stream_stream("/teacher.v1.TeacherService/Score")(silent(), timeout=60)
        with pytest.raises(grpc.RpcError) as raised:
            next(call)
        assert raised.value.code().name == "UNAVAILABLE"
        assert 1 < time.monotonic() - started < 8
        never.set()


def test_a_grpc_call_that_ends_without_a_message_is_refused(quick: Server):
    with channel(quick) as opened_channel:
        call = opened_channel.stream_unary("/teacher.v1.TeacherService/Score")
        with pytest.raises(grpc.RpcError) as raised:
            call(iter([]), timeout=30)
        assert raised.value.code().name == "INVALID_ARGUMENT"
    code, info, _ = refused(quick, b"")
    assert (code.name, info.metadata["field"]) == ("INVALID_ARGUMENT", "completions")
    whole = wire.encode_request(request_of([1, 2])).SerializeToString()
    assert quick.http.post(f"{quick.http_url}/v1/score", content=whole, headers=PROTOBUF).status_code == 200


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_headers(quick: Server):
    """asyncio leaves Nagle's algorithm on where a listener has protocol number 0: each answer came 40 ms late."""
    took = []
    for _ in range(30):
        started = time.monotonic()
        assert quick.http.get(f"{quick.http_url}/livez").status_code == 200
        took.append(time.monotonic() - started)
    assert min(took) < 0.03  # of a kernel's delayed acknowledgement at least 0.04
