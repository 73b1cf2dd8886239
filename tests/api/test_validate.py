"""What an answer may hold, told from float16 and from float32 values alike."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from teacher_api.types import LOGPROB_FLOOR, ScoreOptions, Scores
from teacher_api.validate import check_scores

ROWS, K, SIZE = 3, 5, 100
GOOD = [-0.25, -0.5, -0.5, -7.0, LOGPROB_FLOOR]


def checked(row: list[float], dtype: str) -> None:
    """A whole answer whose middle row has these values."""
    values = np.tile(np.array(GOOD, dtype), (ROWS, 1))
    values[1] = row
    ones = np.full(ROWS, -1.0, np.float32)
    positions = np.arange(1, ROWS + 1, dtype=np.int32)
    ids = np.tile(np.arange(K, dtype=np.int32), (ROWS, 1))
    scores = Scores("a", positions, ones, ones, topk_ids=ids, topk_logprob=values)
    check_scores(scores, ScoreOptions(top_k=K, value_type=dtype), None, positions, SIZE)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (GOOD, ""),
        ([0.0, -0.0, -0.5, -1, -2], ""),  # a sure teacher
        ([5e-4, 0.0, -8, -9, -10], ""),  # rounding
        ([-1.0] * K, ""),
        ([-0.5, -0.25, -1, -2, -3], "row 1 is not in descending order"),
        ([-0.5, -1, -2, -2.5, -2.25], "row 1 is not in descending order"),
        ([-0.5, 0.0, -1, -2, -3], "row 1 is not in descending order"),
        ([0.5, -1, -2, -3, -4], "values from"),
        ([-0.5, -1, -2, -3, -10_008], "values from"),
        ([-0.5, np.nan, -2, -3, -4], "not finite"),
        ([-0.5, -1, -2, -3, -np.inf], "not finite"),
        ([np.inf, -1, -2, -3, -4], "not finite"),
    ],
)
def test_values_are_in_range_and_in_order(row: list[float], complaint: str, dtype: str) -> None:
    expected = pytest.raises(ValueError, match=complaint) if complaint else contextlib.nullcontext()
    with expected:
        checked(row, dtype)
