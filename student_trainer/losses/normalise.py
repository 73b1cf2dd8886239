"""The weight of each token in the step's loss, from counts over the whole batch: all ranks, all micro-batches. The mean
of micro-batch means is a different number wherever their sizes differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from student_trainer.types import BoolArray
from teacher_api.types import FloatArray

Counts = npt.NDArray[np.float64]
"""[2]: counted tokens, and sequences with at least one of them. Add up over ranks before `token_weights`."""


def count(masks: Sequence[BoolArray]) -> Counts:
    """Counts over these samples' masks (each [N_i])."""
    per_sequence = np.array([mask.sum() for mask in masks], dtype=np.float64)
    return np.array([per_sequence.sum(), (per_sequence > 0).sum()], dtype=np.float64)


def token_weights(
    masks: Sequence[BoolArray], global_counts: Counts, normalise: Literal["token", "sequence"]
) -> list[FloatArray]:
    """float32 [N_i] per sample, summing to 1 over the global batch; 0 where masked.

    token:     w_it = m_it / Σ_jt m_jt
    sequence:  w_it = m_it / Σ_t m_it / (number of sequences with a counted token)

    Args:
        masks: of any subset of the batch: a rank's samples, or one micro-batch.
        global_counts: `count` over the whole batch, summed over ranks.
    """
    whole = divisor(global_counts, normalise)
    if normalise == "token":
        return [(mask / whole).astype(np.float32) for mask in masks]
    return [(mask / (max(int(mask.sum()), 1) * whole)).astype(np.float32) for mask in masks]


def undivided(masks: Sequence[BoolArray], normalise: Literal["token", "sequence"]) -> list[FloatArray]:
    """`token_weights` times `divisor`: all that can be said of a sample while others are still to come."""
    if normalise == "token":
        return [mask.astype(np.float32) for mask in masks]
    return [(mask / max(int(mask.sum()), 1)).astype(np.float32) for mask in masks]


def divisor(global_counts: Counts, normalise: Literal["token", "sequence"]) -> float:
    """What a loss or gradient of `undivided` weights is to be divided by."""
    return max(float(global_counts[0 if normalise == "token" else 1]), 1.0)
