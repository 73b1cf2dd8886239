"""The example from end to end: problems and models from scratch, the teacher served, the student distilled in
conversations with the calculator, and all of them measured.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from examples.calculator import task
from examples.quickstart import pretrain, services
from examples.quickstart.pretrain import Recipe
from examples.quickstart.task import Problem, Split, problems
from student_trainer import eval_cli
from student_trainer.distributed import Distributed
from student_trainer.eval_cli import EvaluationConfig
from student_trainer.tracking import METRICS_FILE, read_metrics

RECIPE = Path("recipes/calculator.yaml")
TEACHER_STREAM, STUDENT_STREAM, PROMPT_STREAM = 1, 2, 3
NUM_CHECK = 128
SIDES = ("teacher", "student_before", "student_after")
TALK = {"environment": "calculator", "max_turns": 4, "max_new_tokens": 16, "max_total_tokens": 88}
"""As in the recipe."""


TEACHER = dataclasses.replace(
    pretrain.TEACHER, layers=2, hidden=96, heads=3, feed_forward=256, steps=60, check_every=20
)
STUDENT = dataclasses.replace(
    pretrain.STUDENT, layers=2, hidden=64, heads=2, feed_forward=192, steps=100, stop_at_accuracy=0.4, check_every=2
)


@dataclass(frozen=True, slots=True)
class Settings:
    teacher: Recipe = TEACHER
    student: Recipe = STUDENT
    num_train: int = 2_000
    num_tuning: int = 128
    num_report: int = 256
    overrides: Mapping[str, str] = field(default_factory=dict)  # of the recipe, for student-train


FULL = Settings()
FAST = Settings(
    teacher=dataclasses.replace(FULL.teacher, steps=20, batch_sequences=16),
    student=dataclasses.replace(FULL.student, steps=10, batch_sequences=16),
    num_train=32,
    num_tuning=16,
    num_report=16,
    overrides={
        "train.steps": "2",
        "train.batch_size": "8",
        "eval.every": "2",
        "eval.num_prompts": "8",
        "optim.warmup_steps": "1",
    },
)


def run(settings: Settings, seed: int, output: Path, console: Console) -> dict[str, Any]:
    """Runs it all; leaves models, problems, the run and summary.json in `output`, and returns the summary.

    Raises:
        QuickstartError: a program failed, or this is not the repository's root.
    """
    if not RECIPE.exists():
        raise services.QuickstartError(f"{RECIPE} is not here: run from the repository's root")
    if output.exists():
        raise services.QuickstartError(f"{output} is there already; remove it or choose another --output")
    started = time.monotonic()
    console.rule("1  A teacher that uses a calculator, a student that does now and then", align="left")
    _prepare(settings, seed, output, console)
    console.rule("2  The student talks to the calculator, the teacher scores what the student says", align="left")
    with services.teacher_serve(output / "teacher", output / "teacher-serve.log", console) as url:
        arguments = ["--config", str(RECIPE), "--teacher-url", url, "--student", str(output / "student_before")]
        arguments += ["--prompts", str(_problems(output, "train")), "--output-dir", str(output / "distillation")]
        overrides = {"eval.data.source": str(_problems(output, "tuning")), **settings.overrides}
        services.student_train([*arguments, f"train.seed={seed}"], overrides, console)
    os.replace(output / "distillation" / "final", output / "student_after")
    console.rule("3  Problems that neither training nor any choice has seen", align="left")
    summary = {**_measured(output, console), "seed": seed, "seconds": round(time.monotonic() - started, 1)}
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _prepare(settings: Settings, seed: int, output: Path, console: Console) -> None:
    counts: dict[Split, int] = {
        "train": settings.num_train,
        "tuning": settings.num_tuning,
        "report": settings.num_report,
    }
    for split, count in counts.items():
        made = problems(split, count, seed, PROMPT_STREAM)
        _write(_problems(output, split), made, None if split == "train" else 0)
        if split == "report":
            _write(output / "problems" / "off.jsonl", made, 2 * task.WRONG_BY)  # two results, one after the other
    tokenizer = task.tokenizer_for(seed)
    check = problems("tuning", NUM_CHECK, seed)
    for name, recipe, stream in (
        ("teacher", settings.teacher, TEACHER_STREAM),
        ("student_before", settings.student, STUDENT_STREAM),
    ):
        solved = 0.0

        def heard(step: int, metrics: dict[str, float]) -> None:
            nonlocal solved
            solved = metrics.get("solved", solved)

        examples = problems("train", recipe.steps * recipe.batch_sequences, seed, stream)
        model = pretrain.train(recipe, tokenizer, examples, check, seed=seed, encode=task.encode, progress=heard)
        model.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)
        size = sum(parameter.numel() for parameter in model.parameters())
        console.print(
            f"  {name}: {size / 1e6:.2f}M parameters, writes all turns of {solved:.0%} of the tuning problems right, "
            "given the calculator's answers"
        )


def _problems(output: Path, split: str) -> Path:
    return output / "problems" / f"{split}.jsonl"


def _write(path: Path, made: list[Problem], off: int | None) -> None:
    """A question a line, with its answer, off by so much, where that is not None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for problem in made:
            answer = {} if off is None else {"answer": str(problem.answer + off)}
            file.write(json.dumps({"question": problem.question, **answer}) + "\n")


def _measured(output: Path, console: Console) -> dict[str, Any]:
    """Accuracy of each model, and of the student with a calculator that is off, by the answers that follow from it."""
    table = Table("model", "correct", "95 % interval")
    found: dict[str, Any] = {}
    for name in SIDES:
        result = _solved(output / name, _problems(output, "report"), TALK)
        table.add_row(
            name.replace("_", " "), f"{result['accuracy']:.1%}", f"{result['low']:.1%} to {result['high']:.1%}"
        )
        found[name] = result["accuracy"]
    off = {**TALK, "environment": "examples.calculator.task:off_calculator"}
    follows = _solved(output / "student_after", output / "problems" / "off.jsonl", off)
    console.print(table)
    first, *_, last = [line for line in read_metrics(output / "distillation" / METRICS_FILE) if "turns" in line]
    console.print(
        f"turns per conversation: {first['turns']:.2f} in the first step, {last['turns']:.2f} in the last. With a "
        f"calculator whose results are {task.WRONG_BY} too large, {follows['accuracy']:.1%} of the answers are "
        f"{2 * task.WRONG_BY} too large: those come from the tool.",
        highlight=False,
    )
    return {
        **found,
        "answers_from_the_tool": follows["accuracy"],
        "turns_first_step": first["turns"],
        "turns_last_step": last["turns"],
        "num_problems": follows["num"],
    }


def _solved(model: Path, data: Path, talk: Mapping[str, Any]) -> dict[str, Any]:
    config = EvaluationConfig.model_validate(
        {"model": str(model), "device": "cpu", "data": {"source": str(data), "answer_key": "answer"}, "rollout": talk}
    )
    return eval_cli.solve(config, Distributed(0, 1, 0, torch.device("cpu")))[1]
