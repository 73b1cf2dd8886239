"""Makes what the distillation starts from (problems, tokenizer, teacher, student) and keeps it in a cache, so that the
next run with the same settings skips it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.quickstart import pretrain, task
from examples.quickstart.pretrain import Recipe
from examples.quickstart.settings import Settings, cache_key
from examples.quickstart.tokenizer import make_tokenizer

TEACHER_STREAM, STUDENT_STREAM, PROMPT_STREAM = 1, 2, 3
"""Streams of problems: the distillation's prompts are not those that either model was pre-trained on."""
NUM_CHECK = 192
"""Tuning problems by which pre-training is watched, and the student's ended."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Paths in the cache. The prompts carry no answers; the two held-out files do."""

    folder: Path
    from_cache: bool

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def problems_folder(self) -> Path:
        return self.folder / "problems"

    def problems(self, split: task.Split) -> Path:
        return self.problems_folder / f"{split}.jsonl"


def prepare(settings: Settings, seed: int, cache: Path, console: Console) -> Prepared:
    """The prepared folder, made if it is not there yet. It appears under its name whole or not at all."""
    folder = cache / cache_key(settings, seed)
    if folder.is_dir():
        return Prepared(folder, from_cache=True)
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
    try:
        _write_problems(settings, seed, partial / "problems")
        tokenizer = make_tokenizer(seed)
        for name, recipe, stream in (
            ("teacher", settings.teacher, TEACHER_STREAM),
            ("student", settings.student, STUDENT_STREAM),
        ):
            model = _train(name, recipe, tokenizer, seed, stream, console)
            model.save_pretrained(partial / name)
            tokenizer.save_pretrained(partial / name)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Prepared(folder, from_cache=False)


def _write_problems(settings: Settings, seed: int, folder: Path) -> None:
    counts: dict[task.Split, int] = {
        "train": settings.num_train,
        "tuning": settings.num_tuning,
        "report": settings.num_report,
    }
    folder.mkdir()
    for split, count in counts.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for problem in task.problems(split, count, seed, PROMPT_STREAM):
                line = {"prompt": task.prompt_text(problem)}
                if split != "train":
                    line["answer"] = str(problem.answer)
                file.write(json.dumps(line) + "\n")


def _train(name: str, recipe: Recipe, tokenizer: Any, seed: int, stream: int, console: Console) -> Any:
    """Pre-trains one model under a progress bar. Plain lines where the output is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    solved = 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"pre-training the {name}", total=recipe.steps, note="")

        def heard(step: int, metrics: dict[str, float]) -> None:
            nonlocal solved
            solved = metrics.get("solved", solved)
            progress.update(bar, completed=step, note=f"loss {metrics['loss']:.3f}  solves {solved:.0%}")

        examples = task.problems("train", recipe.steps * recipe.batch_sequences, seed, stream)
        check = task.problems("tuning", NUM_CHECK, seed)
        model = pretrain.train(recipe, tokenizer, examples, check, seed=seed, progress=heard)
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"  {name}: {size / 1e6:.2f}M parameters, writes {solved:.0%} of the tuning problems' solutions")
    return model
