"""Which tokens of a completion count."""

from __future__ import annotations

import numpy as np

from student_trainer.losses.config import LossConfig
from student_trainer.types import BoolArray, Rollout


def loss_mask(rollout: Rollout, config: LossConfig) -> BoolArray:
    """bool [N]: every token of the completion, its EOS included, except those that an environment wrote and
    `config.ignore_token_ids`.

    A rollout holds no padding, so nothing is decided by comparing with a pad id: where pad == eos, the student still
    learns to stop.
    """
    counted = ~np.isin(rollout.token_ids, np.asarray(config.ignore_token_ids, dtype=np.int64))
    return counted if rollout.by_student is None else counted & rollout.by_student
