"""Trainers and teachers that are killed, stopped and left alone. The final weights must be those of an undisturbed run,
bit for bit (torch backend and trainer in reference mode).
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from reliability import holds
from tinymodels import save_tiny, tiny_tokenizer
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
from transformers import AutoModelForCausalLM

from student_trainer import checkpoint

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
    moments = random.Random(1)
    mid_checkpoint = 0
    for kill in range(20):
        process = begin("killed", "checkpoint.save_every=1")
        before = steps_logged(run_dir)
        if kill % 4 == 3:
            wait_until(lambda p=process: writing_a_checkpoint(run_dir) or p.exitcode is not None)
        else:
            wait_until(lambda p=process, before=before: steps_logged(run_dir) > before or p.exitcode is not None)
            time.sleep(moments.uniform(0, 0.4))  # a step and its checkpoint take about as long
        process.kill()
        process.join()
        mid_checkpoint += bool(list((run_dir / "checkpoints").glob(".partial-*")))
        for path in (run_dir / "checkpoints").glob("step-*"):
            assert checkpoint.problems(path) == ""  # a partial one never has a checkpoint's name
    assert mid_checkpoint >= 1
    assert finish(begin("killed"), log) == 0, log.read_text()
    assert_same_bits(run_dir / "final", undisturbed / "final")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_trainer_saves_says_so_and_goes_on(
    number, code, begin, undisturbed, tmp_path, record_property
) -> None:
    run_dir, log = tmp_path / "stopped", tmp_path / "stopped.log"
    process = begin("stopped", "checkpoint.save_every=0")
    wait_until(lambda: steps_logged(run_dir) >= 2, what="two steps")
    os.kill(process.pid, number)
    signalled = time.monotonic()
    assert finish(process, log) == code, log.read_text()
    took = time.monotonic() - signalled
    record_property("seconds_from_signal_to_exit", round(took, 2))
    assert took < 30
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


def test_c6_two_teachers_of_three_killed_mid_run_leave_no_trace(
    place, served, begin, undisturbed, tmp_path, record_property
) -> None:
    """Three replicas, two are killed, one of them comes back: the run loses no step."""
    model = place / "teacher"
    with teacher(tmp_path / "b", model, "--reference") as b, teacher(tmp_path / "c", model, "--reference") as c:
        process = begin("replicas", url=f"{served.url},{b.url},{c.url}")
        wait_until(lambda: steps_logged(tmp_path / "replicas") >= 2, what="two steps")
        b.kill()
        c.kill()
        wait_until(lambda: steps_logged(tmp_path / "replicas") >= 5, what="steps with one teacher")
        b.start()
        assert finish(process, tmp_path / "replicas.log") == 0, (tmp_path / "replicas.log").read_text()
    assert steps_logged(tmp_path / "replicas") == steps_logged(undisturbed)
    assert_same_bits(tmp_path / "replicas" / "final", undisturbed / "final")
    holds(record_property, "C6", "a run of 12 steps on 3 teachers, 2 killed, 1 back: the undisturbed run's weights")


def test_a_teacher_gone_past_its_budget_ends_in_a_checkpoint(
    place, begin, complete, undisturbed, tmp_path, record_property
) -> None:
    run_dir, log = tmp_path / "gone", tmp_path / "gone.log"
    with teacher(tmp_path / "serve", place / "teacher", "--reference") as mortal:
        process = begin("gone", "teacher.timeout_s=4", url=mortal.url)
        wait_until(lambda: steps_logged(run_dir) >= 2, what="two steps")
        mortal.kill()
        wait_until(lambda: still(run_dir), what="a step that waits for the teacher")
        before = psutil.Process(process.pid).cpu_times()
        time.sleep(1.0)
        after = psutil.Process(process.pid).cpu_times()
        busy = after.user + after.system - before.user - before.system
        assert finish(process, log) == 75
    record_property("cpu_seconds_in_a_second_of_waiting", round(busy, 3))
    assert busy < 0.2, f"{busy:.2f} s of CPU in 1 s of waiting for the teacher"
    said = log.read_text().splitlines()[-1]
    assert said.startswith("student-train: stopped after step ")
    assert f"no teacher at {mortal.url} for 4 s" in said
    assert (run_dir / "checkpoints" / f"step-{steps_logged(run_dir):08d}").is_dir()
    assert complete("gone") == 0, log.read_text()
    assert_same_bits(run_dir / "final", undisturbed / "final")


def still(run_dir: Path) -> bool:
    """Whether no step has been logged for a while that would do for several."""
    before = steps_logged(run_dir)
    time.sleep(0.5)
    return steps_logged(run_dir) == before


def test_a_disk_that_fills_up_ends_the_run_and_the_previous_checkpoint_goes_on(begin, undisturbed, tmp_path) -> None:
    """The limit on a file's size stands for a full disk: the kernel refuses the write of the weights all the same."""
    run_dir, log = tmp_path / "full", tmp_path / "full.log"
    process = begin("full")
    wait_until(lambda: (run_dir / "checkpoints" / "step-00000003").exists(), what="a checkpoint")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert finish(process, log) == 1
    said = log.read_text().splitlines()[-1]
    assert said.startswith("student-train: can't write checkpoint ")
    assert "File too large" in said
    assert said.endswith("earlier checkpoints are untouched")
    whole = sorted((run_dir / "checkpoints").iterdir())
    assert whole
    assert [checkpoint.problems(path) for path in whole] == [""] * len(whole)
    assert finish(begin("full"), log) == 0, log.read_text()
    assert_same_bits(run_dir / "final", undisturbed / "final")


