"""Bad input, a bad engine, callers without a key: the right error, for the right one, and the server still serves
afterwards."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from reliability import holds
from serving import (
    PROTOBUF,
    Server,
    ask_grpc,
    ask_grpc_stream,
    ask_http,
    call,
    channel,
    post,
    refused,
    request_of,
    serving,
    status_of,
)

from teacher_api import wire
from teacher_api.errors import BackendFailed, InvalidBackendOutput
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server import json_models

pytestmark = pytest.mark.slow

POISON, NAN, SHORT = 401, 402, 403
GIGABYTE = 1 << 30


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


# ---- a bad engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [ask_grpc, ask_http, ask_grpc_stream])
def test_one_poison_sequence_among_sixteen_fails_alone(server: Server, ask: Any, record_property: Any):
    sequences = [[1, 2, 3, n] for n in range(16)]
    sequences[5] = [1, 2, POISON, 5]
    answers = ask(server, request_of(*sequences, top_k=2))
    assert isinstance(answers[5], BackendFailed)
    assert answers[5].retryable
    assert answers[5].request_id
    assert all(isinstance(answer, Scores) for n, answer in enumerate(answers) if n != 5)
    holds(record_property, "S10", f"{ask.__name__.removeprefix('ask_')}: 15 of 15 others answered")


@pytest.mark.parametrize("token", [NAN, SHORT])
def test_output_that_is_not_finite_or_not_whole_is_withheld(server: Server, token: int, record_property: Any):
    good, bad, later = ask_grpc(server, request_of([1, 2, 3], [1, token, 3], [4, 5, 6], top_k=2))
    assert isinstance(good, Scores)
    assert isinstance(later, Scores)
    assert isinstance(bad, InvalidBackendOutput)
    assert "token_logprob" in bad.message
    text = server.http.post(f"{server.http_url}/v1/score", json={"completions": [{"token_ids": [1, token, 3]}]}).text
    assert "NaN" not in text
    assert "Infinity" not in text
    holds(
        record_property,
        "S12",
        f"{'NaN' if token == NAN else 'a short answer'}: invalid_backend_output, 2 neighbours answered",
    )


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
def test_wrong_requests_are_refused_by_name_before_any_work(
    server: Server, request_, status, kind, field, record_property
):
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
    holds(record_property, "S11", f"{kind} {field or 'as a whole'}: {status} and {code.name}, no work")
    if kind == "fingerprint_mismatch":
        assert "x" in problem["detail"]
        assert server.fingerprint in problem["detail"]
        holds(record_property, "S21", "another fingerprint: 412, both in the message")


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
def test_bad_json_is_400_small_and_without_an_echo(server: Server, body: str, record_property: Any):
    answer = server.http.post(
        f"{server.http_url}/v1/score", content=body.encode("latin-1"), headers={"content-type": "application/json"}
    )
    limits = {400, 413} if len(body) > 65536 else {400}
    assert answer.status_code in limits, answer.text
    assert len(answer.content) <= 4096
    assert "99999999999" not in answer.text
    json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} in the answer"))
    if body in (BAD_JSON[0], BAD_JSON[-2]):
        what = "NaN" if "NaN" in body else "20,000 nested lists"
        holds(record_property, "S12", f"{what} in JSON: {answer.status_code}")


def test_an_error_never_echoes_its_input(server: Server, record_property: Any):
    """Wherever the caller's text could come back: ids, fields, paths, headers, types, each of a hundred kilobytes or as
    much as a header takes."""
    word, url = "ZQXJ", server.http_url
    long = word * 12_000
    as_json = {"content-type": "application/json"}
    asked = {"completions": [{"token_ids": [1, 2]}]}
    sizes = []
    answers = [
        server.http.post(f"{url}/v1/score", content=json.dumps({"completions": long}), headers=as_json),
        server.http.post(f"{url}/v1/score", content=json.dumps({long: 1, **asked}), headers=as_json),
        server.http.post(f"{url}/v1/score", content=json.dumps({**asked, "teacher": long}), headers=as_json),
        server.http.post(f"{url}/v1/score", content=json.dumps({**asked, "options": {long: 1}}), headers=as_json),
        server.http.post(f"{url}/v1/score", content=long, headers={"content-type": "text/plain"}),
        server.http.post(f"{url}/v1/completions", content=json.dumps({"prompt": 1, "model": long}), headers=as_json),
        server.http.get(f"{url}/v1/info", params={"teacher": word * 2000}),
        server.http.get(f"{url}/{word * 2000}"),
        server.http.post(f"{url}/v1/score", content=b"x", headers={"content-type": word * 2000}),
        server.http.post(f"{url}/v1/score", content=b"x", headers={**PROTOBUF, "content-encoding": word * 2000}),
        server.http.get(f"{url}/v1/info", headers={"x-request-id": word * 2000}),
    ]
    for number, answer in enumerate(answers):
        assert 400 <= answer.status_code < 500, (number, answer.text[:200])
        assert len(word) * answer.text.count(word) <= 256, f"answer {number} echoes its input"
        sizes.append(len(answer.content))
    assert max(sizes) <= 4096
    holds(
        record_property,
        "S13",
        f"{len(answers)} errors of inputs up to 48 KB: at most {max(sizes)} bytes, 256 of them the caller's",
    )


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


def test_a_body_of_another_type_or_to_another_place(server: Server):
    url = server.http_url
    assert server.http.post(f"{url}/v1/score", content=b"x", headers={"content-type": "text/plain"}).status_code == 400
    assert server.http.get(f"{url}/v1/nothing").json()["kind"] == "not_found"
    wrong_method = server.http.get(f"{url}/v1/score")
    assert wrong_method.status_code == 405
    assert wrong_method.headers["content-type"] == "application/problem+json"


def test_bodies_over_the_limit_are_refused_while_they_are_read(server: Server, record_property: Any):
    declared = post(server, b"x" * 65537)
    assert (declared.status_code, declared.json()["kind"]) == (413, "too_large")
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(GIGABYTE >> 16):
            sent += 1 << 16
            yield bytes(1 << 16)

    before = psutil.Process().memory_info().rss

    try:
        chunked = server.http.post(f"{server.http_url}/v1/score", content=endless(), headers=PROTOBUF)
        assert chunked.status_code == 413
    except httpx.TransportError:  # the server may also hang up on a body that doesn't end
        assert sent < GIGABYTE
    grown = psutil.Process().memory_info().rss - before
    assert grown < 64 << 20
    told = f"1 GB in chunks: given up after {sent / 1e6:.1f} MB sent, memory +{max(grown, 0) / 1e6:.0f} MB"
    holds(record_property, "S11", told)
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
        assert half.recv(64).startswith(b"HTTP/1.1 408")
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


def test_every_route_and_method_but_the_probes_needs_the_key(record_property: Any):
    keys = ["first-secret-key", "second-secret-key"]
    with serving(api_keys=keys) as server:
        schema = server.http.get(
            f"{server.http_url}/openapi.json", headers={"authorization": f"Bearer {keys[0]}"}
        ).json()
        routes = {route.path for route in server.app._front.inner._app.routes}
        paths = sorted({*schema["paths"], *routes, "/static-offline-docs/swagger-ui.css", "/nowhere"})
        assert {"/", "/docs", "/openapi.json", "/v1/score", "/v1/score/stream", "/v1/info", "/livez", "/readyz"} <= set(
            paths
        )
        for path in paths:
            for method in ("GET", "POST"):
                for sent in (None, "Bearer wrong-secret-key", "Bearer", "Basic first-secret-key", keys[0]):
                    headers = {} if sent is None else {"authorization": sent}
                    status = server.http.request(method, server.http_url + path, headers=headers).status_code
                    assert status == (200 if path in ("/livez", "/readyz", "/health") else 401), (method, path, sent)
        for key in keys:
            assert server.http.get(f"{server.http_url}/v1/info", headers={"authorization": f"bearer {key}"}).is_success
        with channel(server) as opened:
            service = pb.DESCRIPTOR.services_by_name["TeacherService"]
            calls = [f"/{service.full_name}/{method.name}" for method in service.methods]
            calls += ["/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
            for path in calls:
                with pytest.raises(grpc.RpcError) as raised:
                    list(opened.stream_stream(path)(iter([b""]), timeout=30))
                assert raised.value.code().name == "UNAUTHENTICATED", path
            assert call(opened, "GetInfo", b"", metadata=(("authorization", f"Bearer {keys[1]}"),))
            assert opened.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30) == b"\x08\x01"
    holds(
        record_property,
        "S14",
        f"{len(paths)} paths and {len(calls)} RPCs enumerated: none without the key but 3 probes",
    )
