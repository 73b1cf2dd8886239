"""ROLL's DistillPipeline: a Hydra YAML."""

from __future__ import annotations

import math
import re
from typing import Any

from student_trainer.data.config import SourceConfig
from student_trainer.migrate.base import Migration, Table, by, choice, covered, nothing, to, unless
from student_trainer.migrate.shared import (
    DTYPES,
    PROMPT_LENGTHS,
    TRACKERS,
    factor,
    integer,
    number,
    only_for,
    serve,
    track,
    truth,
)

NAME = "ROLL DistillPipeline"
OBJECTIVES = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "adaptive_kl": "adaptive_kl",
    "skewed_forward_kl": "skewed_forward_kl",
    "skewed_reverse_kl": "skewed_reverse_kl",
    "js_divergence": "jsd",
}
SCHEDULES = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
    "warmup_stable_decay": "wsd",
}  # fmt: skip
PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
NOT_OFFERED = "tensor, pipeline and context parallelism of the student are not offered"


def _resume(migration: Migration, key: str, value: Any) -> None:
    if isinstance(value, str) and value.lower() not in ("true", "false"):
        migration.set("checkpoint.resume", value)
    else:
        migration.set("checkpoint.resume", "auto" if truth(value) else "never")


def _files(migration: Migration, key: str, value: Any) -> None:
    files = [value] if isinstance(value, str) else list(value)
    if len(files) == 1:
        migration.set("data.source", files[0])
    else:
        names = [re.sub(r"\W", "_", str(file).rsplit("/", 1)[-1].split(".")[0]) for file in files]
        if len(set(names)) < len(names):  # files of one name in several folders
            names = [f"{name}_{place}" for place, name in enumerate(names)]
        domains = [{"name": name, "source": file} for name, file in zip(names, files, strict=True)]
        migration.set("data.domains", domains)


def _teacher_tensor(migration: Migration, key: str, value: Any) -> None:
    if integer(value) > 1:
        serve(migration, "--backend=vllm")
        serve(migration, f"--tensor-parallel-size={integer(value)}")


def _teacher_pipeline(migration: Migration, key: str, value: Any) -> None:
    if integer(value) > 1:
        serve(migration, "--backend=vllm")
        serve(migration, f"--pipeline-parallel-size={integer(value)}")


def _teacher_dtype(migration: Migration, key: str, value: Any) -> None:
    serve(migration, f"--dtype={DTYPES[value]}")


def _teacher_devices(migration: Migration, key: str, value: Any) -> None:
    if value == migration.theirs.get("student.device_mapping"):
        migration.leave(
            key, value, "the student has the same: give the teacher GPUs of its own (teacher.visible_devices)"
        )
    else:
        migration.set("teacher.visible_devices", ",".join(map(str, devices(value))))


def _trackers(migration: Migration, key: str, value: Any) -> None:
    for name in [value] if isinstance(value, str) else value or []:
        if name in TRACKERS:
            track(migration, TRACKERS[name])
        elif name not in ("stdout", "console"):
            migration.leave(key, name, f"expected one of {', '.join(TRACKERS)}")


def _deepspeed(migration: Migration, key: str, value: Any) -> None:
    found = re.search(r"zero_?([23])", str(value))
    if found:
        migration.set("train.strategy", f"zero{found[1]}")
    else:
        migration.leave(key, value, "see train.strategy")


def _sharded(migration: Migration, key: str, value: Any) -> None:
    if truth(value):
        migration.set("train.strategy", "ddp_sharded")


