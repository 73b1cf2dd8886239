"""Health over gRPC asks for no key: it answers as the standard says, and by it nobody without one keeps others out."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from teacher_api import wire
from tests.serving import Server, call, channel, request_of, serving

KEY = "a-key-of-the-server"
MAX_CALLS = 16
STATES = health_pb2.HealthCheckResponse
CHECK = "/grpc.health.v1.Health/Check"
pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(api_keys=[KEY], max_calls=MAX_CALLS, header_s=1.0) as one:
        yield one


def scores(server: Server) -> bool:
    with channel(server) as opened:
        body = wire.encode_request(request_of([1, 2, 3]))
        return bool(call(opened, "Score", body, timeout=10, metadata=(("authorization", f"Bearer {KEY}"),)))


def ask(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def test_calls_that_watch_without_a_key_leave_room_for_work(server: Server):
    with channel(server) as opened:
        watching = [health_pb2_grpc.HealthStub(opened).Watch(ask(f"unknown-{n}")) for n in range(MAX_CALLS)]
        ended = []
        for one in watching:
            try:
                assert next(one).status == STATES.SERVICE_UNKNOWN
            except grpc.RpcError as error:
                ended.append(error.code())
        assert scores(server)
    assert ended
    assert set(ended) == {grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_calls_that_never_say_what_they_ask_leave_room_for_work_and_end(server: Server):
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait(30)
        yield from ()

    with channel(server) as opened:
        open_ones = [opened.stream_unary(CHECK).future(nothing()) for _ in range(MAX_CALLS)]
        assert scores(server)
        codes = {one.exception(timeout=10).code() for one in open_ones}
        never.set()
    assert codes <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert grpc.StatusCode.UNAVAILABLE in codes


def test_health_is_what_the_standard_says(server: Server):
    with channel(server) as opened:
        health = health_pb2_grpc.HealthStub(opened)
        for service in ("", "teacher.v1.TeacherService"):
            assert health.Check(ask(service)).status == STATES.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            health.Check(ask("nobody"))
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        watching = health.Watch(ask())
        assert next(watching).status == STATES.SERVING
        server.drain()
        assert [one.status for one in watching] == [STATES.NOT_SERVING]  # and then it ends: no drain waits for it
