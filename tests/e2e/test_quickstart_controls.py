"""Is it the teacher's knowledge that teaches? The same distillation, through the real programs, from the true teacher
and from two that carry none: its scores permuted over the vocabulary, and noise. The task: reverse four digits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from examples.quickstart import pretrain, services
from examples.quickstart.pretrain import Recipe
from examples.quickstart.task import Problem, prompt_text
from examples.quickstart.tokenizer import make_tokenizer
from student_trainer.tracking import read_metrics

pytestmark = pytest.mark.slow

TEACHER = Recipe(2, 64, 2, 128, steps=200, batch_sequences=64, stop_at_accuracy=0.98)
STUDENT = Recipe(2, 48, 2, 96, steps=200, batch_sequences=64, stop_at_accuracy=0.10, check_every=5)
DISTIL = {
    "teacher.top_k": "all",
    "rollout.max_new_tokens": "10",
    "optim.name": "muon",
    "optim.learning_rate": "1e-3",
    "train.steps": "160",
    "train.batch_size": "64",
    "eval.every": "160",
    "eval.num_prompts": "200",
    "tracking.trackers": "[]",
    "checkpoint.save_every": "0",
}


def _problems(count: int, seed: int, *, held_out: bool) -> list[Problem]:
    """Numbers whose digits sum to a multiple of 5 are held out."""
    rng = np.random.default_rng([seed, held_out])
    found: list[Problem] = []
    while len(found) < count:
        digits = rng.integers(0, 10, 4)
        if (digits.sum() % 5 == 0) == held_out:
            text = "".join(map(str, digits))
            found.append(Problem(text, f"Answer: {text[::-1]}", int(text[::-1]), (0, 0, 0)))
    return found


def _write(path: Path, problems: list[Problem]) -> Path:
    lines = [{"prompt": prompt_text(p), "answer": p.solution.removeprefix("Answer: ")} for p in problems]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    tokenizer = make_tokenizer(0)
    for name, recipe, seed in (("teacher", TEACHER, 1), ("student", STUDENT, 2)):
        examples = _problems(recipe.steps * recipe.batch_sequences, seed, held_out=False)
        model = pretrain.train(recipe, tokenizer, examples, _problems(200, 3, held_out=True), seed=seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    _write(folder / "prompts.jsonl", _problems(10_400, 4, held_out=False))
    _write(folder / "held_out.jsonl", _problems(200, 5, held_out=True))
    return folder


def _distil(made: Path, control: str) -> tuple[float, float]:
    """Held-out accuracy before and after, with the teacher under `control`."""
    console, run_dir = Console(quiet=True), made / f"run-{control}"
    arguments = ["--student", str(made / "student"), "--prompts", str(made / "prompts.jsonl")]
    with services.teacher_serve(made / "teacher", made / f"{control}.log", console, ["--control", control]) as url:
        services.student_train(
            [*arguments, "--teacher-url", url, "--output-dir", str(run_dir)],
            {**DISTIL, "eval.data.source": str(made / "held_out.jsonl")},
            console,
        )
    accuracy = [x["eval_accuracy"] for x in read_metrics(run_dir / "metrics.jsonl") if "eval_accuracy" in x]
    assert len(accuracy) == 2
    return accuracy[0], accuracy[1]


def test_the_true_teacher_improves_the_student(made: Path) -> None:
    before, after = _distil(made, "none")
    assert before <= 0.4
    assert after >= before + 0.3


@pytest.mark.parametrize("control", ["shuffle", "random"])
def test_a_teacher_without_knowledge_does_not(made: Path, control: str) -> None:
    before, after = _distil(made, control)
    assert after <= before + 0.05
