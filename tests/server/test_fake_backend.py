"""The fake backend and the controls against the definitions, in float64 and written out by hand."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_api.types import LOGPROB_FLOOR, Candidates, ScoreOptions, Scores
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.control import ControlBackend
from teacher_server.backends.exact_rows import score_rows
from teacher_server.backends.fake import FakeBackend, Faults, noise_logits

FLOAT32: Any = {"rel": 2**-23, "abs": 1e-6}  # the answer is rounded to float32: near -32 nats by up to 2e-6


def job(token_ids: list[int], positions: list[int], options: ScoreOptions, candidates: Candidates | None = None) -> Any:
    ids = np.asarray(token_ids, np.int32)
    return ScoreJob("x", ids, 1, np.asarray(positions, np.int32), options, candidates)


def by_hand(logits: list[float], temperature: float) -> list[float]:
    scaled = [z / temperature for z in logits]
    norm = math.log(math.fsum(math.exp(z) for z in scaled))
    return [z - norm for z in scaled]


@settings(deadline=None)
@given(
    width=st.integers(3, 12),
    padding=st.integers(0, 2),
    top_k=st.one_of(st.integers(0, 12), st.just("all")),
    temperature=st.floats(0.3, 4.0),
    seed=st.integers(0, 2**31),
    with_candidates=st.booleans(),
)
def test_rows_match_the_definitions(width, padding, top_k, temperature, seed, with_candidates):
    vocabulary = width - padding
    rng = np.random.default_rng(seed)
    top_k = top_k if top_k == "all" else min(top_k, vocabulary)
    tokens = rng.integers(0, vocabulary, 6)
    positions = sorted(rng.choice(np.arange(1, 6), size=3, replace=False).tolist())
    rows = [rng.integers(0, vocabulary, rng.integers(0, 4)).tolist() for _ in positions]
    candidates = Candidates.from_rows(rows) if with_candidates else None
    table = rng.normal(size=(6, width)) * 3
    options = ScoreOptions(top_k=top_k, temperature=temperature, entropy=True, rank=True)
    asked = job(tokens.tolist(), positions, options, candidates)
    scores = score_rows(asked, lambda at: table[at], width, vocabulary)
    at = 0
    for n, position in enumerate(positions):
        logp = by_hand(table[position].tolist(), temperature)
        token = int(tokens[position])
        assert scores.token_logprob[n] == pytest.approx(logp[token], **FLOAT32)
        inside = {token}
        if top_k == "all":
            inside |= set(range(vocabulary))
            assert scores.topk_logprob[n].tolist() == pytest.approx(logp[:vocabulary], **FLOAT32)
        elif top_k:
            best = sorted(range(vocabulary), key=lambda v: (-logp[v], v))[:top_k]
            assert scores.topk_ids[n].tolist() == best
            inside |= set(best)
        if with_candidates:
            for v in rows[n]:
                assert scores.candidate_logprob[at] == pytest.approx(logp[v], **FLOAT32)
                at += 1
            inside |= set(rows[n])
        outside = math.fsum(math.exp(logp[v]) for v in range(width) if v not in inside)
        expected = math.log(outside) if outside else LOGPROB_FLOOR
        assert scores.log_tail[n] == pytest.approx(expected, abs=1e-5)
        assert scores.entropy[n] == pytest.approx(-math.fsum(math.exp(v) * v for v in logp), abs=1e-5)
        assert scores.rank[n] == 1 + sum(v > logp[token] for v in logp)


@settings(deadline=None)
@given(st.lists(st.integers(0, 99), min_size=2, max_size=12), st.integers(0, 99))
def test_the_fake_distribution_depends_on_all_that_came_before_and_nothing_else(tokens, other):
    last = len(tokens) - 1
    ids = np.asarray(tokens, np.int32)
    row = noise_logits(ids, np.asarray([last], np.int32), 16)
    changed = ids.copy()
    changed[last] = other
    assert np.array_equal(noise_logits(changed, np.asarray([last], np.int32), 16), row), "the token itself is not seen"
    changed = ids.copy()
    changed[0] = (ids[0] + 1) % 100
    assert not np.array_equal(noise_logits(changed, np.asarray([last], np.int32), 16), row)
    if len(tokens) > 3 and tokens[0] != tokens[1]:
        swapped = ids.copy()
        swapped[[0, 1]] = swapped[[1, 0]]
        assert not np.array_equal(noise_logits(swapped, np.asarray([last], np.int32), 16), row), "order matters"


def loaded(**settings: Any) -> FakeBackend:
    backend = FakeBackend(**settings)
    backend.load()
    return backend


def one(backend: Any, asked: ScoreJob) -> Any:
    return asyncio.run(backend.score([asked]))[0]


def test_faults_show_as_asked():
    options = ScoreOptions(top_k=2)
    faults = Faults(poison_token=7, nan_token=8, short_token=9)
    backend = loaded(faults=faults)
    assert isinstance(one(backend, job([1, 2, 3], [1, 2], options)), Scores)
    with pytest.raises(RuntimeError, match="poison"):
        one(backend, job([1, 7, 3], [1, 2], options))
    assert np.isnan(one(backend, job([1, 8, 3], [1, 2], options)).token_logprob[0])
    assert len(one(backend, job([1, 9, 3], [1, 2], options)).token_logprob) == 1


def test_a_path_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        FakeBackend(str(tmp_path / "nothing")).load()


@pytest.mark.parametrize(("seed", "temperature"), [(0, 1.0), (1, 0.7), (2, 2.0)])
def test_shuffle_gives_every_id_the_probability_of_another_one(seed, temperature):
    inner, control = loaded(vocabulary=40), ControlBackend(FakeBackend(vocabulary=40), "shuffle")
    facts = control.load()
    assert facts.scoring_path.startswith("control shuffle")
    tokens = np.random.default_rng(seed).integers(0, 40, 8).tolist()
    everything = ScoreOptions(top_k="all", temperature=temperature, entropy=True)
    positions = list(range(1, len(tokens)))
    plain, shuffled = (one(b, job(tokens, positions, everything)) for b in (inner, control))
    by_rank = np.argsort(np.argsort(shuffled.topk_logprob[0]))
    source = np.argsort(plain.topk_logprob[0])[by_rank]  # whose probability each id has in the first row
    assert (source != np.arange(40)).sum() > 30
    assert np.allclose(plain.topk_logprob[:, source], shuffled.topk_logprob, atol=1e-5), "and in every other row"
    assert np.allclose(plain.log_tail, shuffled.log_tail, atol=1e-5)
    best = one(control, job(tokens, positions, ScoreOptions(top_k=3, temperature=temperature, rank=True)))
    expected = np.argsort(-shuffled.topk_logprob, axis=1, kind="stable")[:, :3]
    assert np.array_equal(best.topk_ids, expected)
    actual = shuffled.topk_logprob[np.arange(len(positions)), np.asarray(tokens)[positions]]
    assert np.allclose(best.token_logprob, actual, atol=1e-5)


def test_random_has_no_trace_of_the_model_and_another_fingerprint():
    control = ControlBackend(FakeBackend(vocabulary=40), "random")
    assert control.load().scoring_path.startswith("control random")
    scores = one(control, job([1, 2, 3, 4], [1, 2, 3], ScoreOptions(top_k="all")))
    mass = np.logaddexp(np.logaddexp.reduce(scores.topk_logprob.astype(np.float64), axis=1), scores.log_tail)
    assert np.abs(mass).max() < 1e-5


def test_shuffle_needs_whole_rows_as_known_once_the_model_is_loaded():
    class TopKOnly(FakeBackend):
        def load(self):
            self.features = frozenset({"top_k", "float16"})
            return super().load()

    with pytest.raises(ValueError, match="whole vocabulary"):
        ControlBackend(TopKOnly(), "shuffle").load()
