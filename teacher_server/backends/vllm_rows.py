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
from teacher_api.types import LOGPROB_FLOOR, IntArray, Scores
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.exact_rows import score_rows

F64 = npt.NDArray[np.float64]

RESOLUTION_FLOOR = 2.0**-19
RESOLUTION_PER_COLUMN = 2.0**-32
"""A float32 log_softmax rounds its sum over the columns, and so shifts all of a row alike. Measured on a CPU over 200
rows of random logits (standard deviation 0.5 to 6): the mass of the top 64 is off by up to 1.1e-6 at 4,096 columns,
4.8e-6 at 32,768, 2.3e-5 at 151,936."""


def tail_resolution(width: int) -> float:
    """The smallest mass that 1 - sum(p) of a row of `width` float32 logprobs can tell from none."""
    return max(RESOLUTION_FLOOR, width * RESOLUTION_PER_COLUMN)


class FlatPromptLogprobs(Protocol):
    """What is read of vllm.logprobs.FlatLogprobs: entries of position t are [start_indices[t], end_indices[t])."""

    start_indices: list[int]
    end_indices: list[int]
    token_ids: list[int]
    logprobs: list[float]


class TooFewIds(Exception):
    """So many of the entries were ids that the tokenizer doesn't know that fewer than K are left in some row."""


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
    """Scores from the E most likely entries of each row and the actual token, at temperature 1.

    log_tail = log(1 - sum p) over (top-k, actual token), with at least tail_resolution(W) under the logarithm, and at
    most log((W - E) p_E + what was seen outside): no unseen id is more likely than the last one seen, p_E. Both are
    upper bounds of a tail too small for the difference.

    Raises:
        TooFewIds: fewer than K of the entries are ids below V; ask for more entries.
    """
    assert job.options.top_k != "all"
    k = job.options.top_k
    token_N, token_logp_N = rows.ids[:, 0], rows.logprobs[:, 0]
    ids_NE, logp_NE = rows.ids[:, 1:], rows.logprobs[:, 1:]
    known_NE = ids_NE < vocabulary
    if k and int(known_NE.sum(axis=1).min()) < k:
        raise TooFewIds
    first_NK = np.argsort(~known_NE, axis=1, kind="stable")[:, :k]
    topk_ids_NK = np.take_along_axis(ids_NE, first_NK, axis=1)
    topk_logp_NK = np.take_along_axis(logp_NE, first_NK, axis=1)
    token_is_out_N = ~(topk_ids_NK == token_N[:, None]).any(axis=1)
    inside_N = np.exp(topk_logp_NK).sum(axis=1) + np.where(token_is_out_N, np.exp(token_logp_N), 0.0)
    tail_N = np.maximum(1.0 - inside_N, tail_resolution(width))
    num_entries = ids_NE.shape[1]
    if num_entries:
        seen_outside_N = np.exp(logp_NE).sum(axis=1) - np.exp(topk_logp_NK).sum(axis=1)
        bound_N = (width - num_entries) * np.exp(logp_NE[:, -1]) + np.maximum(seen_outside_N, 0.0)
        tail_N = np.minimum(tail_N, bound_N)
    with np.errstate(divide="ignore"):
        log_tail_N = np.log(tail_N)
    topk_logprob: npt.NDArray[np.float32] | npt.NDArray[np.float16] = _floored(topk_logp_NK)
    if job.options.value_type == "float16":
        topk_logprob = topk_logprob.astype(np.float16)
    return Scores(
        id=job.id,
        positions=job.positions,
        token_logprob=_floored(token_logp_N),
        log_tail=_floored(log_tail_N),
        topk_ids=topk_ids_NK if k else None,
        topk_logprob=topk_logprob if k else None,
        computed_tokens=job.num_tokens,
    )


def _floored(values: F64) -> npt.NDArray[np.float32]:
    return np.maximum(values, LOGPROB_FLOOR).astype(np.float32)
