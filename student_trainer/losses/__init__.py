"""Objectives of distillation: what is minimised at each scored position, and how it becomes a gradient.

`parse_loss` reads the `loss` section, `build` makes its objective; rows.py, mask.py and normalise.py prepare a
micro-batch, chunked.py runs it. docs/losses.md defines every objective.
"""

from student_trainer.losses.config import LossConfig, LossField, parse_loss
from student_trainer.losses.registry import build, names, register

__all__ = ["LossConfig", "LossField", "build", "names", "parse_loss", "register"]
