"""Charts of a run: from metrics.jsonl to series, and from those to inline SVG and to a PNG file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from student_trainer.report.model import Chart, Series

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 40
DENSE_POINTS = 60
"""From this many points on a line has no dots."""
PNG_COLOURS = ("#0072b2", "#d55e00", "#009e73")  # Okabe and Ito's palette: distinct to colour-blind readers

ACCURACY = "eval_accuracy"
DIVERGENCE = "loss"


def from_metrics(lines: Sequence[dict[str, Any]], *, divergence_name: str, teacher: float | None = None) -> list[Chart]:
    """Accuracy on held-out problems, where it was measured, and the training loss.

    Args:
        lines: what student_trainer.tracking.read_metrics returns.
        divergence_name: what the loss is, for the axis.
        teacher: the teacher's accuracy, drawn as the level to reach.
    """
    charts = []
    accuracy = _series("student", lines, ACCURACY)
    if accuracy.steps:
        series = [accuracy]
        if teacher is not None:
            series.append(Series("teacher", (0, accuracy.steps[-1]), (teacher, teacher), reference=True))
        charts.append(Chart("Accuracy on held-out problems", "correct answers", tuple(series), share=True))
    loss = _series("student's own samples", lines, DIVERGENCE)
    if loss.steps:
        positive = all(value > 0 for value in loss.values)
        charts.append(Chart("Distance to the teacher", divergence_name, (loss,), log_y=positive))
    return charts


def _series(name: str, lines: Sequence[dict[str, Any]], key: str) -> Series:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return Series(name, tuple(float(x) for x, _ in points), tuple(float(y) for _, y in points))


def ticks(low: float, high: float, *, log: bool = False, wanted: int = 5) -> list[float]:
    """Round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten; with `log` 1, 2, 5 of each decade,
    or 1 alone where that would be too many."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1,)):
            marks = [digit * 10.0**decade for decade in decades for digit in digits]
            marks = [mark for mark in marks if low * 0.999 <= mark <= high * 1.001]
            if len(marks) <= 2 * wanted:
                return marks
        return marks
    rough = (high - low) / wanted or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [min(max(number * step, low), high) for number in range(first, last + 1)]  # the product is rounded


def label(value: float, *, share: bool = False) -> str:
    return f"{100 * value:g} %" if share else f"{value:.6g}"


class _Frame:
    """Maps a chart's values to places in the picture."""

    def __init__(self, chart: Chart) -> None:
        xs = [x for series in chart.series for x in series.steps]
        ys = [y for series in chart.series for y in series.values]
        self.log = chart.log_y
        self.x_low, self.x_high = min(*xs, 0.0), max(*xs, 1.0)
        low, high = (0.0, 1.0) if chart.share else (min(ys), max(ys))
        if self.log:
            low, high = low * 0.9, high * 1.1
        elif not chart.share:
            margin = 0.05 * (high - low) or 0.5
            low, high = low - margin, high + margin
        self.y_low, self.y_high = low, high

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_low, self.y_high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def svg(chart: Chart) -> Markup:
    """The chart as an SVG element for inlining; colours come from the page's style sheet."""
    frame = _Frame(chart)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}" class="chart">',
    ]
    for value in ticks(frame.y_low, frame.y_high, log=chart.log_y):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(label(value, share=chart.share))}</text>'
        )
    for value in ticks(frame.x_low, frame.x_high):
        text = label(value)
        parts.append(f'<text x="{frame.x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle" class="axis">step</text>')
    for number, series in enumerate(chart.series):
        parts.append(_line(series, number, frame, chart))
    return Markup("".join(parts) + "</svg>")


def _line(series: Series, number: int, frame: _Frame, chart: Chart) -> str:
    """One series: a line, dots where they are few, and its name at the start where it is a reference."""
    points = list(zip(series.steps, series.values, strict=True))
    places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    kind = "reference" if series.reference else f"s{number}"
    drawn = [f'<polyline class="line {kind}" points="{places}"/>']
    if series.reference:
        x, y = frame.x(points[0][0]) + 8, frame.y(points[0][1])
        y += 16 if y - TOP < 16 else -6
        text = f"{series.name} {label(round(points[0][1], 3), share=chart.share)}"
        drawn.append(f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>')
    elif len(points) < DENSE_POINTS:
        for x, y in points:
            name = f"step {x:g}: {label(round(y, 4), share=chart.share)}"
            place = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5"'
            drawn.append(f'<circle class="dot {kind}" {place}><title>{escape(name)}</title></circle>')
    return "".join(drawn)


def png(charts: Sequence[Chart], path: Path) -> None:
    """The same charts side by side in a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * max(len(charts), 1), 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for place, chart in enumerate(charts):
        axes = figure.add_subplot(1, len(charts), place + 1)
        for number, series in enumerate(chart.series):
            style: dict[str, Any] = {"color": PNG_COLOURS[number % len(PNG_COLOURS)]}
            if series.reference:
                style = {"color": "#666666", "linestyle": "--"}
            elif len(series.steps) < DENSE_POINTS:
                style["marker"] = "o"
            values = [100 * value for value in series.values] if chart.share else series.values
            axes.plot(series.steps, values, label=series.name, **style)
        if chart.share:
            axes.set_ylim(0, 104)
        if chart.log_y:
            axes.set_yscale("log")
            axes.set_yticks(ticks(*axes.get_ylim(), log=True), minor=False)
            axes.yaxis.set_major_formatter(lambda value, _: label(value))
            axes.yaxis.set_minor_formatter(lambda _value, _: "")
        axes.set_title(chart.title)
        axes.set_xlabel("step")
        axes.set_ylabel(f"{chart.y_label} (%)" if chart.share else chart.y_label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(chart.series) > 1:
            axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)
