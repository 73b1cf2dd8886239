"""The torch backend's values against a plain float32 transformers forward of each sequence alone, taken to float64, and
the same bits again where they are promised."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tinymodels import ARCHITECTURES, save_tiny, tiny_model
from torch_jobs import TOLERANCE, WIDTH, check, job, reference, scored, spy_on_trunk

from teacher_api.types import Candidates, Scores
from teacher_server.backends.base import ScoreJob

pytestmark = pytest.mark.slow


def mixed_jobs(size: int, lengths: Sequence[int], temperature: float) -> list[ScoreJob]:
    """Every length with every kind of top-k, half with candidates, some with holes in their positions."""
    rng = np.random.default_rng(0)
    jobs = []
    for index, length in enumerate(lengths):
        ids = rng.integers(2, size, length)
        positions = np.arange(1, length)
        if index % 3 == 1 and length > 4:
            positions = positions[rng.random(length - 1) < 0.6]
            positions = positions if len(positions) else np.array([length - 2])
        candidates = None
        if index % 2:
            candidates = Candidates.from_rows([rng.integers(0, size, rng.integers(0, 4)) for _ in positions])
        top_k = (0, 1, 16, size, "all")[index % 5]
        options = {"top_k": top_k, "temperature": temperature, "entropy": True, "rank": True}
        jobs.append(job(f"job{index}", ids, positions, candidates, **options))
    return jobs


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_scores_as_transformers_does(
    arch: str, temperature: float, checkpoint: Any, opened: Any
) -> None:
    backend = opened(checkpoint(arch), batch_tokens=300, head_chunk_rows=7, max_sequence_tokens=128)
    facts = backend.load()
    assert facts.logit_width == WIDTH
    assert 120 <= facts.tokenizer_size < WIDTH
    assert facts.max_sequence_tokens == 128
    assert facts.batch_tokens == 300
    model = tiny_model(arch)
    jobs = mixed_jobs(facts.tokenizer_size, [2, 128, 3, 17, 64, 5, 33, 100, 9, 128, 2, 50, 21, 22, 23], temperature)
    for answer, asked in zip(scored(backend, jobs), jobs, strict=True):
        check(answer, asked, reference(model, asked), facts.tokenizer_size)


@pytest.mark.slow
def test_every_length_in_one_call(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("qwen3"), batch_tokens=1000)
    jobs = mixed_jobs(120, range(2, 129), 1.0)
    model = tiny_model("qwen3")
    for answer, asked in zip(scored(backend, jobs), jobs, strict=True):
        check(answer, asked, reference(model, asked), 120)


def test_sharp_teachers_keep_their_tails(tmp_path: Path, opened: Any) -> None:
    """A head so large that most of the vocabulary has less mass than float32 can add to 1."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(50.0)
    path = save_tiny(tmp_path / "sharp", "llama")
    model.save_pretrained(path)
    backend = opened(path)
    jobs = mixed_jobs(120, [20, 21, 22, 23, 24, 25, 26, 27, 28, 29], 1.0)
    jobs = [replace(each, options=replace(each.options, top_k=16)) for each in jobs]
    deepest = 0.0
    for answer, asked in zip(scored(backend, jobs), jobs, strict=True):
        logprob = reference(model, asked)
        rows = np.arange(len(asked.positions))
        outside = np.ones(logprob.shape, bool)
        outside[rows, asked.token_ids[asked.positions]] = False
        outside[rows[:, None], answer.topk_ids] = False
        if asked.candidates is not None:
            outside[np.repeat(rows, np.diff(asked.candidates.row_offsets)), asked.candidates.ids] = False
        expected = np.log(np.where(outside, np.exp(logprob), 0.0).sum(-1))
        deepest = min(deepest, float(expected.min()))
        # The forward's own float32 rounding grows with the logits: a relative bound.
        np.testing.assert_allclose(answer.log_tail, expected, rtol=1e-6, atol=5e-5)
    assert deepest < -20


def test_float16_values_and_hidden_states(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("gemma2"))
    asked = job("a", range(2, 40), top_k=8, value_type="float16", hidden=True)
    exact = replace(asked, options=replace(asked.options, value_type="float32"))
    half, full = scored(backend, [asked, exact])
    assert half.topk_logprob is not None
    assert half.topk_logprob.dtype == np.float16
    assert full.topk_logprob is not None
    np.testing.assert_allclose(half.topk_logprob, full.topk_logprob, rtol=2.0**-11, atol=1e-7)
    np.testing.assert_array_equal(half.topk_ids, full.topk_ids)
    model = tiny_model("gemma2")
    with torch.inference_mode():
        states = model.model(torch.from_numpy(asked.token_ids.astype(np.int64))[None]).last_hidden_state[0]
    assert half.hidden is not None
    np.testing.assert_allclose(half.hidden, states[asked.positions - 1], rtol=0, atol=1e-5)


