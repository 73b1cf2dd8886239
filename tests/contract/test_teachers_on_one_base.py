"""Adapters as teachers of their own, over every way in: who answers, under which fingerprint, and who is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from serving import (
    Server,
    ask_grpc,
    ask_grpc_stream,
    ask_http,
    ask_http_stream,
    assembled,
    call,
    channel,
    post,
    refused,
    request_of,
    serving,
)

from teacher_api import check, wire
from teacher_api.client import TeacherClient
from teacher_api.errors import CorruptResponse, FingerprintMismatch, NotFound
from teacher_api.types import ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb

pytestmark = pytest.mark.slow

BINARY = {"grpc": ask_grpc, "http": ask_http, "grpc-stream": ask_grpc_stream, "http-stream": ask_http_stream}
ADAPTERS = {"math": "one", "code": "two", "sums": "one"}  # two names of one adapter
SEQUENCE = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(lora=ADAPTERS) as running:
        yield running


@pytest.fixture(scope="module")
def alone() -> Iterator[Server]:
    """Without adapters, but otherwise the same."""
    with serving() as running:
        yield running


def asking(teacher: str, **options: object) -> ScoreRequest:
    return dataclasses.replace(request_of(SEQUENCE, top_k=3, **options), teacher=teacher)


def info_of(server: Server, teacher: str) -> pb.TeacherInfo:
    with channel(server) as opened:
        return pb.TeacherInfo.FromString(call(opened, "GetInfo", pb.GetInfoRequest(teacher=teacher)))


def asked_as(server: Server, way: str, teacher: str) -> Scores:
    """Checks the seal against the fingerprint that GetInfo gives for `teacher`."""
    expecting = dataclasses.replace(server, fingerprint=info_of(server, teacher).fingerprint)
    (scores,) = BINARY[way](expecting, asking(teacher))
    assert isinstance(scores, Scores)
    return scores


@pytest.mark.parametrize("way", BINARY)
def test_each_teacher_answers_for_itself_by_every_way(server: Server, alone: Server, way: str):
    got = {name: asked_as(server, way, name) for name in ("", *ADAPTERS)}
    (base,) = ask_grpc(alone, asking(""))
    assert isinstance(base, Scores)
    assert np.array_equal(got[""].token_logprob, base.token_logprob), "adapters beside it change nothing of the base"
    assert np.array_equal(got["math"].token_logprob, got["sums"].token_logprob)
    for one, other in (("", "math"), ("", "code"), ("math", "code")):
        assert np.abs(got[one].token_logprob - got[other].token_logprob).min() > 1e-3, (one, other)


def test_json_and_openai_name_them_too(server: Server):
    expected = asked_as(server, "grpc", "math")
    body = {"completions": [{"token_ids": SEQUENCE}], "options": {"top_k": 3}, "teacher": "math"}
    answer = server.http.post(f"{server.http_url}/v1/score", json=body).json()
    assert answer["fingerprint"] == info_of(server, "math").fingerprint
    assert np.array_equal(np.float32(answer["results"][0]["token_logprob"]), expected.token_logprob)
    body = {"prompt": SEQUENCE, "max_tokens": 0, "echo": True, "logprobs": 1, "model": "math"}
    answer = server.http.post(f"{server.http_url}/v1/completions", json=body).json()
    assert (answer["model"], answer["system_fingerprint"]) == ("math", info_of(server, "math").fingerprint)
    told = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert np.array_equal(np.float32(told), expected.token_logprob)
    cards = server.http.get(f"{server.http_url}/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("fake", None)] + [(n, "fake") for n in ADAPTERS]


def test_a_fingerprint_is_that_of_the_weights(server: Server, alone: Server):
    infos = {name: info_of(server, name) for name in ("", *ADAPTERS)}
    prints = {name: info.fingerprint for name, info in infos.items()}
    assert prints[""] == alone.fingerprint
    assert prints["math"] == prints["sums"]
    assert len(set(prints.values())) == 3
    for name, info in infos.items():
        assert tuple(info.teachers) == tuple(ADAPTERS)
        assert info.model_name == (name or "fake")
        assert "adapters" in info.features
        over_http = server.http.get(f"{server.http_url}/v1/info", params={"teacher": name}).json()
        assert (over_http["fingerprint"], over_http["teachers"]) == (info.fingerprint, list(ADAPTERS))
    assert "adapters" not in info_of(alone, "").features


def test_the_expected_fingerprint_is_that_of_the_teacher_asked(server: Server):
    base, math = (info_of(server, name).fingerprint for name in ("", "math"))
    code, info, _ = refused(server, dataclasses.replace(asking("math"), expect_fingerprint=base))
    assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "fingerprint_mismatch")
    assert post(server, dataclasses.replace(asking("math"), expect_fingerprint=base)).status_code == 412
    assert post(server, dataclasses.replace(asking("math"), expect_fingerprint=math)).status_code == 200


def test_an_answer_of_the_base_is_none_of_an_adapters(server: Server):
    frame = pb.ScoreResponse.FromString(post(server, asking("")).content).frames[0]
    question = wire.question(
        asking("math"),
        asking("math").completions[0],
        fingerprint=info_of(server, "math").fingerprint,
        tokenizer_size=512,
    )
    with pytest.raises(CorruptResponse):
        wire.Assembler(question).add(frame)


def test_one_stream_may_ask_several(server: Server):
    """Each message is sealed as its own teacher's; an unknown one fails alone, as the base's error."""
    teachers = ["math", "", "nobody", "code"]
    requests = [
        dataclasses.replace(r, completions=[dataclasses.replace(r.completions[0], id=f"of {r.teacher}")])
        for r in map(asking, teachers)
    ]
    with channel(server) as opened:
        method = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")
        sent = iter([wire.encode_request(request).SerializeToString() for request in requests])
        frames = [pb.ScoreFrame.FromString(data) for data in method(sent, timeout=60)]
    by_id = {frame.completion_id: frame for frame in frames}
    for request in requests:
        name = request.completions[0].id
        known = request.teacher in ADAPTERS
        fingerprint = info_of(server, request.teacher if known else "").fingerprint
        answer = assembled(request, name, [by_id[name]], fingerprint, 512)
        if request.teacher == "nobody":
            assert isinstance(answer, NotFound)
        else:
            expected = asked_as(server, "grpc", request.teacher)
            assert isinstance(answer, Scores)
            assert np.array_equal(answer.token_logprob, expected.token_logprob)


def test_unknown_names_are_refused_with_those_served(server: Server, alone: Server):
    served = "one of math, code, sums"
    code, info, _ = refused(server, asking("nobody"))
    assert (code, info.reason, info.metadata["field"]) == (grpc.StatusCode.NOT_FOUND, "not_found", "teacher")
    code, info, _ = refused(server, pb.GetInfoRequest(teacher="nobody").SerializeToString(), "GetInfo")
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "not_found")
    for answer in (
        post(server, asking("nobody")),
        server.http.get(f"{server.http_url}/v1/info", params={"teacher": "nobody"}),
        server.http.post(
            f"{server.http_url}/v1/score", json={"completions": [{"token_ids": SEQUENCE}], "teacher": "nobody"}
        ),
    ):
        assert answer.status_code == 404
        assert "'nobody'" in answer.json()["detail"]
        assert served in answer.json()["detail"]
    body = {"prompt": SEQUENCE, "max_tokens": 1, "model": "nobody"}
    told = server.http.post(f"{server.http_url}/v1/completions", json=body)
    assert told.status_code == 404
    assert "`fake`, `math`, `code`, `sums`" in told.json()["error"]["message"]
    assert "only the base" in post(alone, asking("math")).json()["detail"]


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_the_client_asks_by_name(server: Server, alone: Server, scheme: str):
    def url(of: Server) -> str:
        return of.http_url if scheme == "http" else f"grpc://{of.grpc_target}"

    with TeacherClient(url(server), timeout_s=20) as client, TeacherClient(url(server), teacher="code") as coder:
        assert client.info().teachers == tuple(ADAPTERS)
        names = ["math", "", "code", "math"]
        got = {name: client.score(asking(name))[0] for name in names}
        assert {name: scores.fingerprint for name, scores in got.items()} == {
            name: info_of(server, name).fingerprint for name in names
        }
        assert coder.info().model_name == "code"
        assert np.array_equal(coder.score(asking(""))[0].token_logprob, got["code"].token_logprob)
        assert coder.score(asking("math"))[0].fingerprint == got["math"].fingerprint
        many = list(client.score_many(asking(name) for name in names))
        assert {scores.fingerprint for scores in many} == {scores.fingerprint for scores in got.values()}
        with pytest.raises(NotFound, match="nobody"):
            client.score(asking("nobody"))
    with TeacherClient(url(alone), teacher="math", timeout_s=20) as stranger, pytest.raises(NotFound, match="only the"):
        stranger.info()
    other = info_of(server, "").fingerprint
    with (
        TeacherClient(url(server), teacher="math", expect_fingerprint=other, timeout_s=20) as misled,
        pytest.raises(FingerprintMismatch),
    ):
        misled.score(asking(""))


def test_teacher_check_looks_at_the_one_it_is_told(server: Server, capsys: pytest.CaptureFixture[str]):
    url = f"grpc://{server.grpc_target}"
    assert check.main([url, "--teacher", "code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == info_of(server, "code").fingerprint
    assert check.main([url]) == 0
    assert "teachers     the base, math, code, sums" in capsys.readouterr().out
    assert check.main([url, "--teacher", "nobody"]) == 1
    assert "nobody" in capsys.readouterr().err


@pytest.mark.parametrize("control", ["shuffle", "random"])
def test_controls_keep_the_teachers_apart(control: str):
    with serving(lora=ADAPTERS, control=control) as controlled:
        assert len({info_of(controlled, name).fingerprint for name in ("", "math", "code")}) == 3
        assert isinstance(asked_as(controlled, "grpc", "math"), Scores)
