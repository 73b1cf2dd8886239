"""S18: one id in header, trailer, body of the error, every log line and the span, whatever becomes of the request; and
an id that could break a log or a header is refused and repeated nowhere."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from collector import collecting
from reliability import RecordProperty, holds
from serving import Server, call, channel, post, request_of, serving, status_of

from teacher_api import wire
from teacher_api.types import CallMetadata

KEY, POISON = "a-key-for-this-test", 401
BEARER = {"authorization": f"Bearer {KEY}"}
TRACEPARENT = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"

Case = tuple[str, Callable[[Server, str], str]]  # the outcome, and a request whose answer's id is returned


def http(server: Server, request_id: str, request: Any, **headers: str) -> str:
    sent = {**BEARER, "x-request-id": request_id, "traceparent": TRACEPARENT, **headers}
    answer = post(server, request, **{name: value for name, value in sent.items() if value})
    if answer.status_code != 200:
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
    return answer.headers["x-request-id"]


def over_grpc(server: Server, request_id: str, request: Any, key: str = KEY) -> str:
    metadata = (("authorization", f"Bearer {key}"), ("x-request-id", request_id), ("traceparent", TRACEPARENT))
    body = request if isinstance(request, bytes) else wire.encode_request(request).SerializeToString()
    with channel(server) as opened:
        method = opened.unary_unary("/teacher.v1.TeacherService/Score")
        try:
            _, done = method.with_call(body, timeout=60, metadata=metadata)
        except grpc.RpcError as error:
            status_of(error)  # its details have the trailer's id
            return dict(error.trailing_metadata())["x-request-id"]
        return dict(done.trailing_metadata())["x-request-id"]


GOOD = request_of([1, 2, 3])
CASES: dict[str, Case] = {
    "http-ok": ("ok", lambda server, name: http(server, name, GOOD)),
    "http-nonsense": ("invalid_request", lambda server, name: http(server, name, b"\xff")),
    "http-too-long": ("too_large", lambda server, name: http(server, name, request_of([1] * 65))),
    "http-no-key": ("unauthenticated", lambda server, name: http(server, name, GOOD, authorization="")),
    "grpc-ok": ("ok", lambda server, name: over_grpc(server, name, GOOD)),
    "grpc-nonsense": ("invalid_request", lambda server, name: over_grpc(server, name, b"\xff")),
    "grpc-wrong-key": ("unauthenticated", lambda server, name: over_grpc(server, name, GOOD, key="no-such-key")),
}


@pytest.mark.slow
def test_one_id_everywhere(capfd: pytest.CaptureFixture[str], record_property: RecordProperty) -> None:
    with (
        collecting() as collector,
        serving(
            api_keys=[KEY],
            max_sequence_tokens=64,
            log_format="json",
            log_level="info",
            fake_poison_token=POISON,
            otlp_endpoint=collector.url,
            trace_share=0.0,  # only what callers trace
        ) as server,
    ):
        polled = {**BEARER, "x-request-id": "an-open-page", "traceparent": TRACEPARENT}
        assert server.http.get(f"{server.http_url}/v1/status", headers=polled).headers["x-request-id"] == "an-open-page"
        ids = {name: ask(server, name) for name, (_, ask) in CASES.items()}
        assert ids == {name: name for name in CASES}
        http(server, "a-batch-that-fails", request_of([1, POISON]))
        metadata = CallMetadata(experiment="maths", run="maths-7")  # in the message; headers come before it
        http(server, "a-request-for-a-run", replace(GOOD, metadata=metadata), **{"preceptor-experiment": "other"})
        spans = collector.wait(len(CASES) + 2, "teacher.score")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    ended = {line["request_id"]: line for line in lines if line["event"] == "request"}
    traced = {span.attributes["preceptor.request_id"]: span for span in spans if span.name == "teacher.score"}
    for name, (outcome, _) in CASES.items():
        transport = name.split("-")[0]
        line = ended[name]
        assert (line["outcome"], line["transport"], line["method"]) == (outcome, transport, "score")
        assert line["tenant"] == ("" if outcome == "unauthenticated" else "default")
        assert line["seconds"] >= 0
        assert (line["level"], line["logger"], line["trace_id"]) == ("info", "teacher_server.requests", "a" * 32)
        assert traced[name].trace_id == "a" * 32
        assert traced[name].parent_id == "b" * 16
        assert traced[name].attributes["preceptor.outcome"] == outcome
        assert not traced[name].is_error  # the callers' doing
    assert (
        sum(span.name == "forward" for span in spans) == 4
    )  # of the three that were scored, and of the one that failed
    parents = {span.span_id: span for span in spans}
    for span in spans:
        if span.name in ("queue", "forward"):
            parent = parents[span.parent_id]
            assert parent.started_ns <= span.started_ns <= span.ended_ns <= parent.ended_ns
    assert "an-open-page" not in ended  # each two seconds, from every tab
    assert "teacher.status" not in {span.name for span in spans}
    named = ended["a-request-for-a-run"]
    assert (named["tenant"], named["experiment"], named["run"]) == ("default", "maths", "maths-7")
    of_span = traced["a-request-for-a-run"].attributes
    assert (of_span["preceptor.experiment"], of_span["preceptor.run"]) == ("maths", "maths-7")
    assert all(KEY not in json.dumps(line) for line in lines)
    holds(
        record_property, "S18", f"{len(CASES)} ways to end, one id in header or trailer, error, log line and span each"
    )


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["a b", "a%0d%0aevil: 1", "x" * 129, "é", "a;b", "a/b"])
def test_an_id_that_could_break_a_log_is_refused_and_not_repeated(small: Server, sent: str) -> None:
    answer = small.http.get(f"{small.http_url}/v1/info", headers={"x-request-id": sent.encode()})
    assert answer.status_code == 400
    problem = answer.json()
    assert problem["field"] == "x-request-id"
    assert sent not in answer.text
    assert problem["request_id"] == answer.headers["x-request-id"] != sent
    if sent.isascii():
        with channel(small) as opened, pytest.raises(grpc.RpcError) as raised:
            call(opened, "GetInfo", b"", metadata=(("x-request-id", sent),))
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        _, info, _ = status_of(raised.value)
        assert info.metadata["field"] == "x-request-id"
        assert info.metadata["request_id"] != sent


@pytest.mark.slow
@pytest.mark.parametrize("ending", [b"\r", b"\n", b"\r\n ", b"\x00", b"\x0b"])
def test_line_ends_inside_a_header_reach_no_answer(small: Server, ending: bytes) -> None:
    """Sent as raw bytes: no client library would."""
    host, port = small.http_url.removeprefix("http://").split(":")
    head = b"GET /v1/info HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: good" + ending + b"evil: 1\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(head)
        answer = b""
        while piece := raw.recv(65536):
            answer += piece
    assert b"evil" not in answer.split(b"\r\n\r\n")[0]
    status = int(answer.split()[1])
    assert status == 400 or (ending == b"\n" and status == 200)  # a bare line feed ends a header: RFC 9112, 2.2


@pytest.mark.slow
def test_an_id_in_an_openai_body_is_held_to_the_same(small: Server) -> None:
    body = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 0, "echo": True, "logprobs": 1}
    url = f"{small.http_url}/v1/completions"
    answer = small.http.post(url, json={**body, "request_id": "a\r\nevil: 1"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "request_id"
    assert "evil" not in answer.text


@pytest.fixture(scope="module")
def small():
    with serving() as running:
        yield running
