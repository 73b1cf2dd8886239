"""`python -m benchmarks.pipeline`: a step of on-policy distillation, ours over gRPC with a vLLM-backed teacher against
TRL's server-distillation trainer with a stock `vllm serve`. Same models, prompts, objective and optimizer, the same two
cores; the sides take turns, and the servers of the one that waits are stopped. benchmarks/README.md explains the keys.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import models, processes
from benchmarks.pipeline_simulated import simulated
from benchmarks.scoring_memory import MIB, resident_bytes
from benchmarks.systems import Child
from examples.interop.environment import OURS, VENV, program

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # the threads of an idle process sleep
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
CORES = 2
VOCABULARY = 32_000
PROMPTS, PROMPT_TOKENS, BATCH, NEW_TOKENS = 256, 98, 16, 128
TOP_K = (16, 64)
WARM_UP = 2  # steps of each turn that don't count
LEARNING_RATE, BETAS = 1e-4, (0.9, 0.95)
LOGIT_STD = 1.0  # nats, of the teacher: between an untrained model's 0.3 and a trained one's
ENGINE = {"max_num_batched_tokens": 4096, "enforce_eager": True, "max_num_seqs": 64}
POLL_S = 0.1
SAME_LOSS = 0.1  # between the sides at the first steps, relative; their samples differ

Step = dict[str, float]
Side = str


@dataclass(frozen=True)
class Place:
    """What both sides read."""

    scratch: Path
    teacher: Path
    student: Path

    def prompts(self, kind: str) -> Path:
        return self.scratch / f"prompts.{kind}"

    @classmethod
    def made(cls, scratch: Path) -> Place:
        """Models of 10.5M and 4.4M parameters and prompts, made in another process: their memory isn't a trainer's."""
        place = cls(scratch, scratch / "teacher", scratch / "student")
        with Child(_Maker) as maker:
            settings = {"vocabulary": VOCABULARY, "hidden": 256, "layers": 4, "logit_std": LOGIT_STD}
            maker.call("make", place.teacher, settings)
            maker.call("make", place.student, {"vocabulary": VOCABULARY, "hidden": 128, "layers": 2, "seed": 1})
        lines = list(map(prompt, range(PROMPTS)))
        place.prompts("txt").write_text("".join(f"{line}\n" for line in lines))
        place.prompts("jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
        return place


class _Maker:
    def make(self, path: Path, settings: dict[str, Any]) -> None:
        models.make(path, **settings)


def prompt(number: int) -> str:
    """Of PROMPT_TOKENS characters, a token each with these models' tokenizer."""
    return f"{number:3}. Say how this row of numbers goes on, and why: {', '.join(str(number * n) for n in range(40))}"[
        :PROMPT_TOKENS
    ]


@dataclass
class Taken:
    """Of one side at one k: its steps after the warm-up of each turn, the losses of all, and the trainer's memory."""

    steps: list[Step] = field(default_factory=list)
    first_losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0


# ---- the sides -------------------------------------------------------------------------------------------------------


class Ours:
    """`student-train` as a user starts it, and what it writes to metrics.jsonl."""

    def __init__(self, place: Place, url: str) -> None:
        self._place, self._url = place, url

    def run(self, top_k: int, steps: int, turn: int) -> tuple[list[Step], int]:
        place = self._place
        output = place.scratch / f"ours-{top_k}-{turn}"
        command = [
            sys.executable, "-m", "student_trainer", "--teacher-url", self._url, "--student", str(place.student),
            "--prompts", str(place.prompts("txt")), "--output-dir", str(output), f"train.steps={steps}",
            f"train.batch_size={BATCH}", f"train.seed={turn}", f"train.threads={CORES}",
            f"rollout.max_new_tokens={NEW_TOKENS}", "loss.objective=forward_kl", "loss.support=teacher",
            "loss.tail=bucket", f"teacher.top_k={top_k}", f"optim.learning_rate={LEARNING_RATE}",
            f"optim.betas={list(BETAS)}", "checkpoint.save_every=0", "tracking.trackers=[]",
            "tracking.samples_every=0", "tracking.log_every=1",
        ]  # fmt: skip
        peak_bytes = _run(command, output.with_suffix(".log"), dict(os.environ))
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [ours_step(line) for line in lines if "seconds" in line], peak_bytes


def ours_step(line: Mapping[str, float]) -> Step:
    """From a line of metrics.jsonl."""
    parts = {
        "generate": line["seconds_sample"],
        "teacher": line["seconds_score"],
        "learn": line["seconds_learn"],
    }
    return {"step": line["seconds"], **parts, "loss": line["loss"], "tokens": line["tokens"]}


class Trl:
    """TRL's ServerDistillationTrainer in its own environment (pipeline_trl.py)."""

    def __init__(self, place: Place, url: str, python: Path) -> None:
        self._place, self._url, self._python = place, url, python

    def run(self, top_k: int, steps: int, turn: int) -> tuple[list[Step], int]:
        place = self._place
        output = place.scratch / f"trl-{top_k}-{turn}"
        output.mkdir()
        settings = {
            "beta": 0.0,  # forward KL
            "loss_top_k": top_k,
            "loss_add_tail": True,
            "max_steps": steps,
            "seed": turn,
            "per_device_train_batch_size": BATCH,
            "max_completion_length": NEW_TOKENS,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
        }
        command = [
            str(self._python), "-P", str(Path(__file__).with_name("pipeline_trl.py")), "--teacher-url", self._url,
            "--student", str(place.student), "--prompts", str(place.prompts("jsonl")), "--output",
            str(output / "steps.json"), "--settings", json.dumps(settings),
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        environment["HF_HOME"] = str(place.scratch / "trl-cache")
        peak_bytes = _run(command, output / "log", environment)
        return json.loads((output / "steps.json").read_text()), peak_bytes


def _run(command: Sequence[str], log: Path, environment: dict[str, str]) -> int:
    """Runs a trainer to its end; the most bytes that were resident in its process.

    Raises:
        RuntimeError: it failed; the end of its log.
    """
    with log.open("w") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    peak_bytes = 0
    try:
        while child.poll() is None:
            with contextlib.suppress(RuntimeError, OSError):  # it has ended meanwhile
                peak_bytes = max(peak_bytes, resident_bytes(child.pid, "VmHWM"))
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_S)
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {child.returncode}: {log.read_text()[-2000:]}")
    return peak_bytes


