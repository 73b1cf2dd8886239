"""What may not be asked: each refusal has the right kind, names the field, and leaves the neighbours alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_api.errors import FingerprintMismatch, InvalidRequest, TeacherError, TooLarge, Unsupported
from teacher_api.types import (
    Candidates,
    Completion,
    ScoreOptions,
    ScoreRequest,
    TeacherInfo,
    scored_positions,
)
from teacher_server.backends.base import FEATURES, ScoreJob
from teacher_server.validation import answer_bytes, decoded_of, jobs_of

INFO = TeacherInfo(
    fingerprint="f" * 32,
    model_name="m",
    tokenizer_fingerprint="t",
    tokenizer_size=100,
    logit_width=128,
    max_sequence_tokens=20,
    max_top_k=10,
    max_candidates=3,
    max_completions=4,
    max_request_bytes=1 << 20,
    max_response_bytes=1 << 20,
    features=FEATURES,
    engine="fake",
    hidden_size=16,
)


def ids(*values: int) -> Any:
    return np.asarray(values, np.int32)


GOOD = Completion("good", ids(4, 5, 6), 0)


def jobs(request: ScoreRequest, info: TeacherInfo = INFO) -> list[Any]:
    return jobs_of(decoded_of(request), info)


def with_options(**options: Any) -> ScoreRequest:
    return ScoreRequest([GOOD], [ids(1, 2, 3)], ScoreOptions(**options))


WHOLE = [
    (ScoreRequest([]), InvalidRequest, "completions"),
    (ScoreRequest([dataclasses.replace(GOOD, id=str(n)) for n in range(5)], [ids(1)]), TooLarge, "completions"),
    (ScoreRequest([GOOD, GOOD], [ids(1)]), InvalidRequest, "completions[1].id"),
    (ScoreRequest([dataclasses.replace(GOOD, id="")], [ids(1)]), InvalidRequest, "completions[0].id"),
    (ScoreRequest([dataclasses.replace(GOOD, id="x" * 257)], [ids(1)]), InvalidRequest, "completions[0].id"),
    (with_options(top_k=11), TooLarge, "options.top_k"),
    (with_options(top_k=-1), InvalidRequest, "options.top_k"),
    (with_options(temperature=0.0), InvalidRequest, "options.temperature"),
    (with_options(temperature=-1.0), InvalidRequest, "options.temperature"),
    (with_options(temperature=math.nan), InvalidRequest, "options.temperature"),
    (with_options(temperature=math.inf), InvalidRequest, "options.temperature"),
    (with_options(temperature=1e-30), InvalidRequest, "options.temperature"),
    (with_options(value_type="int8"), InvalidRequest, "options.value_type"),
    (dataclasses.replace(with_options(), expect_fingerprint="other"), FingerprintMismatch, "expect_fingerprint"),
    (dataclasses.replace(with_options(), timeout_s=0.0), InvalidRequest, "timeout_s"),
    (dataclasses.replace(with_options(), timeout_s=math.nan), InvalidRequest, "timeout_s"),
]


@pytest.mark.parametrize(("request_", "kind", "field"), WHOLE, ids=[f"{c[2]}-{n}" for n, c in enumerate(WHOLE)])
def test_a_request_that_is_wrong_as_a_whole(request_: ScoreRequest, kind: type[TeacherError], field: str):
    with pytest.raises(kind) as refused:
        jobs(request_)
    assert type(refused.value) is kind
    assert refused.value.field == field


NEEDS = {
    "top_k": {"top_k": 1},
    "full_vocabulary": {"top_k": "all"},
    "temperature": {"temperature": 2.0},
    "float16": {"value_type": "float16"},
    "entropy": {"entropy": True},
    "rank": {"rank": True},
    "hidden": {"hidden": True},
}


@pytest.mark.parametrize("feature", NEEDS)
def test_an_option_that_the_backend_cannot_honour_is_refused_by_name(feature: str):
    request = with_options(**NEEDS[feature])
    assert isinstance(jobs(request)[0], ScoreJob)
    without = dataclasses.replace(INFO, features=tuple(f for f in FEATURES if f != feature))
    with pytest.raises(Unsupported, match=feature) as refused:
        jobs(request, without)
    assert refused.value.field.startswith("options.")


def completion(**changes: Any) -> Completion:
    return dataclasses.replace(GOOD, id="bad", **changes)


ONE = [
    (completion(token_ids=ids()), InvalidRequest, "completions[1].token_ids"),
    (completion(token_ids=ids(1, 100)), InvalidRequest, "completions[1].token_ids[1]"),
    (completion(token_ids=ids(-1)), InvalidRequest, "completions[1].token_ids[0]"),
    (completion(token_ids=ids(1, 2).reshape(1, 2)), InvalidRequest, "completions[1].token_ids"),
    (completion(token_ids=ids(*[1] * 18)), TooLarge, "completions[1].token_ids"),
    (completion(token_ids=ids(5), prompt_index=None), InvalidRequest, "completions[1].token_ids"),
    (completion(prompt_index=3), InvalidRequest, "completions[1].prompt_index"),
    (completion(prompt_index=1), InvalidRequest, "prompts[1]"),
    (completion(prompt_index=2), InvalidRequest, "prompts[2][1]"),
    (completion(ranges=((0, 2),)), InvalidRequest, "completions[1].ranges"),
    (completion(ranges=((2, 2),)), InvalidRequest, "completions[1].ranges"),
    (completion(ranges=((1, 3), (2, 4))), InvalidRequest, "completions[1].ranges"),
    (completion(ranges=((3, 7),)), InvalidRequest, "completions[1].ranges"),
    (completion(candidates=Candidates.from_rows([[1], [2]])), InvalidRequest, "completions[1].candidates.row_offsets"),
    (
        completion(candidates=Candidates(ids(1, 2), ids(0, 2, 1, 2))),
        InvalidRequest,
        "completions[1].candidates.row_offsets",
    ),
    (
        completion(candidates=Candidates.from_rows([[1, 2, 3, 4], [], []])),
        TooLarge,
        "completions[1].candidates.row_offsets",
    ),
    (
        completion(candidates=Candidates.from_rows([[1], [], [100]])),
        InvalidRequest,
        "completions[1].candidates.ids[1]",
    ),
]


@pytest.mark.parametrize(("wrong", "kind", "field"), ONE, ids=[f"{c[2]}-{n}" for n, c in enumerate(ONE)])
def test_one_bad_completion_is_its_own_error(wrong: Completion, kind: type[TeacherError], field: str):
    prompts = [ids(1, 2, 3), ids(), ids(1, 700)]
    before, bad, after = jobs(ScoreRequest([GOOD, wrong, dataclasses.replace(GOOD, id="later")], prompts))
    assert isinstance(before, ScoreJob)
    assert isinstance(after, ScoreJob)
    assert type(bad) is kind
    assert bad.field == field
    assert 0 < len(bad.message) <= 1024


@settings(deadline=None)
@given(
    prompt=st.lists(st.integers(-2, 101), max_size=10),
    tokens=st.lists(st.integers(-2, 101), max_size=14),
    use_prompt=st.booleans(),
    ranges=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)), max_size=3),
)
def test_what_is_accepted_is_exactly_what_the_rules_allow(prompt, tokens, use_prompt, ranges):
    """Against the rules written out again, for any input."""
    request = ScoreRequest([Completion("x", ids(*tokens), 0 if use_prompt else None, tuple(ranges))], [ids(*prompt)])
    whole = [*(prompt if use_prompt else []), *tokens]
    flat = [edge for one in ranges for edge in one]
    ranges_fine = all(a < b for a, b in ranges) and flat == sorted(flat) and (not flat or flat[0] >= 1)
    fine = (
        all(0 <= token < 100 for token in whole)
        and len(tokens) >= 1
        and (len(prompt) >= 1 or not use_prompt)
        and 2 <= len(whole) <= 20
        and ranges_fine
        and (not flat or flat[-1] <= len(whole))
    )
    (job,) = jobs(request)
    assert isinstance(job, ScoreJob) == fine
    if fine:
        assert job.token_ids.tolist() == whole
        wanted = [p for a, b in ranges for p in range(a, b)] or list(
            range(max(len(whole) - len(tokens), 1), len(whole))
        )
        assert job.positions.tolist() == wanted


def test_jobs_of_one_prompt_share_a_key_and_others_do_not():
    request = ScoreRequest(
        [
            Completion("a", ids(4), 0),
            Completion("b", ids(5), 0),
            Completion("c", ids(5), 1),
            Completion("d", ids(5, 6), None),
        ],
        [ids(1, 2), ids(1, 3)],
    )
    a, b, c, d = (job.prompt_key for job in jobs(request))
    assert a == b
    assert len({a, c, d}) == 3
    assert d == b""


@settings(deadline=None)
@given(
    top_k=st.one_of(st.integers(0, 10), st.just("all")),
    value_type=st.sampled_from(["float32", "float16"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    with_candidates=st.booleans(),
)
def test_the_size_of_an_answer_is_never_estimated_too_small(top_k, value_type, flags, with_candidates):
    from teacher_api import wire
    from teacher_api.types import Scores

    entropy, rank, hidden = flags
    options = ScoreOptions(top_k=top_k, value_type=value_type, entropy=entropy, rank=rank, hidden=hidden)
    candidates = Candidates.from_rows([[1, 2]] * 3) if with_candidates else None
    (job,) = jobs(ScoreRequest([dataclasses.replace(GOOD, candidates=candidates)], [ids(1, 2, 3)], options))
    assert scored_positions(GOOD, 3).tolist() == job.positions.tolist()
    zeros, columns = np.full(3, -1.0, np.float32), 100 if top_k == "all" else top_k
    kind = np.dtype(value_type)
    scores = Scores(
        id="good",
        positions=job.positions,
        token_logprob=zeros,
        log_tail=zeros,
        topk_ids=None if top_k in (0, "all") else np.tile(np.arange(columns, dtype=np.int32), (3, 1)),
        topk_logprob=None if not columns else np.full((3, columns), -1.0, kind),
        candidate_logprob=np.full(6, -1.0, np.float32) if with_candidates else None,
        entropy=zeros + 2 if entropy else None,
        rank=np.ones(3, np.uint32) if rank else None,
        hidden=np.full((3, 16), 0.1, np.float32) if hidden else None,
    )
    frames = wire.encode_scores(scores, options=options, candidates=candidates, key=b"k" * 32)
    assert sum(frame.ByteSize() for frame in frames) <= answer_bytes(job, INFO)
