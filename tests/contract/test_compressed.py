"""zstd between client and server: agreed on by both, or not there; the same numbers with it as without."""

from __future__ import annotations

import importlib
import struct
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from serving import PROTOBUF, Server, call, channel, post, refused, request_of, serving

from teacher_api import compression, wire
from teacher_api.client import TeacherClient
from teacher_api.errors import InvalidRequest
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb

pytestmark = pytest.mark.slow

zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
LIMIT = 1 << 16


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(max_request_bytes=LIMIT) as running:
        yield running


def long_request(rows: int = 300, **options: object) -> ScoreRequest:
    tokens = np.arange(rows + 1) * 5 % 512
    return request_of(tokens.tolist(), [1, 2, 3], **{"top_k": 16, "entropy": True, **options})


def frames_in(body: bytes) -> list[pb.ScoreFrame]:
    frames = []
    while body:
        (length,) = struct.unpack_from("<I", body)
        frames.append(pb.ScoreFrame.FromString(body[4 : 4 + length]))
        body = body[4 + length :]
    return frames


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_clients_option_changes_no_number(server: Server, scheme: str):
    url = server.http_url if scheme == "http" else f"grpc://{server.grpc_target}"
    request = long_request(value_type="float16")
    bad = ScoreRequest([*request.completions, Completion("bad", np.array([1, 600], np.int32))], options=request.options)
    with TeacherClient(url, timeout_s=60) as plain, TeacherClient(url, timeout_s=60, compression="zstd") as packed:
        expected = {scores.id: scores for scores in plain.score(request)}
        streamed = {scores.id: scores for scores in packed.score_many([request])}
        *answers, error = packed.score(bad, return_errors=True)
    assert isinstance(error, InvalidRequest)
    for scores in [*streamed.values(), *answers]:
        assert isinstance(scores, Scores)
        for name in ("positions", "token_logprob", "log_tail", "topk_ids", "topk_logprob", "entropy"):
            got, want = getattr(scores, name), getattr(expected[scores.id], name)
            assert (got.dtype, got.tobytes()) == (want.dtype, want.tobytes()), name


ACCEPTED = [
    ("zstd", True),
    ("gzip, ZSTD;q=0.5, br", True),
    ("zstd;q=1.0", True),
    ("", False),
    ("identity", False),
    ("gzip, deflate", False),
    ("zstd;q=0", False),
    ("zstd; q=0.000", False),
    ("*", False),
]


@pytest.mark.parametrize(("header", "agreed"), ACCEPTED)
def test_http_answers_are_compressed_where_the_caller_accepts_it(server: Server, header: str, agreed: bool):
    body = wire.encode_request(long_request()).SerializeToString()
    for path in ("/v1/score", "/v1/score/stream"):
        bodies = {}
        for coding in ("identity", header):
            headers = {**PROTOBUF, "accept-encoding": coding, "x-request-id": "r"}
            with server.http.stream("POST", server.http_url + path, content=body, headers=headers) as answer:
                assert answer.status_code == 200
                bodies[coding] = b"".join(answer.iter_raw())
        assert answer.headers.get("content-encoding") == ("zstd" if agreed else None)
        assert answer.headers["vary"] == "accept-encoding"
        sent = zstd.decompress(bodies[header]) if agreed else bodies[header]
        if path.endswith("stream"):  # sequences come as they finish
            assert sorted(frames_in(sent), key=str) == sorted(frames_in(bodies["identity"]), key=str)
        else:
            assert sent == bodies["identity"]
        assert not agreed or len(bodies[header]) < len(sent)


def test_json_is_compressed_as_well_and_errors_never(server: Server):
    asked = {"completions": [{"token_ids": list(range(200))}], "options": {"top_k": 3}}
    headers = {"accept-encoding": "zstd"}
    with server.http.stream("POST", f"{server.http_url}/v1/score", json=asked, headers=headers) as answer:
        assert answer.headers["content-encoding"] == "zstd"
        assert b'"token_logprob"' in zstd.decompress(b"".join(answer.iter_raw()))
    wrong = post(server, request_of([1, 600]), **headers)
    assert wrong.status_code == 400
    assert "content-encoding" not in wrong.headers
    assert wrong.json()["kind"] == "invalid_request"


