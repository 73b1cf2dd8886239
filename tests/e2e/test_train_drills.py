"""Trainers and teachers that are killed, stopped and left alone. The final weights must be those of an undisturbed run,
bit for bit (torch backend and trainer in reference mode).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tinymodels import save_tiny
from training import (
    PROMPTS,
    TeacherProcess,
    arguments,
    assert_same_bits,
    finish,
    metrics,
    teacher,
    trainer,
    wait_until,
    weights,
)

pytestmark = pytest.mark.slow

STEPS = ["--steps=12", "checkpoint.save_every=3", "rollout.max_new_tokens=16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("drills")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    save_tiny(place / "student", seed=2)
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place


@pytest.fixture(scope="module")
def served(place) -> Iterator[TeacherProcess]:
    with teacher(place / "serve", place / "teacher", "--reference") as one:
        yield one


@pytest.fixture
def begin(place, served, tmp_path) -> Callable[..., object]:
    def start(name: str, *more: str, url: str = served.url) -> object:
        argv = arguments(tmp_path / name, place / "student", place / "prompts.txt", url, *STEPS, *more)
        return trainer(argv, tmp_path / f"{name}.log")

    return start


@pytest.fixture
def complete(begin, tmp_path) -> Callable[..., int]:
    def run(name: str, *more: str) -> int:
        return finish(begin(name, *more), tmp_path / f"{name}.log")

    return run


@pytest.fixture(scope="module")
def undisturbed(place, served) -> Path:
    """The run that nothing happens to."""
    run_dir, log = place / "undisturbed", place / "undisturbed.log"
    argv = arguments(run_dir, place / "student", place / "prompts.txt", served.url, *STEPS)
    assert finish(trainer(argv, log), log) == 0, log.read_text()
    return run_dir


def steps_logged(run_dir: Path) -> int:
    return len(metrics(run_dir))


def writing_a_checkpoint(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".partial-*/*"))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first step": lambda run_dir: (run_dir / "run.json").exists(),
    "in a step": lambda run_dir: steps_logged(run_dir) >= 2,
    "in a step after a checkpoint": lambda run_dir: steps_logged(run_dir) >= 5,
    "in a checkpoint": writing_a_checkpoint,
    "in the export": lambda run_dir: (run_dir / ".partial-final").exists() or (run_dir / "final").exists(),
}


def test_a_trainer_killed_again_and_again_ends_as_if_nothing_had_happened(begin, undisturbed, tmp_path) -> None:
    run_dir, log = tmp_path / "killed", tmp_path / "killed.log"
    hits = 0
    for moment, reached in MOMENTS.items():
        process = begin("killed")
        wait_until(lambda p=process, reached=reached: reached(run_dir) or p.exitcode is not None, what=moment)
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), log.read_text()
        hits += process.exitcode != 0
    assert hits >= len(MOMENTS) - 1  # the last may come too late
    assert finish(begin("killed"), log) == 0, log.read_text()
    assert_same_bits(run_dir / "final", undisturbed / "final")
    without_seconds = [
        [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in metrics(d)]
        for d in (run_dir, undisturbed)
    ]
    assert without_seconds[0] == without_seconds[1]


@pytest.mark.long
def test_twenty_kills_at_any_instant(begin, undisturbed, tmp_path) -> None:
    run_dir, log = tmp_path / "killed", tmp_path / "killed.log"
    for kill in range(20):
        process = begin("killed", "checkpoint.save_every=1")
        before = steps_logged(run_dir)
        wait_until(lambda p=process, before=before: steps_logged(run_dir) > before or p.exitcode is not None)
        time.sleep(0.013 * kill)  # somewhere else in a step or checkpoint each time
        process.kill()
        process.join()
    assert finish(begin("killed"), log) == 0, log.read_text()
    assert_same_bits(run_dir / "final", undisturbed / "final")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_trainer_saves_says_so_and_goes_on(number, code, begin, undisturbed, tmp_path) -> None:
    run_dir, log = tmp_path / "stopped", tmp_path / "stopped.log"
    process = begin("stopped", "checkpoint.save_every=0")
    wait_until(lambda: steps_logged(run_dir) >= 2, what="two steps")
    os.kill(process.pid, number)
    assert finish(process, log) == code, log.read_text()
    assert "run the same command again" in log.read_text()
    done = steps_logged(run_dir)
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert finish(begin("stopped", "checkpoint.save_every=0"), log) == 0
    assert_same_bits(run_dir / "final", undisturbed / "final")


def test_a_teacher_killed_mid_run_and_restarted_leaves_no_trace(place, begin, undisturbed, tmp_path) -> None:
    with teacher(tmp_path / "serve", place / "teacher", "--reference") as mortal:
        process = begin("outage", url=mortal.url)
        for kill in (2, 6):
            wait_until(lambda kill=kill: steps_logged(tmp_path / "outage") >= kill, what="some steps")
            mortal.kill()
            mortal.start()
        assert finish(process, tmp_path / "outage.log") == 0, (tmp_path / "outage.log").read_text()
    assert_same_bits(tmp_path / "outage" / "final", undisturbed / "final")


def test_a_teacher_gone_past_its_budget_ends_in_a_checkpoint(place, begin, complete, undisturbed, tmp_path) -> None:
    run_dir, log = tmp_path / "gone", tmp_path / "gone.log"
    with teacher(tmp_path / "serve", place / "teacher", "--reference") as mortal:
        process = begin("gone", "teacher.timeout_s=2", url=mortal.url)
        wait_until(lambda: steps_logged(run_dir) >= 2, what="two steps")
        mortal.kill()
        assert finish(process, log) == 75
    said = log.read_text().splitlines()[-1]
    assert said.startswith("student-train: stopped after step ")
    assert f"no teacher at {mortal.url} for 2 s" in said
    assert (run_dir / "checkpoints" / f"step-{steps_logged(run_dir):08d}").is_dir()
    assert complete("gone") == 0, log.read_text()
    assert_same_bits(run_dir / "final", undisturbed / "final")


def test_two_experiments_share_a_teacher_and_do_not_notice(begin, complete, undisturbed, tmp_path) -> None:
    other = ["loss.objective=policy_gradient", "train.seed=3", "rollout.group_size=2"]
    assert complete("solo", *other) == 0, (tmp_path / "solo.log").read_text()
    both = {"first": begin("first"), "second": begin("second", *other)}
    for name, process in both.items():
        assert finish(process, tmp_path / f"{name}.log") == 0, (tmp_path / f"{name}.log").read_text()
    assert_same_bits(tmp_path / "first" / "final", undisturbed / "final")
    assert_same_bits(tmp_path / "second" / "final", tmp_path / "solo" / "final")


def test_processes_stop_together_and_one_goes_on(begin, undisturbed, tmp_path) -> None:
    run_dir, log = tmp_path / "ranks", tmp_path / "ranks.log"
    process = begin("ranks", "--num-processes=2", "checkpoint.save_every=0")
    wait_until(lambda: steps_logged(run_dir) >= 2, what="two steps")
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process, log) == 143, log.read_text()
    done = steps_logged(run_dir)
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert finish(begin("ranks", "--num-processes=1"), log) == 0, log.read_text()
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, 13))
    a, b = (torch.cat([t.reshape(-1) for t in weights(d / "final").values()]).double() for d in (undisturbed, run_dir))
    assert float((a - b).norm() / a.norm()) < 1e-5
