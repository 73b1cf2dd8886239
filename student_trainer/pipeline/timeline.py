"""Who was busy when: spans of time by part of the pipeline, as figures of a step, as a trace for Perfetto or Chrome,
and as OpenTelemetry's, of which each step is one and the teacher's part in it belongs to it.

Invariant: a step's figures cover its wall clock from `begin` to `figures` and nothing else, whichever step the work was
for; so busy seconds over `seconds` is how well a part was used.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from student_trainer.types import Metrics
from teacher_api.tracing import Span as TracedSpan
from teacher_api.tracing import Tracing

Part = Literal["sample", "score", "learn", "waiting_for_samples", "waiting_for_scores", "waiting_for_learning"]
LANES: dict[Part, str] = {
    "sample": "sampler",
    "waiting_for_learning": "sampler",
    "score": "teacher",
    "learn": "learner",
    "waiting_for_samples": "learner",
    "waiting_for_scores": "learner",
}
"""Whose time a span is of, as the trace shows it."""
MICROSECONDS = 1e6


@dataclass(slots=True)
class Span:
    part: Part
    step: int  # that the work is for, counted from 0
    started: float  # seconds, of the timeline's clock
    ended: float = float("inf")
    detail: dict[str, Any] = field(default_factory=dict)


class Timeline:
    """Spans of one process; any thread may add some.

    Args:
        trace_steps: first and last step, counted from 1, whose spans are kept for `write_trace`; None: none are.
        tracing: where spans are sent.
        told: what is said of the run with each step that is traced.
    """

    def __init__(
        self,
        trace_steps: tuple[int, int] | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        tracing: Tracing | None = None,
        told: Mapping[str, str | int] | None = None,
    ) -> None:
        self.clock = clock
        self._tracing = tracing or Tracing()
        self._told = dict(told or {})
        self._steps: dict[int, TracedSpan] = {}  # that are open
        self._trace_steps = trace_steps
        self._origin = self._began = clock()
        self._begun: SimpleQueue[Span] = SimpleQueue()  # by any thread, since `figures` looked last
        self._open: list[Span] = []  # at that time
        self._traced: list[Span] = []

    def begin(self) -> None:
        """A step's wall clock begins."""
        self._began = self.clock()

    @contextlib.contextmanager
    def span(self, part: Part, step: int, **detail: Any) -> Iterator[None]:
        """The time inside was spent on `part`, for `step`."""
        span = Span(part, step, self.clock(), detail=detail)
        self._begun.put(span)
        told = {f"preceptor.{name}": value for name, value in detail.items()}
        try:
            with self._tracing.span(part, told, parent=self._step(step)):
                yield
        finally:
            span.ended = self.clock()

    def _step(self, step: int) -> Any:
        """The context of the trace that is this step."""
        if not self._tracing.is_on:
            return None
        if step not in self._steps:
            told = {"preceptor.step": step + 1, **{f"preceptor.{name}": value for name, value in self._told.items()}}
            self._steps.setdefault(step, self._tracing.open("step", told))
        return self._steps[step].context

    def end_step(self, step: int) -> None:
        """Nothing more of `step` comes."""
        span = self._steps.pop(step, None)
        if span is not None:
            span.end()

    def close(self) -> None:
        """Ends what is open, and sends what has not been sent."""
        for step in list(self._steps):
            self.end_step(step)
        self._tracing.close()

    def figures(self) -> Metrics:
        """`seconds` since `begin`, and of them `seconds_PART`: those in which a span of the part was open."""
        now = self.clock()
        held = [*self._open, *(self._begun.get() for _ in range(self._begun.qsize()))]
        self._open = [span for span in held if span.ended > now]
        if self._trace_steps is not None:
            first, last = self._trace_steps
            self._traced += [span for span in held if span.ended <= now and first <= span.step + 1 <= last]
        found: Metrics = {}
        for part in ("sample", "score", "learn"):  # always there, whatever the schedule
            found[f"seconds_{part}"] = 0.0
        for part in sorted({span.part for span in held}):
            cut = [(max(s.started, self._began), min(s.ended, now)) for s in held if s.part == part]
            found[f"seconds_{part}"] = covered(cut)
        return {**found, "seconds": now - self._began}

    def write_trace(self, folder: Path, rank: int = 0) -> None:
        """What was kept, if anything was to be, as trace.json (or trace-rank1.json, …) in `folder`, in the Trace Event
        Format: for ui.perfetto.dev or chrome://tracing. Times in microseconds since the timeline was made; spans of one
        part that overlap lie in lanes of their own."""
        if not self._traced:
            return
        events: list[dict[str, Any]] = [_named("process_name", rank, 0, f"process {rank}")]
        number = itertools.count()
        for lane in dict.fromkeys(LANES.values()):
            spans = sorted((s for s in self._traced if LANES[s.part] == lane), key=lambda s: s.started)
            for row in rows(spans):
                thread = next(number)
                events.append(_named("thread_name", rank, thread, lane))
                events += [self._event(span, rank, thread) for span in row]
        path = folder / (f"trace-rank{rank}.json" if rank else "trace.json")
        partial = path.with_name(f".partial-{path.name}")
        partial.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        os.replace(partial, path)

    def _event(self, span: Span, rank: int, thread: int) -> dict[str, Any]:
        return {
            "name": span.part,
            "cat": LANES[span.part],
            "ph": "X",
            "ts": (span.started - self._origin) * MICROSECONDS,
            "dur": (span.ended - span.started) * MICROSECONDS,
            "pid": rank,
            "tid": thread,
            "args": {"step": span.step + 1, **span.detail},
        }


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of `intervals`; one that ends before it starts is empty."""
    total, upto = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        if stop > max(start, upto):
            total += stop - max(start, upto)
            upto = stop
    return total


def rows(spans: Sequence[Span]) -> list[list[Span]]:
    """`spans`, sorted by their start, in as few rows as hold them without overlap."""
    found: list[list[Span]] = []
    for span in spans:
        free = next((row for row in found if row[-1].ended <= span.started), None)
        if free is None:
            found.append([span])
        else:
            free.append(span)
    return found


def _named(what: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}
