"""What a person sees while a run goes on: a progress bar with the numbers that matter, and now and then a table of
completions. Falls back to plain lines where the output is not a terminal. Decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
SHOWN = ("loss", "delta", "grad_norm", "learning_rate", "completion_tokens", "dropped_prompts", "seconds")
"""Metrics on the progress line, where the step has them."""
PLAIN_EVERY_S = 10.0
"""Without a terminal, a line at most this often, besides the first and the last."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    prompt: str
    completion: str
    tokens: int
    finish: str
    divergence_nats: float  # mean per token; NaN where it isn't defined


class Console:
    """Progress of one run on standard error; silent on ranks other than the main one."""

    def __init__(self, *, is_main: bool, total_steps: int, first_step: int = 0) -> None:
        self._is_main = is_main
        self._total_steps = total_steps
        self._rich = RichConsole(stderr=True, quiet=not is_main)
        self._last_line_at = 0.0
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if is_main and self._rich.is_terminal:
            self._progress = _progress(self._rich)
            self._task = self._progress.add_task("distilling", total=total_steps, completed=first_step, note="")
            self._progress.start()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """`step` updates are done."""
        note = "  ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN if name in metrics)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        if step in (1, self._total_steps) or now - self._last_line_at >= PLAIN_EVERY_S:
            self._last_line_at = now
            self.say(f"step {step}/{self._total_steps}  {note}")

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """A table of completions."""
        table = Table(title=f"completions at step {step}", show_lines=True, expand=True)
        table.add_column("prompt", ratio=2)
        table.add_column("completion", ratio=3)
        table.add_column("tokens", justify="right")
        table.add_column("end")
        table.add_column("KL / token", justify="right")
        for row in rows:
            table.add_row(
                Text(row.prompt), Text(row.completion), str(row.tokens), row.finish, f"{row.divergence_nats:.3f}"
            )
        self._rich.print(table)

    def say(self, line: str) -> None:
        # Not wrapped: in a log file a line is one line, and its paths are whole.
        self._rich.print(Text(line), soft_wrap=True)

    @contextmanager
    def progress(self, what: str, items: Iterable[T], total: int) -> Iterator[Iterator[T]]:
        """Counts `items` as they are taken, on a bar of its own (a plain line where there is no terminal)."""
        if self._progress is None:
            self.say(f"{what}: {total}")
            yield iter(items)
            return
        task = self._progress.add_task(what, total=total, note="")
        try:
            yield self._counted(items, task)
        finally:
            self._progress.remove_task(task)

    def _counted(self, items: Iterable[T], task: TaskID) -> Iterator[T]:
        for item in items:
            yield item
            if self._progress is not None:
                self._progress.advance(task)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _progress(console: RichConsole) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
