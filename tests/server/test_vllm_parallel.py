"""Engines of two processes that divide the layers or the sequences, on the fused path (test_vllm_fused.py divides the
vocabulary). Where vLLM runs them: a float64 model's scores. Where it doesn't: one line that names the combination."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_jobs import check, checkpoint_for_vllm, job, log_p, ragged, random_tokens, score

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # vLLM and what it starts, not ours
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::pytest.PytestWarning"),
]

VOCABULARY, WIDTH, POSITIONS = 490, 500, 420
START_S = 200.0  # an engine that hangs ends in the refusal, too


@pytest.mark.parametrize("size", ["pipeline_parallel_size", "data_parallel_size"])
def test_two_processes_score_right_or_are_refused_by_name(size: str, tmp_path: Path) -> None:
    from teacher_server.backends.vllm_backend import VllmBackend

    sizes = {"tokenizer_size": VOCABULARY, "vocab_size": WIDTH, "max_position_embeddings": POSITIONS}
    checkpoint = checkpoint_for_vllm(tmp_path / "teacher", **sizes)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    small = {"max_num_batched_tokens": 100, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 27}
    backend = VllmBackend(
        str(checkpoint), scoring_path="fused", engine_args={**small, size: 2}, start_timeout_s=START_S
    )
    try:
        refusal = None
        try:
            assert backend.load().scoring_path.startswith("fused")
        except ValueError as error:
            refusal = str(error)
        if refusal is not None:
            assert size == "pipeline_parallel_size", refusal  # data parallelism runs on CPUs
            assert f"(scoring path fused with {size} 2)" in refusal
            assert "\n" not in refusal
            return
        shared = random_tokens(0, 266, VOCABULARY)
        jobs = []
        for n in range(16):
            own = random_tokens(n + 1, 5 + 25 * n, VOCABULARY)
            tokens, first = (np.concatenate([shared, own[:150]]), len(shared)) if n % 2 else (own, 1)
            positions = np.arange(first, len(tokens))
            asked = job(tokens, positions, top_k=[0, 5, "all"][n % 3], candidates=ragged(n, len(positions), VOCABULARY))
            jobs.append(replace(asked, options=replace(asked.options, temperature=1.0 + n % 2, rank=True)))
        for asked, scores in zip(jobs, score(backend, *jobs), strict=True):
            check(asked, scores, log_p(reference, asked), VOCABULARY, tolerance=1e-5)
    finally:
        asyncio.run(backend.close())
