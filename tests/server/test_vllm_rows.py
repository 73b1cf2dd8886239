"""Reading vLLM's flat prompt logprobs, without an engine: answers are built from float32 log-softmax as vLLM does, and
checked against the same logits in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from teacher_api.errors import InvalidBackendOutput
from teacher_api.types import LOGPROB_FLOOR, Candidates, ScoreOptions
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.vllm_rows import TooFewIds, read_rows, scores_from_full_rows, scores_from_top_k


@dataclass
class Flat:
    start_indices: list[int] = field(default_factory=lambda: [0])
    end_indices: list[int] = field(default_factory=lambda: [0])
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def flat_of(logits: torch.Tensor, tokens: np.ndarray, entries: int) -> Flat:
    """vLLM's answer to a sequence whose row t - 1 of `logits` predicts position t."""
    flat = Flat()
    log_p = logits.to(torch.float32).log_softmax(-1)
    best, ids = log_p.topk(entries, dim=-1)
    for row, token in enumerate(tokens[1:]):
        flat.start_indices.append(len(flat.token_ids))
        flat.token_ids += [int(token), *ids[row].tolist()]
        flat.logprobs += [float(log_p[row, token]), *best[row].tolist()]
        flat.end_indices.append(len(flat.token_ids))
    return flat


def make(
    width: int, *, scale: float, rows: int = 40, seed: int = 0, top: int | None = None
) -> tuple[torch.Tensor, np.ndarray]:
    """(logits [rows, width] in float64, tokens [rows + 1]) of a random model; tokens below `top`."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, generator=generator) * scale
    tokens = np.random.default_rng(seed).integers(0, top or width, rows + 1)
    return logits.double(), tokens.astype(np.int32)


def job(
    tokens: np.ndarray, positions: list[int] | None = None, candidates: Candidates | None = None, **options: object
) -> ScoreJob:
    chosen = np.arange(1, len(tokens)) if positions is None else np.asarray(positions)
    return ScoreJob("a", tokens, 0, chosen.astype(np.int32), ScoreOptions(**options), candidates)  # type: ignore[arg-type]


def tail_of(log_p: np.ndarray, inside: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(np.where(inside, 0.0, np.exp(log_p)).sum(axis=1)), LOGPROB_FLOOR)


@pytest.mark.parametrize(("width", "mass"), [(4096, 2e-6), (32768, 8e-6)])
@pytest.mark.parametrize("scale", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("k", [0, 1, 16, 64])
def test_top_k_tail_is_off_by_a_few_millionths_of_mass_at_most(width: int, mass: float, scale: float, k: int) -> None:
    logits, tokens = make(width, scale=scale)
    asked = job(tokens, top_k=k)
    rows = read_rows(asked, flat_of(logits, tokens, k), len(tokens), k)
    scores = scores_from_top_k(asked, rows, width, width)
    log_p = logits.log_softmax(-1).numpy()
    inside = np.zeros(log_p.shape, dtype=bool)
    inside[np.arange(40), tokens[1:]] = True
    if k:
        assert scores.topk_ids is not None
        np.testing.assert_allclose(scores.topk_logprob, -np.sort(-log_p, axis=1)[:, :k], atol=1e-5)
        inside[np.arange(40)[:, None], scores.topk_ids] = True
    np.testing.assert_allclose(np.exp(scores.log_tail), np.exp(tail_of(log_p, inside)), atol=mass)


def test_a_tail_below_the_resolution_is_bounded_from_above() -> None:
    logits, tokens = make(1000, scale=1.0)
    logits[:, :4] += torch.tensor([60.0, 59.0, 58.0, 55.0])
    tokens[1:] = 0
    asked = job(tokens, top_k=3)
    scores = scores_from_top_k(asked, read_rows(asked, flat_of(logits, tokens, 3), 41, 3), 1000, 1000)
    log_p = logits.log_softmax(-1).numpy()
    inside = np.zeros(log_p.shape, dtype=bool)
    inside[:, :3] = True
    assert (scores.log_tail >= tail_of(log_p, inside) - 1e-3).all()
    seven = job(tokens, top_k=7)
    scores = scores_from_top_k(seven, read_rows(seven, flat_of(logits, tokens, 7), 41, 7), 1000, 1000)
    # 1 - sum(p) says nothing here; that no unseen id beats the seventh does.
    seventh = -np.sort(-log_p, axis=1)[:, 6]
    assert (scores.log_tail <= seventh + np.log(1000) + 1e-3).all()
    assert (scores.log_tail < -30).all()


def test_ids_without_a_token_are_not_offered_and_stay_in_the_tail() -> None:
    logits, tokens = make(100, scale=1.0, top=90)
    logits[:, 95] += 8.0
    asked = job(tokens, top_k=5)
    rows = read_rows(asked, flat_of(logits, tokens, 10), 41, 10)
    scores = scores_from_top_k(asked, rows, 90, 100)
    log_p = logits.log_softmax(-1).numpy()
    best = np.argsort(-log_p[:, :90], axis=1)[:, :5]
    np.testing.assert_array_equal(scores.topk_ids, best)
    inside = np.zeros(log_p.shape, dtype=bool)
    inside[np.arange(40)[:, None], best] = True
    inside[np.arange(40), tokens[1:]] = True
    np.testing.assert_allclose(scores.log_tail, tail_of(log_p, inside), atol=1e-4)


def test_too_many_ids_without_a_token_ask_for_more() -> None:
    logits, tokens = make(100, scale=1.0, top=90)
    logits[:, 90:] += 20.0
    asked = job(tokens, top_k=5)
    with pytest.raises(TooFewIds):
        scores_from_top_k(asked, read_rows(asked, flat_of(logits, tokens, 10), 41, 10), 90, 100)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_full_rows_answer_everything(temperature: float) -> None:
    logits, tokens = make(100, scale=3.0, top=90)
    positions = [1, 2, 17, 40]
    candidates = Candidates.from_rows([[3], [], [4, 5, 4], [89]])
    asked = job(tokens, positions, candidates, top_k=7, temperature=temperature, entropy=True)
    rows = read_rows(asked, flat_of(logits, tokens, 100), 41, 100)
    scores = scores_from_full_rows(asked, rows, 90)
    log_p = (logits / temperature).log_softmax(-1).numpy()[np.asarray(positions) - 1]
    best = np.argsort(-log_p[:, :90], axis=1)[:, :7]
    np.testing.assert_array_equal(scores.topk_ids, best)
    np.testing.assert_allclose(scores.token_logprob, log_p[np.arange(4), tokens[positions]], atol=2e-6)
    np.testing.assert_allclose(scores.candidate_logprob, log_p[[0, 2, 2, 2, 3], [3, 4, 5, 4, 89]], atol=4e-6)
    np.testing.assert_allclose(scores.entropy, -(np.exp(log_p) * log_p).sum(axis=1), atol=2e-6)
    inside = np.zeros(log_p.shape, dtype=bool)
    inside[np.arange(4)[:, None], best] = True
    inside[np.arange(4), tokens[positions]] = True
    inside[[0, 2, 2, 3], [3, 4, 5, 89]] = True
    np.testing.assert_allclose(scores.log_tail, tail_of(log_p, inside), atol=4e-6)


def test_an_answer_that_does_not_fit_the_question_is_withheld() -> None:
    logits, tokens = make(50, scale=1.0, rows=10)
    asked = job(tokens, top_k=4)

    def refused(flat: Flat | None, match: str) -> None:
        with pytest.raises(InvalidBackendOutput, match=match):
            read_rows(asked, flat, len(tokens), 4)

    refused(None, "no prompt logprobs")
    short = flat_of(logits[:-1], tokens[:-1], 4)
    refused(short, "10 rows, expected 11")
    refused(flat_of(logits, tokens, 3), "position 1: vLLM returned 4 entries, expected 5")
    other = flat_of(logits, (tokens + 1) % 50, 4)
    refused(other, "scored token")
    broken = flat_of(logits, tokens, 4)
    broken.logprobs[17] = float("nan")
    refused(broken, "position 4: logprobs are not finite")
