"""README.md of an exported student: who taught it, how, and how it went. Says nothing about a licence: that is for
those who own the student's base, the teacher and the data.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from student_trainer.config import TrainConfig, experiment
from teacher_api.types import TeacherInfo

CURVES = ("loss", "delta", "student_entropy", "completion_tokens", "grad_norm")
"""Metrics of the training steps that the card shows, where the run has them."""
ROWS = 12
"""Of a curve's table: steps evenly spread over the run, the first and the last among them."""


def render(config: TrainConfig, teachers: Mapping[str, TeacherInfo], lines: Sequence[dict[str, Any]]) -> str:
    """The card.

    Args:
        teachers: by their names in the run; a single one has none.
        lines: what tracking.read_metrics gives of the run.
    """
    steps = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "eval_accuracy" in line]
    facts = {
        "Student before": f"`{config.student.model}`",
        **{fact: value for name, teacher in teachers.items() for fact, value in _facts(name, teacher).items()},
        "Objective": f"`{config.loss.objective}`",
        "Steps": str(config.train.steps),
        "Completion tokens trained on": f"{steps[-1]['total_tokens']:.0f}" if steps else "not logged",
        "Made with": f"preceptor {importlib.metadata.version('preceptor')}",
    }
    parts = [_header(config), f"# {Path(config.train.output_dir).resolve().name}"]
    parts.append(_how(config.data.on_policy_fraction))
    parts.append(_table(("", ""), list(facts.items())))
    parts.append("## Training")
    columns = [name for name in CURVES if any(line.get(name) is not None for line in steps)]
    parts.append(_table(("step", *columns), [_row(line, columns) for line in _spread(steps)]))
    if evaluated:
        columns = ["eval_accuracy", "eval_low", "eval_high"]
        parts.append("## Evaluation")
        parts.append(f"`{config.eval.task}`: share correct, and its 95 % interval.")
        parts.append(_table(("step", *columns), [_row(line, columns) for line in _spread(evaluated)]))
    parts.append("## Configuration")
    settings = yaml.safe_dump(experiment(config), allow_unicode=True, sort_keys=True, width=1000)
    parts.append(f"```yaml\n{settings}```")
    return "\n\n".join(parts) + "\n"


def _how(on_policy_fraction: float) -> str:
    """Whose text it learned from."""
    if on_policy_fraction == 1.0:
        return "A language model distilled on-policy: it wrote, and its teacher scored every token of it."
    if on_policy_fraction == 0.0:
        return "A language model distilled on given text, every token of which its teacher scored."
    return (
        f"A language model distilled on text that it wrote itself (a share of {on_policy_fraction:g}) and on given "
        "text, every token of which its teacher scored."
    )


def _facts(name: str, teacher: TeacherInfo) -> dict[str, str]:
    of = f" {name}" if name else ""
    return {
        f"Teacher{of}": f"`{teacher.model_name}`",
        f"Teacher{of}'s fingerprint": f"`{teacher.fingerprint}`",
        f"Tokenizer's fingerprint{f' (teacher {name})' if name else ''}": f"`{teacher.tokenizer_fingerprint}`",
        f"Teacher{of}'s engine": f"{teacher.engine}, {teacher.scoring_path}",
    }


def _header(config: TrainConfig) -> str:
    """What a hub reads of a card."""
    content: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", *(["on-policy-distillation"] if config.data.on_policy_fraction else [])],
    }
    if not Path(config.student.model).expanduser().exists():  # a hub id
        content["base_model"] = config.student.model
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _spread(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most ROWS of them."""
    if len(lines) <= ROWS:
        return list(lines)
    return [lines[round(place * (len(lines) - 1) / (ROWS - 1))] for place in range(ROWS)]


def _row(line: dict[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
    values = [line.get(name) for name in columns]
    return (str(line["step"]), *("–" if value is None else f"{value:.4g}" for value in values))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
