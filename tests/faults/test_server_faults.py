"""Bad input, a bad engine, too much work, callers that leave: the right error, on time, for the right one, and the
server still serves afterwards."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from serving import PROTOBUF, Server, ask_grpc, ask_grpc_stream, ask_http, call, channel, post, serving, unread

from teacher_api import wire
from teacher_api.errors import BackendFailed, InvalidBackendOutput, InvalidRequest, TeacherError
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server import json_models
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.fake import FakeBackend

POISON, NAN, SHORT = 401, 402, 403


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(
        fake_poison_token=POISON,
        fake_nan_token=NAN,
        fake_short_token=SHORT,
        max_sequence_tokens=64,
        max_request_bytes=65536,
        max_response_bytes=65536,
        max_top_k=64,
        body_idle_s=0.5,
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def _still_serving(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        (answer,) = ask_http(request.getfixturevalue("server"), request_of([1, 2, 3]))
        assert isinstance(answer, Scores)


def request_of(*sequences: Sequence[int], **options: Any) -> ScoreRequest:
    timeout_s = options.pop("timeout_s", None)
    completions = [Completion(f"c{n}", np.asarray(s, np.int32)) for n, s in enumerate(sequences)]
    return ScoreRequest(completions, options=ScoreOptions(**options), timeout_s=timeout_s)


def status_of(error: grpc.RpcError) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo, Any]:
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
    assert info.metadata["request_id"] == trailers["x-request-id"]
    return status, info, retry


def refused(server: Server, request: Any, method: str = "Score", **options: Any) -> tuple[grpc.StatusCode, Any, Any]:
    with channel(server) as opened, pytest.raises(grpc.RpcError) as raised:
        call(opened, method, wire.encode_request(request) if isinstance(request, ScoreRequest) else request, **options)
    _, info, retry = status_of(raised.value)
    return raised.value.code(), info, retry


# ---- a bad engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [ask_grpc, ask_http, ask_grpc_stream])
def test_one_poison_sequence_among_sixteen_fails_alone(server: Server, ask: Any):
    sequences = [[1, 2, 3, n] for n in range(16)]
    sequences[5] = [1, 2, POISON, 5]
    answers = ask(server, request_of(*sequences, top_k=2))
    assert isinstance(answers[5], BackendFailed)
    assert answers[5].retryable
    assert answers[5].request_id
    assert all(isinstance(answer, Scores) for n, answer in enumerate(answers) if n != 5)


@pytest.mark.parametrize("token", [NAN, SHORT])
def test_output_that_is_not_finite_or_not_whole_is_withheld(server: Server, token: int):
    good, bad, later = ask_grpc(server, request_of([1, 2, 3], [1, token, 3], [4, 5, 6], top_k=2))
    assert isinstance(good, Scores)
    assert isinstance(later, Scores)
    assert isinstance(bad, InvalidBackendOutput)
    assert "token_logprob" in bad.message
    text = server.http.post(f"{server.http_url}/v1/score", json={"completions": [{"token_ids": [1, token, 3]}]}).text
    assert "NaN" not in text
    assert "Infinity" not in text


# ---- bad input -------------------------------------------------------------------------------------------------------

WRONG = [
    (request_of([1, 512]), 400, "invalid_request", "completions[0].token_ids[1]"),
    (request_of([5]), 400, "invalid_request", "completions[0].ranges"),
    (request_of([1] * 65), 413, "too_large", "completions[0].token_ids"),
    (request_of([1, 2], top_k=65), 413, "too_large", "options.top_k"),
    (request_of([1, 2], hidden=True), 422, "unsupported", "options.hidden"),
    (ScoreRequest(request_of([1, 2]).completions, expect_fingerprint="x"), 412, "fingerprint_mismatch", None),
    (pb.ScoreRequest(), 400, "invalid_request", "completions"),
    (ScoreRequest([Completion("a", np.asarray([1, 2], np.int32), ranges=((0, 2),))]), 400, "invalid_request", None),
    (request_of([1, 2], temperature=1e9), 400, "invalid_request", "options.temperature"),
]


@pytest.mark.parametrize(("request_", "status", "kind", "field"), WRONG, ids=[f"{w[2]}-{w[3]}" for w in WRONG])
def test_wrong_requests_are_refused_by_name_before_any_work(server: Server, request_, status, kind, field):
    before = len(server.backend.scored_ids)
    answer = post(server, request_)
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["kind"]) == (status, kind)
    assert problem["request_id"] == answer.headers["x-request-id"]
    if field:
        assert problem["field"] == field
    code, info, _ = refused(server, request_)
    assert (info.reason, info.domain) == (kind, "teacher.v1")
    assert info.metadata.get("field", "") == problem.get("field", "")
    expected = {400: "INVALID_ARGUMENT", 413: "INVALID_ARGUMENT", 422: "UNIMPLEMENTED", 412: "FAILED_PRECONDITION"}
    assert code.name == expected[status]
    assert len(server.backend.scored_ids) == before


def test_cut_off_and_flipped_bytes_are_the_callers_error(server: Server):
    whole = wire.encode_request(request_of([1, 2, 3, 4], [5, 6, 7], top_k=3)).SerializeToString()
    chance = random.Random(7)
    bodies = [whole[:n] for n in range(len(whole))]
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        bodies.append(bytes(damaged))
    bodies += [chance.randbytes(chance.randint(1, 200)) for _ in range(50)]
    counts = {"ok": 0, "refused": 0}
    with channel(server) as opened:
        for number, body in enumerate(bodies):
            answer = server.http.post(f"{server.http_url}/v1/score", content=body, headers=PROTOBUF)
            assert answer.status_code in (200, 400, 412, 413, 422), answer.text
            assert len(answer.content) <= 4096 or answer.status_code == 200
            counts["ok" if answer.status_code == 200 else "refused"] += 1
            if number % 4 == 0:
                allowed = {"OK", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION"}
                assert code_of(opened, body) in allowed
    assert counts["refused"] > 100


def code_of(opened: grpc.Channel, body: bytes) -> str:
    try:
        call(opened, "Score", body)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


BAD_JSON = [
    '{"completions": [{"token_ids": [1, 2]}], "options": {"temperature": NaN}}',
    '{"completions": [{"token_ids": [1, 2]}], "options": {"temperature": Infinity}}',
    '{"completions": [{"token_ids": [1, 2]}], "timeout_s": 1e999}',
    '{"completions": [{"token_ids": [1, NaN]}]}',
    '{"completions": [{"token_ids": [1, 2.5]}]}',
    '{"completions": [{"token_ids": ["1", 2]}]}',
    '{"completions": [{"token_ids": [1, -2]}]}',
    '{"completions": [{"token_ids": [1, 99999999999999999999]}]}',
    '{"completions": [{"token_ids": [1, 2], "colour": 1}]}',
    '{"completions": [{"token_ids": [1, 2], "ranges": [[-1, 2]]}]}',
    '{"completions": [{"token_ids": [1, 2], "prompt_index": -1}]}',
    '{"completions": []}',
    '{"completions"',
    "null",
    "",
    "[" * 100_000,
    '{"completions": ' + "[" * 20_000 + "]" * 20_000 + "}",
    '\xff{"completions": 1}',
]


@pytest.mark.parametrize("body", BAD_JSON, ids=range(len(BAD_JSON)))
def test_bad_json_is_400_small_and_without_an_echo(server: Server, body: str):
    answer = server.http.post(
        f"{server.http_url}/v1/score", content=body.encode("latin-1"), headers={"content-type": "application/json"}
    )
    limits = {400, 413} if len(body) > 65536 else {400}
    assert answer.status_code in limits, answer.text
    assert len(answer.content) <= 4096
    assert "99999999999" not in answer.text
    json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} in the answer"))


def test_top_k_of_json_is_small(server: Server):
    asked = {"completions": [{"token_ids": [1, 2]}], "options": {"top_k": 65}}
    answer = server.http.post(f"{server.http_url}/v1/score", json=asked)
    assert (answer.status_code, answer.json()["field"]) == (422, "options.top_k")


def test_a_large_answer_is_not_given_as_json():
    with serving(max_sequence_tokens=4096, max_top_k=64) as server:
        asked = {"completions": [{"token_ids": [1] * 4000} for _ in range(4)], "options": {"top_k": 64}}
        answer = server.http.post(f"{server.http_url}/v1/score", json=asked)
        assert (answer.status_code, answer.json()["kind"]) == (413, "too_large")


def test_requests_that_grow_when_they_are_read_are_refused_before():
    """Two bytes a range, three bytes a list: each becomes hundreds in memory."""
    message = wire.encode_request(request_of([1, 2, 3]))
    message.completions[0].ranges.extend([pb.Range()] * (wire.MAX_RANGES + 1))
    with serving() as server:
        answer = post(server, message)
        assert (answer.status_code, answer.json()["kind"], answer.json()["field"]) == (413, "too_large", "completions")
        candidates = "[]," * (json_models.MAX_JSON_BODY_BYTES // 3) + "[]"
        body = '{"completions": [{"token_ids": [1, 2, 3], "candidates": [' + candidates + "]}]}"
        answer = server.http.post(
            f"{server.http_url}/v1/score", content=body, headers={"content-type": "application/json"}
        )
        assert (answer.status_code, answer.json()["kind"]) == (413, "too_large")


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


def test_a_body_of_another_type_or_to_another_place(server: Server):
    url = server.http_url
    assert server.http.post(f"{url}/v1/score", content=b"x", headers={"content-type": "text/plain"}).status_code == 400
    assert server.http.get(f"{url}/v1/nothing").json()["kind"] == "not_found"
    wrong_method = server.http.get(f"{url}/v1/score")
    assert wrong_method.status_code == 405
    assert wrong_method.headers["content-type"] == "application/problem+json"


def test_bodies_over_the_limit_are_refused_while_they_are_read(server: Server):
    declared = post(server, b"x" * 65537)
    assert (declared.status_code, declared.json()["kind"]) == (413, "too_large")
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(4096):
            sent += 1 << 16
            yield bytes(1 << 16)

    try:
        chunked = server.http.post(f"{server.http_url}/v1/score", content=endless(), headers=PROTOBUF)
        assert chunked.status_code == 413
    except httpx.TransportError:  # the server may also hang up on a body that doesn't end
        assert sent < 4096 << 16
    code, info, retry = refused(server, b"\x0a" + b"x" * 65537)
    assert (code.name, info.reason, retry) == ("INVALID_ARGUMENT", "too_large", None)


def test_a_body_that_stops_is_given_up(server: Server):
    host, port = server.http_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as half:
        half.sendall(
            b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-protobuf\r\n"
            b"content-length: 100\r\n\r\nhalf"
        )
        started = time.monotonic()
        assert half.recv(64).startswith(b"HTTP/1.1 400")
        assert time.monotonic() - started < 5


def test_an_answer_too_large_for_one_message_goes_over_the_stream(server: Server):
    request = request_of(*[[1] * 60] * 4, top_k=60)
    answer = post(server, request)
    assert (answer.status_code, answer.json()["kind"]) == (413, "too_large")
    assert "stream" in answer.json()["detail"]
    assert all(isinstance(one, Scores) for one in ask_grpc_stream(server, request))


def test_an_id_used_twice_in_a_stream_ends_it_after_what_was_accepted(server: Server):
    message = wire.encode_request(request_of([1, 2, 3])).SerializeToString()
    with channel(server) as opened:
        frames = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")(iter([message, message]), timeout=30)
        assert pb.ScoreFrame.FromString(next(frames)).completion_id == "c0"
        with pytest.raises(grpc.RpcError) as raised:
            next(frames)
    _, info, _ = status_of(raised.value)
    assert (info.reason, info.metadata["field"]) == ("invalid_request", "completions[0].id")


def test_a_wrong_message_in_a_stream_is_its_own_error(server: Server):
    first, third = request_of([1, 2, 3]), ScoreRequest([Completion("z", np.asarray([7, 8], np.int32))])
    second = ScoreRequest([Completion("y", np.asarray([7, 8], np.int32))], options=ScoreOptions(top_k=65))
    messages = [wire.encode_request(one).SerializeToString() for one in (first, second, third)]
    with channel(server) as opened:
        frames = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")(iter(messages), timeout=30)
        got = {
            frame.completion_id: pb.ScoreRows.FromString(frame.rows) for frame in map(pb.ScoreFrame.FromString, frames)
        }
    assert got["y"].error.field == "options.top_k"
    assert got["c0"].num_rows == 2
    assert got["z"].num_rows == 1


# ---- who asks --------------------------------------------------------------------------------------------------------


def test_the_callers_request_id_comes_back_and_a_dangerous_one_does_not(server: Server):
    answer = post(server, request_of([1, 2]), **{"x-request-id": "run-7.step:3"})
    assert answer.headers["x-request-id"] == "run-7.step:3"
    assert pb.ScoreResponse.FromString(answer.content).request_id == "run-7.step:3"
    bad = post(server, request_of([1, 2]), **{"x-request-id": "a b"})
    assert (bad.status_code, bad.json()["field"]) == (400, "x-request-id")
    assert bad.headers["x-request-id"] != "a b"
    host, port = server.http_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"GET /v1/info HTTP/1.1\r\nhost: x\r\nx-request-id: a\rb: c\r\n\r\n")
        head = raw.recv(4096)
    assert b" 400 " in head.split(b"\r\n")[0]
    assert b"\r\nb: c" not in head
    with channel(server) as opened:
        method = opened.unary_unary("/teacher.v1.TeacherService/GetInfo")
        _, made = method.with_call(b"", metadata=(("x-request-id", "mine-1"),), timeout=30)
        assert dict(made.trailing_metadata())["x-request-id"] == "mine-1"


def test_every_route_and_method_but_the_probes_needs_the_key():
    keys = ["first-secret-key", "second-secret-key"]
    with serving(api_keys=keys) as server:
        schema = server.http.get(
            f"{server.http_url}/openapi.json", headers={"authorization": f"Bearer {keys[0]}"}
        ).json()
        paths = [*schema["paths"], "/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css", "/nowhere"]
        assert {"/v1/score", "/v1/score/stream", "/v1/info", "/livez", "/readyz"} <= set(paths)
        for path in paths:
            for method in ("GET", "POST"):
                for sent in (None, "Bearer wrong-secret-key", "Bearer", "Basic first-secret-key", keys[0]):
                    headers = {} if sent is None else {"authorization": sent}
                    status = server.http.request(method, server.http_url + path, headers=headers).status_code
                    assert status == (200 if path in ("/livez", "/readyz") else 401), (method, path, sent)
        for key in keys:
            assert server.http.get(f"{server.http_url}/v1/info", headers={"authorization": f"bearer {key}"}).is_success
        with channel(server) as opened:
            for method in ("GetInfo", "Score"):
                with pytest.raises(grpc.RpcError) as raised:
                    call(opened, method, b"")
                assert raised.value.code().name == "UNAUTHENTICATED"
            for path in (
                "/teacher.v1.TeacherService/ScoreStream",
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            ):
                with pytest.raises(grpc.RpcError) as raised:
                    list(opened.stream_stream(path)(iter([b""]), timeout=30))
                assert raised.value.code().name == "UNAUTHENTICATED", path
            assert call(opened, "GetInfo", b"", metadata=(("authorization", f"Bearer {keys[1]}"),))
            assert opened.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30) == b"\x08\x01"


# ---- too much work, and callers that leave ---------------------------------------------------------------------------


class Gated(FakeBackend):
    """Holds every batch while its gate is closed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(max_sequence_tokens=64, batch_sequences=1, **settings)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        import asyncio

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


