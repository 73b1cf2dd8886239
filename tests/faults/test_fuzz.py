"""Whatever is sent (S22): no 5xx but a 503 that is meant, no gRPC code of a bug, every error small and in its form, and
the server serves afterwards. Cases are drawn from the documents that clients read, OpenAPI and the gRPC descriptors,
and from bytes that mean nothing. The same cases at each run; the counts of the table in `make test-long`.
"""

from __future__ import annotations

import collections
import contextlib
import json
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import jsonschema
import numpy as np
import pytest
import schemathesis
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from messages import messages
from reliability import holds
from schemathesis.generation import GenerationMode
from serving import PROTOBUF, Server, ask_grpc, ask_http, call, channel, request_of, serving, status_of

from teacher_api import errors, wire
from teacher_api.types import Candidates, Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb

pytestmark = pytest.mark.slow

LONG = pytest.mark.long
MEANT_CODES = {  # of the table in docs/protocol.md; INTERNAL and UNKNOWN are bugs
    "INVALID_ARGUMENT",
    "UNIMPLEMENTED",
    "NOT_FOUND",
    "FAILED_PRECONDITION",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "UNAVAILABLE",
}
TOKENS, MAX_BYTES = 64, 65536


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    limits = {"max_sequence_tokens": TOKENS, "max_top_k": 64, "max_request_bytes": MAX_BYTES, "body_idle_s": 1.0}
    with serving(**limits, generate=True, max_generated_tokens=8) as running:
        yield running


@pytest.fixture(autouse=True)
def _still_serving(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        assert isinstance(ask_http(running, request_of([1, 2, 3]))[0], Scores)
        assert isinstance(ask_grpc(running, request_of([1, 2, 3]))[0], Scores)
        for probe in ("livez", "readyz"):
            assert running.http.get(f"{running.http_url}/{probe}").status_code == 200


def each(strategy: st.SearchStrategy[Any], cases: int, check: Callable[[Any], None]) -> None:
    """`check` of so many cases, the same ones at each run, without making a failing one smaller."""

    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def checked(case: Any) -> None:
        check(case)

    checked()


def is_meant(status: int, content_type: str, content: bytes, document: dict[str, Any]) -> None:
    """An answer that is no success: its status, its size and its form."""
    assert status < 500 or status in (503, 504), content[:300]
    assert len(content) <= 4096
    kinds = document["components"]["schemas"]
    body = json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} in the answer"))
    if content_type.startswith("application/problem+json"):
        jsonschema.validate(body, kinds["Problem"])
        assert body["status"] == status
    else:
        jsonschema.validate(body, kinds["OpenAIError"])


@schemathesis.serializer(PROTOBUF["content-type"])
def as_it_is(_: Any, value: Any) -> bytes:
    """What schemathesis sends where the document says bytes, or means something else."""
    if isinstance(value, bytes):
        return value
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else json.dumps(value).encode()


@pytest.mark.parametrize("cases", [80, pytest.param(2000, marks=LONG)])
def test_cases_over_the_openapi_document(server: Server, cases: int, record_property: Any):
    """As the document allows, and, where there is a body in JSON, as it forbids."""
    document = server.http.get(f"{server.http_url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/score", "/v1/completions", "/v1/info", "/livez"} <= {operation.path for operation in operations}
    statuses: collections.Counter[int] = collections.Counter()

    def check(case: Any) -> None:
        answer = case.call(base_url=server.http_url, timeout=60)
        statuses[answer.status_code] += 1
        if answer.status_code >= 400:
            is_meant(answer.status_code, answer.headers.get("content-type", [""])[0], answer.content, document)

    ways = [operation.as_strategy(generation_mode=GenerationMode.POSITIVE) for operation in operations]
    takes_json = [one for one in operations if "application/json" in one.get_request_payload_content_types()]
    ways += [one.as_strategy(generation_mode=GenerationMode.NEGATIVE) for one in takes_json * 3]
    for number, way in enumerate(ways):
        each(way, (number + 1) * cases // len(ways) - number * cases // len(ways), check)
    told = ", ".join(f"{count} times {status}" for status, count in sorted(statuses.items()))
    assert statuses[200] > 0
    assert statuses[400] > 0
    holds(record_property, "S22", f"{sum(statuses.values())} cases over OpenAPI: {told}")


def nearly_right() -> st.SearchStrategy[pb.ScoreRequest]:
    """A right request, of which some parts are replaced by arbitrary ones."""
    completion = pb.Completion.DESCRIPTOR
    parts = {
        "options": messages(pb.ScoreOptions.DESCRIPTOR),
        "completions": st.lists(messages(completion), max_size=2),
        "metadata": messages(pb.CallMetadata.DESCRIPTOR),
        "timeout_s": st.floats(),
        "teacher": st.text(max_size=8),
        "expect_fingerprint": st.text(max_size=8),
        "compression": st.integers(0, 3),
        "packed": st.binary(max_size=40),
    }

    def merged(seed: int, changes: dict[str, Any], ranges: list[tuple[int, int]]) -> pb.ScoreRequest:
        made = right_request(random.Random(seed))
        made.MergeFrom(pb.ScoreRequest(**changes))
        made.completions[0].ranges.extend(pb.Range(start=start, stop=stop) for start, stop in ranges)
        return made

    ranges = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), max_size=2)
    return st.builds(merged, st.integers(0, 99), st.fixed_dictionaries({}, optional=parts), ranges)


