"""From logits to scores with numpy in float64, straight from the definitions. For backends that make up or permute
logits; slow on purpose-built engines' scale, exact on any.

Shape legend: N rows, W logit width, V tokenizer size, K top-k, M candidates over all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_api.types import LOGPROB_FLOOR, Scores
from teacher_server.backends.base import ScoreJob

F64 = npt.NDArray[np.float64]
CHUNK_VALUES = 1 << 21  # logits held at a time: 16 MiB of float64


def score_rows(job: ScoreJob, logits_of: Callable[[npt.NDArray[np.int32]], F64], width: int, vocabulary: int) -> Scores:
    """Scores all rows of `job`, a chunk of rows at a time.

    log p = z/T - logsumexp(z/T) over all W columns; log_tail = logsumexp of log p over the columns outside
    (top-k, candidates, actual token); entropy = -sum p log p; rank = 1 + #{v: p_v > p_token}. Ties in the top-k go to
    the smaller id. Natural logarithms; nothing is below LOGPROB_FLOOR.

    Args:
        logits_of: gives logits [n, W] of the positions [n] it is asked for.
        width: W. vocabulary: V; ids from V on stay in the tail.
    """
    step = max(1, CHUNK_VALUES // width)
    parts = [
        _chunk(job, slice(start, min(start + step, len(job.positions))), logits_of, vocabulary)
        for start in range(0, len(job.positions), step)
    ]
    joined: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return Scores(id=job.id, positions=job.positions, computed_tokens=job.num_tokens, **joined)


def _chunk(
    job: ScoreJob, rows: slice, logits_of: Callable[[npt.NDArray[np.int32]], F64], vocabulary: int
) -> dict[str, Any]:
    positions, options = job.positions[rows], job.options
    z_NW = logits_of(positions) / options.temperature
    z_NW = z_NW - z_NW.max(axis=1, keepdims=True)
    logp_NW = z_NW - np.log(np.exp(z_NW).sum(axis=1, keepdims=True))
    row_N = np.arange(len(positions))
    token_N = job.token_ids[positions]
    outside_NW = np.ones(logp_NW.shape, dtype=bool)
    outside_NW[row_N, token_N] = False
    result: dict[str, Any] = {"token_logprob": _floored(logp_NW[row_N, token_N])}
    value_type = np.float16 if options.value_type == "float16" else np.float32
    if options.top_k == "all":
        outside_NW[:, :vocabulary] = False
        result["topk_logprob"] = _floored(logp_NW[:, :vocabulary]).astype(value_type)
    elif options.top_k:
        ids_NK = np.argsort(-logp_NW[:, :vocabulary], axis=1, kind="stable")[:, : options.top_k]
        outside_NW[row_N[:, None], ids_NK] = False
        result["topk_ids"] = ids_NK.astype(np.int32)
        result["topk_logprob"] = _floored(np.take_along_axis(logp_NW, ids_NK, axis=1)).astype(value_type)
    if job.candidates is not None:
        offsets = job.candidates.row_offsets[rows.start : rows.stop + 1]
        ids_M = job.candidates.ids[offsets[0] : offsets[-1]]
        row_M = np.repeat(row_N, np.diff(offsets))
        outside_NW[row_M, ids_M] = False
        result["candidate_logprob"] = _floored(logp_NW[row_M, ids_M])
    with np.errstate(divide="ignore"):
        result["log_tail"] = _floored(np.log(np.where(outside_NW, np.exp(logp_NW), 0.0).sum(axis=1)))
    if options.entropy:
        result["entropy"] = (-(np.exp(logp_NW) * logp_NW).sum(axis=1)).astype(np.float32)
    if options.rank:
        result["rank"] = (1 + (logp_NW > logp_NW[row_N, token_N][:, None]).sum(axis=1)).astype(np.uint32)
    return result


def _floored(values: F64) -> npt.NDArray[np.float32]:
    return np.maximum(values, LOGPROB_FLOOR).astype(np.float32)
