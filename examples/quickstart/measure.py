"""Judges saved checkpoints on held-out problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from student_trainer.data.config import DataConfig
from student_trainer.data.prompts import load_prompts
from student_trainer.evaluate import EvalResult, TaskName, evaluate
from student_trainer.report.compare import Checkpoint
from student_trainer.types import Prompt

MAX_NEW_TOKENS = 72
TASK: TaskName = "final_answer"


def held_out(path: Path, tokenizer: Any) -> Sequence[Prompt]:
    """The problems of a file that `prepare` wrote, in its order."""
    return load_prompts(DataConfig(source=str(path), prompt_key="prompt", answer_key="answer"), tokenizer).all()


def accuracy(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], progress: Callable[[Iterable[Any]], Iterator[Any]]
) -> EvalResult:
    """Greedy accuracy with its confidence interval."""
    return evaluate(checkpoint.sampler, prompts, TASK, decode=checkpoint.decode, progress=progress)