def test_only_what_precedes_the_last_position_runs(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"))
    whole, early = scored(backend, [job("a", range(2, 42)), job("b", range(2, 42), [3, 7])])
    assert (whole.computed_tokens, early.computed_tokens) == (39, 7)
    np.testing.assert_allclose(early.token_logprob, whole.token_logprob[[2, 6]], rtol=0, atol=TOLERANCE)


def test_bfloat16_gets_float32_logits(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("qwen3"), dtype="bfloat16")
    facts = backend.load()
    assert (facts.dtype, facts.head_dtype) == ("bfloat16", "float32")
    asked = job("a", range(2, 100), top_k=64)
    (answer,) = scored(backend, [asked])
    # Loaded, not cast: .bfloat16() would round the rotary frequencies too.
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=torch.bfloat16)
    with torch.inference_mode():
        hidden = model.model(torch.arange(2, 99)[None]).last_hidden_state[0]
        logprob = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)
    expected = np.take_along_axis(logprob.numpy(), answer.topk_ids.astype(np.int64), -1)
    np.testing.assert_allclose(answer.topk_logprob, expected, rtol=0, atol=1e-4)
    assert all(len(np.unique(row)) == 64 for row in answer.topk_logprob)


def test_long_rope_is_that_of_the_sequence_not_of_its_batch(tmp_path: Path, opened: Any) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
    }
    settings = {**ARCHITECTURES["llama"][1], "original_max_position_embeddings": 32, "rope_parameters": rope}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Phi3Config(**settings, vocab_size=WIDTH, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    path = save_tiny(tmp_path / "phi3", "llama")
    model.save_pretrained(path)
    backend = opened(path)
    size = backend.load().tokenizer_size
    options = {"entropy": True, "rank": True, "top_k": 3}
    rng = np.random.default_rng(0)
    jobs = [job(str(n), rng.integers(2, size, n), **options) for n in (10, 31, 32, 33, 34, 60)]
    jobs.append(job("early", rng.integers(2, size, 50), [3, 9], **options))
    together, alone = scored(backend, jobs), [scored(backend, [asked])[0] for asked in jobs]
    for answer, asked in zip(together + alone, jobs + jobs, strict=True):
        check(answer, asked, reference(model, asked), size)


def as_bytes(answer: Scores) -> list[bytes]:
    values = (answer.token_logprob, answer.log_tail, answer.topk_ids, answer.topk_logprob, answer.entropy, answer.rank)
    return [value.tobytes() for value in values if value is not None]


REFERENCE_JOB = {"top_k": 16, "entropy": True, "rank": True}


@pytest.mark.parametrize("arch", ["qwen3", "mixtral", "mamba2"])
def test_reference_mode_gives_the_same_bits_alone_and_in_company(arch: str, checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint(arch), reference=True, threads=0)
    shapes = spy_on_trunk(backend)
    rng = np.random.default_rng(1)
    jobs = [job(str(i), rng.integers(2, 120, n), **REFERENCE_JOB) for i, n in enumerate([30, 31, 30, 128, 2, 64])]
    together = scored(backend, jobs)
    assert {rows for rows, _ in shapes} == {1}
    assert backend.load().batch_tokens == 0, "a sequence at a time, however long"
    for asked, answer in zip(reversed(jobs), reversed(together), strict=True):
        assert as_bytes(scored(backend, [asked])[0]) == as_bytes(answer)
    again = opened(checkpoint(arch), reference=True, threads=0)
    for asked, answer in zip(jobs, together, strict=True):
        assert as_bytes(scored(again, [asked])[0]) == as_bytes(answer)


SCORE_ELSEWHERE = """
import asyncio, sys
import numpy as np
from teacher_api.types import ScoreOptions
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.torch_backend import TorchBackend

backend = TorchBackend(sys.argv[1], reference=True)
backend.load()
ids = np.arange(2, 90, dtype=np.int32)
options = ScoreOptions(top_k=16, entropy=True, rank=True)
answer = asyncio.run(backend.score([ScoreJob("a", ids, 0, np.arange(1, 88, dtype=np.int32), options)]))[0]
parts = (answer.token_logprob, answer.log_tail, answer.topk_ids, answer.topk_logprob, answer.entropy, answer.rank)
sys.stdout.write(b"".join(part.tobytes() for part in parts).hex())
"""


@pytest.mark.slow
def test_reference_mode_gives_the_same_bits_in_another_process(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("qwen3"), reference=True, threads=0)
    ids = np.arange(2, 90)
    company = [job("x", ids[:50], **REFERENCE_JOB), job("a", ids, range(1, 88), **REFERENCE_JOB)]
    here = b"".join(as_bytes(scored(backend, company)[1])).hex()
    command = [sys.executable, "-c", SCORE_ELSEWHERE, str(checkpoint("qwen3"))]
    there = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert there.stdout == here
