"""Answers of unary calls that are on their way: they count as in work until the transport has let go of them, whether
the caller reads them, stops reading, or leaves."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from serving import Server, ask_grpc, post, request_of, serving

from teacher_api import wire
from teacher_api.types import Scores
from teacher_api.v1 import teacher_pb2 as pb

pytestmark = pytest.mark.slow

VOCABULARY, TOKENS = 4096, 1024
LARGE = request_of(np.ones(TOKENS, np.int32), top_k="all")
LARGE_BYTES = (TOKENS - 1) * VOCABULARY * 4  # 16 MiB: far more than the buffers on the way
RECEIVE_BYTES = 1 << 19  # of those buffers, the caller's
ANY = 1e-9  # high_water: /readyz says no while anything at all is in work


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(fake_vocabulary=VOCABULARY, high_water=ANY, answer_idle_s=30) as running:
        yield running


def nothing_in_work(server: Server) -> bool:
    return server.http.get(f"{server.http_url}/readyz").status_code == 200


def until(condition: Callable[[], bool], complaint: str, limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, complaint


@contextlib.contextmanager
def http_answer(server: Server) -> Iterator[socket.socket]:
    """A connection over which the large answer has begun to come; its bytes are read by whoever gets it."""
    host, port = server.http_url.removeprefix("http://").split(":")
    body = wire.encode_request(LARGE).SerializeToString()
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        caller.settimeout(60)
        caller.connect((host, int(port)))
        head = "POST /v1/score HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/x-protobuf\r\n"
        caller.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert caller.recv(12) == b"HTTP/1.1 200"
        yield caller


class Relay:
    """A TCP proxy that passes on what the server sends only while its gate is open: gRPC's own client can't be kept
    from reading."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self.gate = threading.Event()
        self.passed = 0  # bytes from the server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._server = socket.socket()
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        self._server.connect((host, int(port)))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        self._caller, _ = self._listener.accept()
        threading.Thread(target=self._upwards, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := self._server.recv(RECEIVE_BYTES):
                if self.passed > 1 << 20:  # the answer has begun
                    self.gate.wait(60)
                self._caller.sendall(data)
                self.passed += len(data)

    def _upwards(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._caller.recv(RECEIVE_BYTES):
                self._server.sendall(data)

    def close(self) -> None:
        self.gate.set()
        for each in (self._listener, self._server, self._caller):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@contextlib.contextmanager
def grpc_answer(server: Server) -> Iterator[tuple[Relay, Any]]:
    """A call whose large answer has begun to come and stops at the relay."""
    relay = Relay(server.grpc_target)
    options = [("grpc.max_receive_message_length", -1)]
    try:
        with grpc.insecure_channel(relay.target, options) as opened:
            body = wire.encode_request(LARGE).SerializeToString()
            answer = opened.unary_unary("/teacher.v1.TeacherService/Score").future(body, timeout=60)
            until(lambda: relay.passed > 1 << 20, "the answer never came")
            yield relay, answer
    finally:
        relay.close()


def test_a_slow_reader_over_http_holds_its_budget_until_it_has_read(server: Server):
    with http_answer(server) as caller:
        assert not nothing_in_work(server)
        data = b"HTTP/1.1 200" + b"".join(iter(lambda: caller.recv(1 << 20), b""))
    head, _, content = data.partition(b"\r\n\r\n")
    assert f"content-length: {len(content)}".encode() in head.lower()
    frames = pb.ScoreResponse.FromString(content).frames
    assert sum(len(frame.rows) for frame in frames) > LARGE_BYTES
    until(lambda: nothing_in_work(server), "the budget never came back")


def test_a_slow_reader_over_grpc_holds_its_budget_until_it_has_read(server: Server):
    with grpc_answer(server) as (relay, answer):
        assert not nothing_in_work(server)
        relay.gate.set()
        frames = pb.ScoreResponse.FromString(answer.result(60)).frames
        assert sum(len(frame.rows) for frame in frames) > LARGE_BYTES
        until(lambda: nothing_in_work(server), "the budget never came back")


def test_a_caller_over_http_that_leaves_gives_its_budget_back(server: Server):
    with http_answer(server) as caller:
        assert not nothing_in_work(server)
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(lambda: nothing_in_work(server), "the budget never came back")


def test_a_caller_over_grpc_that_leaves_gives_its_budget_back(server: Server):
    with grpc_answer(server) as (_, answer):
        assert not nothing_in_work(server)
        answer.cancel()
        until(lambda: nothing_in_work(server), "the budget never came back")


def test_a_caller_that_stops_reading_is_given_up():
    settings = {"fake_vocabulary": VOCABULARY, "high_water": ANY, "answer_idle_s": 0.1}
    with serving(**settings) as server:
        with http_answer(server) as caller:
            until(lambda: nothing_in_work(server), "an answer that nobody reads held its budget")
            size = sum(len(chunk) for chunk in iter(lambda: caller.recv(1 << 20), b""))
            assert size < LARGE_BYTES, "it ends early"
        with grpc_answer(server) as (relay, answer):
            until(lambda: nothing_in_work(server), "an answer that nobody reads held its budget")
            relay.gate.set()
            assert answer.code() == grpc.StatusCode.CANCELLED


def test_a_hundred_calls_leave_nothing_behind(server: Server):
    """Good ones, wrong ones and ones whose caller does not wait, over both transports."""
    good, wrong = request_of([1, 2, 3], top_k=2), request_of([1, VOCABULARY])
    body = wire.encode_request(good).SerializeToString()
    with grpc.insecure_channel(server.grpc_target) as opened:
        method = opened.unary_unary("/teacher.v1.TeacherService/Score")
        for n in range(20):
            assert post(server, good).status_code == 200
            assert post(server, wrong).status_code == 400
            asked = {"completions": [{"token_ids": [1, 2, 3]}]}
            assert server.http.post(f"{server.http_url}/v1/score", json=asked).status_code == 200
            assert isinstance(ask_grpc(server, good, VOCABULARY)[0], Scores)
            leaving = method.future(body, timeout=60)
            if n % 2:
                leaving.cancel()
            else:
                leaving.result(60)
    until(lambda: nothing_in_work(server), "some of the budget leaked")
