"""One picture from the trainer's step over the wire to the engine's forward, and a run that is not changed by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from collector import Told, collecting
from tinymodels import save_tiny
from training import PROMPTS, arguments, assert_same_bits, finish, metrics, teacher, trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("traced_runs")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    save_tiny(place / "student", seed=2)
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return place


def ancestors(span: Told, spans: dict[str, Told]) -> list[str]:
    names = []
    while span.parent_id:
        span = spans[span.parent_id]
        names.append(span.name)
    return names


def test_each_step_is_a_trace_down_to_the_forwards_and_the_run_is_the_same(place: Path) -> None:
    with collecting() as collector:
        options = ("--reference", f"--otlp-endpoint={collector.url}", "--trace-share=0")
        with teacher(place / "serve", place / "teacher", *options) as served:
            for name, more in (("traced", [f"tracking.otlp_endpoint={collector.url}"]), ("plain", [])):
                log = place / f"{name}.log"
                argv = arguments(
                    place / name, place / "student", place / "prompts.jsonl", served.url, "--steps=3", *more
                )
                assert finish(trainer(argv, log), log) == 0, log.read_text()
    assert_same_bits(place / "traced" / "final", place / "plain" / "final")

    spans = {span.span_id: span for span in collector.spans}
    steps = {span.trace_id: span for span in spans.values() if span.name == "step"}
    assert sorted(span.attributes["preceptor.step"] for span in steps.values()) == [1, 2, 3]
    assert {span.attributes["preceptor.run"] for span in steps.values()} == {"traced"}
    forwards = [span for span in spans.values() if span.name == "forward"]
    chains = {tuple(ancestors(span, spans)) for span in forwards}
    assert chains == {("teacher.score_stream", "score", "step")}  # the handshake belongs to no step
    scored = dict.fromkeys(steps, 0)
    for span in forwards:
        assert span.service == "teacher-serve"
        step = steps[span.trace_id]
        assert step.service == "student-train"
        assert step.started_ns <= span.started_ns < span.ended_ns <= step.ended_ns
        scored[span.trace_id] += span.attributes["preceptor.sequences"]
    assert set(scored.values()) == {4}  # train.batch_size
    for trace, step in steps.items():
        parts = {span.name for span in spans.values() if span.trace_id == trace and span.parent_id == step.span_id}
        assert {"sample", "score", "learn"} <= parts
    assert len(metrics(place / "traced")) == 3
