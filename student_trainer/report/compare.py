"""Loads checkpoints, lets each complete the same prompts greedily, and asks the teacher about every token of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from student_trainer import student as students
from student_trainer.config import StudentConfig
from student_trainer.evaluate import TASKS, TaskName
from student_trainer.report import collect
from student_trainer.report.model import Comparison
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.student import Student
from student_trainer.types import Prompt, Rollout

if TYPE_CHECKING:
    from teacher_api.client import TeacherClient


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved student and its greedy sampler."""

    student: Student
    sampler: TorchSampler

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, special tokens left out."""
        return str(self.student.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def load(model: str | Path, max_new_tokens: int) -> Checkpoint:
    """From a directory in Hugging Face format or a hub id, on the CPU.

    Raises:
        StudentError: it can't be loaded.
    """
    student = students.load(StudentConfig(model=str(model)), torch.device("cpu"))
    student.model.eval()
    sampler = TorchSampler(
        student.model,
        eos_token_ids=student.eos_token_ids,
        pad_token_id=student.pad_token_id,
        vocabulary_size=student.vocabulary_size,
        config=RolloutConfig(max_new_tokens=max_new_tokens, greedy=True),
        seed=0,
    )
    return Checkpoint(student, sampler)


def compare(
    checkpoints: Sequence[Checkpoint], prompts: Sequence[Prompt], task: TaskName, client: TeacherClient
) -> list[Comparison]:
    """Each prompt completed by each checkpoint, with both models' distributions at every token; judged by `task` where
    the prompt has an answer."""
    sides = []
    for checkpoint in checkpoints:
        rollouts = checkpoint.sampler.sample(prompts, range(len(prompts)))
        correct = [_judge(checkpoint, rollout, task) for rollout in rollouts]
        sides.append(collect.view(rollouts, checkpoint.student.model, checkpoint.student.tokenizer, client, correct))
    return [
        Comparison(prompt.text, prompt.answer, completions)
        for prompt, completions in zip(prompts, zip(*sides, strict=True), strict=True)
    ]


def _judge(checkpoint: Checkpoint, rollout: Rollout, task: TaskName) -> bool | None:
    if rollout.prompt.answer is None:
        return None
    return rollout.finish == "eos" and TASKS[task](checkpoint.decode(rollout.token_ids.tolist()), rollout.prompt.answer)
