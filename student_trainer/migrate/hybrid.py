"""The hybrid multi-GPU script: CE + KL on packed text, layers of the teacher grafted into the student
(`torchrun … train_gpus.py --layers 14 16 …`), and its MMLU evaluation."""

from __future__ import annotations

from typing import Any

from student_trainer.migrate.base import Migration, Table, by, choice, covered, nothing, to
from student_trainer.migrate.shared import DTYPES, factor, integer, number, track, truth

NAME = "hybrid distillation script"
PROCESSES = "times accumulated steps and processes: train.batch_size"
UNNAMED_TEACHER = "TEACHER_MODEL"
SHELL = "set it in the shell: the trainer's processes inherit it"


def _layers(migration: Migration, key: str, value: Any) -> None:
    values = value if isinstance(value, list) else str(value).split()
    migration.set("student.layers_from_teacher", [int(layer) for layer in values])


def _freeze(what: str) -> Any:
    def apply(migration: Migration, key: str, value: Any) -> None:
        migration.settings.setdefault("student.freeze", []).append(what)

    return by("`student.freeze`", apply, what)


def _wandb(migration: Migration, key: str, value: Any) -> None:
    track(migration, "wandb")


def _temperature(migration: Migration, key: str, value: Any) -> None:
    migration.set("loss.student_temperature", number(value))
    migration.set("loss.teacher_temperature", number(value))
    migration.set("loss.scale_by_t2", True)


def _source(migration: Migration, key: str, value: Any) -> None:
    if value != "HuggingFaceFW/fineweb-edu":
        migration.set("data.source", value)


TABLE: Table = {
    "student_model": to("student.model"),
    "teacher_model": to("teacher.model"),
    "dtype": choice("student.dtype", DTYPES),
    "layers": by("`student.layers_from_teacher`", _layers, "from student.graft_from, the teacher"),
    "freeze_mlp": _freeze("mlp"),
    "freeze_replaced_layers": _freeze("replaced_layers"),
    "batch_size": by("`train.batch_size`", lambda migration, key, value: None, PROCESSES),
    "grad_accumulation_steps": by("`train.batch_size`", lambda migration, key, value: None, PROCESSES),
    "ce_weight": to("loss.ce_weight", number),
    "kl_weight": to("loss.kl_weight", number),
    "temperature": by("`loss.student_temperature`, `loss.teacher_temperature`, `loss.scale_by_t2`", _temperature),
    "epochs": to("train.epochs", number),
    "max_steps": to("train.steps", integer),
    "seq_length": to("data.seq_length", integer),
    "lr": to("optim.learning_rate", number),
    "learning_rate": to("optim.learning_rate", number),
    "weight_decay": to("optim.weight_decay", number),
    "warmup_steps": to("optim.warmup_steps", integer),
    "decay_steps": to("optim.decay_steps", integer),
    "min_lr_ratio": to("optim.min_lr_ratio", number),
    "max_grad_norm": to("optim.grad_clip", number),
    "dataset_name": by("`data.source`", _source),
    "dataset_subset": to("data.subset"),
    "no_dataset_streaming": by("`data.streaming`", lambda migration, key, value: None, "false; true without it"),
    "local_files_only": to("data.local_files_only", truth),
    "save_interval": to("checkpoint.save_every", integer),
    "log_interval": to("tracking.log_every", integer),
    "resume_step": nothing("the same command goes on from the newest checkpoint (checkpoint.resume)"),
    "wandb": by("`tracking.trackers`", _wandb),
    "wandb_project": to("tracking.project"),
    "wandb_run_name": to("tracking.run_name"),
    "wandb_entity": nothing("set WANDB_ENTITY in the shell"),
    "output_dir": to("train.output_dir"),
    "seed": to("train.seed", integer),
    "launcher.nproc_per_node": to("train.num_processes", integer),
    "launcher.nnodes": nothing("several machines: start each with torchrun, see deploy/accelerate"),
    "launcher.*": covered("no launcher is needed"),
    "WANDB_MODE": to("tracking.wandb_mode"),
    "CUDA_VISIBLE_DEVICES": by("`teacher.visible_devices`", lambda migration, key, value: None, "the GPU left over"),
}


def finish(migration: Migration) -> None:
    """What their script does without being told, and what depends on several options."""
    theirs, settings = migration.theirs, migration.settings
    migration.set("loss.objective", "forward_kl")
    migration.set("data.preset", "fineweb-edu")
    if settings.get("data.source", "fineweb") != "fineweb" and "data.subset" not in settings:
        migration.remark("data.preset says which field of the data is the text; data.text_key for another")
    if "no_dataset_streaming" not in theirs:
        migration.set("data.streaming", True)
    ranks = settings.get("train.num_processes", 1)
    size, accumulated = factor(migration, "batch_size"), factor(migration, "grad_accumulation_steps")
    if size is not None and accumulated is not None:
        migration.set("train.batch_size", size * accumulated * ranks)
        migration.remark(f"train.batch_size: {size} a process × {accumulated} accumulated × {ranks} processes")
    if ranks > 1:
        migration.set("train.strategy", "ddp_sharded")
    devices = [device for device in str(theirs.get("CUDA_VISIBLE_DEVICES", "")).split(",") if device]
    if len(devices) == ranks + 1:
        migration.set("teacher.visible_devices", devices[-1])
        students = ",".join(devices[:-1])
        migration.remark(
            f"of the {len(devices)} GPUs the last is the teacher's: start with CUDA_VISIBLE_DEVICES={students}"
        )
    elif devices:
        migration.leave("CUDA_VISIBLE_DEVICES", ",".join(devices), SHELL)
    steps = settings.get("train.steps")
    migration.set("optim.schedule", "wsd")
    if "optim.decay_steps" not in settings:
        settings["optim.decay_steps"] = max(1, (steps or 1000) // 10)
        migration.remark(
            "optim.decay_steps: a tenth of the steps, since the command does not say how long the decay is"
        )
    if "teacher.model" not in settings and "student.layers_from_teacher" in settings:
        migration.set("teacher.model", UNNAMED_TEACHER)
        migration.remark(
            f"put the teacher's directory or hub id in place of {UNNAMED_TEACHER}: the command does not name it"
        )
    if "student.layers_from_teacher" in settings:
        migration.set("student.graft_from", settings["teacher.model"])
    if "data.streaming" in settings and "train.epochs" in settings:
        migration.leave("epochs", migration.drop("train.epochs"), "a stream has no known length: train.steps")
    if "wandb" not in settings.get("tracking.trackers", ()):
        for key in ("tracking.project", "tracking.run_name", "tracking.wandb_mode"):
            migration.drop(key)
