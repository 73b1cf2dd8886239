"""The fused path over a real engine, every option at once, against float64; and what the engine may do meanwhile:
prefills in pieces, prefixes from the cache, preemption, another order, two processes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reliability import holds
from transformers import AutoModelForCausalLM
from vllm_jobs import check, checkpoint_for_vllm, job, log_p, ragged, random_tokens, score

from teacher_api.head import logprobs_from_hidden
from teacher_api.types import ScoreOptions, Scores
from teacher_server.backends.base import ScoreJob, ScoringBackend
from teacher_server.config import ServerConfig
from teacher_server.head_share import as_client_has_it
from teacher_server.identity import teacher_infos

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # vLLM and what it starts, not ours
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::pytest.PytestWarning"),
]

VOCABULARY, WIDTH, POSITIONS = 4990, 5000, 420
BLOCK = 128  # tokens of vLLM's key-value blocks on a CPU: what can come from the cache
CHUNK = 100  # tokens of a step: longer sequences come in pieces
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fused") / "teacher"
    return checkpoint_for_vllm(path, tokenizer_size=VOCABULARY, vocab_size=WIDTH, max_position_embeddings=POSITIONS)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def fused(checkpoint: Path) -> Iterator[ScoringBackend]:
    yield from _loaded(checkpoint)


def _loaded(checkpoint: Path, **arguments: object) -> Iterator[ScoringBackend]:
    from teacher_server.backends.vllm_backend import VllmBackend

    own = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 27, **arguments}
    backend = VllmBackend(str(checkpoint), scoring_path="fused", engine_args=own)
    threads = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    backend.facts = backend.load()  # type: ignore[attr-defined]
    assert os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == threads, "the next engine may need other threads"
    yield backend
    asyncio.run(backend.close())


def mixed_jobs() -> list[ScoreJob]:
    """Lengths from 2 to the longest, all options in turn, half of the sequences with a common beginning."""
    ks = itertools.cycle([0, 1, 16, 64, "all", VOCABULARY, 300])
    temperatures = itertools.cycle([1.0, 2.0, 0.7])
    shared = random_tokens(0, 2 * BLOCK + 10, VOCABULARY)
    jobs = []
    for n, length in enumerate([2, 3, CHUNK - 1, CHUNK, CHUNK + 1, BLOCK + 1, 2 * CHUNK + 1, POSITIONS - 1, POSITIONS]):
        own = random_tokens(n + 1, length, VOCABULARY)
        after = np.concatenate([shared, random_tokens(50 + n, 5 + 15 * n, VOCABULARY)])
        for tokens, first in ((own, 1), (after, len(shared))):
            positions = np.arange(first, len(tokens))
            jobs.append(
                job(
                    tokens,
                    positions,
                    top_k=next(ks),
                    temperature=next(temperatures),
                    entropy=n % 2 == 0,
                    rank=n % 3 == 0,
                    candidates=ragged(100 + n, len(positions), VOCABULARY) if n % 4 else None,
                )
            )
    return jobs


def check_all(jobs: list[ScoreJob], answers: list[Scores], reference: torch.nn.Module) -> None:
    for asked, scores in zip(jobs, answers, strict=True):
        check(asked, scores, log_p(reference, asked), VOCABULARY, tolerance=TOLERANCE)


def test_says_what_it_is(fused: ScoringBackend) -> None:
    facts = fused.facts  # type: ignore[attr-defined]
    assert facts.scoring_path.startswith("fused")
    assert facts.batch_tokens == CHUNK
    assert (facts.tokenizer_size, facts.logit_width, facts.max_sequence_tokens) == (VOCABULARY, WIDTH, POSITIONS)
    assert {"candidates", "temperature", "full_vocabulary", "entropy", "rank", "hidden", "exact_tail"} <= fused.features


@pytest.mark.parametrize("order", ["as they are", "backwards", "shuffled"])
def test_every_option_at_once_in_any_order(fused: ScoringBackend, reference: torch.nn.Module, order: str) -> None:
    jobs = mixed_jobs()
    if order == "backwards":
        jobs.reverse()
    elif order == "shuffled":
        jobs = [jobs[i] for i in np.random.default_rng(0).permutation(len(jobs))]
    check_all(jobs, score(fused, *jobs), reference)


def test_a_group_computes_its_prompt_once(
    fused: ScoringBackend, reference: torch.nn.Module, record_property: Any
) -> None:
    """Completions with a common opening: the cache would serve rows that have to be computed, and must not."""
    prompt = random_tokens(900, 2 * BLOCK, VOCABULARY)
    opening = random_tokens(901, BLOCK, VOCABULARY)
    jobs = [
        job(
            np.concatenate([prompt, opening, random_tokens(910 + n, 1 + 3 * n, VOCABULARY)]),
            np.arange(len(prompt), len(prompt) + BLOCK + 1 + 3 * n),
            top_k=8,
        )
        for n in range(6)
    ]
    jobs.append(jobs[2])  # twice the same
    (first,) = score(fused, jobs[0])
    answers = score(fused, *jobs)
    check_all([jobs[0], *jobs], [first, *answers], reference)
    # Row i is at token i - 1: of the two blocks of the prompt the last token's row is scored, so one is from the cache.
    assert [scores.cached_tokens for scores in answers] == [BLOCK] * len(jobs)
    assert [scores.computed_tokens + scores.cached_tokens for scores in answers] == [len(j.token_ids) for j in jobs]
    worst = max(
        float(np.abs(scores.token_logprob - log_p(reference, asked)[np.arange(len(targets)), targets]).max())
        for asked, scores, targets in zip(jobs, answers, [j.token_ids[j.positions] for j in jobs], strict=True)
    )
    assert worst <= 1e-3
    holds(record_property, "S24", f"vLLM: {worst:.1e} from a float64 forward, after a shared prompt")


def test_ranges_with_holes_and_hidden_states(fused: ScoringBackend, reference: torch.nn.Module) -> None:
    tokens = random_tokens(7, 300, VOCABULARY)
    positions = [1, 2, 99, 100, 101, 102, 250]
    asked = job(tokens, positions, top_k=3, hidden=True, candidates=ragged(1, len(positions), VOCABULARY))
    (scores,) = score(fused, asked)
    check(asked, scores, log_p(reference, asked), VOCABULARY, tolerance=TOLERANCE)
    with torch.inference_mode():
        states = reference(torch.tensor(tokens[None]), output_hidden_states=True).hidden_states[-1][0]
    assert scores.hidden is not None
    np.testing.assert_allclose(scores.hidden, states[np.asarray(positions) - 1].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hidden_states_through_the_output_head_are_the_whole_rows(fused: ScoringBackend, temperature: float) -> None:
    facts = fused.facts  # type: ignore[attr-defined]
    info = teacher_infos(ServerConfig(model="m"), fused.features, facts)[""]
    head = as_client_has_it(fused.output_head(), info)
    assert (head.logit_width, head.hidden_size, head.tokenizer_size) == (WIDTH, facts.hidden_size, VOCABULARY)
    (scores,) = score(fused, job(random_tokens(6, 150, VOCABULARY), top_k="all", temperature=temperature, hidden=True))
    assert scores.hidden is not None
    got = logprobs_from_hidden(scores.hidden, head, temperature)
    np.testing.assert_allclose(got, scores.topk_logprob, rtol=0, atol=TOLERANCE)


def test_float16_values_are_those_of_float32_rounded(fused: ScoringBackend) -> None:
    asked = job(random_tokens(8, 50, VOCABULARY), top_k=20)
    half = replace(asked, options=replace(asked.options, value_type="float16"))
    one, two = score(fused, asked, half)
    assert one.topk_logprob is not None
    assert two.topk_logprob is not None
    assert two.topk_logprob.dtype == np.float16
    np.testing.assert_allclose(two.topk_logprob.astype(np.float32), one.topk_logprob, rtol=2**-11, atol=1e-5)


@pytest.mark.parametrize("number", [400, pytest.param(10_000, marks=pytest.mark.long)])
def test_many_requests_leave_the_answers_alone(fused: ScoringBackend, reference: torch.nn.Module, number: int) -> None:
    for start in range(0, number, 400):
        jobs = [job(random_tokens(seed, 2 + seed % 30, VOCABULARY), top_k=2) for seed in range(start, start + 400)]
        answers = score(fused, *jobs)
        chosen = range(start % 23, 400, 23)
        check_all([jobs[i] for i in chosen], [answers[i] for i in chosen], reference)
    later = mixed_jobs()[:4]
    check_all(later, score(fused, *later), reference)


def test_preempted_sequences_are_whole(checkpoint: Path, reference: torch.nn.Module, tmp_path: Path) -> None:
    """In a process of its own, where the scheduler can be watched: too few blocks for all that run."""
    out = tmp_path / "answers.npz"
    script = Path(__file__).with_name("vllm_preempted.py")
    path = os.pathsep.join([str(script.parent), str(script.parent.parent)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint), str(VOCABULARY), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["preemptions"] > 0
    with np.load(out) as arrays:
        for n, asked in enumerate(preempted_jobs(VOCABULARY)):
            got = {key.split("/")[1]: arrays[key] for key in arrays.files if key.startswith(f"{n}/")}
            scores = Scores(id=asked.id, positions=asked.positions, **got)
            check(asked, scores, log_p(reference, asked), VOCABULARY, tolerance=TOLERANCE)


def preempted_jobs(vocabulary: int) -> list[ScoreJob]:
    return [
        job(
            random_tokens(n, 400 - n, vocabulary),
            top_k=5,
            candidates=ragged(n, 399 - n, vocabulary) if n % 2 else None,
        )
        for n in range(8)
    ]


def test_two_processes_share_the_vocabulary(checkpoint: Path, reference: torch.nn.Module) -> None:
    (backend,) = itertools.islice(loading := _loaded(checkpoint, tensor_parallel_size=2), 1)
    try:
        jobs = mixed_jobs()
        check_all(jobs, score(backend, *jobs), reference)
    finally:
        loading.close()
        asyncio.run(backend.close())


def test_wrong_answers_are_found_before_serving(fused: ScoringBackend, checkpoint: Path) -> None:
    """The check at start, over answers that are spoiled on their way."""
    from teacher_server.backends.vllm_check import check_answers

    facts = fused.facts  # type: ignore[attr-defined]

    def shifted(jobs: list[ScoreJob]) -> list[Scores]:
        answers = score(fused, *jobs)
        return [replace(a, topk_logprob=np.roll(a.topk_logprob, 1, axis=0)) for a in answers]  # type: ignore[arg-type]

    def tailless(jobs: list[ScoreJob]) -> list[Scores]:
        return [replace(a, log_tail=a.log_tail - 1) for a in score(fused, *jobs)]

    def lukewarm(jobs: list[ScoreJob]) -> list[Scores]:
        return score(fused, *(replace(j, options=replace(j.options, temperature=1.0)) for j in jobs))

    def foreign(jobs: list[ScoreJob]) -> list[Scores]:
        moved = [replace(j, token_ids=(j.token_ids + 1) % VOCABULARY) for j in jobs]
        return score(fused, *moved)

    check_answers(lambda jobs: score(fused, *jobs), facts, checkpoint)
    for spoiled in (shifted, tailless, lukewarm, foreign):
        with pytest.raises(ValueError, match="wrong: "):
            check_answers(spoiled, facts, checkpoint)  # type: ignore[arg-type]


def test_falls_back_where_the_fused_path_does_not_start(
    checkpoint: Path, reference: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from teacher_server.backends import vllm_backend

    def broken(*_: object) -> None:
        raise ValueError("the answers of the fused path are wrong: made up")

    monkeypatch.setattr(vllm_backend, "check_answers", broken)
    arguments = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 27}
    backend = vllm_backend.VllmBackend(str(checkpoint), engine_args=arguments)
    try:
        facts = backend.load()
        assert facts.scoring_path.startswith("prompt-logprobs top-k")
        assert backend.features == {"top_k", "float16"}
        assert "falls back" in caplog.text
        assert "the answers of the fused path are wrong: made up" in facts.scoring_path_note
        asked = job(random_tokens(1, 40, VOCABULARY), top_k=4)
        (scores,) = score(backend, asked)
        check(asked, scores, log_p(reference, asked), VOCABULARY, tolerance=1e-4, tail_tolerance=2e-3)
    finally:
        asyncio.run(backend.close())


def test_options_reach_the_pooler_whole() -> None:
    from teacher_server.vllm_plugin.request import Asked

    for asked in (Asked.of(j) for j in mixed_jobs()):
        back = Asked.from_extra(asked.to_extra())
        np.testing.assert_array_equal(back.rows, asked.rows)
        assert back.options == asked.options
        assert (back.candidates is None) == (asked.candidates is None)
        if asked.candidates is not None and back.candidates is not None:
            np.testing.assert_array_equal(back.candidates.ids, asked.candidates.ids)
            np.testing.assert_array_equal(back.candidates.row_offsets, asked.candidates.row_offsets)
    holes = Asked(np.array([3, 4, 9]), ScoreOptions(top_k="all", value_type="float16"), None)
    np.testing.assert_array_equal(Asked.from_extra(holes.to_extra()).rows, [3, 4, 9])