def test_http_requests_may_be_compressed(server: Server):
    message = wire.encode_request(long_request()).SerializeToString()
    for path in ("/v1/score", "/v1/score/stream"):
        headers = {**PROTOBUF, "content-encoding": "zstd"}
        answer = server.http.post(server.http_url + path, content=zstd.compress(message), headers=headers)
        assert answer.status_code == 200


BODIES = {
    "gzip": (b"x", "gzip", 422, "unsupported"),
    "no frame": (b"hello", "zstd", 400, "invalid_request"),
    "cut": (zstd.compress(bytes(500))[:-1], "zstd", 400, "invalid_request"),
    "two frames": (2 * zstd.compress(b"x"), "zstd", 400, "invalid_request"),
    "too large": (zstd.compress(bytes(LIMIT + 1)), "zstd", 413, "too_large"),
    "bomb": (zstd.compress(bytes(1 << 29)), "zstd", 413, "too_large"),
}


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score/stream", "/v1/completions"])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_cannot_be_unpacked_are_refused_and_forgotten(server: Server, name: str, path: str):
    body, coding, status, kind = BODIES[name]
    assert len(body) < LIMIT
    headers = {"content-type": "application/json" if "completions" in path else PROTOBUF["content-type"]}
    answer = server.http.post(server.http_url + path, content=body, headers={**headers, "content-encoding": coding})
    if path == "/v1/completions":
        assert answer.status_code in (status, 400), answer.text  # in OpenAI's shape
    else:
        assert (answer.status_code, answer.json()["kind"]) == (status, kind)
        assert answer.json()["field"] == "content-encoding"
    assert post(server, request_of([1, 2, 3])).status_code == 200


def test_grpc_frames_are_compressed_where_the_request_allows_it(server: Server):
    request = long_request(900)
    plain, asking = wire.encode_request(request), wire.encode_request(request)
    asking.compression = pb.COMPRESSION_ZSTD
    envelope = compression.pack_request(asking)
    assert pb.ScoreRequest.FromString(envelope).packed
    with channel(server) as opened:
        sent = [pb.ScoreResponse.FromString(call(opened, "Score", m)).frames for m in (plain, asking, envelope)]
        stream = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")
        other = wire.encode_request(request_of(*[[n, 1, 2] * 200 for n in range(3)], top_k=16))
        for completion in other.completions:
            completion.id = f"other {completion.id}"
        streamed = [
            pb.ScoreFrame.FromString(data) for data in stream(iter([envelope, other.SerializeToString()]), timeout=60)
        ]
    for frame, alike, packed in zip(*sent, strict=True):
        assert frame.compression == pb.COMPRESSION_NONE
        assert alike == packed
        assert alike.checksum == frame.checksum
        large = frame.completion_id == "c0"
        assert alike.compression == (pb.COMPRESSION_ZSTD if large else pb.COMPRESSION_NONE)
        assert (zstd.decompress(alike.rows) if large else alike.rows) == frame.rows
    found = {frame.completion_id: frame.compression for frame in streamed}
    assert found == {"c0": 1, "c1": 0, "other c0": 0, "other c1": 0, "other c2": 0}


def test_a_grpc_envelope_is_held_to_the_same_limit(server: Server):
    for size in (LIMIT + 1, 1 << 29):
        packed = pb.ScoreRequest(packed=zstd.compress(bytes(size)))
        code, info, _ = refused(server, packed)
        assert (code.name, info.reason, info.metadata["field"]) == ("INVALID_ARGUMENT", "too_large", "packed")
    _, info, _ = refused(server, pb.ScoreRequest(packed=b"hello"))
    assert (info.reason, info.metadata["field"]) == ("invalid_request", "packed")
    over_http = post(
        server, pb.ScoreRequest(packed=zstd.compress(wire.encode_request(long_request()).SerializeToString()))
    )
    assert (over_http.status_code, over_http.json()["field"]) == (400, "packed")


def test_it_is_among_the_features(server: Server):
    assert "zstd" in server.info().features


def test_options_of_a_request_are_those_inside_the_envelope(server: Server):
    request = ScoreRequest(long_request().completions, options=ScoreOptions(top_k=2))
    url = f"grpc://{server.grpc_target}"
    with TeacherClient(url, timeout_s=60, compression="zstd") as client:
        assert {scores.topk_ids.shape[1] for scores in client.score(request)} == {2}
