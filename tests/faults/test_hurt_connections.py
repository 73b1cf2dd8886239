"""The client behind a proxy that hurts its connections (C3, C4, C5): it ends at its deadline, hands out each answer
once, and takes no damaged one. The reference is the same question over a connection that nothing happens to."""

from __future__ import annotations

import random
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from faultproxy import Hurt, hurting
from reliability import holds
from serving import Server, post, serving

from teacher_api import client as client_module
from teacher_api import wire
from teacher_api.client import TeacherClient
from teacher_api.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    TeacherError,
    Unavailable,
)
from teacher_api.transport import PROTOBUF, parse
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_retries")]

FLIPS = 1000
ARRAYS = ("positions", "token_logprob", "log_tail", "topk_ids", "topk_logprob")
DEADLINE_S = 1.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def question(count: int = 4, tokens: int = 40) -> ScoreRequest:
    chance = np.random.default_rng(5)
    completions = [Completion(f"c{n}", chance.integers(0, 512, tokens, dtype=np.int32)) for n in range(count)]
    return ScoreRequest(completions, options=ScoreOptions(top_k=4))


def url_of(server: Server, scheme: str) -> str:
    return server.http_url if scheme == "http" else f"grpc://{server.grpc_target}"


def equal(one: Scores, other: Scores) -> bool:
    return one.id == other.id and all(np.array_equal(getattr(one, a), getattr(other, a)) for a in ARRAYS)


def expected(server: Server, request: ScoreRequest) -> list[Scores]:
    with TeacherClient(server.http_url) as client:
        return client.score(request)


@pytest.mark.parametrize("row", ["C3", "C4"])
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_dripping_or_half_open_connection_ends_at_its_deadline(
    server: Server, scheme: str, row: str, record_property: Any
):
    """In the middle of an answer: the handshake with the teacher is over by then."""
    request = question()
    kind = "drip" if row == "C3" else "half-open"
    with hurting(url_of(server, scheme)) as (proxy, url):
        proxy.always = Hurt(kind, after=700, every_s=0.01)
        started = time.monotonic()
        with TeacherClient(url, timeout_s=DEADLINE_S) as client, pytest.raises((DeadlineExceeded, Unavailable)):
            client.score(request)
        took = time.monotonic() - started
    assert took < DEADLINE_S + 2
    holds(record_property, row, f"{scheme}: ended {took - DEADLINE_S:+.2f} s from its deadline of {DEADLINE_S:g} s")


@pytest.mark.parametrize("row", ["C3", "C4"])
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_what_such_connections_held_up_is_delivered_once(server: Server, scheme: str, row: str, record_property: Any):
    """Attempts are given up and made again until the connections are whole; then each answer is there, once."""
    request = question(12)
    wanted = {scores.id: scores for scores in expected(server, request)}
    kinds = ("drip",) if row == "C3" else ("half-open", "cut")
    ways = [Hurt(kind, after, way) for kind in kinds for after, way in ((60, "up"), (900, "down"), (2000, "down"))]
    with hurting(url_of(server, scheme), *ways) as (proxy, url):
        with TeacherClient(url, timeout_s=60, attempt_timeout_s=0.5) as client:
            got = list(client.score_many([request]))
        assert not proxy.faults, "a fault that nobody met"
    assert len(got) == len(wanted), "one is missing, or there twice"
    assert all(equal(scores, wanted[scores.id]) for scores in got)
    holds(record_property, row, f"{scheme}: {len(got)} answers through {len(ways)} such connections, each once")


