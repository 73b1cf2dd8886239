"""`student-eval`: accuracy of a checkpoint on problems with known answers, with a confidence interval.

Exit codes: 0 evaluated; 1 sampling failed or the result can't be written; 2 the command, a file or the model does not
fit.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from pydantic import Field, model_validator

from student_trainer.config import StudentConfig
from student_trainer.console import Console
from student_trainer.data.config import PromptConfig
from student_trainer.evaluate import EvalResult, Judged, TaskName, evaluate
from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.config import RolloutConfig
from teacher_api import settings
from teacher_api.settings import Section

PROGRAM = "student-eval"
DESCRIPTION = "Accuracy of a model on problems with known answers."
FAILED, UNUSABLE = 1, 2
SHORTCUTS = {
    "--data": "data.source",
    "--limit": "data.limit",
    "--max-new-tokens": "rollout.max_new_tokens",
    "--json": "output",
}


class GreedyByDefault(RolloutConfig):
    """How the model answers."""

    greedy: bool = True
    """Take the most likely token; false: sample."""


class EvaluationConfig(Section):
    model: str = ""
    """Directory in Hugging Face format, or hub id. Required. Remote code is never run."""
    revision: str = ""
    """Hub revision (branch, tag or commit); empty: the default branch."""
    model_class: str = ""
    """package.module:Class to load the model with; empty: what its config.json says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass."""
    device: str = "auto"
    """auto: a GPU if there is one, else cpu; or cpu, cuda, cuda:1."""
    data: PromptConfig = PromptConfig()
    """Problems with answers (data.answer_key)."""
    rollout: GreedyByDefault = GreedyByDefault()
    task: TaskName = "final_answer"
    """exact_match: the whole completion; final_answer: what follows the last "Answer:", "####" or stands in \\boxed{};
    numeric_answer: the last number. A completion cut off at rollout.max_new_tokens is never correct."""
    output: str = ""
    """Write the result, with every completion, to this JSON file."""
    seed: int = Field(0, ge=0)
    """Of sampling, where rollout.greedy is off."""

    @model_validator(mode="after")
    def _complete(self) -> EvaluationConfig:
        if not self.model:
            raise ValueError("model is not set: name a directory or a hub id (--model MODEL)")
        if not self.data.source:
            raise ValueError("data.source is not set: name a file of problems (--data FILE)")
        if self.rollout.greedy and self.seed:
            raise ValueError(f"seed: got {self.seed} with rollout.greedy, expected none: nothing is drawn")
        if self.rollout.group_size != 1:
            raise ValueError(f"rollout.group_size: got {self.rollout.group_size}, expected 1: one answer per problem")
        return self


def main() -> NoReturn:
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit code."""
    try:
        config, _ = settings.load(
            EvaluationConfig,
            arguments,
            prog=PROGRAM,
            description=DESCRIPTION,
            env_prefix="PRECEPTOR_EVAL_",
            shortcuts=SHORTCUTS,
        )
        result = evaluate_model(config)
    except ValueError as error:
        return _say(error, UNUSABLE)
    except RolloutError as error:
        return _say(error, FAILED)
    print(
        f"{config.model}: {config.task} {result.accuracy:.1%} "
        f"(95 % interval {result.low:.1%} to {result.high:.1%}, n = {result.num})"
    )
    if config.output:
        content = {"model": config.model, "task": config.task, **dataclasses.asdict(result)}
        try:
            Path(config.output).write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            return _say(f"can't write the result: {error}", FAILED)
    return 0


def _say(message: object, code: int) -> int:
    """One line on standard error."""
    print(f"{PROGRAM}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def evaluate_model(config: EvaluationConfig) -> EvalResult:
    """Loads the model, samples and judges. Raises ValueError in one line where something does not fit."""
    from student_trainer import distributed, student
    from student_trainer.data.prompts import load_prompts
    from student_trainer.rollout.torch_sampler import TorchSampler

    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise ValueError(f"output is {config.output!r}, but its directory is not there; make it first")
    device = distributed.join(config.device, timeout_s=60.0).device
    settings_of_model = StudentConfig(
        model=config.model, revision=config.revision, model_class=config.model_class, dtype=config.dtype
    )
    model = student.load(settings_of_model, device)
    prompts = load_prompts(config.data, model.tokenizer).all()
    sampler = TorchSampler(
        model.model,
        eos_token_ids=model.eos_token_ids,
        pad_token_id=model.pad_token_id,
        vocabulary_size=model.vocabulary_size,
        config=config.rollout,
        seed=config.seed,
    )
    console = Console(is_main=True, total_steps=1)

    def shown(samples: Iterator[Judged]) -> Iterator[Judged]:
        with console.progress(f"evaluating {config.model}", samples, len(prompts)) as counted:
            yield from counted

    try:
        with model.arithmetic():
            return evaluate(
                sampler,
                prompts,
                config.task,
                decode=lambda ids: str(model.tokenizer.decode(list(ids), skip_special_tokens=True)),
                progress=shown,
                batch_size=config.rollout.batch_sequences,
            )
    finally:
        console.close()


if __name__ == "__main__":
    main()
