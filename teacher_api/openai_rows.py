"""From a `/v1/completions` answer of a stock `vllm serve` to Scores: `prompt_logprobs` is a list with one JSON object a
position (null for the first), each with 1 + E or E entries `"id": {"logprob", "rank", "decoded_token"}` — the E most
likely ids, ranked 1 to E, and the actual token, which is one of them or comes beside them with a rank of its own.

No Python bytecode runs per entry: pydantic's parser, twice as fast as json's, makes the objects, and iterators of C
walk them once, into arrays. Knows no sockets.

Shape legend: T tokens, N scored rows, E entries asked, L entries of all rows, K top-k, W logit width, V tokenizer size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic_core import from_json

from teacher_api.errors import InvalidBackendOutput
from teacher_api.top_rows import F64, floored, top_rows
from teacher_api.types import LOGPROB_FLOOR, IntArray, ScoreOptions, Scores, TeacherInfo
from teacher_api.validate import LOGPROB_SLACK

MINUS_INFINITY = -9999.0
"""What vLLM writes for a logprob of -inf, which JSON does not have."""
MASS_SLACK = 1e-3
"""By which the probabilities of a row may exceed 1, as rounding of float32 logprobs."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What an answer says of the scored rows."""

    token_ids: IntArray  # [N]: the actual tokens
    token_logp: F64  # [N]
    token_rank: npt.NDArray[np.int64]  # [N]
    ids: IntArray  # [N, E], most likely first
    logp: F64  # [N, E]
    num_tokens: int  # of the sequence that was asked
    cached_tokens: int


def read_answer(body: bytes, token_ids: IntArray, positions: IntArray, num_entries: int) -> Rows:
    """The rows at `positions` [N] of an answer to `token_ids` [T], asked for `num_entries` E.

    Raises:
        InvalidBackendOutput: it is no such answer: rows are missing, of another width, of another token, or hold what
            is no logprob.
    """
    try:
        answer = from_json(body)
        (choice,) = answer["choices"]
        rows = choice["prompt_logprobs"]
        if len(rows) != len(token_ids):
            raise InvalidBackendOutput(f"the server returned {len(rows)} rows, expected {len(token_ids)}")
        asked = itemgetter(*positions.tolist())(rows)
        found = _columns(asked if len(positions) > 1 else (asked,), len(positions))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidBackendOutput(
            f"the server's answer has no prompt logprobs to read ({type(error).__name__}: {error!s:.200}); expected "
            "those of vLLM's /v1/completions"
        ) from error
    return _arranged(*found, token_ids, positions, num_entries, _cached(answer))


def _columns(
    rows: tuple[Mapping[str, Any], ...], num_rows: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], F64, npt.NDArray[np.int64]]:
    """Widths [N]; ids, logprobs and ranks [L] of all rows, one after the other."""
    widths_N = np.fromiter(map(len, rows), np.int64, num_rows)
    num_entries = int(widths_N.sum())
    values: list[Any] = list(chain.from_iterable(map(dict.values, rows)))  # type: ignore[arg-type]
    ids_L = np.fromiter(map(int, chain.from_iterable(rows)), np.int64, num_entries)
    logp_L = np.fromiter(map(itemgetter("logprob"), values), np.float64, num_entries)
    rank_L = np.fromiter(map(itemgetter("rank"), values), np.int64, num_entries)
    return widths_N, ids_L, logp_L, rank_L


