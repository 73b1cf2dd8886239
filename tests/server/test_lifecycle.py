"""A real `teacher-serve` process: probes while it loads, one line for what can't start, a drain that fails nobody."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from ports import free_port
from reliability import holds
from serving import call, channel, serving

from teacher_api import wire
from teacher_api.types import Completion, ScoreRequest
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server import grpc_api
from teacher_server.app import StartError
from teacher_server.auth import KeyRing
from teacher_server.backends.fake import FakeBackend
from teacher_server.config import ServerConfig
from teacher_server.grpc_api import GrpcServer
from teacher_server.lifecycle import Lifecycle
from teacher_server.service import TeacherService

pytestmark = pytest.mark.slow

PROTOBUF = {"content-type": "application/x-protobuf"}
START_S = 90.0  # a loaded machine imports slowly
CPU_TO_LIVE_S = 1.5
SLACK_S = 4.0  # the check's own second, and a loaded machine


class Process:
    def __init__(self, tmp_path: Path, *arguments: str, http_port: int = 0) -> None:
        self.announce = tmp_path / "ready.json"
        command = [sys.executable, "-m", "teacher_server", "--http-port", str(http_port), "--grpc-port", "0"]
        command += ["--announce-file", str(self.announce), *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.started = time.monotonic()
        self.child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def ready(self) -> dict[str, Any]:
        deadline = time.monotonic() + START_S
        while not self.announce.exists():
            assert self.child.poll() is None, self.child.stderr.read()  # type: ignore[union-attr]
            assert time.monotonic() < deadline, "not ready in time"
            time.sleep(0.02)
        return dict(json.loads(self.announce.read_text()))

    def signal(self, number: int = signal.SIGTERM) -> float:
        self.child.send_signal(number)
        return time.monotonic()

    def ended(self, limit_s: float) -> tuple[int, str, str]:
        out, err = self.child.communicate(timeout=limit_s)
        return self.child.returncode, out, err


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    running: list[Process] = []
    yield running
    for process in running:
        if process.child.poll() is None:
            process.child.kill()
        process.child.communicate()


def body(name: str = "x", token: int = 1) -> bytes:
    request = ScoreRequest([Completion(name, np.asarray([1, 2, token], np.int32))])
    return wire.encode_request(request).SerializeToString()


def probe(url: str, name: str) -> int:
    return httpx.get(f"{url}/{name}", verify=False).status_code


def test_it_is_alive_before_it_is_ready_and_says_so_once_it_is(processes, tmp_path, record_property):
    """While the model is loading (the fake one waits for its self-check), livez is 200 and readyz 503."""
    port = free_port()
    arguments = ["--model", "fake", "--backend", "fake", "--fake-latency-s", "1.5", "--metrics-port", "0"]
    process = Process(tmp_path, *arguments, http_port=port)
    processes.append(process)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            assert probe(url, "livez") == 200
            break
        except httpx.TransportError:
            assert time.monotonic() - process.started < START_S
    alive_s = time.monotonic() - process.started
    # S1 asks for one second on a machine of one's own; on a shared one only the process's own time can be held to it.
    spent = psutil.Process(process.child.pid).cpu_times()
    assert spent.user + spent.system < CPU_TO_LIVE_S
    assert not process.announce.exists()
    assert probe(url, "readyz") == 503
    early = httpx.post(f"{url}/v1/score", content=body(), headers=PROTOBUF, verify=False)
    assert (early.status_code, early.json()["kind"], early.json()["retryable"]) == (503, "unavailable", True)
    ready = process.ready()
    assert time.monotonic() - process.started > alive_s
    assert probe(url, "readyz") == 200
    assert ready["http_url"] == url
    assert "preceptor_teacher_info{" in httpx.get(ready["metrics_url"]).text
    with grpc.insecure_channel(ready["grpc_url"].removeprefix("grpc://")) as opened:
        assert opened.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30) == b"\x08\x01"
        listed = opened.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        assert b"teacher.v1.TeacherService" in next(listed(iter([b"\x3a\x00"]), timeout=30))  # list_services: ""
    process.signal()
    status, out, err = process.ended(30)
    assert status == 0
    assert "Traceback" not in err
    (line,) = out.strip().splitlines()
    assert line == (  # one line, for people
        f"ready {ready['grpc_url']} {url} model=fake fingerprint={ready['fingerprint']} metrics={ready['metrics_url']}"
    )
    cpu_s = spent.user + spent.system
    holds(
        record_property, "S1", f"livez {alive_s:.2f} s after exec, {cpu_s:.2f} s of CPU by then; readyz 503 till ready"
    )


WRONG = [
    (["--model", "/nowhere/at/all"], 1, "not a directory"),
    (["--model", "fake", "--backend", "fake", "--queue-tokens", "100"], 1, "queue_tokens"),
    (["--model", "fake", "--modle", "x"], 2, "did you mean model"),
    (["--backend", "fake"], 2, "model"),
    (["--model", "fake", "--batch-tokens", "0"], 2, "batch_tokens"),
    (["--model", "fake", "--backend", "fake", "--host", "203.0.113.1", "--anonymous"], 1, "cannot listen"),
    (["--config", "/nowhere/config.yaml"], 2, "/nowhere/config.yaml"),
    (["--model", "fake", "--backend", "fake", "--announce-file", "/nowhere/ready"], 1, "/nowhere"),
    (["--model", "fake", "--backend", "fake", "--announce-file", "/tmp"], 1, "/tmp"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "status", "cause"), WRONG, ids=[w[2] for w in WRONG])
def test_what_cannot_start_says_why_in_one_line(processes, tmp_path, arguments, status, cause, record_property):
    process = Process(tmp_path, *arguments)
    processes.append(process)
    got, out, err = process.ended(START_S)
    assert got == status
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("teacher-serve: error: ")
    assert cause in line
    assert not process.announce.exists()
    if "/nowhere/at/all" in arguments:
        holds(record_property, "S1", f"a model that is not there: exit {got}, one line")


def test_a_port_that_is_taken_is_one_line(processes, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = Process(tmp_path, "--model", "fake", "--backend", "fake", http_port=taken.getsockname()[1])
        processes.append(process)
        status, _, err = process.ended(START_S)
    assert status == 1
    assert "cannot listen" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_sigterm_with_calls_in_flight_and_a_half_sent_body_fails_nobody(processes, tmp_path, record_property):
    """S4, with 16 calls over HTTP and 16 over gRPC."""
    lame_duck_s, grace_s = 0.5, 4.0
    process = Process(
        tmp_path,
        *("--model", "fake", "--backend", "fake", "--fake-latency-s", "0.5", "--batch-sequences", "16"),
        *("--lame-duck-s", str(lame_duck_s), "--grace-s", str(grace_s), "--body-idle-s", "60"),
    )
    processes.append(process)
    ready = process.ready()
    url, target = ready["http_url"], ready["grpc_url"].removeprefix("grpc://")
    host, port = url.removeprefix("http://").split(":")
    half = socket.create_connection((host, int(port)))
    half.sendall(
        b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\ncontent-length: 99\r\n\r\nhalf"
    )
    with (
        half,
        grpc.insecure_channel(target) as opened,
        httpx.Client(verify=False, timeout=60) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        method = opened.unary_unary("/teacher.v1.TeacherService/Score")
        over_grpc = [method.future(body(f"g{n}", 100 + n), timeout=60) for n in range(16)]
        over_http = [
            pool.submit(client.post, f"{url}/v1/score", content=body(f"h{n}", 200 + n), headers=PROTOBUF)
            for n in range(16)
        ]
        while not any(future.done() for future in over_http):  # the first batch is through, the others wait
            time.sleep(0.005)
        signalled = process.signal()
        while probe(url, "readyz") == 200:
            assert time.monotonic() - signalled < lame_duck_s, "readyz did not change"
        late = client.post(f"{url}/v1/score", content=body("late", 300), headers=PROTOBUF)
        assert late.status_code == 200, "the lame duck still serves"
        for future in over_http:
            response = pb.ScoreResponse.FromString(future.result(60).content)
            assert not pb.ScoreRows.FromString(response.frames[0].rows).HasField("error")
        for future in over_grpc:
            response = pb.ScoreResponse.FromString(future.result(60))
            assert not pb.ScoreRows.FromString(response.frames[0].rows).HasField("error")
    status, _, err = process.ended(30)
    took = time.monotonic() - signalled
    assert status == 0, err
    assert took <= lame_duck_s + grace_s + SLACK_S
    assert "Traceback" not in err
    limit_s = lame_duck_s + grace_s + 1
    holds(record_property, "S4", f"0 of 32 calls failed; exit 0 after {took:.1f} s (of {limit_s:.1f} s)")


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_an_engine_that_hangs_does_not_keep_the_server(processes, tmp_path, signals, record_property):
    """One SIGTERM: gone when the grace is over. Two: at once."""
    grace_s = 1.0 if signals == 1 else 60.0
    process = Process(
        tmp_path,
        *("--model", "fake", "--backend", "fake", "--fake-hang-token", "500"),
        *("--lame-duck-s", "0", "--grace-s", str(grace_s)),
    )
    processes.append(process)
    ready = process.ready()
    with grpc.insecure_channel(ready["grpc_url"].removeprefix("grpc://")) as opened:
        hanging = opened.unary_unary("/teacher.v1.TeacherService/Score").future(body("h", 500), timeout=60)
        with pytest.raises(grpc.FutureTimeoutError):
            hanging.result(0.3)
        signalled = process.signal()
        if signals == 2:
            while probe_or_gone(ready["http_url"]) == 200:
                assert time.monotonic() - signalled < 10
            signalled = process.signal()
        status, _, _ = process.ended(30)
        took = time.monotonic() - signalled
        assert status == 0
        assert took <= (grace_s if signals == 1 else 0) + SLACK_S
        assert hanging.exception(10) is not None, "the caller is not left hanging"
    ways = f"one SIGTERM and a grace of {grace_s:g} s" if signals == 1 else "a second SIGTERM"
    holds(record_property, "S4", f"engine hung: exit 0 {took:.1f} s after {ways}")


def probe_or_gone(url: str) -> int:
    try:
        return probe(url, "readyz")
    except httpx.TransportError:
        return 0


def test_a_start_that_fails_gives_its_ports_back():
    """In a program that goes on: both were open while the model loaded."""

    class Broken(FakeBackend):
        def load(self):
            for port in ports.values():
                socket.create_connection(("127.0.0.1", port), timeout=10).close()
            raise ValueError("the model is broken")

    ports = {"http_port": free_port(), "grpc_port": free_port()}
    with pytest.raises(StartError, match="the model is broken"), serving(lambda _: Broken(), **ports):
        pass
    for port in ports.values():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=10)


def test_a_second_signal_after_the_stop_leaves_nothing_undone_in_the_loop():
    """The loop may close at any moment then: a coroutine made for the health service would never be awaited."""

    async def stopped_and_told_again() -> set[Any]:
        lifecycle, config = Lifecycle(stall_s=5.0, high_water=0.9), ServerConfig(model="fake", backend="fake")
        served = GrpcServer(TeacherService(config, lifecycle), lifecycle, KeyRing.of(config))
        await served.start("127.0.0.1", 0)
        lifecycle.begin_drain()
        await served.stop(0)
        before = asyncio.all_tasks()
        lifecycle.begin_drain()
        return asyncio.all_tasks() - before

    assert asyncio.run(stopped_and_told_again()) == set()


def test_a_grpc_connection_without_calls_is_closed_and_its_next_call_served(monkeypatch):
    monkeypatch.setattr(grpc_api, "IDLE_MS", 500)
    with serving() as server, channel(server) as opened:
        left = threading.Event()
        states = []

        def see(state: grpc.ChannelConnectivity) -> None:
            states.append(state)
            if state is grpc.ChannelConnectivity.IDLE and grpc.ChannelConnectivity.READY in states:
                left.set()

        opened.subscribe(see)
        call(opened, "GetInfo", pb.GetInfoRequest())
        assert left.wait(10), states
        call(opened, "GetInfo", pb.GetInfoRequest())


def test_the_configuration_is_printed_without_the_keys(tmp_path):
    environment = {**os.environ, "TEACHER_API_KEYS": "[a-very-secret-key]", "TEACHER_MAX_TOP_K": "17"}
    command = [sys.executable, "-m", "teacher_server", "--model", "m", "--grpc-port=9", "--print-config"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert "max_top_k: 17" in done.stdout
    assert "grpc_port: 9" in done.stdout
    assert "secret" not in done.stdout


def test_livez_fails_only_for_an_engine_that_is_silent_while_work_waits():
    silent_s, share = [0.0], [0.0]
    life = Lifecycle(stall_s=10, high_water=0.9)
    life.watch_work(lambda: silent_s[0], lambda: share[0])
    assert life.livez().ok
    assert not life.readyz().ok
    life.become_ready()
    assert life.readyz().ok
    share[0] = 0.95
    assert not life.readyz().ok
    assert life.livez().ok, "busy is not dead"
    share[0], silent_s[0] = 0.0, 11.0
    assert not life.livez().ok
    silent_s[0] = 0.0
    life.begin_drain()
    assert (life.livez().ok, life.readyz().ok) == (True, False)
    assert not life.quick_exit.is_set()
    life.begin_drain()
    assert life.quick_exit.is_set()
