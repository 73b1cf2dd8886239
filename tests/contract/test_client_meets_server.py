"""The client against the server, over both transports: the two halves of the contract were written apart, and meet
here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from serving import Server, ask_grpc, serving

from teacher_api.client import TeacherClient
from teacher_api.errors import (
    BackendFailed,
    FingerprintMismatch,
    InvalidRequest,
    TeacherError,
    TooLarge,
    Unauthenticated,
    Unsupported,
)
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores

pytestmark = pytest.mark.slow

KEY = "a-key-for-this-test"
POISON = 401


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(fake_poison_token=POISON, max_sequence_tokens=64, max_response_bytes=1 << 18) as running:
        yield running


@pytest.fixture(params=["grpc", "http"])
def client(server: Server, request: pytest.FixtureRequest) -> Iterator[TeacherClient]:
    url = server.http_url if request.param == "http" else f"grpc://{server.grpc_target}"
    with TeacherClient(url, timeout_s=20) as opened:
        yield opened


def sequence(name: str, *tokens: int) -> Completion:
    return Completion(name, np.asarray(tokens, np.int32))


def test_the_client_knows_who_is_there(client: TeacherClient, server: Server):
    info = client.info()
    assert info.fingerprint == server.fingerprint
    assert info.max_sequence_tokens == 64
    assert "exact_tail" in info.features


def test_scores_are_those_of_the_wire(client: TeacherClient, server: Server):
    request = ScoreRequest([sequence("a", 1, 2, 3), sequence("b", 9, 8)], options=ScoreOptions(top_k=5, entropy=True))
    for got, expected in zip(client.score(request), ask_grpc(server, request), strict=True):
        assert got.fingerprint == server.fingerprint
        assert got.topk_logprob.tobytes() == expected.topk_logprob.tobytes()
        assert got.token_logprob.tobytes() == expected.token_logprob.tobytes()
        assert got.entropy.tobytes() == expected.entropy.tobytes()


def test_many_requests_stream_through(client: TeacherClient):
    requests = [ScoreRequest([sequence(f"{n}", 1, 2, n)], options=ScoreOptions(top_k=3)) for n in range(60)]
    got = {scores.id: scores for scores in client.score_many(requests)}
    assert sorted(got, key=int) == [str(n) for n in range(60)]
    assert all(one.num_rows == 2 for one in got.values())


WRONG = [
    (ScoreRequest([sequence("a", 1, 600)]), InvalidRequest, "completions[0].token_ids[1]"),
    (ScoreRequest([sequence("a", *[1] * 65)]), TooLarge, "completions[0].token_ids"),
    (ScoreRequest([sequence("a", 1, 2)], options=ScoreOptions(top_k=400)), TooLarge, "options.top_k"),
    (ScoreRequest([sequence("a", 1, 2)], options=ScoreOptions(hidden=True)), Unsupported, "options.hidden"),
]


@pytest.mark.parametrize(("request_", "kind", "field"), WRONG, ids=[w[2] for w in WRONG])
def test_refusals_arrive_as_what_they_are(client: TeacherClient, request_, kind, field):
    with pytest.raises(kind) as refused:
        client.score(request_)
    assert type(refused.value) is kind
    assert refused.value.field == field


def test_one_bad_sequence_is_one_error(client: TeacherClient):
    request = ScoreRequest([sequence("a", 1, 2), sequence("b", 1, 600), sequence("c", 3, 4)])
    first, second, third = client.score(request, return_errors=True)
    assert isinstance(first, Scores)
    assert isinstance(third, Scores)
    assert isinstance(second, InvalidRequest)


def test_a_poison_sequence_fails_in_the_end_without_its_neighbours(server: Server):
    with TeacherClient(f"grpc://{server.grpc_target}", timeout_s=2) as client:
        request = ScoreRequest([sequence("a", 1, 2), sequence("b", 1, POISON)])
        good, bad = client.score(request, return_errors=True)
    assert isinstance(good, Scores)
    assert isinstance(bad, TeacherError)
    assert isinstance(bad, BackendFailed) or bad.kind == "deadline_exceeded"


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_another_teacher_and_a_missing_key_are_refused(scheme: str):
    with serving(api_keys=[KEY]) as locked:
        url = locked.http_url if scheme == "http" else f"grpc://{locked.grpc_target}"
        with TeacherClient(url, timeout_s=5) as stranger, pytest.raises(Unauthenticated):
            stranger.info()
        with TeacherClient(url, api_key=KEY, timeout_s=5) as friend:
            assert friend.info().fingerprint == locked.fingerprint
        with (
            TeacherClient(url, api_key=KEY, timeout_s=5, expect_fingerprint="0" * 32) as surprised,
            pytest.raises(FingerprintMismatch, match="0000"),
        ):
            surprised.score(ScoreRequest([sequence("a", 1, 2)]))
