"""Who was busy when: the seconds of a step, and its trace."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from student_trainer.pipeline.timeline import Span, Timeline, covered, rows


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=8))
def test_covered_time_counts_every_moment_once(intervals: list[tuple[int, int]]) -> None:
    """Against counting unit by unit."""
    assert covered(intervals) == len({t for start, stop in intervals for t in range(start, stop)})


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=12))
def test_spans_of_a_row_do_not_overlap(shapes: list[tuple[int, int]]) -> None:
    spans = [Span("score", 0, start, start + length) for start, length in sorted(shapes)]
    found = rows(spans)
    assert sum(len(row) for row in found) == len(spans)
    assert all(a.ended <= b.started for row in found for a, b in itertools.pairwise(row))
    busiest = max((sum(s.started <= t < s.ended for s in spans) for t in range(30)), default=0)
    assert len(found) == busiest


def test_figures_are_of_the_steps_own_wall_clock() -> None:
    """Also of work that began before the step, and goes on after it."""
    now = [0.0]
    timeline = Timeline(clock=lambda: now[0])
    ahead = timeline.span("sample", 7)
    ahead.__enter__()
    now[0] = 10.0
    timeline.begin()
    with timeline.span("learn", 6):
        now[0] = 13.0
    now[0] = 15.0
    first = timeline.figures()
    assert (first["seconds"], first["seconds_learn"], first["seconds_sample"], first["seconds_score"]) == (5, 3, 5, 0)
    timeline.begin()
    now[0] = 16.0
    ahead.__exit__(None, None, None)
    now[0] = 19.0
    assert timeline.figures() == {"seconds": 4, "seconds_sample": 1, "seconds_score": 0, "seconds_learn": 0}


def test_a_trace_is_in_the_trace_event_format(tmp_path: Path) -> None:
    """Complete events with numbers for times, none overlapping another of its thread, and a name for each thread; of
    the steps that were asked for."""
    now = [5.0]
    timeline = Timeline((2, 3), clock=lambda: now[0])
    for step in range(4):
        with timeline.span("sample", step):
            now[0] += 1.0
            with timeline.span("score", step, samples=2), timeline.span("score", step, samples=1):
                now[0] += 0.5
        with timeline.span("learn", step):
            now[0] += 2.0
        timeline.figures()
    timeline.write_trace(tmp_path, rank=0)
    timeline.write_trace(tmp_path, rank=1)
    trace = json.loads((tmp_path / "trace.json").read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["args"]["step"] for event in spans} == {2, 3}
    assert sorted(event["name"] for event in spans) == sorted(2 * ["sample", "score", "score", "learn"])
    assert sum(event["dur"] for event in spans if event["name"] == "learn") == 4e6
    assert spans[0]["ts"] == 3.5e6
    for event in spans:
        assert isinstance(event["ts"], float)
        assert event["dur"] >= 0
    named = {event["tid"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    for thread in {event["tid"] for event in spans}:
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == thread)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(own))
        assert thread in named
    assert json.loads((tmp_path / "trace-rank1.json").read_text())["traceEvents"][0]["pid"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trace-rank1.json", "trace.json"]