TABLE: Table = {
    "exp_name": to("tracking.run_name"),
    "seed": to("train.seed", integer),
    "output_dir": to("train.output_dir"),
    "logging_dir": covered("logs are in train.output_dir"),
    "checkpoint_config.*": covered("checkpoints are in train.output_dir"),
    "save_steps": to("checkpoint.save_every", integer),
    "logging_steps": to("tracking.log_every", integer),
    "resume_from_checkpoint": by("`checkpoint.resume`", _resume, "a path; true → auto, false → never"),
    "student_pretrain": to("student.model"),
    "teacher_pretrain": to("teacher.model", remark="a child process; teacher.url for one that is shared"),
    "logits_topk": to("teacher.top_k", lambda value: integer(value) or "all", "0 → all"),
    "distill_loss_weight": to("loss.distill_weight", number),
    "kd_objective": choice("loss.objective", OBJECTIVES),
    "kd_temperature": to("loss.student_temperature", number),
    "teacher_temperature": to("loss.teacher_temperature", number),
    "adaptive_kl_alpha": to("loss.adaptive_alpha", number),
    "skew_lambda": to("loss.skew_lambda", number),
    "distill_on_prompt": to("loss.on_prompt", truth),
    "logits_transfer_backend": covered("scores come over gRPC or HTTP"),
    "sequence_length": to("data.max_prompt_tokens", integer, PROMPT_LENGTHS),
    "max_grad_norm": to("optim.grad_clip", number),
    "question_key": to("data.question_key"),
    "answer_key": to("data.answer_key"),
    "system_key": to("data.system_key"),
    "prompt_key": to("data.prompt_key"),
    "track_with": by("`tracking.trackers`", _trackers),
    "tracker_kwargs.project": to("tracking.project"),
    "tracker_kwargs.name": to("tracking.run_name"),
    "tracker_kwargs.log_dir": covered("logs are in train.output_dir"),
    "student.model_args.dtype": choice("student.dtype", DTYPES),
    "student.model_args.disable_gradient_checkpointing": to(
        "student.gradient_checkpointing", lambda value: not truth(value)
    ),
    "student.model_args.attn_implementation": covered("torch's own attention"),
    "student.model_args.*": covered("what config.json says"),
    "student.training_args.learning_rate": to("optim.learning_rate", number),
    "student.training_args.lr_scheduler_type": choice("optim.schedule", SCHEDULES),
    "student.training_args.warmup_steps": to("optim.warmup_steps", integer),
    "student.training_args.weight_decay": to("optim.weight_decay", number),
    "student.training_args.num_train_epochs": to("train.epochs", number),
    "student.training_args.max_steps": to("train.steps", integer),
    "student.training_args.per_device_train_batch_size": to(
        "train.micro_batch_size", integer, "times accumulation and data-parallel processes: train.batch_size"
    ),
    "student.training_args.gradient_accumulation_steps": covered("part of train.batch_size"),
    "student.training_args.*": nothing("see the optim and train sections"),
    "student.data_args.file_name": by("`data.source`, `data.domains`", _files),
    "student.data_args.template": covered("the tokenizer's own chat template (data.template)"),
    "student.data_args.question_key": to("data.question_key"),
    "student.data_args.answer_key": to("data.answer_key"),
    "student.data_args.system_key": to("data.system_key"),
    "student.data_args.prompt_key": to("data.prompt_key"),
    "student.data_args.*": covered("nothing to tune"),
    "student.strategy_args.strategy_name": covered("train.strategy"),
    "student.strategy_args.strategy_config": by("`train.strategy`", _deepspeed, "ZeRO-2 → zero2, ZeRO-3 → zero3"),
    "student.strategy_args.strategy_config.tensor_model_parallel_size": unless(1, NOT_OFFERED),
    "student.strategy_args.strategy_config.pipeline_model_parallel_size": unless(1, NOT_OFFERED),
    "student.strategy_args.strategy_config.context_parallel_size": unless(1, NOT_OFFERED),
    "student.strategy_args.strategy_config.sequence_parallel": covered("goes with tensor parallelism"),
    "student.strategy_args.strategy_config.use_distributed_optimizer": by(
        "`train.strategy`", _sharded, "true → ddp_sharded"
    ),
    "student.strategy_args.strategy_config.recompute_granularity": to(
        "student.gradient_checkpointing", lambda value: value in ("full", "selective")
    ),
    "student.strategy_args.strategy_config.*": nothing("see train.strategy"),
    "student.use_sequence_packing": to("train.packing", lambda value: "on" if truth(value) else "off"),
    "student.device_mapping": to("train.num_processes", lambda value: len(devices(value))),
    "student.*": covered("no worker groups here"),
    "teacher.model_args.dtype": by("`teacher.serve_args`", _teacher_dtype, "--dtype"),
    "teacher.strategy_args.strategy_config.tensor_model_parallel_size": by(
        "`teacher.serve_args`", _teacher_tensor, "--tensor-parallel-size of a vLLM teacher"
    ),
    "teacher.strategy_args.strategy_config.pipeline_model_parallel_size": by(
        "`teacher.serve_args`", _teacher_pipeline, "--pipeline-parallel-size of a vLLM teacher"
    ),
    "teacher.device_mapping": by("`teacher.visible_devices`", _teacher_devices),
    "teacher.*": covered("the teacher is a server of its own: teacher.serve_args"),
    "num_gpus_per_node": covered("student.device_mapping says how many"),
    "hydra.*": covered("no Hydra here"),
    "system_envs.*": nothing("set it in the shell"),
}


