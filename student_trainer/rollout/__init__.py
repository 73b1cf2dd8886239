"""Sampling completions from the student. Engines are imported by name: `rollout.torch_sampler` pulls in torch."""

from student_trainer.rollout.base import RolloutEngine, RolloutError
from student_trainer.rollout.config import RolloutConfig

__all__ = ["RolloutConfig", "RolloutEngine", "RolloutError"]
