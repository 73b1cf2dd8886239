"""Draws a report as one HTML file: no other file, no network, no server. All text from models and data is escaped.

Shape of the embedded data: per token [text, KL, student p, teacher p, student's top, teacher's top]; strings that
repeat are kept once and referred to by number.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from student_trainer.report import curves
from student_trainer.report.model import Choice, Report, TokenView

LEVELS = 9
LOWEST_NATS, HIGHEST_NATS = 1e-3, 3.0
"""Ends of the colour scale, which is logarithmic: divergences within one completion span orders of magnitude."""


def level(kl_nats: float) -> int:
    """Step 0 … LEVELS of the colour scale; 0 has no colour."""
    if kl_nats <= LOWEST_NATS:
        return 0
    place = math.log(kl_nats / LOWEST_NATS) / math.log(HIGHEST_NATS / LOWEST_NATS)
    return min(LEVELS, 1 + int(place * LEVELS))


def level_start(step: int) -> float:
    """Smallest divergence, in nats, of colour step `step` >= 1."""
    return float(LOWEST_NATS * (HIGHEST_NATS / LOWEST_NATS) ** ((step - 1) / LEVELS))


def visible(text: str) -> str:
    """A token's text with what can't be seen made visible; line breaks stay, so that the completion keeps its lines."""
    return text.replace("\n", "⏎\n").replace("\t", "⇥") or "∅"


def render(report: Report) -> str:
    """The page.

    Raises:
        ValueError: a comparison has not one completion per side.
    """
    for comparison in report.comparisons:
        if len(comparison.completions) != len(report.sides):
            raise ValueError(f"got {len(comparison.completions)} completions for {len(report.sides)} sides")
    environment = Environment(
        loader=PackageLoader("student_trainer", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["level"] = level
    environment.filters["visible"] = visible
    tokens = [token for c in report.comparisons for side in c.completions for token in side.tokens]
    return environment.get_template("template.html.j2").render(
        report=report,
        charts=[(chart, curves.svg(chart)) for chart in report.charts],
        legend=[(step, level_start(step)) for step in range(1, LEVELS + 1)],
        sides=_summaries(report),
        data=_embed(tokens),
    )


def write(report: Report, path: Path) -> None:
    """Writes the page to `path`, whole or not at all."""
    text = render(report)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _summaries(report: Report) -> list[dict[str, Any]]:
    """One line per side for the table above the completions."""
    rows = []
    for number, name in enumerate(report.sides):
        shown = [comparison.completions[number] for comparison in report.comparisons]
        tokens = [token for completion in shown for token in completion.tokens]
        judged = [completion.correct for completion in shown if completion.correct is not None]
        rows.append(
            {
                "name": name,
                "correct": f"{sum(judged)} of {len(judged)}" if judged else "–",
                "mean_kl": sum(token.kl_nats for token in tokens) / max(len(tokens), 1),
                "apart": sum(token.kl_nats >= 0.1 for token in tokens) / max(len(tokens), 1),
                "length": len(tokens) / max(len(shown), 1),
            }
        )
    return rows


def _embed(tokens: list[TokenView]) -> Markup:
    """The tokens' numbers as JSON that is safe inside a script element."""
    strings: dict[str, int] = {}

    def number(text: str) -> int:
        return strings.setdefault(text, len(strings))

    def top(choices: tuple[Choice, ...]) -> list[float]:
        return [value for choice in choices for value in (number(choice.text), _short(choice.probability))]

    rows = [
        [
            number(token.text),
            _short(token.kl_nats),
            _short(token.student_probability),
            _short(token.teacher_probability),
            top(token.student_top),
            top(token.teacher_top),
        ]
        for token in tokens
    ]
    text = json.dumps({"strings": list(strings), "tokens": rows}, ensure_ascii=True, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