def devices(value: Any) -> list[int]:
    """Of `list(range(0,8))` or a list.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, list):
        return [int(device) for device in value]
    ranges = re.findall(r"range\((\d+)\s*,\s*(\d+)\)", str(value))
    if not ranges:
        raise ValueError(f"got {value!r}, expected list(range(first, last)) or a list")
    return [device for first, last in ranges for device in range(int(first), int(last))]


def _batch_size(migration: Migration) -> None:
    training, config = "student.training_args.", "student.strategy_args.strategy_config."
    size = factor(migration, f"{training}per_device_train_batch_size")
    accumulated = factor(migration, f"{training}gradient_accumulation_steps")
    splits = [factor(migration, config + name) for name in PARALLEL]
    if size is None or accumulated is None or None in splits:
        return
    split = math.prod(n or 1 for n in splits)
    ranks = max(1, migration.settings.get("train.num_processes", 1) // split)
    migration.set("train.batch_size", size * accumulated * ranks)
    migration.remark(
        f"train.batch_size: {size} a process × {accumulated} accumulated × {ranks} data-parallel processes"
    )


def _into_domains(migration: Migration) -> None:
    """What is said of several files is said of each."""
    settings = migration.settings
    keys = {f"data.{name}": name for name in SourceConfig.model_fields}
    shared = {keys[key]: migration.drop(key) for key in list(settings) if key in keys}
    settings["data.domains"] = [{**domain, **shared} for domain in settings["data.domains"]]


def finish(migration: Migration) -> None:
    """What depends on several of their keys."""
    theirs, settings = migration.theirs, migration.settings
    migration.set("data.on_policy_fraction", 0.0)
    migration.remark(
        "their pipeline trains on the data's answers: so does this; data.on_policy_fraction=1 to sample instead"
    )
    if theirs.get("student.training_args.per_device_train_batch_size") is not None:
        _batch_size(migration)
    objective = settings.get("loss.objective")
    for key, owner in (
        ("loss.adaptive_alpha", ("adaptive_kl",)),
        ("loss.skew_lambda", tuple(OBJECTIVES.values())[3:5]),
    ):
        if objective not in owner:
            migration.drop(key)
    only_for(migration, "data.answer_key", "data.prompt_key", (None,), "data.prompt_key takes the prompt as it stands")
    if not set(settings.get("tracking.trackers", ())) & {"wandb", "swanlab", "mlflow", "trackio"}:
        migration.drop("tracking.project")
    if "wandb" not in settings.get("tracking.trackers", ()) and "tracking.run_name" in settings:
        name = migration.drop("tracking.run_name")
        settings["train.output_dir"] = f"{settings.get('train.output_dir', 'runs')}/{name}"
        migration.remark("exp_name is the last part of train.output_dir, after which runs are named")
    if "data.max_prompt_tokens" in settings:
        migration.set("data.max_answer_tokens", settings["data.max_prompt_tokens"])
        migration.set("data.overlong", "drop")
    if "data.domains" in settings:
        _into_domains(migration)