def right_request(chance: random.Random) -> pb.ScoreRequest:
    ids = np.asarray([chance.randrange(512) for _ in range(chance.randint(2, 20))], np.int32)
    rows = len(ids) - 1
    candidates = Candidates.from_rows([[chance.randrange(512)] for _ in range(rows)]) if chance.random() < 0.3 else None
    options = ScoreOptions(top_k=chance.randint(0, 8), entropy=chance.random() < 0.5)
    return wire.encode_request(ScoreRequest([Completion("a", ids, candidates=candidates)], options=options))


@pytest.mark.parametrize("cases", [150, pytest.param(2000, marks=LONG)])
def test_messages_made_from_the_grpc_descriptors(server: Server, cases: int, record_property: Any):
    service = pb.DESCRIPTOR.services_by_name["TeacherService"]
    codes: collections.Counter[str] = collections.Counter()
    with channel(server) as opened:
        for method in service.methods:
            anything = messages(method.input_type)
            scores = method.input_type is pb.ScoreRequest.DESCRIPTOR
            one = st.one_of(anything, nearly_right(), nearly_right()) if scores else anything
            several = st.lists(one, max_size=3) if method.client_streaming else st.tuples(one)

            def check(asked: Any, path: str = f"/{service.full_name}/{method.name}") -> None:
                sent = iter([message.SerializeToString() for message in asked])
                error = failure(opened, path, sent)
                code = "OK" if error is None else error.code().name
                codes[code] += 1
                if error is not None:
                    assert code in MEANT_CODES, f"{path}: {code}: {error.details()}"
                    _, info, _ = status_of(error)
                    assert info.reason in errors.KINDS
                    assert len(error.details() or "") <= 4096

            each(several, cases if scores else max(cases // 10, 10), check)
    told = ", ".join(f"{count} times {code}" for code, count in sorted(codes.items()))
    assert codes["OK"] > 10
    holds(record_property, "S22", f"{sum(codes.values())} messages over the gRPC descriptors: {told}")


def failure(opened: grpc.Channel, path: str, sent: Iterator[bytes]) -> grpc.RpcError | None:
    try:
        list(opened.stream_stream(path)(sent, timeout=60))
    except grpc.RpcError as error:
        return error
    return None


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """One of: noise, a part, flipped bits, a piece repeated, two pieces changed over."""
    way, cut = chance.randrange(5), chance.randrange(1, len(whole))
    if way == 0:
        return chance.randbytes(chance.randint(0, 300))
    if way == 1:
        return whole[:cut]
    if way == 2:
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if way == 3:
        return whole[:cut] + whole[cut // 2 :]
    return whole[cut:] + whole[:cut]


PATHS = ("/v1/score", "/v1/score/stream", "/v1/completions")
TYPES = ("application/x-protobuf", "application/json", "text/plain", "")


@pytest.mark.parametrize("cases", [500, pytest.param(10_000, marks=LONG)])
def test_raw_bodies(server: Server, cases: int, record_property: Any):
    """On every way in that takes a body, under every content type, packed or not."""
    chance = random.Random(22)
    document = server.http.get(f"{server.http_url}/openapi.json").json()
    text = json.dumps({"completions": [{"token_ids": [1, 2, 3]}], "options": {"top_k": 2}}).encode()
    openai = json.dumps({"model": "fake", "prompt": [1, 2, 3], "max_tokens": 1, "logprobs": 1, "echo": True}).encode()
    statuses: collections.Counter[int] = collections.Counter()
    for _ in range(cases):
        whole = chance.choice([right_request(chance).SerializeToString(), text, openai])
        headers = {"content-type": chance.choice(TYPES)}
        if chance.random() < 0.1:
            headers["content-encoding"] = "zstd"
        path = chance.choice(PATHS)
        answer = server.http.post(server.http_url + path, content=damaged(whole, chance), headers=headers)
        statuses[answer.status_code] += 1
        if answer.status_code >= 400:
            is_meant(answer.status_code, answer.headers["content-type"], answer.content, document)
    told = ", ".join(f"{count} times {status}" for status, count in sorted(statuses.items()))
    holds(record_property, "S22", f"{cases} raw bodies: {told}")


@pytest.mark.parametrize("cases", [60, pytest.param(1000, marks=LONG)])
def test_bytes_that_are_hardly_http(server: Server, cases: int, record_property: Any):
    chance = random.Random(23)
    body = right_request(chance).SerializeToString()
    head = f"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: {PROTOBUF['content-type']}\r\ncontent-length: "
    whole = head.encode() + str(len(body)).encode() + b"\r\nconnection: close\r\n\r\n" + body
    host, port = server.http_url.removeprefix("http://").split(":")
    statuses: collections.Counter[str] = collections.Counter()
    for _ in range(cases):
        with socket.create_connection((host, int(port)), timeout=30) as caller, contextlib.suppress(ConnectionError):
            caller.sendall(damaged(whole, chance))
            caller.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda caller=caller: caller.recv(65536), b""))  # type: ignore[misc]
            status = answer[9:12].decode("latin-1")
            statuses[status or "closed"] += 1
            assert status < "500" or status == "503", answer[:300]
    told = ", ".join(f"{count} times {status}" for status, count in sorted(statuses.items()))
    holds(record_property, "S22", f"{cases} damaged HTTP requests: {told}")


@pytest.mark.parametrize("cases", [2000, pytest.param(20_000, marks=LONG)])
def test_decoding_what_was_damaged(server: Server, cases: int, record_property: Any):
    """Both ends: the server's reading of requests, and the client's of answers. Damage is found or harmless to the
    numbers; nothing but a typed error is raised."""
    chance = random.Random(24)
    asked = request_of([1, 2, 3, 4, 5, 6], top_k=3)
    with channel(server) as opened:
        response = pb.ScoreResponse.FromString(call(opened, "Score", wire.encode_request(asked)))
    question = wire.question(
        asked, asked.completions[0], fingerprint=response.fingerprint, tokenizer_size=512, field="completions[0]"
    )
    frame = response.frames[0].SerializeToString()
    wanted = wire.Assembler(question).add(pb.ScoreFrame.FromString(frame))
    assert isinstance(wanted, Scores)
    found: collections.Counter[str] = collections.Counter()
    for _ in range(cases):
        try:
            wire.decode_request(pb.ScoreRequest.FromString(damaged(right_request(chance).SerializeToString(), chance)))
            found["requests decoded"] += 1
        except (DecodeError, errors.TeacherError):
            found["requests refused"] += 1
        try:
            got = wire.Assembler(question).add(pb.ScoreFrame.FromString(damaged(frame, chance)))
        except (DecodeError, errors.CorruptResponse):
            found["answers refused"] += 1
        else:
            assert got is None or np.array_equal(got.token_logprob, wanted.token_logprob)
            found["answers as they were, or unended"] += 1
    assert found["answers refused"] > cases / 2
    told = ", ".join(f"{count} {what}" for what, count in sorted(found.items()))
    holds(record_property, "S22", f"damaged messages: {told}")