def _arranged(
    widths_N: npt.NDArray[np.int64],
    ids_L: npt.NDArray[np.int64],
    logp_L: F64,
    rank_L: npt.NDArray[np.int64],
    token_ids: IntArray,
    positions: IntArray,
    num_entries: int,
    cached_tokens: int,
) -> Rows:
    def refuse(bad_N: Any, text: str) -> None:
        if bad_N.any():
            row = int(np.argmax(bad_N))
            raise InvalidBackendOutput(f"position {positions[row]}: {text} ({int(widths_N[row])} entries)")

    num_rows, actual_N = len(positions), token_ids[positions]
    row_L = np.repeat(np.arange(num_rows), widths_N)
    refuse((widths_N < max(num_entries, 1)) | (widths_N > num_entries + 1), f"expected {num_entries} to one more")
    is_actual_L = ids_L == actual_N[row_L]
    refuse(np.bincount(row_L[is_actual_L], minlength=num_rows) != 1, "the actual token is not among the entries")
    bad_L = np.isnan(logp_L) | (logp_L > LOGPROB_SLACK)
    refuse(np.bincount(row_L[bad_L], minlength=num_rows) > 0, "values that are no logprobs")
    logp_L = np.where(logp_L <= MINUS_INFINITY, LOGPROB_FLOOR, logp_L)

    is_top_L = ~is_actual_L | (widths_N == num_entries)[row_L]
    place_L = rank_L[is_top_L] - 1
    off_L = (place_L < 0) | (place_L >= num_entries)
    refuse(np.bincount(row_L[is_top_L][off_L], minlength=num_rows) > 0, f"ranks other than 1 to {num_entries}")
    ids_NE = np.full((num_rows, num_entries), -1, np.int32)
    logp_NE = np.zeros((num_rows, num_entries))
    ids_NE[row_L[is_top_L], place_L] = ids_L[is_top_L]
    logp_NE[row_L[is_top_L], place_L] = logp_L[is_top_L]
    refuse((ids_NE < 0).any(axis=1), f"ranks do not count from 1 to {num_entries}")
    outside_N = widths_N > num_entries
    mass_N = np.exp(logp_NE).sum(axis=1) + np.where(outside_N, np.exp(logp_L[is_actual_L]), 0.0)
    refuse(mass_N > 1 + MASS_SLACK, "probabilities add up to more than 1; expected vLLM's raw logprobs")
    return Rows(actual_N, logp_L[is_actual_L], rank_L[is_actual_L], ids_NE, logp_NE, len(token_ids), cached_tokens)


def _cached(answer: Mapping[str, Any]) -> int:
    usage = answer.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if isinstance(cached, int) and cached > 0 else 0


def width_of_row(body: bytes) -> int:
    """Number of entries at position 1 of an answer that was asked for all. Raises InvalidBackendOutput."""
    try:
        return len(from_json(body)["choices"][0]["prompt_logprobs"][1])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise InvalidBackendOutput(f"no prompt logprobs in the server's answer ({type(error).__name__})") from error


def scores_of(rows: Rows, completion_id: str, positions: IntArray, options: ScoreOptions, info: TeacherInfo) -> Scores:
    """Scores at temperature 1. For top-k "all" the entries are all W columns, and the tail is summed over those without
    a token; else it is the rest to 1 (teacher_api.top_rows).

    Raises:
        TooFewIds: as top_rows.
        InvalidBackendOutput: ids that the model has no column for.
    """
    if options.top_k == "all":
        topk_ids, topk_logp, log_tail = None, *_whole(rows, info)
    else:
        top = top_rows(
            rows.token_ids,
            rows.token_logp,
            rows.ids,
            rows.logp,
            top_k=options.top_k,
            tokenizer_size=info.tokenizer_size,
            logit_width=info.logit_width,
        )
        topk_ids, topk_logp, log_tail = top.ids, top.logprob, top.log_tail
    has_top = options.top_k != 0
    values: npt.NDArray[np.float32] | npt.NDArray[np.float16] = floored(topk_logp)
    if options.value_type == "float16":
        values = values.astype(np.float16)
    return Scores(
        id=completion_id,
        positions=positions,
        token_logprob=floored(rows.token_logp),
        log_tail=floored(log_tail),
        topk_ids=topk_ids if has_top else None,
        topk_logprob=values if has_top else None,
        rank=rows.token_rank.astype(np.uint32) if options.rank else None,
        computed_tokens=rows.num_tokens - rows.cached_tokens,
        cached_tokens=rows.cached_tokens,
        fingerprint=info.fingerprint,
    )


def _whole(rows: Rows, info: TeacherInfo) -> tuple[F64, F64]:
    """Logprobs [N, V] in id order, and the log of the mass of the columns from V on [N]."""
    if rows.ids.shape[1] != info.logit_width or int(rows.ids.max()) >= info.logit_width:
        raise InvalidBackendOutput(f"rows of ids up to {rows.ids.max()}; expected all {info.logit_width}")
    logp_NW = np.empty(rows.ids.shape)
    np.put_along_axis(logp_NW, rows.ids.astype(np.int64), rows.logp, axis=1)
    with np.errstate(divide="ignore"):
        return logp_NW[:, : info.tokenizer_size], np.log(np.exp(logp_NW[:, info.tokenizer_size :]).sum(axis=1))