@pytest.mark.parametrize("way", ["http", "grpc-field", "grpc-deadline"])
def test_a_deadline_behind_a_long_job_comes_on_time_and_nothing_is_run(held: Server, way: str):
    started = time.monotonic()
    if way == "http":
        answer = post(held, request_of([1, 2, 3], timeout_s=0.3))
        assert (answer.status_code, answer.json()["kind"]) == (504, "deadline_exceeded")
    elif way == "grpc-field":
        code, info, _ = refused(held, request_of([1, 2, 3], timeout_s=0.3))
        assert (code.name, info.reason) == ("DEADLINE_EXCEEDED", "deadline_exceeded")
    else:
        with channel(held) as opened, pytest.raises(grpc.RpcError) as raised:
            call(opened, "Score", wire.encode_request(request_of([1, 2, 3])), timeout=0.3)
        assert raised.value.code().name == "DEADLINE_EXCEEDED"
    assert time.monotonic() - started < 3
    held.backend.gate.set()
    assert isinstance(ask_http(held, ScoreRequest([Completion("after", np.ones(3, np.int32))]))[0], Scores)
    assert held.backend.scored_ids == ["holder", "after"]


def ready(server: Server) -> bool:
    return server.http.get(f"{server.http_url}/readyz").status_code == 200


def until(condition: Callable[[], bool], limit_s: float, complaint: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, complaint


@pytest.mark.parametrize("way", ["http", "http-stream", "grpc", "grpc-stream"])
def test_the_queued_work_of_a_caller_that_leaves_is_dropped(held: Server, way: str):
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
        until(lambda: ready(held), 2, "the place of the caller that left never became free")
        held.backend.gate.set()
        assert [other.result(30).status_code for other in others] == [200, 200]
    assert "gone" not in held.backend.scored_ids
    if not way.startswith("http"):
        opened.close()


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