FAMILIES = {
    "reverse_kl over the union": ["loss.objective=reverse_kl"],
    "policy_gradient": ["loss.objective=policy_gradient", "rollout.group_size=2", "loss.center=group"],
    "k3": ["loss.objective=k3"],
}
"""Besides forward_kl, which all the other drills have: a divergence whose support the student chooses, advantages of
whole groups, and a sampled-token objective."""


@pytest.mark.parametrize("loss", FAMILIES.values(), ids=FAMILIES)
def test_every_family_of_objectives_goes_on_bit_for_bit(loss, begin, complete, tmp_path) -> None:
    shorter = ["--steps=5", "checkpoint.save_every=2", *loss]
    assert complete("whole", *shorter) == 0, (tmp_path / "whole.log").read_text()
    process = begin("killed", *shorter)
    wait_until(lambda: steps_logged(tmp_path / "killed") >= 3 or process.exitcode is not None, what="three steps")
    process.kill()
    process.join()
    assert complete("killed", *shorter) == 0, (tmp_path / "killed.log").read_text()
    assert_same_bits(tmp_path / "killed" / "final", tmp_path / "whole" / "final")


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


def test_a_teacher_without_numbers_for_one_prompt_steps_no_rank(place, tmp_path) -> None:
    """NaN in the teacher, for whatever holds one token; two processes. The prompts of the first two steps are free of
    it, and so is what the student says to them."""
    save_tiny(place / "broken", seed=1, scale=2.5, tie_word_embeddings=False)  # only what follows the token is NaN
    tokenizer = tiny_tokenizer()
    [bad] = tokenizer("?")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(place / "broken")
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = torch.nan
    model.save_pretrained(place / "broken")
    prompts, run_dir, log = tmp_path / "prompts.txt", tmp_path / "nan", tmp_path / "nan.log"
    prompts.write_text("\n".join([*PROMPTS[:8], "?", "fox", "dog", "the"]) + "\n")
    with teacher(tmp_path / "serve", place / "broken") as one:
        argv = arguments(run_dir, place / "student", prompts, one.url, "--num-processes=2", "teacher.timeout_s=2")
        argv += ["data.shuffle=false", "checkpoint.save_every=1", "rollout.max_new_tokens=4"]
        assert finish(trainer(argv, log), log) == 1
    said = log.read_text()
    assert re.search(
        r"student-train: the teacher at \S+ gives no usable scores, for \d+ s, request \w+: invalid_backend_output: "
        r".*sequence '8': .* at position \d+",
        said,
    ), said
    assert "another process failed" in said
    assert steps_logged(run_dir) == 2
    steps = sorted(p.name for p in (run_dir / "checkpoints").glob("step-*"))
    assert steps == ["step-00000001", "step-00000002"]
    assert not (run_dir / "final").exists()


@pytest.mark.long
def test_a_teacher_killed_five_times_in_two_hundred_steps_leaves_no_trace(
    place, served, begin, complete, tmp_path
) -> None:
    longer = ["--steps=200", "checkpoint.save_every=50", "rollout.max_new_tokens=8"]
    assert complete("whole", *longer) == 0, (tmp_path / "whole.log").read_text()
    with teacher(tmp_path / "serve", place / "teacher", "--reference") as mortal:
        process = begin("outage", *longer, url=mortal.url)
        for kill in (20, 60, 100, 140, 180):
            wait_until(lambda kill=kill: steps_logged(tmp_path / "outage") >= kill, what="some steps")
            mortal.kill()
            mortal.start()
        assert finish(process, tmp_path / "outage.log") == 0, (tmp_path / "outage.log").read_text()
    assert_same_bits(tmp_path / "outage" / "final", tmp_path / "whole" / "final")
