"""What the pipeline benchmark makes of what it measured; the measurement itself is `python -m benchmarks.pipeline`."""

from __future__ import annotations

import pytest

from benchmarks import pipeline
from benchmarks.pipeline import Taken


def steps(*seconds: float) -> list[dict[str, float]]:
    return [{"step": s, "generate": s / 2, "teacher": s / 4, "learn": s / 4, "tokens": 2048.0} for s in seconds]


def taken(trl_loss: float = 0.02) -> dict[tuple[str, int], Taken]:
    return {
        ("ours", 16): Taken(steps(1.0, 9.0, 2.0), [0.0201, 0.0199], peak_bytes=400 << 20),
        ("trl", 16): Taken(steps(8.0, 7.0, 6.0), [trl_loss], peak_bytes=1000 << 20),
        ("ours", 64): Taken(steps(2.0, 2.0, 2.0), [0.05], peak_bytes=500 << 20),
        ("trl", 64): Taken(steps(9.0, 11.0), [0.05], peak_bytes=800 << 20),
    }


def test_ratios_of_medians() -> None:
    figures = pipeline.figures_of(taken())
    assert figures["speedup_k16"] == pytest.approx(7.0 / 2.0)
    assert figures["speedup_k64"] == pytest.approx(10.0 / 2.0)
    assert figures["memory_ratio"] == pytest.approx(500 / 800)
    assert figures["trl_generate_s_k16"] == pytest.approx(3.5)
    assert figures["steps"] == 2


def test_sides_that_compute_different_things_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"k=16: the first step's loss is 0\.02 with ours and 0\.03 with TRL"):
        pipeline.figures_of(taken(trl_loss=0.03))


def test_prompts_have_one_length_and_differ() -> None:
    lines = [pipeline.prompt(n) for n in range(pipeline.PROMPTS)]
    assert {len(line) for line in lines} == {pipeline.PROMPT_TOKENS}
    assert len(set(lines)) == pipeline.PROMPTS
    assert all(line.isascii() and "\n" not in line for line in lines)
