"""An engine that dies and is started again: the probes of both transports say so while it lasts, and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from serving import Server, ask_grpc, ask_http, post, request_of, serving

from teacher_api.types import Scores

pytestmark = pytest.mark.slow

DEATH = 404
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # of grpc.health.v1.HealthCheckResponse


def until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, complaint


def readyz(server: Server) -> int:
    return server.http.get(f"{server.http_url}/readyz").status_code


def test_the_probes_turn_while_a_dead_engine_is_started_again_and_back_afterwards():
    with (
        serving(fake_death_token=DEATH, fake_restart_s=3600) as server,
        grpc.insecure_channel(server.grpc_target) as opened,
    ):
        health = opened.unary_unary("/grpc.health.v1.Health/Check")
        by_name = b"\x0a\x19teacher.v1.TeacherService"  # field 1, 25 bytes
        before = ask_http(server, request_of([1, 2, 3]))[0]
        assert (readyz(server), health(b""), health(by_name)) == (200, SERVING, SERVING)
        for _ in range(2):  # a second death is noticed like the first
            killed = post(server, request_of([1, DEATH, 3]))
            assert killed.status_code == 200, "the sequence fails, not the call"
            until(lambda: readyz(server) == 503, "/readyz did not turn")
            assert "engine" in server.http.get(f"{server.http_url}/readyz").json()["status"]
            until(lambda: health(b"") == health(by_name) == NOT_SERVING, "gRPC health did not turn")
            assert server.http.get(f"{server.http_url}/livez").status_code == 200
            failed = ask_grpc(server, request_of([1, 2, 3]))[0]
            assert (failed.kind, failed.retryable) == ("backend_failed", True)
            assert failed.retry_after_s > 0
            server.backend.up_at = 0.0  # it has started
            until(lambda: readyz(server) == 200, "/readyz did not turn back")
            until(lambda: health(b"") == health(by_name) == SERVING, "gRPC health did not turn back")
            after = ask_http(server, request_of([1, 2, 3]))[0]
            assert isinstance(before, Scores)
            assert isinstance(after, Scores)
            assert np.array_equal(after.token_logprob, before.token_logprob)


def test_an_engine_that_dies_behind_a_control_turns_the_probes_too():
    with serving(fake_death_token=DEATH, fake_restart_s=1.0, control="random") as server:
        server.backend.inner.up_at = time.monotonic() + 3600
        until(lambda: readyz(server) == 503, "/readyz did not turn")
        server.backend.inner.up_at = 0.0
        until(lambda: readyz(server) == 200, "/readyz did not turn back")


def test_a_server_that_drains_meanwhile_stays_unready():
    with serving(fake_death_token=DEATH, fake_restart_s=3600, lame_duck_s=2.0) as server:
        post(server, request_of([1, DEATH]))
        until(lambda: readyz(server) == 503, "/readyz did not turn")
        server.drain()
        server.backend.up_at = 0.0
        until(lambda: server.http.get(f"{server.http_url}/readyz").json()["status"] == "draining", "it did not drain")
