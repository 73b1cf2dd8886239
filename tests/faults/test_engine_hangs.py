"""An engine that hangs, and one that is merely busy (S2): the probes tell them apart. A real engine that is stopped
by a signal is in tests/server/test_vllm_backend.py."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from reliability import holds
from serving import Server, ask_http, post, request_of, serving

from teacher_api.types import Scores
from teacher_server.lifecycle import GAPS_KEPT, PATIENCE, Lifecycle

pytestmark = pytest.mark.slow

HANG = 404
NOT_SERVING = b"\x08\x02"
READYZ_LIMIT_S = 10.0


def status(server: Server, probe: str) -> int:
    return server.http.get(f"{server.http_url}/{probe}").status_code


def seconds_until(server: Server, probe: str, limit_s: float) -> float:
    """From now until the probe says no."""
    started = time.monotonic()
    while status(server, probe) == 200:
        assert time.monotonic() - started < limit_s, f"/{probe} still says yes"
        time.sleep(0.02)
    return time.monotonic() - started


@pytest.mark.parametrize("hang_s", [2.0, pytest.param(None, marks=pytest.mark.long)])
def test_a_hanging_engine_is_not_ready_within_ten_seconds_and_not_alive_at_stall_s(
    hang_s: float | None, record_property: Any
):
    """None: as it is unless told otherwise."""
    chosen = {} if hang_s is None else {"hang_s": hang_s}
    stall_s = 12.0 if hang_s is None else 4.0
    with (
        serving(fake_hang_token=HANG, stall_s=stall_s, grace_s=0.2, **chosen) as server,
        grpc.insecure_channel(server.grpc_target) as opened,
        ThreadPoolExecutor(1) as pool,
    ):
        assert isinstance(ask_http(server, request_of([1, 2, 3]))[0], Scores)
        started = time.monotonic()
        hanging = pool.submit(post, server, request_of([1, HANG]))
        while not server.app.lifecycle._idle_s():
            assert time.monotonic() - started < 10, "the engine never began"
        ready_s = seconds_until(server, "readyz", 30)
        assert ready_s <= READYZ_LIMIT_S
        assert opened.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30) == NOT_SERVING
        assert "hang" in server.http.get(f"{server.http_url}/readyz").json()["status"]
        assert status(server, "livez") == 200, "not before stall_s"
        live_s = ready_s + seconds_until(server, "livez", 30)
        assert stall_s - 1 <= live_s <= stall_s + 3
        server.drain()
        assert hanging.result(30).status_code == 503
    limits = f"hang_s {hang_s or 'by default'}, stall_s {stall_s:g}"
    holds(record_property, "S2", f"readyz 503 after {ready_s:.1f} s, livez 503 after {live_s:.1f} s ({limits})")


@pytest.mark.parametrize("seconds", [5, pytest.param(120, marks=pytest.mark.long)])
def test_a_saturated_engine_is_alive_all_the_time(seconds: float, record_property: Any):
    """More work than it can do, and forwards that each take a good part of what would be a stall."""
    with serving(fake_latency_s=0.4, batch_sequences=1, stall_s=2.0, hang_s=1.0, queue_tokens=40_000) as server:
        over, asked = threading.Event(), [0] * 16

        def greedy(number: int) -> None:
            while not over.is_set():
                asked[number] += post(server, request_of([1, 2, 3], timeout_s=3)).status_code in (200, 504)

        with ThreadPoolExecutor(16) as pool:
            callers = [pool.submit(greedy, number) for number in range(16)]
            probes: list[int] = []
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                probes.append(status(server, "livez"))
                assert "hanging" not in server.http.get(f"{server.http_url}/readyz").json()["status"]
                time.sleep(0.05)
            over.set()
            for caller in callers:
                caller.result(60)
        assert set(probes) == {200}
        assert sum(asked) > 16
    holds(record_property, "S2", f"{seconds} s saturated by 16 callers: livez 200 in {len(probes)} of {len(probes)}")


def test_patience_grows_with_the_longest_forward_of_late_and_ends_at_stall_s():
    silent = [0.0]
    life = Lifecycle(stall_s=200, hang_s=8, high_water=0.9)
    life.watch_work(lambda: silent[0], lambda: 0.0)
    life.become_ready()

    def ready_at(seconds: float) -> bool:
        silent[0] = seconds
        life.engine_is("")
        return life.readyz().ok

    assert [ready_at(s) for s in (0, 7.9, 8.1)] == [True, True, False], "without a past"
    assert ready_at(30) is False
    assert ready_at(0.1), "a forward ended"
    assert [ready_at(s) for s in (30, 30 * PATIENCE - 1, 30 * PATIENCE + 1)] == [True, True, False]
    ready_at(0.1)
    assert [ready_at(s) for s in (199, 201)] == [True, False], "never beyond stall_s"
    for _ in range(GAPS_KEPT):
        ready_at(1.0)
        ready_at(0.1)
    assert [ready_at(s) for s in (7.9, 8.1)] == [True, False], "what was long ago is forgotten"


def test_what_is_wrong_with_the_engine_is_told_to_listeners_once():
    told: list[bool] = []
    life = Lifecycle(stall_s=300, hang_s=8, high_water=0.9)
    life.become_ready()
    life.on_change(lambda: told.append(life.is_serving))
    for trouble in ("", "stopped", "stopped", "", ""):
        life.engine_is(trouble)
        assert life.readyz().ok is not bool(trouble)
        assert trouble in life.readyz().status
    assert told == [False, True]
