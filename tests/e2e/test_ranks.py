"""Whole runs on several processes: that go on with other numbers of them and other strategies, lose one, or are started
by other people's launchers.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from ports import free_port
from tinymodels import save_tiny
from training import (
    DEEPSPEED,
    PROMPTS,
    TeacherProcess,
    arguments,
    assert_same_bits,
    finish,
    metrics,
    ranks,
    teacher,
    trainer,
    wait_until,
    weights,
)

from student_trainer import checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 8
LAUNCH_S = 300.0
"""Longest wait for a run that another launcher starts, imports and all."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    save_tiny(place / "student", seed=2)
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place


@pytest.fixture(scope="module")
def served(place) -> Iterator[TeacherProcess]:
    with teacher(place / "serve", place / "teacher", "--reference") as one:
        yield one


@pytest.fixture(scope="module")
def command(place, served) -> Callable[..., list[str]]:
    def make(run_dir: Path, *more: str) -> list[str]:
        settings = [f"--steps={STEPS}", "train.num_processes=0", "train.micro_batch_tokens=24", "eval.every=0"]
        return arguments(run_dir, place / "student", place / "prompts.txt", served.url, *settings, *more)

    return make


@pytest.fixture(scope="module")
def alone(place, command) -> Path:
    """The run of one process that nothing happens to."""
    log = place / "alone.log"
    assert finish(trainer(command(place / "alone"), log), log) == 0, log.read_text()
    return place / "alone"


def together(argv: list[str], world: int, log: Path, **variables: str) -> None:
    """One run of `world` processes, to its end."""
    for process in ranks(argv, world, log, **variables):
        assert finish(process, log) == 0, log.read_text()


def distance(a: Path, b: Path) -> float:
    """Of two students, by norm."""
    left, right = (torch.cat([t.reshape(-1) for _, t in sorted(weights(d).items())]).double() for d in (a, b))
    return float((left - right).norm() / right.norm())


def drawn(run_dir: Path) -> list[tuple[float, ...]]:
    """What depends on which prompts were drawn and on what was sampled, by step."""
    return [(line["step"], line["prompt_tokens"], line["completion_tokens"]) for line in metrics(run_dir)]


def segments(command: Callable[..., list[str]], run_dir: Path, parts: Sequence[tuple[int, str, int]]) -> None:
    """One run in parts of (processes, strategy, up to step)."""
    for world, strategy, until in parts:
        argv = command(run_dir, f"--steps={until}", f"train.strategy={strategy}")
        where = {"PYTHONPATH": str(DEEPSPEED)} if strategy.startswith("zero") else {}
        together(argv, world, run_dir.with_suffix(".log"), **where)
        state = json.loads((run_dir / "checkpoints" / f"step-{until:08d}" / checkpoint.STATE).read_text())
        assert (state["world"], state["strategy"]) == (world, strategy if world > 1 else "one process")


CHAINS = {
    "one, two, one": [(1, "auto", 2), (2, "fsdp2", 4), (2, "ddp_sharded", 6), (1, "auto", STEPS)],
    "four, two": [(4, "fsdp2", 4), (2, "fsdp2", STEPS)],
    "four, two, one": [(4, "ddp_sharded", 3), (2, "ddp", 6), (1, "auto", STEPS)],
    "zero3, fsdp2": [(2, "zero3", 3), (2, "fsdp2", 6), (2, "zero2", STEPS)],
}


@pytest.mark.parametrize(
    "chain", [name if name == "one, two, one" else pytest.param(name, marks=pytest.mark.long) for name in CHAINS]
)
def test_a_run_goes_on_with_other_ranks_and_strategies(chain: str, command, alone, tmp_path) -> None:
    if "zero" in chain and not DEEPSPEED.is_dir():
        pytest.skip("no DeepSpeed here: make setup-test")
    run_dir = tmp_path / "run"
    segments(command, run_dir, CHAINS[chain])
    assert drawn(run_dir) == drawn(alone)
    assert distance(run_dir / "final", alone / "final") < 1e-5


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp_sharded", marks=pytest.mark.long)])
def test_the_same_ranks_go_on_bit_by_bit(strategy: str, command, tmp_path) -> None:
    segments(command, tmp_path / "whole", [(2, strategy, STEPS)])
    segments(command, tmp_path / "parted", [(2, strategy, 3), (2, strategy, STEPS)])
    assert_same_bits(tmp_path / "whole" / "final", tmp_path / "parted" / "final")


