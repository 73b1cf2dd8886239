"""The quickstart's two sizes: the real one, and one that runs through the same commands in a minute and learns nothing
worth mentioning (`--fast`, for tests)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from examples.quickstart.pretrain import STUDENT, TEACHER, Recipe

MADE_BY = ("task.py", "tokenizer.py", "pretrain.py", "prepare.py")
"""Files whose text decides what is prepared: a change to them makes the cache stale."""


@dataclass(frozen=True, slots=True)
class Settings:
    teacher: Recipe = TEACHER
    student: Recipe = STUDENT
    num_train: int = 18_000  # more than the run samples: no prompt comes twice
    num_tuning: int = 256
    num_report: int = 512
    num_shown: int = 12  # completions in the report
    overrides: Mapping[str, str] = field(default_factory=dict)  # of the recipe, for student-train


FULL = Settings()
FAST = Settings(
    teacher=dataclasses.replace(TEACHER, layers=2, hidden=64, heads=2, feed_forward=128, steps=30, batch_sequences=16),
    student=dataclasses.replace(STUDENT, layers=1, hidden=48, heads=2, feed_forward=96, steps=15, batch_sequences=16),
    num_train=200,
    num_tuning=32,
    num_report=32,
    num_shown=3,
    overrides={
        "train.steps": "4",
        "train.batch_size": "8",
        "eval.every": "2",
        "eval.num_prompts": "8",
        "optim.warmup_steps": "1",
    },
)


def cache_key(settings: Settings, seed: int) -> str:
    """Names what `prepare` makes: equal keys, equal files."""
    folder = Path(__file__).parent
    sources = [(folder / name).read_bytes() for name in MADE_BY]
    made = dataclasses.replace(settings, overrides={}, num_shown=0)
    return hashlib.blake2b(b"\0".join([repr((made, seed)).encode(), *sources]), digest_size=8).hexdigest()
