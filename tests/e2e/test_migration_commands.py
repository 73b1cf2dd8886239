"""Configurations and commands of other systems' guides, taken over by `student-migrate` and trained with: hub ids and
data sets are tiny ones of the same names, scale and devices are this machine's, everything else is as it was written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cachedhub
import migrated
import pytest
import theirs
import torch
import yaml
from migrated import ANSWERS, PROMPTS, Ran, assert_loss, mean_advantage
from training import TeacherProcess, teacher, weights

from student_trainer.migrate import cli as migration

# Runs in this process leave gRPC's threads behind; its handlers must not run when a later test starts processes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

pytestmark = pytest.mark.slow

SCALE = (
    "train.steps=2",
    "train.batch_size=4",
    "train.num_processes=1",
    "train.strategy=auto",
    "train.reference=true",
    "student.device=cpu",
    "teacher.model=",
    "teacher.serve_args=[]",
    "teacher.visible_devices=",
    "rollout.max_new_tokens=8",
    "tracking.samples_every=0",
    "tracking.wandb_mode=disabled",
)
"""Of this machine, and the one teacher of all tests instead of one of the run's own."""


@dataclass(frozen=True, slots=True)
class Case:
    given: str
    has: dict[str, Any]  # settings as the run recorded them
    check: Callable[[Ran], None] = lambda ran: None
    suffix: str = ""  # of the file it stands in; a command without one
    needs: tuple[str, ...] = ()  # what it leaves open, and what only other machines have room for
    idle: tuple[str, ...] = field(default=("tracking.wandb_mode=disabled",))  # scale that it has no use for


def boxed(ran: Ran) -> None:
    texts = {f"{q}\n\nPut the final answer in \\boxed{{}}. " for q in PROMPTS}
    assert {s.rollout.prompt.text for scored in ran.scored for s in scored} <= texts


def of_tulu(ran: Ran) -> None:
    assert {s.rollout.prompt.text for scored in ran.scored for s in scored} <= {f"{q} " for q in PROMPTS}
    assert len(ran.scored[0]) == 4 * 4
    assert ran.config["train"]["batch_size"] == 4
    written = json.loads((ran.directory / "final-adapter" / "adapter_config.json").read_text())
    assert written["r"] == 64


def by_policy_gradient(ran: Ran) -> None:
    assert ran.lines[0]["loss"] == pytest.approx(-mean_advantage(ran), rel=1e-3)


def on_answers(ran: Ran) -> None:
    assert all(s.rollout.source == "fixed" and s.rollout.prompt.answer in ANSWERS for s in ran.scored[0])


def greedy(ran: Ran) -> None:
    for scored in (s for s in ran.scored[0] if s.rollout.source == "on_policy"):
        at = torch.from_numpy(scored.rollout.token_ids).long()
        assert torch.equal(migrated.log_probs(ran.student, scored)[:, : migrated.V].argmax(1), at)


def grafted(ran: Ran) -> None:
    config = json.loads((ran.directory / "final" / "config.json").read_text())
    assert config["preceptor_graft"]["layers"] == [14, 16, 17, 30]
    before, after = weights(Path(ran.student)), weights(ran.directory / "final")
    mlps = [name for name in after if "feed_forward" in name]
    assert mlps
    assert all(torch.equal(after[name], before[name]) for name in mlps if name in before)
    assert any(not torch.equal(after[name], before[name]) for name in set(after) & set(before))
    assert all(len(s.rollout.prompt.token_ids) + s.rollout.num_tokens == 25 for s in ran.scored[0])


