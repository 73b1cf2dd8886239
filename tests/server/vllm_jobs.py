"""Jobs for a vLLM engine, and their answers next to a float64 transformers forward of the same float32 checkpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tinymodels import save_tiny

from teacher_api.errors import TeacherError
from teacher_api.types import LOGPROB_FLOOR, Candidates, ScoreOptions, Scores
from teacher_server.backends.base import ScoreJob, ScoringBackend

TOLERANCE = 1e-4


def checkpoint_for_vllm(path: Path, **settings: Any) -> Path:
    """vLLM's attention on CPUs knows heads of 32 and more."""
    heads = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return save_tiny(path, "qwen3", **{**heads, "scale": 3.0, **settings})


def random_tokens(seed: int, length: int, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, length)


def ragged(seed: int, num_rows: int, vocabulary: int) -> Candidates:
    """0 to 3 candidates for each row."""
    return Candidates.from_rows([random_tokens(seed + n, n % 4, vocabulary) for n in range(num_rows)])


def job(tokens: np.ndarray, positions: object = None, **settings: object) -> ScoreJob:
    candidates = settings.pop("candidates", None)
    chosen = np.arange(1, len(tokens)) if positions is None else np.asarray(positions)
    return ScoreJob(
        id=f"{len(tokens)} tokens",
        token_ids=tokens.astype(np.int32),
        prompt_tokens=0,
        positions=chosen.astype(np.int32),
        options=ScoreOptions(**settings),  # type: ignore[arg-type]
        candidates=candidates,  # type: ignore[arg-type]
    )


@torch.inference_mode()
def log_p(reference: torch.nn.Module, asked: ScoreJob) -> np.ndarray:
    """log p [N, W] in float64, over all columns, at the job's temperature."""
    logits = reference(torch.tensor(asked.token_ids[None].astype(np.int64))).logits[0]
    return (logits / asked.options.temperature).log_softmax(-1)[asked.positions - 1].numpy()


def answer(result: Scores | TeacherError) -> Scores:
    assert isinstance(result, Scores), result
    return result


def score(backend: ScoringBackend, *jobs: ScoreJob) -> list[Scores]:
    async def all_at_once() -> list[list[Scores | TeacherError]]:
        return await asyncio.gather(*(backend.score([one]) for one in jobs))

    return [answer(results[0]) for results in asyncio.run(all_at_once())]


def check(
    asked: ScoreJob,
    scores: Scores,
    expected_NW: np.ndarray,
    vocabulary: int,
    *,
    tolerance: float = TOLERANCE,
    tail_tolerance: float | None = None,
) -> None:
    """Every value that was asked for, by its definition."""
    rows = np.arange(len(asked.positions))
    tokens = asked.token_ids[asked.positions]
    outside = np.ones_like(expected_NW, dtype=bool)
    outside[rows, tokens] = False
    assert scores.positions.tolist() == asked.positions.tolist()
    np.testing.assert_allclose(scores.token_logprob, expected_NW[rows, tokens], rtol=0, atol=tolerance)
    k = asked.options.top_k
    if k == "all":
        assert scores.topk_ids is None
        np.testing.assert_allclose(scores.topk_logprob, expected_NW[:, :vocabulary], rtol=0, atol=tolerance)
        outside[:, :vocabulary] = False
    elif k:
        _check_top_k(scores, k, expected_NW, vocabulary, tolerance)
        outside[rows[:, None], scores.topk_ids] = False
    if asked.candidates is not None:
        row_of = np.repeat(rows, np.diff(asked.candidates.row_offsets))
        expected = expected_NW[row_of, asked.candidates.ids]
        np.testing.assert_allclose(scores.candidate_logprob, expected, rtol=0, atol=tolerance)
        outside[row_of, asked.candidates.ids] = False
    with np.errstate(divide="ignore"):
        tail = np.maximum(np.log(np.where(outside, np.exp(expected_NW), 0).sum(axis=1)), LOGPROB_FLOOR)
    np.testing.assert_allclose(scores.log_tail, tail, rtol=0, atol=tail_tolerance or tolerance)
    if asked.options.entropy:
        entropy = -(np.exp(expected_NW) * expected_NW).sum(axis=1)
        np.testing.assert_allclose(scores.entropy, entropy, rtol=0, atol=tolerance)
    if asked.options.rank:
        own = expected_NW[rows, tokens][:, None]
        assert scores.rank is not None
        assert (scores.rank >= 1 + (expected_NW > own + tolerance).sum(axis=1)).all()
        assert (scores.rank <= 1 + (expected_NW > own - tolerance).sum(axis=1)).all()


def _check_top_k(scores: Scores, k: int, expected_NW: np.ndarray, vocabulary: int, tolerance: float) -> None:
    assert scores.topk_ids is not None
    assert scores.topk_ids.shape == (len(expected_NW), k)
    assert scores.topk_ids.max() < vocabulary
    assert all(len(set(row)) == k for row in scores.topk_ids.tolist())
    best = -np.sort(-expected_NW[:, :vocabulary], axis=1)[:, :k]
    np.testing.assert_allclose(scores.topk_logprob, best, rtol=0, atol=tolerance)
    own = np.take_along_axis(expected_NW, scores.topk_ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(scores.topk_logprob, own, rtol=0, atol=tolerance)
