"""How far scores are from a float64 forward of the same weights.

Shape legend: T tokens, N scored rows, K top-k, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.systems import Work
from teacher_api.types import Candidates, Completion, ScoreOptions, ScoreRequest, Scores

F64 = npt.NDArray[np.float64]
GROUP, PROMPT, COMPLETION = 3, 160, 48  # a prompt of more than one cache block
WHOLE_ROWS = 8
CANDIDATES = 64
NEAR_TIE = 1e-4
"""Nats within which an id may be on either side of another without its rank being wrong."""


class Reference:
    """Logits of the checkpoint by transformers, all of it in float64: its norms would compute in float32."""

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
        for module in self._model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _norm.__get__(module)

    def logits(self, sequence: np.ndarray) -> F64:
        """[T, V]; row t is about token t + 1."""
        import torch

        with torch.inference_mode():
            result: F64 = self._model(torch.from_numpy(sequence).long()[None]).logits[0].numpy()
        return result

    def head(self, hidden_NH: np.ndarray) -> F64:
        import torch

        with torch.inference_mode():
            result: F64 = self._model.lm_head(torch.from_numpy(hidden_NH).double()).numpy()
        return result


def _norm(self: Any, x: Any) -> Any:
    return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def log_softmax(logits: F64, temperature: float = 1.0) -> F64:
    scaled = logits / temperature
    top = scaled.max(axis=-1, keepdims=True)
    normalised: F64 = scaled - top - np.log(np.exp(scaled - top).sum(axis=-1, keepdims=True))
    return normalised


def questions(random: np.random.Generator, vocabulary: int) -> tuple[Work, dict[str, ScoreRequest]]:
    """A group on one prompt, and every option asked of it."""

    def tokens(count: int) -> np.ndarray:
        return random.integers(2, vocabulary, count).astype(np.int32)

    work = Work([tokens(COMPLETION) for _ in range(GROUP)], [tokens(PROMPT)], [0] * GROUP)

    def ask(rows: int = COMPLETION, candidates: int = 0, **options: Any) -> ScoreRequest:
        completions = []
        for i, completion in enumerate(work.completions):
            ids = [random.choice(vocabulary, candidates, replace=False) for _ in range(rows if candidates else 0)]
            chosen = Candidates.from_rows(ids) if candidates else None
            completions.append(Completion(str(i), completion, 0, ((PROMPT, PROMPT + rows),), chosen))
        return ScoreRequest(completions, prompts=work.prompts, options=ScoreOptions(**options))

    return work, {
        "plain": ask(),
        "top_k": ask(top_k=16),
        "everything": ask(candidates=CANDIDATES, top_k=64, temperature=0.7, entropy=True, rank=True),
        "whole": ask(WHOLE_ROWS, top_k="all", temperature=1.5),
        "hidden": ask(WHOLE_ROWS, hidden=True),
        "float16": ask(top_k=64, value_type="float16"),
    }


def errors(
    reference: Reference, work: Work, requests: dict[str, ScoreRequest], answers: dict[str, list[Scores]]
) -> dict[str, float]:
    """`max_abs_error` over all float32 values in nats, `max_float16_error` over the float16 ones, `rank_errors`; and
    `max_abs_error_as_stock` over what stock vLLM is asked for, too: token and top 16 at temperature 1, by their ids."""
    worst: dict[str, float] = defaultdict(float)
    worst["rank_errors"] = 0.0
    for i, sequence in enumerate(work.sequences):
        logits = reference.logits(sequence)
        for name, request in requests.items():
            scores, asked = answers[name][i], request.completions[i].candidates
            logp_NV = log_softmax(logits[scores.positions - 1], request.options.temperature)
            found = _of_one(logp_NV, sequence[scores.positions], scores, asked)
            if scores.hidden is not None:
                from_hidden = log_softmax(reference.head(scores.hidden), request.options.temperature)
                found["max_abs_error"] = max(found["max_abs_error"], float(np.abs(from_hidden - logp_NV).max()))
            if name == "top_k":
                found["max_abs_error_as_stock"] = _error_by_id(logp_NV, sequence[scores.positions], scores)
            for key, value in found.items():
                worst[key] = worst[key] + value if key == "rank_errors" else max(worst[key], value)
    return dict(worst)


def _of_one(logp_NV: F64, token_N: np.ndarray, scores: Scores, candidates: Candidates | None) -> dict[str, float]:
    rows_N = np.arange(len(token_N))
    outside_NV = np.ones(logp_NV.shape, dtype=bool)
    outside_NV[rows_N, token_N] = False
    token_logp_N = logp_NV[rows_N, token_N]
    gaps = [scores.token_logprob - token_logp_N]
    found: dict[str, float] = {}
    whole = scores.topk_ids is None and scores.topk_logprob is not None
    if scores.topk_logprob is not None:
        gap = scores.topk_logprob.astype(np.float64) - logp_NV if whole else _top_k_gap(logp_NV, scores)
        if scores.topk_logprob.dtype == np.float16:
            found["max_float16_error"] = float(np.abs(gap).max())
        else:
            gaps.append(gap.reshape(-1))
    if scores.topk_ids is not None:
        outside_NV[rows_N[:, None], scores.topk_ids] = False
    if candidates is not None and scores.candidate_logprob is not None:
        row_M = np.repeat(rows_N, np.diff(candidates.row_offsets))
        gaps.append(scores.candidate_logprob - logp_NV[row_M, candidates.ids])
        outside_NV[row_M, candidates.ids] = False
    if not whole:
        gaps.append(scores.log_tail - np.log(np.where(outside_NV, np.exp(logp_NV), 0.0).sum(axis=1)))
    if scores.entropy is not None:
        gaps.append(scores.entropy + (np.exp(logp_NV) * logp_NV).sum(axis=1))
    if scores.rank is not None:
        low_N = 1 + (logp_NV > token_logp_N[:, None] + NEAR_TIE).sum(axis=1)
        high_N = (logp_NV > token_logp_N[:, None] - NEAR_TIE).sum(axis=1)  # the token itself is the 1
        found["rank_errors"] = float(((scores.rank < low_N) | (scores.rank > high_N)).sum())
    found["max_abs_error"] = float(np.abs(np.concatenate(gaps)).max())
    return found


def _error_by_id(logp_NV: F64, token_N: np.ndarray, scores: Scores) -> float:
    assert scores.topk_ids is not None
    ids_NK = np.column_stack([token_N, scores.topk_ids]).astype(np.int64)
    values_NK = np.column_stack([scores.token_logprob, scores.topk_logprob])
    return float(np.abs(values_NK - np.take_along_axis(logp_NV, ids_NK, axis=1)).max())


def _top_k_gap(logp_NV: F64, scores: Scores) -> F64:
    """Each value against the id it is given for, or against the true value of its place, whichever is farther."""
    assert scores.topk_ids is not None
    assert scores.topk_logprob is not None
    value_NK = scores.topk_logprob.astype(np.float64)
    k = value_NK.shape[1]
    of_id_NK = np.take_along_axis(logp_NV, scores.topk_ids.astype(np.int64), axis=1)
    of_place_NK = -np.sort(-np.partition(logp_NV, -k, axis=1)[:, -k:], axis=1)
    gap: F64 = np.maximum(np.abs(value_NK - of_id_NK), np.abs(value_NK - of_place_NK))
    return gap


def stock_error(
    reference: Reference, sequences: list[np.ndarray], answers: list[list[dict[str, dict[str, float]]]]
) -> float:
    """Over all values of stock vLLM's prompt logprobs, of the positions that `questions` has scored."""
    worst = 0.0
    for sequence, rows in zip(sequences, answers, strict=True):
        logp = log_softmax(reference.logits(sequence))
        for position, row in enumerate(rows[PROMPT - 1 :], start=PROMPT):
            ids = np.array([int(name) for name in row])
            values = np.array([entry["logprob"] for entry in row.values()])
            worst = max(worst, float(np.abs(values - logp[position - 1, ids]).max()))
    return worst
