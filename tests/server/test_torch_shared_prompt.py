"""A prompt that several sequences share: run once where the model allows it, with the values of a plain float64
transformers forward of each whole sequence, and tokens counted as they were computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reliability import holds
from tinymodels import save_tiny, tiny_model
from torch_jobs import TOLERANCE, check, reference, score, scored, spy_on_steps

from teacher_api.errors import BackendFailed
from teacher_api.types import Candidates, ScoreOptions, Scores
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.shared_prompt import CACHED_TOKEN_WEIGHT, MIN_SAVED_TOKENS

pytestmark = pytest.mark.slow

SIZE = 120
SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    **{arch: (arch, {}) for arch in ("qwen3", "qwen2", "llama", "gemma2", "gpt2", "mixtral")},
    "mistral of a sliding window": ("mistral", {"sliding_window": 16}),
    "mistral of a window that nothing fills": ("mistral", {"sliding_window": 1000}),
    "gemma2 of a window as long as the prompt": ("gemma2", {"sliding_window": 60}),
    "qwen2 of mixed layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
}
NOT_SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", {}),
    "dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
}


def group(
    prompt: Sequence[int], lengths: Sequence[int], *, key: bytes = b"p", seed: int = 0, **options: Any
) -> list[ScoreJob]:
    """Completions of these lengths on one prompt, each scored whole."""
    rng, jobs = np.random.default_rng(seed), []
    for number, length in enumerate(lengths):
        ids = np.concatenate([prompt, rng.integers(2, SIZE, length)]).astype(np.int32)
        positions = np.arange(len(prompt), len(ids), dtype=np.int32)
        asked = ScoreOptions(**options)
        jobs.append(ScoreJob(f"{key.decode()}{number}", ids, len(prompt), positions, asked, None, key))
    return jobs


def mixed_group(prompt: Sequence[int]) -> list[ScoreJob]:
    """A group whose members ask for different things: within the prompt, across its end, holes, candidates, options."""
    jobs = group(prompt, [30, 7, 1, 12, 40, 3, 25], entropy=True, rank=True)
    ends = len(prompt)
    jobs[1] = replace(jobs[1], positions=np.arange(1, jobs[1].num_tokens, dtype=np.int32))
    jobs[3] = replace(jobs[3], positions=np.array([2, ends - 1, ends, ends + 1, ends + 9], np.int32))
    jobs[5] = replace(jobs[5], positions=np.array([1, 5, ends - 1], np.int32))
    jobs[6] = replace(jobs[6], candidates=Candidates.from_rows([[n % SIZE, 7] for n in range(25)]))
    kinds: list[Any] = [0, 4, 16, "all", 1, 8, 3]
    return [
        replace(job, options=replace(job.options, top_k=k, temperature=1.0 + n % 2))
        for n, (job, k) in enumerate(zip(jobs, kinds, strict=True))
    ]


def checkpoint_of(tmp_path: Path, arch: str, overrides: dict[str, Any]) -> tuple[Path, Any]:
    """The checkpoint, and the same model in float64."""
    path = save_tiny(tmp_path / "model", arch, **overrides)
    return path, float64_model(arch, **overrides)


def float64_model(arch: str, **overrides: Any) -> Any:
    model = tiny_model(arch, **overrides).double()
    if arch == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


PROMPT = np.random.default_rng(7).integers(2, SIZE, 60).tolist()


@pytest.mark.parametrize("name", SHARING)
def test_values_are_those_of_whole_sequences(name: str, tmp_path: Path, opened: Any) -> None:
    path, model = checkpoint_of(tmp_path, *SHARING[name])
    backend = opened(path, head_chunk_rows=7)
    size = backend._loaded.facts.tokenizer_size
    with_cache, without = spy_on_steps(backend)
    jobs = mixed_group(PROMPT)
    alone = replace(group(PROMPT[:20], [9], key=b"other")[0], options=jobs[0].options)
    answers = scored(backend, [*jobs[:3], alone, *jobs[3:]])
    for answer, asked in zip(answers, [*jobs[:3], alone, *jobs[3:]], strict=True):
        check(answer, asked, reference(model, asked), size)
    assert with_cache == [(1, 60), (len(jobs), 39)]
    assert without == [(1, 28)]


def test_alone_in_a_batch_and_after_a_shared_prompt_in_any_order(
    tmp_path: Path, opened: Any, record_property: Any
) -> None:
    path, model = checkpoint_of(tmp_path, *SHARING["qwen3"])
    backend = opened(path)
    jobs = group(PROMPT, [30, 7, 1, 12, 40, 3, 25])
    expected = {
        job.id: reference(model, job)[np.arange(len(job.positions)), job.token_ids[job.positions]] for job in jobs
    }
    worst = 0.0
    orders = [[n] for n in range(len(jobs))]
    orders += [list(np.random.default_rng(seed).permutation(len(jobs))) for seed in range(4)]
    for order in orders:
        for shared in (True, False):
            asked = [jobs[n] if shared else replace(jobs[n], prompt_key=b"") for n in order]
            for answer in scored(backend, asked):
                worst = max(worst, float(np.abs(answer.token_logprob - expected[answer.id]).max()))
    assert worst <= TOLERANCE
    holds(record_property, "S24", f"torch: {worst:.1e} from a float64 forward, alone, batched and shared, in 5 orders")


@pytest.mark.parametrize("name", NOT_SHARING)
def test_models_without_such_a_cache_run_whole_sequences(name: str, tmp_path: Path, opened: Any) -> None:
    path, _ = checkpoint_of(tmp_path, *NOT_SHARING[name])
    backend = opened(path, max_sequence_tokens=128)
    size = backend._loaded.facts.tokenizer_size
    with_cache, without = spy_on_steps(backend)
    jobs = group(PROMPT, [30, 7, 12], entropy=True, rank=True, top_k=3)
    for answer, asked in zip(scored(backend, jobs), jobs, strict=True):
        model = tiny_model(NOT_SHARING[name][0], **NOT_SHARING[name][1])
        check(answer, asked, reference(model, asked), size)
        assert (answer.computed_tokens, answer.cached_tokens) == (asked.num_tokens - 1, 0)
    assert not with_cache
    assert without == [(3, 89)]
    assert not backend.policy.shares_prompts


def test_reference_mode_never_shares(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("qwen3"), reference=True)
    with_cache, without = spy_on_steps(backend)
    answers = scored(backend, group(PROMPT, [30, 7, 12]))
    assert not with_cache
    assert sorted(without) == [(1, 66), (1, 71), (1, 89)]
    assert all(answer.cached_tokens == 0 for answer in answers)
    assert not backend.policy.shares_prompts


def test_tokens_are_counted_as_they_were_computed(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"))
    with_cache, _ = spy_on_steps(backend)
    jobs = group(PROMPT, [5, 30, 12])
    jobs.append(replace(jobs[0], id="within", positions=np.array([3, 40], np.int32)))
    answers = scored(backend, jobs)
    counts = [(answer.computed_tokens, answer.cached_tokens) for answer in answers]
    assert counts == [(4, 60), (29 + 60, 0), (11, 60), (0, 40)]
    assert with_cache == [(1, 60), (4, 29)]


def test_rows_within_the_prompt_alone_need_no_more_than_them(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"))
    with_cache, _ = spy_on_steps(backend)
    options = {"entropy": True, "rank": True, "top_k": 2}
    jobs = [replace(job, positions=np.array([3, 40 + n], np.int32)) for n, job in enumerate(group(PROMPT, [5] * 3))]
    jobs = [replace(job, options=ScoreOptions(**options)) for job in jobs]
    model = float64_model("llama")
    for answer, asked in zip(scored(backend, jobs), jobs, strict=True):
        check(answer, asked, reference(model, asked), SIZE)
    assert with_cache == [(1, 42)]


def test_forwards_keep_to_the_budget(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"), batch_tokens=100, batch_sequences=4)
    with_cache, without = spy_on_steps(backend)
    lengths = [68, 40, 11, 11, 11, 11, 11, 2, 2]
    jobs = group(PROMPT, lengths, entropy=True, rank=True)
    model = float64_model("llama")
    answers = scored(backend, jobs)
    for answer, asked in zip(answers, jobs, strict=True):
        check(answer, asked, reference(model, asked), SIZE)
    assert with_cache[0] == (1, 60)
    assert sum(rows for rows, _ in with_cache[1:]) == len(lengths)
    for rows, tokens in with_cache[1:]:
        assert rows <= 4
        assert rows * (tokens + CACHED_TOKEN_WEIGHT * 60) <= 100 or rows == 1
    assert len(with_cache) == 1 + 4
    assert not without
    assert sum(answer.computed_tokens for answer in answers) == 60 + sum(lengths) - len(lengths)


def test_what_saves_too_little_runs_whole(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"))
    with_cache, without = spy_on_steps(backend)
    few = MIN_SAVED_TOKENS // 3 + 1
    scored(backend, group(PROMPT[:few], [9, 9, 9]) + group(PROMPT[:9], [4], key=b"q"))
    assert not with_cache
    assert sum(rows for rows, _ in without) == 4
    scored(backend, group(PROMPT[:few], [9, 9, 9, 9]))
    assert with_cache == [(1, few), (4, 8)]


def test_groups_of_several_prompts_in_one_batch(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("qwen3"))
    with_cache, _ = spy_on_steps(backend)
    options = {"entropy": True, "rank": True, "top_k": 5}
    first, second = group(PROMPT, [9, 20, 3], **options), group(PROMPT[::-1], [8, 3], key=b"q", seed=1, **options)
    jobs = [first[0], second[0], first[1], second[1], first[2]]
    model = float64_model("qwen3")
    for answer, asked in zip(scored(backend, jobs), jobs, strict=True):
        check(answer, asked, reference(model, asked), SIZE)
    assert with_cache == [(1, 60), (3, 19)]  # two of the second prompt save 60 tokens: too few


def test_a_failing_sequence_fails_alone(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"))

    def fail(ids: torch.Tensor) -> None:
        if bool((ids == 119).any()):
            raise torch.OutOfMemoryError("no memory\nleft")

    spy_on_steps(backend, fail)
    options = {"entropy": True, "rank": True}
    jobs = group(PROMPT, [9, 20, 3], **options)
    jobs[1].token_ids[70] = 119  # it would not have failed without the spy, and does not fail alone: no cache there
    model = float64_model("llama")
    for answer, asked in zip(scored(backend, jobs), jobs, strict=True):
        check(answer, asked, reference(model, asked), SIZE)
        assert (answer.computed_tokens, answer.cached_tokens) == (asked.num_tokens - 1, 0)


def test_a_prompt_that_fails_leaves_its_sequences_to_run_whole(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"))

    def fail(ids: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no memory\nleft")

    _, without = spy_on_steps(backend, fail)
    answers = score(backend, group(PROMPT, [9, 20, 3]))
    assert not any(isinstance(answer, BackendFailed) for answer in answers)
    assert all(isinstance(answer, Scores) for answer in answers)
    assert len(without) == 3
