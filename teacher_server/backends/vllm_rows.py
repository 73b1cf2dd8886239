"""From vLLM's flat prompt logprobs to scores. Knows the layout of that answer and nothing of engines.

The layout, for a sequence of T tokens and k entries asked: T - 1 rows (position 0 has none) of width k + 1; the first
entry of a row is the actual token, the others are the k most likely ids, most likely first, the actual token again if
it is among them.

Shape legend: T tokens, N scored rows, K top-k asked by the client, E entries vLLM was asked for, W logit width, V
tokenizer size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from teacher_api.errors import InvalidBackendOutput
from teacher_api.top_rows import TooFewIds, floored, top_rows
from teacher_api.types import LOGPROB_FLOOR, IntArray, Scores
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.exact_rows import score_rows

__all__ = ["FlatPromptLogprobs", "PromptRows", "TooFewIds", "read_rows", "scores_from_full_rows", "scores_from_top_k"]

F64 = npt.NDArray[np.float64]


class FlatPromptLogprobs(Protocol):
    """What is read of vllm.logprobs.FlatLogprobs: entries of position t are [start_indices[t], end_indices[t])."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Entries of the scored rows, as vLLM gave them."""

    ids: IntArray  # [N, 1+E]; column 0 the actual token
    logprobs: F64  # [N, 1+E]


def read_rows(job: ScoreJob, flat: FlatPromptLogprobs | None, num_tokens: int, num_entries: int) -> PromptRows:
    """The rows that `job` scores, from the answer to its first `num_tokens` tokens.

    Raises:
        InvalidBackendOutput: rows are missing, of another width, of another token, or not finite.
    """
    if flat is None:
        raise InvalidBackendOutput(f"sequence {job.id!r}: vLLM returned no prompt logprobs")
    if len(flat.start_indices) != num_tokens or len(flat.end_indices) != num_tokens:
        raise InvalidBackendOutput(
            f"sequence {job.id!r}: vLLM returned {len(flat.start_indices)} rows, expected {num_tokens}"
        )
    starts_N = np.asarray(flat.start_indices, dtype=np.int64)[job.positions]
    ends_N = np.asarray(flat.end_indices, dtype=np.int64)[job.positions]
    width = num_entries + 1
    if (ends_N - starts_N != width).any():
        row = int(np.flatnonzero(ends_N - starts_N != width)[0])
        raise InvalidBackendOutput(
            f"sequence {job.id!r}, position {job.positions[row]}: vLLM returned {ends_N[row] - starts_N[row]} entries, "
            f"expected {width}"
        )
    # One slice of the long lists, then numpy: a list of the wanted entries alone would be built entry by entry.
    first, last = int(starts_N[0]), int(ends_N[-1])
    index_NE = (starts_N - first)[:, None] + np.arange(width)
    ids_NE = np.asarray(flat.token_ids[first:last], dtype=np.int32)[index_NE]
    logprobs_NE = np.asarray(flat.logprobs[first:last], dtype=np.float64)[index_NE]
    if (ids_NE[:, 0] != job.token_ids[job.positions]).any():
        row = int(np.flatnonzero(ids_NE[:, 0] != job.token_ids[job.positions])[0])
        raise InvalidBackendOutput(
            f"sequence {job.id!r}, position {job.positions[row]}: vLLM scored token {ids_NE[row, 0]}, "
            f"expected {job.token_ids[job.positions[row]]}"
        )
    if np.isnan(logprobs_NE).any() or (logprobs_NE > 1e-3).any():
        row = int(np.flatnonzero((np.isnan(logprobs_NE) | (logprobs_NE > 1e-3)).any(axis=1))[0])
        raise InvalidBackendOutput(f"sequence {job.id!r}, position {job.positions[row]}: logprobs are not finite")
    return PromptRows(ids_NE, np.maximum(logprobs_NE, LOGPROB_FLOOR))


def scores_from_full_rows(job: ScoreJob, rows: PromptRows, vocabulary: int) -> Scores:
    """Scores from rows that hold all W columns: every option, and a tail summed over the ids outside.

    With temperature T: log p / T - logsumexp(log p / T); what log p and the logits differ by is constant in a row.
    """
    width = rows.ids.shape[1] - 1
    index = {int(position): row for row, position in enumerate(job.positions)}

    def logits_of(positions: IntArray) -> F64:
        chosen = [index[int(position)] for position in positions]
        logp_NW = np.full((len(chosen), width), np.nan)
        np.put_along_axis(logp_NW, rows.ids[chosen, 1:].astype(np.int64), rows.logprobs[chosen, 1:], axis=1)
        if np.isnan(logp_NW).any():
            raise InvalidBackendOutput(f"sequence {job.id!r}: a row of vLLM does not hold each of the {width} ids")
        return logp_NW

    return score_rows(job, logits_of, width, vocabulary)


def scores_from_top_k(job: ScoreJob, rows: PromptRows, vocabulary: int, width: int) -> Scores:
    """Scores from the E most likely entries of each row and the actual token, at temperature 1; for the tail see
    teacher_api.top_rows.

    Raises:
        TooFewIds: fewer than K of the entries are ids below V; ask for more entries.
    """
    assert job.options.top_k != "all"
    k = job.options.top_k
    top = top_rows(
        rows.ids[:, 0],
        rows.logprobs[:, 0],
        rows.ids[:, 1:],
        rows.logprobs[:, 1:],
        top_k=k,
        tokenizer_size=vocabulary,
        logit_width=width,
    )
    topk_logprob: npt.NDArray[np.float32] | npt.NDArray[np.float16] = floored(top.logprob)
    if job.options.value_type == "float16":
        topk_logprob = topk_logprob.astype(np.float16)
    return Scores(
        id=job.id,
        positions=job.positions,
        token_logprob=floored(rows.logprobs[:, 0]),
        log_tail=floored(top.log_tail),
        topk_ids=top.ids if k else None,
        topk_logprob=topk_logprob if k else None,
        computed_tokens=job.num_tokens,
    )
