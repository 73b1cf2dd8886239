"""The quickstart from end to end: prepare, serve the teacher, distil over the wire, measure, report. Steps and programs
are those of a real pair of models.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from examples.quickstart import measure, services
from examples.quickstart.page import make_report
from examples.quickstart.prepare import Prepared, prepare
from examples.quickstart.services import QuickstartError
from examples.quickstart.settings import Settings
from student_trainer.evaluate import EvalResult
from student_trainer.report import compare, curves, html
from student_trainer.report.model import Comparison
from student_trainer.tracking import METRICS_FILE, read_metrics
from teacher_api.client import TeacherClient

RECIPE = Path("recipes/quickstart.yaml")
RUN, PROBLEMS, TEACHER_LOG = "distillation", "problems", "teacher-serve.log"
SIDES = ("teacher", "student_before", "student_after")


@dataclass
class Stopwatch:
    """Wall-clock seconds of each stage, and of the whole since `started` (time.monotonic)."""

    started: float
    stages: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = self.started

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.stages[name] = round(now - self._last, 1)
        self._last = now

    @property
    def total_s(self) -> float:
        return round(time.monotonic() - self.started, 1)


def quickstart(settings: Settings, seed: int, output: Path, cache: Path, started: float, console: Console) -> None:
    """Runs it all and leaves its results in `output`.

    Raises:
        QuickstartError: a program failed, or `output` holds something that is not ours.
    """
    if not RECIPE.exists():
        raise QuickstartError(f"{RECIPE} is not here: run from the repository's root")
    run_dir = _clear(output)
    watch = Stopwatch(started)
    console.rule("1  A teacher that can do the task, a student that can't yet", align="left")
    prepared = prepare(settings, seed, cache, console)
    _announce(prepared, console)
    watch.lap("prepare")

    console.rule("2  On-policy distillation: the student samples, the teacher scores over gRPC", align="left")
    with services.teacher_serve(prepared.teacher, output / TEACHER_LOG, console) as url:
        services.student_train(_train_arguments(url, prepared, run_dir, seed), _overrides(settings, prepared), console)
        watch.lap("distil")

        console.rule("3  Held-out problems that neither training nor any choice has seen", align="left")
        _copy_inputs(prepared, run_dir, output)
        results, comparisons = _measure(settings, prepared, output, url, console)
    watch.lap("evaluate")
    _write(output, run_dir, seed, prepared, results, comparisons, watch)
    _conclude(output, results, watch, console)


def _clear(output: Path) -> Path:
    """Makes `output` and removes the run of an earlier quickstart in it; nothing else is ever removed."""
    run_dir = output / RUN
    if run_dir.exists():
        if not (run_dir / METRICS_FILE).exists() and any(run_dir.iterdir()):
            raise QuickstartError(f"{run_dir} is not an earlier quickstart's run; choose another --output")
        shutil.rmtree(run_dir)
    output.mkdir(parents=True, exist_ok=True)
    return run_dir


def _announce(prepared: Prepared, console: Console) -> None:
    if prepared.from_cache:
        console.print(f"  pre-trained before, found in {prepared.folder}")
    with prepared.problems("train").open(encoding="utf-8") as file:
        prompt = json.loads(file.readline())["prompt"].strip()
    console.print(f"  one of the distillation's prompts (they have no answers): {prompt}", highlight=False)


def _train_arguments(url: str, prepared: Prepared, run_dir: Path, seed: int) -> list[str]:
    arguments = ["--config", str(RECIPE), "--teacher-url", url, "--student", str(prepared.student)]
    arguments += ["--prompts", str(prepared.problems("train")), "--output-dir", str(run_dir)]
    return [*arguments, f"train.seed={seed}"]


def _overrides(settings: Settings, prepared: Prepared) -> dict[str, str]:
    return {"eval.data.source": str(prepared.problems("tuning")), **settings.overrides}


def _copy_inputs(prepared: Prepared, run_dir: Path, output: Path) -> None:
    """Puts the three checkpoints and the problems beside the results, each folder replaced whole."""
    folders = (prepared.teacher, prepared.student, run_dir / "final", prepared.problems_folder)
    for name, source in zip((*SIDES, PROBLEMS), folders, strict=True):
        partial = output / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        shutil.rmtree(output / name, ignore_errors=True)
        os.replace(partial, output / name)


def _measure(
    settings: Settings, prepared: Prepared, output: Path, url: str, console: Console
) -> tuple[dict[str, EvalResult], list[Comparison]]:
    """Accuracy of each checkpoint as it was saved, and the completions for the report."""
    checkpoints = {name: compare.load(output / name, measure.MAX_NEW_TOKENS) for name in SIDES}
    prompts = measure.held_out(prepared.problems("report"), checkpoints["teacher"].student.tokenizer)
    results = {}
    for name, checkpoint in checkpoints.items():

        def shown(samples: Iterable[Any], name: str = name) -> Iterator[Any]:
            label = f"  {name.replace('_', ' ')}"
            yield from track(samples, label, len(prompts), console=console, disable=not console.is_terminal)

        results[name] = measure.accuracy(checkpoint, prompts, shown)
    students = SIDES[1:]
    with TeacherClient(url) as client:
        shown_prompts = prompts[: settings.num_shown]
        comparisons = compare.compare([checkpoints[name] for name in students], shown_prompts, measure.TASK, client)
    return results, comparisons


def _write(
    output: Path,
    run_dir: Path,
    seed: int,
    prepared: Prepared,
    results: dict[str, EvalResult],
    comparisons: list[Comparison],
    watch: Stopwatch,
) -> None:
    """summary.json, learning_curve.png and report.html."""
    lines = read_metrics(run_dir / METRICS_FILE)
    config_yaml = (run_dir / "config.yaml").read_text(encoding="utf-8")
    report = make_report(results, comparisons, lines, config_yaml, watch.total_s, seed)
    curves.png(report.charts, output / "learning_curve.png")
    html.write(report, output / "report.html")
    watch.lap("report")
    teacher, before, after = (results[name].accuracy for name in SIDES)
    summary = {
        "teacher_accuracy": teacher,
        "student_before": before,
        "student_after": after,
        "recovered": after / teacher if teacher else 0.0,
        "seconds": watch.total_s,
        "seed": seed,
        "intervals_95": {name: [result.low, result.high] for name, result in results.items()},
        "num_problems": results["teacher"].num,
        "stage_seconds": watch.stages,
        "pretraining_from_cache": prepared.from_cache,
    }
    partial = output / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output / "summary.json")


def _conclude(output: Path, results: dict[str, EvalResult], watch: Stopwatch, console: Console) -> None:
    """The table, and what to try next."""
    table = Table("model", "correct", "95 % interval", title=f"{results['teacher'].num} held-out problems, greedy")
    for name, result in results.items():
        table.add_row(name.replace("_", " "), f"{result.accuracy:.1%}", f"{result.low:.1%} to {result.high:.1%}")
    console.print(table)
    teacher, after = results["teacher"].accuracy, results["student_after"].accuracy
    recovered = f"{after / teacher:.1%} of the teacher's accuracy; " if teacher else ""
    console.print(f"{recovered}{watch.total_s:.0f} s ({', '.join(f'{k} {v:.0f}' for k, v in watch.stages.items())})")
    commands = (
        f"teacher-serve --model {output}/teacher",
        "teacher-check grpc://127.0.0.1:8301",
        f"student-train --config {RECIPE} --teacher-url grpc://127.0.0.1:8301 --student {output}/student_before "
        f"--prompts {output}/{PROBLEMS}/train.jsonl --output-dir {output}/forward-kl loss.objective=forward_kl "
        f"eval.data.source={output}/{PROBLEMS}/tuning.jsonl",
        f"student-eval --model {output}/forward-kl/final --data {output}/{PROBLEMS}/report.jsonl",
        f"python -m student_trainer.report --run {output}/forward-kl --teacher-url grpc://127.0.0.1:8301",
    )
    console.print(f"\nLook at it:  {output}/report.html\nNext, with .venv/bin in your PATH:", highlight=False)
    for command in commands:
        services.show(console, command.split())
    console.print("For a real pair of models see README.md; what this run shows and does not: docs/quickstart.md")
