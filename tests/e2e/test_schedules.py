"""`train.schedule` in whole runs against real teachers: strict is sequential bit for bit, async learns from every
sample once, however often it is killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tinymodels import save_tiny
from training import (
    FORKS,
    PROMPTS,
    TeacherProcess,
    _enter,
    arguments,
    assert_same_bits,
    finish,
    metrics,
    ranks,
    wait_until,
    weights,
)

from student_trainer import cli

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

pytestmark = pytest.mark.slow

BATCH, GROUP, STEPS, AHEAD = 4, 2, 10, 2
"""Prompts of a step, completions of each, steps, and how many are sampled ahead."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("schedules")
    save_tiny(place / "left", seed=1, scale=2.5)
    save_tiny(place / "right", seed=5, scale=2.5)
    save_tiny(place / "student", seed=2)
    records = [{"question": text, "answer": text[::-1]} for text in PROMPTS]
    (place / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return place


@pytest.fixture(scope="module")
def served(place) -> Iterator[dict[str, TeacherProcess]]:
    teachers = {
        name: TeacherProcess(place / f"serve_{name}", place / name, "--reference") for name in ("left", "right")
    }
    try:
        for one in teachers.values():
            one.begin()
        for one in teachers.values():
            one.wait()
        yield teachers
    finally:
        for one in teachers.values():
            one.stop()


@pytest.fixture(autouse=True)
def _own_torch_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def argv(place, served, tmp_path) -> Callable[..., list[str]]:
    def make(name: str, *more: str) -> list[str]:
        url = served["left"].url
        return arguments(tmp_path / name, place / "student", place / "prompts.jsonl", url, *more)

    return make


# -- strict


MICRO = ["--steps=4", "train.micro_batch_size=2", "rollout.batch_sequences=2", "rollout.group_size=2"]
"""Several micro-batches a step, sampled two sequences at a time in order of their lengths, not of their numbers."""
TWO = ["teachers.left.top_k=8", "teachers.right.top_k=4"]
VARIANTS = {
    "forward_kl": [],
    "fixed data and candidates of all": [
        "data.on_policy_fraction=0.5", "data.mix=sample", "loss.support=union", "loss.objective=reverse_kl",
    ],
    "prompts too, by sequence": ["loss.on_prompt=true", "loss.normalise=sequence", "loss.objective=jsd"],
    "k3, several updates": ["loss.objective=k3", "train.updates=2"],
    "policy_gradient": ["loss.objective=policy_gradient"],
    "policy_gradient, centred": ["loss.objective=policy_gradient", "loss.center=group"],
    "two teachers by sample": [*TWO, "teaching.by=sample"],
    "a mixture": [*TWO, "teaching.by=mixture"],
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_strict_is_sequential_bit_for_bit(variant, argv, served, tmp_path) -> None:
    if "teachers." in "".join(variant):
        variant = [*variant, *(f"teachers.{name}.url={one.url}" for name, one in served.items())]
    for schedule in ("sequential", "strict"):
        chosen = argv(schedule, *MICRO, *variant, f"train.schedule={schedule}")
        if "teachers." in "".join(variant):
            chosen = [a for a in chosen if not a.startswith(("--teacher-url", "teacher."))]
        assert cli.run(chosen) == 0
    assert_same_bits(tmp_path / "strict" / "final", tmp_path / "sequential" / "final")
    lines = [[_without_seconds(line) for line in metrics(tmp_path / s)] for s in ("sequential", "strict")]
    assert lines[0] == lines[1]
    assert {"seconds_sample", "seconds_score", "seconds_learn"} <= set(metrics(tmp_path / "strict")[0])


def _without_seconds(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if "seconds" not in key}


def test_strict_is_sequential_bit_for_bit_on_two_processes_and_near_it_on_one(argv, tmp_path) -> None:
    for schedule in ("sequential", "strict"):
        settings = [a for a in argv(schedule, *MICRO, f"train.schedule={schedule}") if "num_processes" not in a]
        log = tmp_path / f"{schedule}.log"
        assert [finish(p, log) for p in ranks(settings, 2, log)] == [0, 0], log.read_text()
    assert_same_bits(tmp_path / "strict" / "final", tmp_path / "sequential" / "final")
    assert cli.run(argv("alone", *MICRO)) == 0
    a, b = (
        torch.cat([t.reshape(-1) for t in weights(tmp_path / d / "final").values()]).double()
        for d in ("alone", "strict")
    )
    assert float((a - b).norm() / a.norm()) < 1e-5


def test_a_run_changes_between_sequential_and_strict_but_not_to_async(argv, tmp_path, capfd) -> None:
    assert cli.run(argv("whole", *MICRO)) == 0
    shorter = [*MICRO, "--steps=2", "train.schedule=sequential"]
    assert cli.run(argv("parts", *shorter)) == 0
    assert cli.run(argv("parts", *MICRO, "train.schedule=async", "train.max_staleness=1")) == 2
    assert "train.max_staleness: 0 -> 1" in capfd.readouterr().err
    assert cli.run(argv("parts", *MICRO)) == 0
    assert_same_bits(tmp_path / "whole" / "final", tmp_path / "parts" / "final")


def test_a_trace_is_written_on_demand(argv, tmp_path) -> None:
    assert cli.run(argv("traced", *MICRO, "tracking.trace_steps=[2,3]")) == 0
    events = json.loads((tmp_path / "traced" / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["step"] for event in spans} == {2, 3}
    assert {"sample", "score", "learn"} <= {event["name"] for event in spans}
    learned = sum(event["args"].get("samples", 0) for event in spans if event["name"] == "learn")
    assert learned == 2 * 4 * 2


# -- async


ASYNC = [
    "train.schedule=async",
    f"train.max_staleness={AHEAD}",
    f"train.batch_size={BATCH}",
    f"rollout.group_size={GROUP}",
]


def _recording(argv: list[str]) -> int:
    """`student-train`, which notes what each step has learned from before it is reported."""
    from student_trainer.run import Run

    note = Path(os.environ["LEARNED"]).open("a")  # noqa: SIM115
    report = Run.report

    def recorded(self: Run, samples: Any, learned: Any) -> None:
        seen = [[s.rollout.uid, int(s.rollout.versions.min())] for s in samples.all()]
        note.write(json.dumps({"step": samples.step, "seen": seen}) + "\n")
        note.flush()
        report(self, samples, learned)

    Run.report = recorded  # type: ignore[method-assign]
    return cli.run(argv)


def recording(argv: list[str], log: Path, learned: Path) -> Any:
    process = FORKS.Process(target=_enter, args=(_recording, argv, str(log), {"LEARNED": str(learned)}))
    process.start()
    return process


def assert_every_sample_once(learned: Path, steps: int) -> None:
    """In the steps that the final weights come from: of a step that was taken again, the last time."""
    last = {line["step"]: line["seen"] for line in map(json.loads, learned.read_text().splitlines())}
    assert sorted(last) == list(range(steps))
    for step, seen in last.items():
        first = step * BATCH * GROUP
        assert [uid for uid, _ in seen] == list(range(first, first + BATCH * GROUP))
        assert all(0 <= step - version <= AHEAD for _, version in seen)


def test_async_learns_from_every_sample_once_and_says_how_old_they_are(argv, tmp_path, capfd) -> None:
    log, learned = tmp_path / "async.log", tmp_path / "learned.jsonl"
    settings = argv("async", *ASYNC, f"--steps={STEPS}", "loss.staleness=prefix", "loss.support=union")
    assert finish(recording(settings, log, learned), log) == 0, log.read_text()
    assert_every_sample_once(learned, STEPS)
    lines = metrics(tmp_path / "async")
    shares = [{k: v for k, v in line.items() if k.removeprefix("staleness_").isdigit()} for line in lines]
    assert all(sum(share.values()) == pytest.approx(1.0) for share in shares)
    assert all(line["staleness_max"] <= AHEAD and line["dropped_samples"] == 0 for line in lines)
    assert max(line["staleness_max"] for line in lines) >= 1  # something was sampled ahead
    assert (tmp_path / "async" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.long)])
def test_async_killed_at_any_instant_loses_no_sample_and_uses_none_twice(kills, argv, tmp_path) -> None:
    log, learned = tmp_path / "killed.log", tmp_path / "learned.jsonl"
    steps = 4 * kills
    settings = argv("killed", *ASYNC, f"--steps={steps}", "checkpoint.save_every=2")
    moments = random.Random(kills)
    for kill in range(kills):
        process = recording(settings, log, learned)
        reached = min(3 * kill + 2, steps - 1)
        wait_until(lambda p=process, n=reached: len(metrics(tmp_path / "killed")) >= n or p.exitcode is not None)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
    assert finish(recording(settings, log, learned), log) == 0, log.read_text()
    assert_every_sample_once(learned, steps)


def test_async_stops_at_a_signal_and_when_its_teacher_is_gone(argv, place, tmp_path) -> None:
    run_dir, log, learned = tmp_path / "stopped", tmp_path / "stopped.log", tmp_path / "learned.jsonl"
    mortal = TeacherProcess(tmp_path / "serve", place / "left", "--reference").start()
    try:
        settings = argv("stopped", *ASYNC, f"--steps={STEPS}", "checkpoint.save_every=0")
        settings = [a for a in settings if not a.startswith("--teacher-url")]
        settings += [f"--teacher-url={mortal.url}", "teacher.timeout_s=2"]
        process = recording(settings, log, learned)
        wait_until(lambda: len(metrics(run_dir)) >= 2, what="two steps")
        os.kill(process.pid, signal.SIGTERM)
        assert finish(process, log) == 143, log.read_text()
        process = recording(settings, log, learned)
        done = len(metrics(run_dir))
        wait_until(lambda: len(metrics(run_dir)) >= done + 1, what="another step")
        mortal.kill()
        assert finish(process, log) == 75, log.read_text()
        assert log.read_text().splitlines()[-1].startswith("student-train: stopped after step ")
        mortal.start()
        assert finish(recording(settings, log, learned), log) == 0, log.read_text()
    finally:
        mortal.stop()
    assert_every_sample_once(learned, STEPS)


def test_async_on_two_processes_learns_from_every_sample_once(argv, tmp_path) -> None:
    log, learned = tmp_path / "ranks.log", tmp_path / "learned.jsonl"
    settings = [a for a in argv("ranks", *ASYNC, f"--steps={STEPS}") if "num_processes" not in a]
    started = ranks(settings, 2, log, main=_recording, LEARNED=str(learned))
    assert [finish(process, log) for process in started] == [0, 0], log.read_text()
    seen: dict[int, list[int]] = {}
    for line in map(json.loads, learned.read_text().splitlines()):
        seen.setdefault(line["step"], []).extend(uid for uid, _ in line["seen"])
    size = BATCH * GROUP
    assert {step: sorted(uids) for step, uids in seen.items()} == {
        step: list(range(step * size, (step + 1) * size)) for step in range(STEPS)
    }


REFUSED = {
    "train.max_staleness: got 0": ["train.schedule=async"],
    "train.max_staleness: got 2 with train.schedule strict": ["train.max_staleness=2"],
    "train.schedule: got async with rollout.engine vllm": [
        "train.schedule=async", "train.max_staleness=1", "rollout.engine=vllm",
    ],
    "train.schedule: got async with teacher.refresh_every": [
        "train.schedule=async", "train.max_staleness=1", "teacher.model=self", "teacher.refresh_every=2",
    ],
    "loss.staleness: got prefix with train.updates 1": ["loss.staleness=prefix"],
    "trace_steps: got [3, 2]": ["tracking.trace_steps=[3,2]"],
}  # fmt: skip


@pytest.mark.parametrize(("said", "settings"), REFUSED.items(), ids=REFUSED)
def test_what_can_not_be_is_refused_in_one_line(said, settings, argv, capfd) -> None:
    chosen = argv("refused", *settings)
    if "teacher.model=self" in settings:
        chosen = [a for a in chosen if not a.startswith("--teacher-url")]
    assert cli.run(chosen) == 2
    err = capfd.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
