"""Each rule on synthetic series that should and should not set it off, and its memory over a checkpoint. The expected
steps follow from the rules as docs/training.md states them, computed here with numpy.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from student_trainer.alarms import Alarms, GuardsConfig

NAMES = ("alarm_loss", "alarm_grad_norm", "alarm_entropy", "alarm_length")
NOTHING: dict[str, list[int]] = {name: [] for name in NAMES}
QUIET = {"loss": 1.0, "grad_norm": 1.0, "student_entropy": 2.0, "completion_tokens": 40.0, "skipped": 0.0}


def watch(series: dict[str, list[float]], **config: float) -> dict[str, list[int]]:
    """Steps (from 0) at which each rule held, over steps whose other figures are quiet."""
    alarms = Alarms(GuardsConfig(**config))
    held: dict[str, list[int]] = {name: [] for name in NAMES}
    for step in range(max(map(len, series.values()))):
        figures, _ = alarms.look({**QUIET, **{key: values[step] for key, values in series.items()}})
        for name, value in figures.items():
            if value:
                held[name].append(step)
    return held


def noise(seed: int, count: int, *, mean: float = 1.0, scale: float = 0.05) -> list[float]:
    return (mean + scale * np.random.Generator(np.random.Philox(seed)).standard_normal(count)).tolist()


def test_a_spike_of_the_loss_is_called_where_it_is_and_nowhere_else() -> None:
    loss = noise(1, 60)
    loss[40] = 2.0
    assert watch({"loss": loss}) == {**NOTHING, "alarm_loss": [40]}


@pytest.mark.parametrize("seed", range(5))
def test_noise_drift_and_an_end_of_descent_call_nothing(seed: int) -> None:
    count = 400
    series = {
        "loss": (np.array(noise(seed, count)) * np.exp(-np.arange(count) / 80)).tolist(),
        "grad_norm": np.exp(np.array(noise(seed + 10, count, mean=0.0, scale=0.4))).tolist(),
        "student_entropy": np.linspace(3, 1, count).tolist(),
        "completion_tokens": (np.array(noise(seed + 20, count, mean=0.0, scale=0.2)) * 10 + 40).tolist(),
    }
    assert watch(series) == NOTHING


def test_the_limit_of_a_loss_spike_is_that_of_its_definition() -> None:
    before = noise(3, 20)
    middle = np.median(before)
    spread = 1.4826 * np.median(np.abs(np.array(before) - middle))
    for factor, held in ((7.99, []), (8.01, [20])):
        assert watch({"loss": [*before, middle + factor * spread]})["alarm_loss"] == held
    assert watch({"loss": [1.0] * 20 + [1.079]})["alarm_loss"] == []  # no spread: 1 % of the median
    assert watch({"loss": [1.0] * 20 + [1.081]})["alarm_loss"] == [20]
    assert watch({"loss": [-1.0] * 20 + [-0.919]})["alarm_loss"] == [20]  # policy gradient's may be negative


def test_a_gradient_norm_is_held_against_the_median_of_the_window() -> None:
    norms = [1.0, 3.0] * 10
    assert watch({"grad_norm": [*norms, 19.9]})["alarm_grad_norm"] == []
    assert watch({"grad_norm": [*norms, 20.1, 2.0]})["alarm_grad_norm"] == [20]
    assert watch({"grad_norm": [0.0] * 20 + [1e-9]})["alarm_grad_norm"] == [20]


@pytest.mark.parametrize(
    ("key", "alarm"), [("student_entropy", "alarm_entropy"), ("completion_tokens", "alarm_length")]
)
def test_a_collapse_is_called_once_most_of_a_window_has_collapsed(key: str, alarm: str) -> None:
    series = [4.0] * 30 + [0.3] * 30
    # Of the last 20 figures, more than half are low from the eleventh low one on.
    assert watch({key: series})[alarm] == list(range(40, 60))
    assert watch({key: [4.0] * 30 + [0.5] * 30})[alarm] == []  # an eighth is no collapse
    assert watch({key: [4.0] * 30 + [0.3] * 9 + [4.0] * 21})[alarm] == []  # nor is a short dip
    assert watch({key: [4.0] * 20 + [0.3] * 19})[alarm] == []  # nor what is not yet a window


def test_nothing_is_called_before_there_is_a_window() -> None:
    assert watch({"loss": [1.0] * 19 + [100.0]})["alarm_loss"] == []
    assert watch({"loss": [1.0] * 4 + [100.0]}, window=4)["alarm_loss"] == [4]


def test_a_rule_at_zero_is_off_and_not_logged() -> None:
    alarms = Alarms(GuardsConfig(loss_spike=0, entropy_collapse=0))
    figures, _ = alarms.look(QUIET)
    assert set(figures) == {"alarm_grad_norm", "alarm_length"}


def test_skipped_steps_and_missing_figures_are_left_out() -> None:
    alarms = Alarms(GuardsConfig(window=4))
    for _ in range(4):
        alarms.look({"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0})
        figures, begun = alarms.look({"loss": float("nan"), "grad_norm": float("inf"), "skipped": 1.0})
        assert set(figures.values()) == {0.0}
        assert begun == []
    figures, _ = alarms.look({"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0})
    assert set(figures.values()) == {0.0}
    figures, begun = alarms.look({"loss": 1.0, "grad_norm": 11.0, "skipped": 0.0})
    assert figures["alarm_grad_norm"] == 1.0
    assert len(begun) == 1
    assert "11 times the median 1" in begun[0].replace(".0", "")
    assert "guards.grad_norm_spike is 10" in begun[0]


def test_a_person_is_told_when_it_begins_not_at_every_step() -> None:
    alarms = Alarms(GuardsConfig(window=4))
    lines = [
        alarms.look({**QUIET, "student_entropy": value})[1] for value in [4.0] * 8 + [0.1] * 8 + [4.0] * 4 + [0.1] * 4
    ]
    assert [step for step, told in enumerate(lines) if told] == [10, 22]
    assert "student_entropy has collapsed: median 0.1" in lines[10][0]


@pytest.mark.parametrize("cut", [3, 19, 20, 39, 40, 55])
def test_after_a_checkpoint_the_rules_go_on_as_if_there_had_been_none(cut: int) -> None:
    series = {
        "loss": [*noise(5, 45), 9.0, *noise(6, 14)],
        "grad_norm": [*noise(7, 50), 80.0, *noise(8, 9)],
        "student_entropy": [3.0] * 30 + [0.1] * 30,
    }
    steps = [{**QUIET, **{key: values[step] for key, values in series.items()}} for step in range(60)]
    whole, first = Alarms(GuardsConfig()), Alarms(GuardsConfig())
    expected = [whole.look(figures) for figures in steps]
    found = [first.look(figures) for figures in steps[:cut]]
    second = Alarms(GuardsConfig(), json.loads(json.dumps(first.state())))
    assert found + [second.look(figures) for figures in steps[cut:]] == expected
    assert any(begun for _, begun in expected)