@contextlib.contextmanager
def awake(family: Sequence[psutil.Process]) -> Iterator[None]:
    """These processes, stopped until now, run inside."""
    for process in family:
        process.resume()
    try:
        yield
    finally:
        for process in family:
            process.suspend()


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(place: Place, python: Path, turns: int, steps: int) -> dict[tuple[Side, int], Taken]:
    """Turns of `steps` steps after WARM_UP, of both sides at each k."""
    engine = [f"--{n.replace('_', '-')}" if v is True else f"--{n.replace('_', '-')}={v}" for n, v in ENGINE.items()]
    ours_engine = [part for name, value in ENGINE.items() for part in (f"--vllm.{name}", json.dumps(value))]
    taken = {(side, k): Taken() for k in TOP_K for side in ("ours", "trl")}
    servers: dict[Side, list[psutil.Process]] = {}
    with contextlib.ExitStack() as stack:
        arguments = ("--backend", "vllm", "--scoring-path", "fused", "--dtype", "float32", *ours_engine)
        before = _children()
        announced = stack.enter_context(processes.teacher(place.teacher, place.scratch, *arguments))
        servers["ours"] = sorted(_children() - before, key=lambda process: process.pid)
        before = _children()
        url = stack.enter_context(processes.stock_vllm(place.teacher, place.scratch, "--dtype", "float32", *engine))
        servers["trl"] = sorted(_children() - before, key=lambda process: process.pid)
        sides = {"ours": Ours(place, announced["grpc_url"]), "trl": Trl(place, url, python)}
        for family in servers.values():
            stack.callback(_resume, family)  # before they are asked to end
            for process in family:
                process.suspend()
        for turn in range(turns):
            for k in TOP_K:
                for side in ("ours", "trl") if turn % 2 == 0 else ("trl", "ours"):
                    with awake(servers[side]):
                        found, peak_bytes = sides[side].run(k, WARM_UP + steps, turn)
                    into = taken[side, k]
                    into.steps += found[WARM_UP:]
                    into.first_losses.append(found[0]["loss"])
                    into.peak_bytes = max(into.peak_bytes, peak_bytes)
                    seconds = statistics.median(step["step"] for step in found[WARM_UP:])
                    print(f"turn {turn + 1} of {turns}: {side} k={k} {seconds:.2f} s a step", file=sys.stderr)
    return taken


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _resume(family: Sequence[psutil.Process]) -> None:
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def figures_of(taken: Mapping[tuple[Side, int], Taken]) -> dict[str, float]:
    """Medians of the steps and of their parts; ratios.

    Raises:
        RuntimeError: the sides' losses differ at the first step, so they don't compute the same thing.
    """
    figures: dict[str, float] = {}
    for k in sorted({k for _, k in taken}):
        ours, trl = taken["ours", k], taken["trl", k]
        mine, theirs = (statistics.fmean(side.first_losses) for side in (ours, trl))
        if abs(mine - theirs) > SAME_LOSS * theirs:
            raise RuntimeError(f"k={k}: the first step's loss is {mine:.4g} with ours and {theirs:.4g} with TRL")
        figures[f"speedup_k{k}"] = _median(trl.steps, "step") / _median(ours.steps, "step")
        for side, each in (("ours", ours), ("trl", trl)):
            for part in ("step", "generate", "teacher", "learn", "tokens"):
                unit = "" if part == "tokens" else "_s"
                figures[f"{side}_{part}{unit}_k{k}"] = _median(each.steps, part)
            figures[f"{side}_first_loss_k{k}"] = statistics.fmean(each.first_losses)
            figures[f"{side}_peak_mib_k{k}"] = each.peak_bytes / MIB
    ratios = [taken["ours", k].peak_bytes / taken["trl", k].peak_bytes for _, k in taken]
    return {**figures, "memory_ratio": max(ratios), "steps": float(min(len(each.steps) for each in taken.values()))}


def _median(steps: Sequence[Step], part: str) -> float:
    return statistics.median(step[part] for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--venv", type=Path, default=VENV, help="where `make interop` has put TRL")
    parser.add_argument("--turns", type=int, default=2, help="of each side at each k (default 2)")
    parser.add_argument("--steps", type=int, default=6, help=f"of a turn that count, after {WARM_UP} (default 6)")
    parser.add_argument("--quick", action="store_true", help="one turn of one step, to see that it works")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started is stopped
    python = program(options.venv, "python")
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    both = {"OMP_NUM_THREADS": str(len(cores)), "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    os.environ.update(ENVIRONMENT, **both)
    turns, steps = (1, 1) if options.quick else (options.turns, options.steps)
    with tempfile.TemporaryDirectory() as scratch:
        figures = figures_of(measure(Place.made(Path(scratch)), python, turns, steps))
    if not options.quick:
        figures |= simulated()
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
