"""The local on-policy script in Tinker's manner: `python -m local_distill.train_on_policy_local --…`."""

from __future__ import annotations

import re
from typing import Any

from student_trainer.migrate.base import Migration, Table, by, choice, covered, nothing, to
from student_trainer.migrate.shared import DTYPES, dataset, integer, number, serve, track

NAME = "local on-policy script"
DEVICES = "a server of its own holds the teacher: --tensor-parallel-size and the like in teacher.serve_args"


def _project(migration: Migration, key: str, value: Any) -> None:
    track(migration, "wandb")
    migration.set("tracking.project", value)


def _name(migration: Migration, key: str, value: Any) -> None:
    track(migration, "wandb")
    migration.set("tracking.run_name", value)


def _zero3(migration: Migration, key: str, value: Any) -> None:
    serve(migration, "--backend=vllm")
    migration.leave(key, value, DEVICES)


def _deepspeed(migration: Migration, key: str, value: Any) -> None:
    found = re.search(r"zero_?([23])", str(value))
    if found:
        migration.set("train.strategy", f"zero{found[1]}")
    else:
        migration.leave(key, value, "see train.strategy")


TABLE: Table = {
    "student_model": to("student.model"),
    "teacher_model": to("teacher.model", remark="a child process; teacher.url for one that is shared"),
    "steps": to("train.steps", integer),
    "batch_size": to("train.batch_size", integer, "prompts of a step, over all processes"),
    "group_size": to("rollout.group_size", integer),
    "grad_accum": covered("micro-batches go by train.micro_batch_tokens; the result does not depend on it"),
    "max_new_tokens": to("rollout.max_new_tokens", integer),
    "temperature": to("rollout.temperature", number),
    "top_p": to("rollout.top_p", number),
    "learning_rate": to("optim.learning_rate", number),
    "weight_decay": to("optim.weight_decay", number),
    "kl_coef": to("loss.kl_coef", number),
    "kl_discount": to("loss.kl_discount", number),
    "eval_every": to("eval.every", integer),
    "save_every": to("checkpoint.save_every", integer),
    "output_dir": to("train.output_dir"),
    "seed": to("train.seed", integer),
    "dtype": choice("student.dtype", DTYPES),
    "use_lora": by("`student.lora.r`", lambda migration, key, value: None, "64 where lora_r is not given"),
    "lora_r": to("student.lora.r", integer),
    "lora_alpha": to("student.lora.alpha", integer),
    "lora_dropout": to("student.lora.dropout", number),
    "dataset": by("`data.preset`, `data.source`", dataset),
    "prompts_file": to("data.source"),
    "wandb_project": by("`tracking.project`", _project),
    "wandb_name": by("`tracking.run_name`", _name),
    "wandb_mode": to("tracking.wandb_mode"),
    "teacher_ds_zero3": by("", _zero3, DEVICES),
    "teacher_ds_config": nothing(DEVICES),
    "launcher.config_file": nothing("deploy/accelerate has ours; without a launcher all visible GPUs are used"),
    "launcher.deepspeed_config_file": by("`train.strategy`", _deepspeed, "ZeRO-2 → zero2, ZeRO-3 → zero3"),
    "launcher.num_processes": to("train.num_processes", integer),
    "launcher.nproc_per_node": to("train.num_processes", integer),
    "launcher.*": covered("no launcher is needed"),
}


def finish(migration: Migration) -> None:
    """What depends on several of their options."""
    settings = migration.settings
    migration.set("loss.objective", "policy_gradient")
    lora = [key for key in settings if key.startswith("student.lora.")]
    if "use_lora" in migration.theirs:
        settings.setdefault("student.lora.r", 64)
    else:
        for key in lora:
            migration.leave(key, migration.drop(key), "without --use_lora all weights are trained")
    if settings.get("tracking.wandb_mode") and "wandb" not in settings.get("tracking.trackers", ()):
        migration.drop("tracking.wandb_mode")
    if "teacher_ds_zero3" in migration.theirs:
        migration.remark("add --tensor-parallel-size=N to teacher.serve_args, and teacher.visible_devices")
