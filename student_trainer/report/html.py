"""Draws a report as one HTML file: no other file, no network, no server. All text from models and data is escaped.

Shape of the embedded data: per token [text, KL, student p, teacher p, student's top, teacher's top]; strings that
repeat are kept once and referred to by number.
"""

from __future__ import annotations

import bisect
import json
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from student_trainer.report import curves
from student_trainer.report.model import Choice, Report, TokenView

LEVEL_STARTS_NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Smallest divergence of each colour. Roughly logarithmic: those of one completion span orders of magnitude."""
UNDERLINED = 3
"""So many of the highest steps are marked by more than a colour."""


def level(kl_nats: float) -> int:
    """Step of the colour scale, from 1; 0 has no colour."""
    return bisect.bisect_right(LEVEL_STARTS_NATS, kl_nats)


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
        legend=list(enumerate(LEVEL_STARTS_NATS, start=1)),
        underlined_from=len(LEVEL_STARTS_NATS) - UNDERLINED + 1,
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
