"""Judges saved checkpoints on the report's held-out problems, and asks the teacher about some of the completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from teacher_api.client import TeacherClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.data.config import DataConfig
from student_trainer.data.prompts import load_prompts
from student_trainer.evaluate import EvalResult, evaluate
from student_trainer.report import collect
from student_trainer.report.model import Comparison, CompletionView
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.types import Prompt, Rollout

MAX_NEW_TOKENS = 72
TASK = "final_answer"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint, loaded by plain transformers, and its greedy sampler."""

    model: Any
    tokenizer: Any
    sampler: TorchSampler

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def load(path: Path) -> Loaded:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sampler = TorchSampler(
        model,
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        vocabulary_size=len(tokenizer),
        config=RolloutConfig(max_new_tokens=MAX_NEW_TOKENS, greedy=True),
        seed=0,
    )
    return Loaded(model, tokenizer, sampler)


def held_out(path: Path, tokenizer: Any) -> Sequence[Prompt]:
    config = DataConfig(
        source=str(path),
        question_key="question",
        answer_key="answer",
        template="plain",
        prompt_template="{question}\n",
    )
    return load_prompts(config, tokenizer).all()


def accuracy(
    checkpoint: Loaded, prompts: Sequence[Prompt], progress: Callable[[Iterable[Any]], Iterator[Any]]
) -> EvalResult:
    """Greedy accuracy with its confidence interval."""
    return evaluate(checkpoint.sampler, prompts, TASK, decode=checkpoint.decode, progress=progress)


def compare(
    checkpoints: Sequence[Loaded], prompts: Sequence[Prompt], results: Sequence[EvalResult], client: TeacherClient
) -> list[Comparison]:
    """The first prompts' completions by each checkpoint, with both models' distributions at every token."""
    sides: list[list[CompletionView]] = []
    for checkpoint, result in zip(checkpoints, results, strict=True):
        rollouts: list[Rollout] = checkpoint.sampler.sample(prompts, range(len(prompts)))
        correct = [sample.correct for sample in result.samples[: len(prompts)]]
        sides.append(collect.view(rollouts, checkpoint.model, checkpoint.tokenizer, client, correct))
    return [
        Comparison(prompt.text, prompt.answer, completions)
        for prompt, completions in zip(prompts, zip(*sides, strict=True), strict=True)
    ]