NEEDS_STUDENT = ("--student=Qwen/Qwen3-8B",)
PROBLEMS_TO_SOLVE = "eval.data.source={place}/problems.jsonl"
PROBLEMS = "data.source={place}/problems.jsonl"
WIDE = ("optim.decay_steps=1", "data.seq_length=24", "student.graft_from={place}/deep", "--student={place}/bamba")
ON_TULU = {"student": {"model": "Qwen/Qwen3-8B", "dtype": "bfloat16"}, "data": {"preset": "tulu3"}}
CASES = {
    "nemo page": Case(
        theirs.NEMO_PAGE,
        {"data": {"on_policy_fraction": 0.9, "preset": "math-cl"}, "loss": {"objective": "forward_kl"}},
        boxed,
        ".yaml",
        NEEDS_STUDENT,
    ),
    "nemo batch": Case(
        theirs.NEMO_BATCH, {"train": {"micro_batch_tokens": 16384}}, suffix=".yaml", needs=(*NEEDS_STUDENT, PROBLEMS)
    ),
    "nemo guide": Case(
        theirs.NEMO_GUIDE,
        {
            "student": {"model": "Qwen/Qwen2.5-1.5B-Instruct"},
            "data": {"on_policy_fraction": 0.5},
            "rollout": {"greedy": True, "temperature": 1.0},
            "checkpoint": {"save_every": 500},
            "tracking": {"log_every": 10},
        },
        greedy,
        ".yaml",
        (PROBLEMS,),
    ),
    "nemo overrides": Case(
        theirs.NEMO_OVERRIDES,
        {"data": {"on_policy_fraction": 0.7}, "loss": {"objective": "reverse_kl"}},
        needs=(
            *NEEDS_STUDENT,
            PROBLEMS,
            "rollout.engine=torch",
        ),  # vLLM's: tests/trainer/test_rollout_vllm_colocated.py
    ),
    "nemo whole": Case(
        theirs.NEMO,
        {
            "data": {"on_policy_fraction": 0.5, "preset": "math-cl", "max_prompt_tokens": 4096, "overlong": "drop"},
            "train": {"micro_batch_tokens": 8192, "packing": "on"},
            "student": {"gradient_checkpointing": True},
            "optim": {"learning_rate": 2e-5, "betas": [0.9, 0.999]},
            "tracking": {"project": "distil", "run_name": "org/student-1.5B-run", "trackers": ["wandb"]},
        },
        boxed,
        ".yaml",
        (*NEEDS_STUDENT, "optim.warmup_steps=1", "eval.data.preset=null", "eval.data.split=train", PROBLEMS_TO_SOLVE),
        (),
    ),
    "roll command": Case(
        theirs.ROLL_COMMAND, {"data": {"on_policy_fraction": 0.0}}, on_answers, needs=(*NEEDS_STUDENT, PROBLEMS)
    ),
    "roll script": Case(
        theirs.ROLL_SCRIPT, {"data": {"on_policy_fraction": 0.0}}, on_answers, ".sh", (*NEEDS_STUDENT, PROBLEMS)
    ),
    "roll whole": Case(
        theirs.ROLL,
        {
            "loss": {
                "objective": "skewed_reverse_kl",
                "skew_lambda": 0.2,
                "distill_weight": 0.85,
                "student_temperature": 2.0,
                "teacher_temperature": 3.0,
                "on_prompt": True,
            },
            "teacher": {"top_k": "all"},
            "train": {"seed": 42, "packing": "on", "micro_batch_size": 8},
            "checkpoint": {"save_every": 100, "resume": "never"},
            "tracking": {"trackers": ["tensorboard"]},
            "optim": {"schedule": "cosine", "learning_rate": 2e-5},
        },
        lambda ran: assert_loss(
            ran, migrated.skewed_reverse_kl(0.2), weights=(0.15, 0.85), temperatures=(2.0, 3.0), rel=2e-2
        ),
        ".yaml",
        ("--student=Qwen/Qwen3-8B", "data.source={place}/zh.jsonl", "optim.warmup_steps=1"),
    ),
    "local toy": Case(
        theirs.LOCAL_TOY,
        {"student": {"model": "sshleifer/tiny-gpt2"}, "rollout": {"group_size": 2}},
        by_policy_gradient,
        needs=("--prompts={place}/prompts.txt",),
    ),
    "local GPUs": Case(
        theirs.LOCAL_GPUS,
        {
            **ON_TULU,
            "checkpoint": {"save_every": 200},
            "tracking": {"trackers": ["wandb"], "project": "onpolicy-distill", "run_name": "qwen8b_tulu3"},
        },
        of_tulu,
        idle=(),
    ),
    "local ZeRO-2": Case(
        theirs.LOCAL_ZERO2,
        {"loss": {"objective": "policy_gradient"}},
        by_policy_gradient,
        needs=(*NEEDS_STUDENT, "--prompts={place}/prompts.txt"),
    ),
    "local ZeRO-3 teacher": Case(theirs.LOCAL_ZERO3, ON_TULU, of_tulu),
    "local whole": Case(
        theirs.LOCAL,
        {
            "loss": {"objective": "policy_gradient", "kl_coef": 0.5, "kl_discount": 0.9},
            "optim": {"learning_rate": 1e-4},
        },
        lambda ran: None,
        needs=NEEDS_STUDENT,
        idle=(),
    ),
    "hybrid GPUs": Case(
        theirs.HYBRID_GPUS,
        {
            "student": {"dtype": "bfloat16", "freeze": ["mlp", "replaced_layers"]},
            "loss": {"objective": "forward_kl", "ce_weight": 1.0, "kl_weight": 0.1},
            "data": {"preset": "fineweb-edu", "local_files_only": True},
            "optim": {"schedule": "wsd"},
            "tracking": {"trackers": ["wandb"], "project": "llamba-distill", "run_name": "1teacher_4students1"},
        },
        grafted,
        needs=WIDE,
        idle=(),
    ),
    "hybrid whole": Case(
        theirs.HYBRID,
        {"loss": {"student_temperature": 2.0, "teacher_temperature": 2.0, "scale_by_t2": True}},
        grafted,
        needs=WIDE,
        idle=(),
    ),
}
PACKED = ("hybrid GPUs", "hybrid whole")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = migrated.make_place(tmp_path_factory.mktemp("commands"))
    rows = [{"question_zh": q, "answer_zh": a} for q, a in zip(PROMPTS, ANSWERS, strict=True)]
    (place / "zh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[TeacherProcess]:
    with teacher(place / "serve", place / "teacher", "--reference", f"--max-top-k={migrated.V}") as one:
        yield one


def taken_over(given: str, suffix: str, folder: Path) -> Path:
    """Our configuration for theirs, in a file."""
    if suffix:
        (folder / f"theirs{suffix}").write_text(given)
        given = str(folder / f"theirs{suffix}")
    ours = folder / "run.yaml"
    ours.write_text(migration.as_yaml(migration.migrate(given)))
    return ours


@pytest.mark.parametrize("name", CASES)
def test_what_a_guide_has_is_trained_with(name: str, place, served, tmp_path, monkeypatch) -> None:
    case = CASES[name]
    cachedhub.use(monkeypatch, models=place / "hub", data=place / "datasets")
    argv = [f"--config={taken_over(case.given, case.suffix, tmp_path)}", f"--teacher-url={served.url}"]
    argv += [word for word in SCALE if word not in case.idle or case.idle == ()]
    argv += [word.format(place=place) for word in case.needs]
    if name in PACKED:
        argv = [word for word in argv if not word.startswith("rollout.")]
    threads = torch.get_num_threads()
    try:
        ran = migrated.run(argv, tmp_path / "run", monkeypatch, place / "teacher")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for section, values in case.has.items():
        ran.has(**{f"{section}__{key}": value for key, value in values.items()})
    case.check(ran)


@pytest.mark.parametrize("given", [theirs.NEMO_PLAIN, theirs.NEMO_PYTHON])
def test_a_command_that_says_nothing_but_a_file_gives_no_settings(given: str) -> None:
    found = migration.migrate(given)
    assert (found.settings, [left.value for left in found.left]) == (
        {}, ["examples/configs/distillation_math_cl.yaml"],
    )  # fmt: skip


@pytest.mark.parametrize("given", theirs.NO_TRAINING)
def test_what_trains_nothing_is_refused(given: str) -> None:
    with pytest.raises(migration.MigrationError, match="is no program that is known here"):
        migration.migrate(given)


@pytest.mark.long
def test_both_programs_as_their_users_start_them(place, tmp_path) -> None:
    """`student-migrate` and `student-train` by their own commands; the teacher is the run's own child, by its name."""
    environment = {**os.environ, "HF_HUB_CACHE": str(place / "hub"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(place / "datasets"), "HF_DATASETS_OFFLINE": "1"}
    cachedhub.cached_model(place / "hub", "Qwen/Qwen3-32B", place / "teacher")
    ours = tmp_path / "run.yaml"
    code = "from student_trainer.migrate.cli import main; main()"
    given = [sys.executable, "-c", code, theirs.LOCAL_GPUS, "-o", str(ours)]
    subprocess.run(given, check=True, timeout=300)
    written = yaml.safe_load(ours.read_text())
    assert (written["student"]["model"], written["teacher"]["model"]) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B")
    scale = ["train.steps=2", "train.batch_size=4", "train.num_processes=2", "student.device=cpu"]
    scale += ["rollout.max_new_tokens=8", f"--output-dir={tmp_path / 'run'}", "tracking.samples_every=0"]
    command = [sys.executable, "-m", "student_trainer", f"--config={ours}", *scale]
    done = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in migrated.metrics(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "run" / "final-adapter" / "adapter_config.json").is_file()
