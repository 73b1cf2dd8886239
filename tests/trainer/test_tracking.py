"""metrics.jsonl holds one line a step, also after a kill and a resume; TensorBoard's file can be read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from student_trainer.tracking import Tracker, TrackingConfig, check_installed, read_metrics


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_after_the_resumed_step_are_dropped_and_a_torn_one_too(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(trackers=()), {})
    for step in range(1, 6):
        tracker.log(step, {"loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    again = Tracker(tmp_path, TrackingConfig(trackers=()), {}, resumed_step=3)
    again.log(4, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]


def test_a_torn_last_line_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    Tracker(tmp_path, TrackingConfig(trackers=()), {}).log(1, {"loss": math.nan, "norm": math.inf, "lr": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "norm": None, "lr": 1.0}]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrackingConfig(), {"optim": {"learning_rate": 0.5}})
    tracker.log(1, {"loss": 2.0})
    tracker.log(2, {"loss": 1.0})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
    assert "learning_rate" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize(("resumed_step", "kept"), [(3, [1, 2, 3]), (-1, [])])
def test_tensorboard_forgets_what_came_after_the_resumed_step(
    resumed_step: int, kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files of one second are read in the order of this counter, as text: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    killed = Tracker(tmp_path, TrackingConfig(), {})
    for step in range(1, 7):
        killed.log(step, {"loss": float(step), "only_before": 0.0})
    again = Tracker(tmp_path, TrackingConfig(), {}, resumed_step=resumed_step)
    again.log(resumed_step + 1, {"loss": -1.0})
    again.close()
    killed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [*((s, s) for s in kept), (resumed_step + 1, -1.0)]
    assert [e.step for e in events.Scalars("only_before")] == kept


def test_a_tracker_that_is_not_installed_is_named() -> None:
    check_installed(TrackingConfig(trackers=("tensorboard",)))
    with pytest.raises(ValueError, match="clearml is not installed"):
        check_installed(TrackingConfig(trackers=("clearml",)))


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", TrackingConfig(), {}, resumed_step=0, is_main=False)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert not (tmp_path / "run").exists()
