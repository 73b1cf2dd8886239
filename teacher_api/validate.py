"""What an answer may hold: the checks that the server applies to its backends' output and the client to what arrives.

Shape legend: N scored rows, K top-k, M candidates over all rows, V tokenizer size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_api.types import LOGPROB_FLOOR, Candidates, IntArray, ScoreOptions, Scores

LOGPROB_SLACK = 1e-3
"""Nats by which a logprob may exceed 0: float32 rounding of a logsumexp over logits of some hundreds."""

_FLOOR_BITS = int(np.array(LOGPROB_FLOOR, np.float16).view(np.int16))


def num_candidates(candidates: Candidates | None) -> int:
    return len(candidates.ids) if candidates is not None else 0


def check_candidates(candidates: Candidates, num_rows: int) -> None:
    """Refuses offsets that don't cut the ids into one run per scored row.

    Raises:
        ValueError: says what is wrong.
    """
    offsets = candidates.row_offsets
    if len(offsets) != num_rows + 1:
        raise ValueError(f"{len(offsets)} row_offsets; expected {num_rows + 1}: one more than the scored positions")
    if offsets[0] != 0 or offsets[-1] != len(candidates.ids):
        raise ValueError(
            f"row_offsets run from {offsets[0]} to {offsets[-1]}; expected 0 to {len(candidates.ids)}, the ids' number"
        )
    if (np.diff(offsets) < 0).any():
        raise ValueError(f"row_offsets descend at [{int(np.argmax(np.diff(offsets) < 0)) + 1}]; expected ascending")


def check_scores(
    scores: Scores,
    options: ScoreOptions,
    candidates: Candidates | None,
    positions: IntArray,
    tokenizer_size: int,
) -> None:
    """Refuses an answer that can't belong to its question: wrong rows, missing or unasked arrays, wrong shapes or
    dtypes, values that are not finite or out of range, top-k ids that repeat or are out of order.

    Raises:
        ValueError: names the array and says what was got and expected.
    """
    num_rows, whole = len(positions), options.top_k == "all"
    if not np.array_equal(scores.positions, positions):
        raise ValueError(f"positions are not the {num_rows} that were asked")
    top_k = tokenizer_size if options.top_k == "all" else options.top_k
    logprob_type = np.float16 if options.value_type == "float16" else np.float32
    num_asked = num_candidates(candidates)
    expected: dict[str, tuple[bool, tuple[int | None, ...], Any]] = {
        "token_logprob": (True, (num_rows,), np.float32),
        "log_tail": (True, (num_rows,), np.float32),
        "topk_ids": (top_k > 0 and not whole, (num_rows, top_k), np.int32),
        "topk_logprob": (top_k > 0, (num_rows, top_k), logprob_type),
        "candidate_logprob": (num_asked > 0, (num_asked,), np.float32),
        "entropy": (options.entropy, (num_rows,), np.float32),
        "rank": (options.rank, (num_rows,), np.uint32),
        "hidden": (options.hidden, (num_rows, None), np.float32),
    }
    for name, (asked, shape, dtype) in expected.items():
        array = getattr(scores, name)
        if (array is not None) != asked:
            if name == "candidate_logprob" and array is not None and candidates is not None and array.size == 0:
                continue  # candidates were given, but no row asks for any
            raise ValueError(f"{name} is {'missing' if asked else 'there although it was not asked for'}")
        if array is None:
            continue
        fits = array.ndim == len(shape) and all(s in (None, a) for s, a in zip(shape, array.shape, strict=True))
        if not fits or array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; expected {np.dtype(dtype)}{list(shape)}")
        order = _order_of_negatives(array) if array.dtype == np.float16 else None
        if order is None:
            order = array.astype(np.float32, copy=False)  # exact; numpy's own float16 is an order of magnitude slower
            _check_values(name, order)
        if name == "topk_logprob" and scores.topk_ids is not None:
            _check_top_k(scores.topk_ids, order, tokenizer_size)


def _check_values(name: str, array: npt.NDArray[Any]) -> None:
    """Finite, and in the range that its name promises. min and max see every NaN: they propagate it."""
    if array.size == 0 or name == "topk_ids":
        return
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise ValueError(f"{name}: value {array[tuple(where)]} at {where} is not finite")
    floor, ceiling = LOGPROB_FLOOR, LOGPROB_SLACK
    if name == "entropy":
        floor, ceiling = -LOGPROB_SLACK, np.inf
    elif name == "rank":
        floor, ceiling = 1, np.inf
    elif name == "hidden":
        return
    if low < floor or high > ceiling:
        raise ValueError(f"{name}: values from {low} to {high}; expected {floor} to {ceiling}")


def _order_of_negatives(half: npt.NDArray[np.float16]) -> npt.NDArray[np.int16] | None:
    """Integers that are ordered as the values, in half the time that converting these takes; None unless all of them
    are negative, finite and not below LOGPROB_FLOOR.

    The bits of a negative float16, as an integer, grow with its magnitude; those of what is not negative are above 0.
    """
    bits = half.view(np.int16)
    return None if bits.size == 0 or bits.max() > _FLOOR_BITS else -1 - bits


def _check_top_k(ids: IntArray, logprob: npt.NDArray[Any], tokenizer_size: int) -> None:
    if ids.size == 0:
        return
    if int(ids.min()) < 0 or int(ids.max()) >= tokenizer_size:
        raise ValueError(f"topk_ids: ids from {ids.min()} to {ids.max()}; expected 0 to {tokenizer_size - 1}")
    ascends = logprob[:, 1:] > logprob[:, :-1]
    if ascends.any():
        raise ValueError(f"topk_logprob: row {int(np.argwhere(ascends)[0, 0])} is not in descending order")
    sorted_ids = np.sort(ids, axis=1)
    repeats = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    if repeats.any():
        raise ValueError(f"topk_ids: row {int(np.argwhere(repeats)[0, 0])} has an id twice")
