"""What the quickstart's report says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from student_trainer.evaluate import EvalResult
from student_trainer.report import curves
from student_trainer.report.model import Comparison, Figure, Report

NOTES = (
    "The student learned from its own samples. The loss held the teacher's distribution over the next token at every "
    "place of them and nothing else: no reference solutions, no answers, no rewards.",
    "The problems counted here share their three numbers with no problem that either model was trained on, and no "
    "setting was chosen on them; the curve above is measured on a third set. Single sums and differences do recur.",
    "It does not show that this beats fine-tuning on the teacher's solutions. With unlimited fresh prompts and a "
    "teacher as sure of itself as this one, fine-tuning learned faster when it was tried; on-policy learning led when "
    "prompts were few.",
    "It does not show how large models behave: both were made in minutes for this one task.",
)


def make_report(
    results: dict[str, EvalResult],
    comparisons: Sequence[Comparison],
    lines: Sequence[dict[str, Any]],
    config_yaml: str,
    seconds: float,
    seed: int,
) -> Report:
    """The page's content from the results of `teacher`, `student_before` and `student_after`."""
    teacher, before, after = (results[name] for name in ("teacher", "student_before", "student_after"))
    recovered = f"{after.accuracy / teacher.accuracy:.1%}" if teacher.accuracy else "–"
    return Report(
        title="Quickstart: on-policy distillation",
        subtitle="A small student learns two-step arithmetic from its own samples, each token scored by its teacher "
        "over the network.",
        sides=("student before", "student after"),
        figures=(
            _figure("teacher", teacher),
            _figure("student before", before),
            _figure("student after", after),
            Figure("recovered", recovered, "of the teacher's accuracy"),
            Figure("time", f"{int(seconds) // 60} min {int(seconds) % 60} s", "installation apart"),
        ),
        charts=tuple(
            curves.from_metrics(lines, divergence_name="reverse KL, nats per token", teacher=teacher.accuracy)
        ),
        comparisons=tuple(comparisons),
        notes=NOTES,
        config_yaml=config_yaml,
        facts={"seed": str(seed), "held-out problems": f"{teacher.num}, greedy decoding, exact match of the answer"},
    )


def _figure(name: str, result: EvalResult) -> Figure:
    return Figure(name, f"{result.accuracy:.1%}", f"95 %: {result.low:.1%} to {result.high:.1%}")