class Damaging:
    """A transport whose first answer has one bit turned over; it refuses to be asked again."""

    def __init__(self, info: pb.TeacherInfo, answer: bytes) -> None:
        self._info, self._answer = info, answer
        self.bits: list[int] = []  # to be turned over in the next answer
        self.answers = 0

    async def info(self, **_: Any) -> pb.TeacherInfo:
        return self._info

    async def score(self, request: pb.ScoreRequest, *, request_id: str, **_: Any) -> pb.ScoreResponse:
        if self.answers:
            raise InvalidRequest("asked again")
        self.answers += 1
        answer = pb.ScoreResponse.FromString(self._answer)
        answer.request_id = request_id
        damaged = bytearray(answer.SerializeToString())
        for bit in self.bits:
            damaged[bit // 8] ^= 1 << bit % 8
        return parse(pb.ScoreResponse, bytes(damaged))

    async def close(self) -> None:
        return


def asked(client: TeacherClient, request: ScoreRequest) -> list[Scores] | TeacherError:
    try:
        return client.score(request)
    except TeacherError as error:
        return error


def test_none_of_a_thousand_flipped_bits_is_accepted(server: Server, monkeypatch: Any, record_property: Any):
    """Of the message, anywhere."""
    request, chance = question(2), random.Random(11)
    answer = post(server, request).content
    transport = Damaging(server.info(), answer)
    monkeypatch.setattr(client_module, "open_transport", lambda *_, **__: transport)
    rejected = 0
    with TeacherClient(server.http_url) as client:
        whole = asked(client, request)
        assert not isinstance(whole, TeacherError), "without damage it is accepted"
        for bit in chance.sample(range(8 * len(answer)), FLIPS):
            transport.bits, transport.answers = [bit], 0
            got = asked(client, request)
            assert isinstance(got, TeacherError), bit
            assert got.message == "asked again" or isinstance(got, FingerprintMismatch)
            rejected += 1
    holds(record_property, "C5", f"{rejected} of {FLIPS} answers with a flipped bit rejected")


def test_bits_flipped_on_the_wire_reach_nobody(server: Server, record_property: Any):
    """Anywhere in the whole HTTP answer, status and headers included."""
    request, chance, count = question(1), random.Random(12), 80
    wanted = expected(server, request)
    size, asked_again = len(_answer(server, request)), 0
    with hurting(server.http_url) as (proxy, url), TeacherClient(url, timeout_s=60, attempt_timeout_s=0.5) as client:
        client.info()
        for _ in range(count):
            before = _asked(proxy.asked)
            proxy.flip_next(chance.randrange(8 * size))
            (answer,) = client.score(request, return_errors=True)
            assert equal(answer, wanted[0]), answer
            asked_again += _asked(proxy.asked) > before + 1
    assert asked_again > count / 3
    holds(record_property, "C5", f"{count} bits flipped on the wire, headers included: {asked_again} asked again")


def test_no_flipped_bit_of_a_status_line_ends_a_call(server: Server):
    request = question(1)
    wanted = expected(server, request)
    with hurting(server.http_url) as (proxy, url), TeacherClient(url, timeout_s=60, attempt_timeout_s=0.5) as client:
        client.info()
        for bit in range(8 * len("HTTP/1.1 200 OK")):
            proxy.flip_next(bit)
            (answer,) = client.score(request, return_errors=True)
            assert equal(answer, wanted[0]), (bit, answer)


def test_a_bit_flipped_while_clients_ask_who_is_there_is_noticed(server: Server):
    """Anywhere in what comes down during the handshake: a wrong fingerprint would turn every answer away."""
    request, chance = question(1), random.Random(13)
    wanted = expected(server, request)
    size = len(server.http.get(f"{server.http_url}/v1/info", headers={"accept": PROTOBUF}).content) + 150  # and headers
    with hurting(server.http_url) as (proxy, url):
        for _ in range(60):
            proxy.flip_next(chance.randrange(8 * size))
            with TeacherClient(url, timeout_s=60, attempt_timeout_s=0.5) as client:
                (answer,) = client.score(request, return_errors=True)
            assert equal(answer, wanted[0]), answer


def test_a_connection_outlasts_the_pools_of_clients(server: Server):
    """Who closes first decides whether a question is sent into a connection that is being closed."""
    pool = httpx.Limits(max_connections=1, keepalive_expiry=60)
    with httpx.Client(limits=pool) as client:
        opened = []
        for wait_s in (0, 5.5):  # httpx keeps its own for 5 s
            time.sleep(wait_s)
            with client.stream("GET", f"{server.http_url}/v1/info") as answer:
                answer.read()
                opened.append(answer.extensions["network_stream"].get_extra_info("client_addr"))
            assert answer.status_code == 200
    assert opened[0] == opened[1]


def _asked(sent: bytearray) -> int:
    return len(re.findall(rb"POST /v1/score ", sent))


def _answer(server: Server, request: ScoreRequest) -> bytes:
    """All bytes of one answer."""
    body = wire.encode_request(request).SerializeToString()
    host, port = server.http_url.removeprefix("http://").split(":")
    head = f"POST /v1/score HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as caller:
        caller.sendall(f"{head}content-type: application/x-protobuf\r\n\r\n".encode() + body)
        return b"".join(iter(lambda: caller.recv(1 << 16), b""))