def killed_rank(launcher: int) -> psutil.Process | None:
    """Process 1 of the run whose launcher has the process number `launcher`."""
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            if child.environ().get("RANK") == "1":
                return child
        except psutil.Error:
            continue
    return None


def test_a_killed_rank_ends_the_run_with_a_checkpoint_to_go_on_from(command, alone, tmp_path) -> None:
    run_dir, log = tmp_path / "killed", tmp_path / "killed.log"
    argv = command(run_dir, "train.strategy=fsdp2", "--num-processes=2")
    process = trainer(argv, log)
    wait_until(lambda: len(metrics(run_dir)) >= 3 or process.exitcode is not None, what="three steps")
    victim = killed_rank(process.pid)
    assert victim is not None, log.read_text()
    victim.kill()
    assert finish(process, log) == 128 + signal.SIGKILL, log.read_text()
    assert re.search(
        r"process 1 of 2 was killed by SIGKILL; the others are stopped; .* go on from the newest checkpoint",
        log.read_text(),
    )
    assert "Traceback" not in log.read_text()
    assert checkpoint.find_latest(run_dir) is not None
    together(command(run_dir), 1, log)
    assert drawn(run_dir) == drawn(alone)
    assert distance(run_dir / "final", alone / "final") < 1e-5


def launch(module: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Another launcher, in a session of its own, its output in `log`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(DEEPSPEED)]), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *module], stdout=file, stderr=file, env=environment, start_new_session=True, cwd=ROOT
        )


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("fsdp2", "fsdp2"),
        pytest.param("ddp", "ddp", marks=pytest.mark.long),
        pytest.param("zero2", "zero2", marks=pytest.mark.long),
        pytest.param("zero3", "zero3", marks=pytest.mark.long),
    ],
)
def test_accelerate_launch_starts_what_its_configuration_says(
    name: str, strategy: str, command, alone, tmp_path
) -> None:
    if "zero" in name and not DEEPSPEED.is_dir():
        pytest.skip("no DeepSpeed here: make setup-test")
    run_dir, log = tmp_path / "launched", tmp_path / "launched.log"
    config = ROOT / "deploy" / "accelerate" / f"{name}.yaml"
    options = ["--config_file", str(config), "--num_processes=2", f"--main_process_port={free_port()}", "-m"]
    process = launch(["accelerate.commands.launch", *options, "student_trainer", *command(run_dir)], log)
    assert process.wait(LAUNCH_S) == 0, log.read_text()
    state = json.loads((run_dir / "checkpoints" / f"step-{STEPS:08d}" / checkpoint.STATE).read_text())
    assert (state["world"], state["strategy"]) == (2, strategy)
    assert distance(run_dir / "final", alone / "final") < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_nodes_train_together(launcher: str, command, alone, tmp_path) -> None:
    run_dir, log, port = tmp_path / "nodes", tmp_path / "nodes.log", free_port()
    processes = []
    for node in range(2):
        if launcher == "torchrun":
            start = ["torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1"]
            start += ["--master-addr=127.0.0.1", f"--master-port={port}", "-m"]
        else:
            config = ROOT / "deploy" / "accelerate" / "ddp-2-nodes.yaml"
            start = ["accelerate.commands.launch", "--config_file", str(config), "--num_processes=2"]
            start += [f"--machine_rank={node}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}", "-m"]
        processes.append(launch([*start, "student_trainer", *command(run_dir, "train.strategy=fsdp2")], log))
    for process in processes:
        assert process.wait(LAUNCH_S) == 0, log.read_text()
    state = json.loads((run_dir / "checkpoints" / f"step-{STEPS:08d}" / checkpoint.STATE).read_text())
    assert (state["world"], state["strategy"]) == (2, "fsdp2")
    assert distance(run_dir / "final", alone / "final") < 1e-5
