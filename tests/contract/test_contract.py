"""One suite over every backend and every way in: the same question gets the same answer, bit for bit, whichever
transport carries it, and the numbers are those of the backend asked directly."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Server, ask_grpc, ask_grpc_stream, ask_http, ask_http_stream, serving
from tinymodels import save_tiny

from teacher_api.types import Candidates, Completion, ScoreOptions, ScoreRequest, Scores, scored_positions
from teacher_server.backends.base import ScoreJob

pytestmark = pytest.mark.slow

VOCABULARY = 120
ARRAYS = [field.name for field in dataclasses.fields(Scores) if field.name not in ("id", "fingerprint")]
BINARY = {"grpc": ask_grpc, "http": ask_http, "grpc-stream": ask_grpc_stream, "http-stream": ask_http_stream}


@pytest.fixture(scope="module", params=["fake", "torch", "control"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param == "torch":
        model = save_tiny(tmp_path_factory.mktemp("contract") / "tiny")
        with serving(backend="torch", model=str(model), reference=True, threads=1) as running:
            yield running
        return
    control = "shuffle" if request.param == "control" else "none"
    with serving(fake_vocabulary=VOCABULARY, reference=True, control=control) as running:
        yield running


def ids(rng: np.random.Generator, count: int) -> Any:
    return rng.integers(0, VOCABULARY, count).astype(np.int32)


def a_request(seed: int, options: ScoreOptions, *, with_candidates: bool = False) -> ScoreRequest:
    """Two shared prompts, a whole sequence without one, ranges with holes, many lengths."""
    rng = np.random.default_rng(seed)
    prompts = [ids(rng, 5), ids(rng, 17)]
    plans = [(0, 6, ()), (0, 1, ()), (1, 20, ((17, 19), (25, 37))), (1, 3, ((1, 4), (18, 20))), (None, 9, ())]
    completions = []
    for n, (prompt, length, ranges) in enumerate(plans):
        one = Completion(f"c{n}", ids(rng, length), prompt, ranges)
        if with_candidates:
            rows = len(scored_positions(one, 0 if prompt is None else len(prompts[prompt])))
            candidates = Candidates.from_rows([ids(rng, rng.integers(0, 4)) for _ in range(rows)])
            one = dataclasses.replace(one, candidates=candidates)
        completions.append(one)
    return ScoreRequest(completions, prompts, options)


OPTIONS = [
    ScoreOptions(),
    ScoreOptions(top_k=1),
    ScoreOptions(top_k=7, entropy=True, rank=True, temperature=2.0),
    ScoreOptions(top_k=VOCABULARY),
    ScoreOptions(top_k=5, value_type="float16"),
    ScoreOptions(top_k="all"),
    ScoreOptions(top_k="all", value_type="float16", entropy=True),
]


def same(a: Any, b: Any) -> None:
    for name in ARRAYS:
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, np.ndarray):
            assert isinstance(right, np.ndarray), name
            assert left.dtype == right.dtype, name
            assert left.shape == right.shape, name
            assert left.tobytes() == right.tobytes(), name
        else:
            assert left == right, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_binary_way_in_gives_the_same_bits(server: Server, options: ScoreOptions):
    request = a_request(1, options, with_candidates=True)
    answers = {name: ask(server, request, VOCABULARY) for name, ask in BINARY.items()}
    for name, results in answers.items():
        assert all(isinstance(one, Scores) for one in results), name
        for one, other in zip(results, answers["grpc"], strict=True):
            same(one, other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_arrives_is_what_the_backend_said(server: Server, options: ScoreOptions):
    request = a_request(2, options, with_candidates=True)
    jobs = []
    for completion in request.completions:
        prompt = np.zeros(0, np.int32) if completion.prompt_index is None else request.prompts[completion.prompt_index]
        jobs.append(
            ScoreJob(
                completion.id,
                np.concatenate([prompt, completion.token_ids]),
                len(prompt),
                scored_positions(completion, len(prompt)),
                options,
                completion.candidates,
            )
        )
    direct = asyncio.run_coroutine_threadsafe(server.backend.score(jobs), server.loop).result(60)
    for answer, expected in zip(ask_grpc(server, request, VOCABULARY), direct, strict=True):
        same(answer, expected)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.integers(0, 8), st.floats(0.5, 2.0), st.booleans())
def test_rows_are_distributions_and_agree_with_the_whole_vocabulary(server, seed, top_k, temperature, candidates):
    some = ScoreOptions(top_k=top_k, temperature=temperature, rank=True, entropy=True)
    request = a_request(seed, some, with_candidates=candidates)
    everything = dataclasses.replace(request, options=dataclasses.replace(some, top_k="all"))
    for completion, got, full in zip(
        request.completions,
        ask_grpc(server, request, VOCABULARY),
        ask_http(server, everything, VOCABULARY),
        strict=True,
    ):
        logp_NV = full.topk_logprob.astype(np.float64)
        padding = np.exp(full.log_tail.astype(np.float64))  # columns without a token
        assert np.allclose(np.exp(logp_NV).sum(axis=1) + padding, 1, atol=1e-5)
        prompt = 0 if completion.prompt_index is None else len(request.prompts[completion.prompt_index])
        tokens = np.concatenate([request.prompts[completion.prompt_index] if prompt else [], completion.token_ids])
        for n, position in enumerate(got.positions):
            token = int(tokens[position])
            inside = {token, *([] if got.topk_ids is None else got.topk_ids[n].tolist())}
            if completion.candidates is not None:
                cut = slice(*completion.candidates.row_offsets[n : n + 2])
                inside |= set(completion.candidates.ids[cut].tolist())
                assert np.allclose(got.candidate_logprob[cut], logp_NV[n, completion.candidates.ids[cut]], atol=1e-5)
            assert got.token_logprob[n] == pytest.approx(logp_NV[n, token], abs=1e-5)
            if got.topk_ids is not None:
                assert np.allclose(got.topk_logprob[n], np.sort(logp_NV[n])[::-1][:top_k], atol=1e-5)
            outside = np.exp(np.delete(logp_NV[n], sorted(inside))).sum() + padding[n]
            assert np.exp(got.log_tail[n]) == pytest.approx(outside, abs=1e-5)


def test_json_says_the_same_in_numbers(server: Server):
    request = a_request(3, ScoreOptions(top_k=3, entropy=True, rank=True), with_candidates=True)
    asked = {
        "prompts": [prompt.tolist() for prompt in request.prompts],
        "completions": [
            {
                "id": c.id,
                "token_ids": c.token_ids.tolist(),
                "ranges": [list(r) for r in c.ranges],
                "candidates": [row.tolist() for row in np.split(c.candidates.ids, c.candidates.row_offsets[1:-1])],
                **({} if c.prompt_index is None else {"prompt_index": c.prompt_index}),
            }
            for c in request.completions
        ],
        "options": {"top_k": 3, "entropy": True, "rank": True},
    }
    answer = server.http.post(f"{server.http_url}/v1/score", json=asked).json()
    assert answer["fingerprint"] == server.fingerprint
    for got, expected in zip(answer["results"], ask_grpc(server, request, VOCABULARY), strict=True):
        assert got["positions"] == expected.positions.tolist()
        for name in ("token_logprob", "log_tail", "entropy", "topk_logprob"):
            assert np.array_equal(np.asarray(got[name], np.float32), getattr(expected, name)), name
        assert got["rank"] == expected.rank.tolist()
        assert got["topk_ids"] == expected.topk_ids.tolist()
        flat = [value for row in got["candidate_logprob"] for value in row]
        assert np.array_equal(np.asarray(flat, np.float32), expected.candidate_logprob)


def test_the_description_is_complete_and_the_same_on_both_transports(server: Server):
    from serving import call, channel

    from teacher_api.v1 import teacher_pb2 as pb

    over_http = server.info()
    with channel(server) as opened:
        data = call(opened, "GetInfo", b"")
    over_grpc = pb.TeacherInfo.FromString(data)
    assert over_http == over_grpc
    assert over_grpc.checksum == hashlib.sha256(data[19:]).digest()[:16], "its own field first, and what it is of"
    assert over_http.fingerprint == server.fingerprint
    assert (over_http.api_version, over_http.tokenizer_size) == (1, VOCABULARY)
    assert over_http.logit_width >= over_http.tokenizer_size
    for name in ("weights_digest", "tokenizer_fingerprint", "engine", "engine_version", "scoring_path", "dtype"):
        assert getattr(over_http, name), name
    assert {"top_k", "full_vocabulary", "candidates", "temperature"} <= set(over_http.features)
    as_json = server.http.get(f"{server.http_url}/v1/info").json()
    assert as_json["fingerprint"] == server.fingerprint
