"""NeMo-RL's on-policy distillation: one YAML with dotted overrides."""

from __future__ import annotations

from typing import Any

from student_trainer.migrate.base import Migration, Rule, Table, by, choice, covered, nothing, to, unless
from student_trainer.migrate.shared import (
    DTYPES,
    PROMPT_LENGTHS,
    dataset,
    integer,
    number,
    serve,
    track,
    truth,
    validation,
)

NAME = "NeMo-RL distillation"
KL_TYPES = {"forward": "forward_kl", "reverse": "reverse_kl", "mixed": "mixed_kl"}
NOT_OFFERED = "tensor and context parallelism of the student are not offered"
ENGINE = "the engine's own choices; rollout.vllm.arguments takes any argument of vLLM's"
WORKERS = "no worker groups here: the trainer's processes do all but the scoring"


def _teacher_parallel(migration: Migration, key: str, value: Any) -> None:
    if int(value) > 1:
        serve(migration, "--backend=vllm")
        serve(migration, f"--tensor-parallel-size={int(value)}")


def _decoding(migration: Migration, key: str, value: Any) -> None:
    if value == "greedy":
        migration.set("rollout.greedy", True)
    elif value not in ("sample", "sampling"):
        migration.leave(key, value, "expected greedy or sample")


def _strategy(migration: Migration, key: str, value: Any) -> None:
    if truth(value):
        migration.set("train.strategy", "fsdp2")


def _engine(migration: Migration, key: str, value: Any) -> None:
    """Colocated, where they don't say otherwise: the training weights themselves, or an engine of vLLM."""
    colocated = truth(migration.theirs.get("policy.generation.colocated.enabled", True))
    if not colocated:
        migration.leave(
            key, value, "start rollout-serve on the GPUs for sampling, set rollout.engine=vllm-server and "
            "rollout.server.urls"
        )  # fmt: skip
    elif value == "vllm":
        migration.set("rollout.engine", "vllm")
    elif value != "megatron":
        migration.leave(key, value, "expected vllm or megatron")


def _of_vllm(ours: str, convert: Any) -> Rule:
    """An option of the colocated engine, where there is one."""
    inner = to(ours, convert)

    def apply(migration: Migration, key: str, value: Any) -> None:
        colocated = truth(migration.theirs.get("policy.generation.colocated.enabled", True))
        if colocated and migration.theirs.get("policy.generation.backend") == "vllm":
            inner.apply(migration, key, value)

    return Rule(inner.ours, "with a colocated vllm", apply)


def _tracker(name: str) -> Rule:
    def apply(migration: Migration, key: str, value: Any) -> None:
        if truth(value):
            track(migration, name)

    return by("`tracking.trackers`", apply)


def _metric(value: Any) -> str:
    name = str(value).removeprefix("val:").removeprefix("train:").removeprefix("val_")
    return {"accuracy": "eval_accuracy", "reward": "eval_accuracy", "loss": "loss"}[name]


def _scheduler(migration: Migration, key: str, value: Any) -> None:
    """LinearLR upwards is warm-up; what follows it is the schedule."""
    for entry in value if isinstance(value, list) else [value]:
        name = str(entry.get("name", "")).rsplit(".", 1)[-1] if isinstance(entry, dict) else ""
        arguments = entry.get("kwargs", {}) if name else {}
        if name == "LinearLR" and arguments.get("start_factor", 0) < arguments.get("end_factor", 1):
            migration.set("optim.warmup_steps", integer(arguments["total_iters"]))
        elif name == "LinearLR":
            migration.set("optim.schedule", "linear")
        elif name == "CosineAnnealingLR":
            migration.set("optim.schedule", "cosine")
        elif name not in ("ConstantLR", "") or (not name and set(entry) != {"milestones"}):
            migration.leave(key, entry, "expected LinearLR, CosineAnnealingLR or ConstantLR")


def _tokens_of(section: str) -> Rule:
    """Tokens of a micro-batch, of a section that may be switched off while another key says how many."""

    def apply(migration: Migration, key: str, value: Any) -> None:
        others = [name for name in migration.theirs if name.endswith("train_mb_tokens") and name != key]
        if others and not truth(migration.theirs.get(f"{section}.enabled", True)):
            migration.leave(key, value, f"{section}.enabled is false, and {others[0]} is there")
        else:
            migration.set("train.micro_batch_tokens", integer(value))

    return by("`train.micro_batch_tokens`", apply)


def _gpus(migration: Migration, key: str, value: Any) -> None:
    nodes = integer(migration.theirs.get("cluster.num_nodes", 1) or 1)
    if nodes > 1:
        migration.leave(
            key, value, f"{nodes} machines: start each with torchrun or accelerate launch, see deploy/accelerate"
        )
    else:
        migration.set("train.num_processes", integer(value))


GENERATION: Table = {
    "max_new_tokens": to("rollout.max_new_tokens", integer),
    "temperature": to("rollout.temperature", number),
    "top_p": to("rollout.top_p", number),
    "top_k": to("rollout.top_k", lambda value: 0 if value is None else integer(value)),
    "stop_token_ids": to("rollout.stop_token_ids", lambda value: list(value or [])),
    "stop_strings": unless(None, "stop at token ids: rollout.stop_token_ids"),
    "backend": by("`rollout.engine`", _engine, "vllm → vllm, megatron → torch, the training weights themselves"),
    "vllm_cfg.gpu_memory_utilization": _of_vllm("rollout.vllm.gpu_memory_utilization", number),
    "vllm_cfg.enforce_eager": _of_vllm("rollout.vllm.enforce_eager", truth),
    "vllm_cfg.tensor_parallel_size": unless(1, "each training process has an engine on its own device"),
    "vllm_cfg.pipeline_parallel_size": unless(1, "each training process has an engine on its own device"),
    "vllm_cfg.max_model_len": covered("as long as the longest prompt and completion need"),
    "*": covered(ENGINE),
}
TABLE: Table = {
    "distillation.lambda": to("data.on_policy_fraction", number, "the rest trains on the data's own answers"),
    "distillation.lambda_": to("data.on_policy_fraction", number, "the rest trains on the data's own answers"),
    "distillation.kl_type": choice("loss.objective", KL_TYPES),
    "loss_fn.kl_type": choice("loss.objective", KL_TYPES),
    "loss_fn.mixed_kl_weight": to("loss.mixed_weight", number),
    "loss_fn.zero_outside_topk": nothing("what is outside the top-k is one more outcome here: see loss.tail"),
    "distillation.topk_logits_k": to("teacher.top_k", integer),
    "distillation.teacher_model_path": to("teacher.model"),
    "distillation.max_length": to("rollout.max_new_tokens", integer, "new tokens, without the prompt's"),
    "distillation.generate_strategy.max_length": to(
        "rollout.max_new_tokens", integer, "new tokens, without the prompt's"
    ),
    "distillation.generate_strategy.temperature": to("rollout.temperature", number),
    "distillation.generate_strategy.decoding_method": by("`rollout.greedy`", _decoding),
    "distillation.max_steps": to("train.steps", integer),
    "distillation.max_num_steps": to("train.steps", integer),
    "distillation.max_num_epochs": to("train.epochs", number, "with train.steps as well, whichever ends first"),
    "distillation.eval_steps": to("eval.every", integer),
    "distillation.val_period": to("eval.every", integer),
    "distillation.max_val_samples": to("eval.num_prompts", integer),
    "distillation.save_steps": to("checkpoint.save_every", integer),
    "distillation.logging_steps": to("tracking.log_every", integer),
    "distillation.num_prompts_per_step": to("train.batch_size", integer),
    "distillation.num_generations_per_prompt": to("rollout.group_size", integer),
    "distillation.max_rollout_turns": unless(1, "one turn per sample here"),
    "distillation.seed": to("train.seed", integer),
    "distillation.val_batch_size": covered("evaluation batches by rollout.batch_sequences"),
    "distillation.val_at_start": covered("evaluations are also before the first step and after the last"),
    "distillation.val_at_end": covered("evaluations are also before the first step and after the last"),
    "checkpointing.enabled": unless(True, "there is always one at the end; checkpoint.save_every=0 for no others"),
    "checkpointing.checkpoint_dir": to("train.output_dir"),
    "checkpointing.metric_name": to("checkpoint.metric", _metric),
    "checkpointing.higher_is_better": to("checkpoint.mode", lambda value: "max" if truth(value) else "min"),
    "checkpointing.keep_top_k": to("checkpoint.keep_top_k", integer),
    "checkpointing.save_period": to("checkpoint.save_every", integer),
    "checkpointing.*": covered("checkpoints are whole Hugging Face directories with the optimizer"),
    "policy.model_name": to("student.model"),
    "policy.tokenizer.name": covered("the student's own"),
    "policy.tokenizer.chat_template_kwargs": unless(None, "the chat template is used without arguments"),
    "policy.precision": choice("student.dtype", DTYPES),
    "policy.train_global_batch_size": covered("train.batch_size prompts are one update"),
    "policy.train_micro_batch_size": covered("train.micro_batch_tokens"),
    "policy.max_total_sequence_length": to("data.max_prompt_tokens", integer, PROMPT_LENGTHS),
    "policy.max_grad_norm": to("optim.grad_clip", number),
    "policy.optimizer.name": unless("torch.optim.AdamW", "expected AdamW; optim.name also has muon"),
    "policy.optimizer.kwargs.lr": to("optim.learning_rate", number),
    "policy.optimizer.kwargs.weight_decay": to("optim.weight_decay", number),
    "policy.optimizer.kwargs.betas": to("optim.betas", list),
    "policy.optimizer.kwargs.eps": to("optim.eps", number),
    "policy.optimizer.kwargs.*": covered("kernels are torch's choice"),
    "policy.scheduler": by("`optim.schedule`, `optim.warmup_steps`", _scheduler),
    "policy.dtensor_cfg.enabled": by("`train.strategy`", _strategy, "true → fsdp2"),
    "policy.dtensor_cfg.cpu_offload": to("train.cpu_offload", truth),
    "policy.dtensor_cfg.activation_checkpointing": to("student.gradient_checkpointing", truth),
    "policy.dtensor_cfg.tensor_parallel_size": unless(1, NOT_OFFERED),
    "policy.dtensor_cfg.context_parallel_size": unless(1, NOT_OFFERED),
    "policy.dtensor_cfg.sequence_parallel": unless(False, NOT_OFFERED),
    "policy.dtensor_cfg.*": covered("fsdp2's own choices"),
    "policy.megatron_cfg.enabled": unless(False, "Megatron is not offered: train.strategy"),
    "policy.megatron_cfg.*": covered("belongs to Megatron"),
    "policy.dynamic_batching.train_mb_tokens": _tokens_of("policy.dynamic_batching"),
    "policy.dynamic_batching.*": covered("micro-batches always go by tokens"),
    "policy.sequence_packing.enabled": to("train.packing", lambda value: "on" if truth(value) else "off"),
    "policy.sequence_packing.train_mb_tokens": _tokens_of("policy.sequence_packing"),
    "policy.sequence_packing.*": covered("first fit, longest first"),
    "policy.generation.colocated.enabled": covered("see policy.generation.backend"),
    "policy.generation.colocated.*": covered(ENGINE),
    **{f"policy.generation.{key}": rule for key, rule in GENERATION.items()},
    "policy.*": covered(WORKERS),
    "train_mb_tokens": to("train.micro_batch_tokens", integer),
    "teacher.model_name": to("teacher.model", remark="a child process; teacher.url for one that is shared"),
    "teacher.dtensor_cfg.tensor_parallel_size": by(
        "`teacher.serve_args`", _teacher_parallel, "--tensor-parallel-size of a vLLM teacher"
    ),
    "teacher.*": covered("the teacher is a server of its own: teacher.serve_args"),
    "data.dataset_name": by("`data.preset`, `data.source`", dataset),
    "data.train.dataset_name": by("`data.preset`, `data.source`", dataset),
    "data.prompt_file": to("data.prompt_template_file", remark="theirs has {} where ours has {question}"),
    "data.default.prompt_file": to("data.prompt_template_file", remark="theirs has {} where ours has {question}"),
    "data.prompt_template": nothing("a name in their repository: data.prompt_template is the text itself"),
    "data.system_prompt_file": unless(None, "data.system_prompt is the text itself"),
    "data.default.system_prompt_file": unless(None, "data.system_prompt is the text itself"),
    "data.shuffle": to("data.shuffle", truth),
    "data.max_input_seq_length": to("data.max_prompt_tokens", integer, PROMPT_LENGTHS),
    "data.validation.dataset_name": by("`eval.data.preset`, `eval.data.source`", validation),
    "data.validation.split": to("eval.data.split"),
    "data.validation.*": nothing("see eval.data"),
    "data.default.env_name": covered("there is no environment: no rewards are needed"),
    "env.*": covered("there is no environment: no rewards are needed"),
    "logger.log_dir": covered("logs are in train.output_dir"),
    "logger.wandb_enabled": _tracker("wandb"),
    "logger.tensorboard_enabled": _tracker("tensorboard"),
    "logger.mlflow_enabled": _tracker("mlflow"),
    "logger.swanlab_enabled": _tracker("swanlab"),
    "logger.wandb.project": to("tracking.project"),
    "logger.wandb.name": to("tracking.run_name"),
    "logger.*": covered("metrics.jsonl has everything"),
    "cluster.gpus_per_node": by("`train.num_processes`", _gpus),
    "cluster.*": covered("machines are torchrun's or accelerate launch's"),
}


def finish(migration: Migration) -> None:
    """What depends on several of their keys."""
    settings = migration.settings
    if settings.get("rollout.greedy"):
        for key in ("rollout.temperature", "rollout.top_p", "rollout.top_k"):
            if key in settings:
                migration.leave(key, migration.drop(key), "greedy decoding draws nothing")
    if settings.get("data.on_policy_fraction") == 0.0:
        for key in [key for key in settings if key == "rollout.engine" or key.startswith("rollout.vllm.")]:
            migration.drop(key)
    if settings.get("loss.objective") != "mixed_kl":
        migration.drop("loss.mixed_weight")
    if "wandb" not in settings.get("tracking.trackers", ()):
        migration.drop("tracking.project")
        migration.drop("tracking.run_name")
    if "data.prompt_template_file" in settings and settings.get("data.preset"):
        migration.remark("data.prompt_template_file takes the place of the preset's own template")
    if settings.get("train.cpu_offload") is False or settings.get("train.strategy") != "fsdp2":
        migration.drop("train.cpu_offload")
    if "data.max_prompt_tokens" in settings:
        migration.set("data.overlong", "drop")
    if "eval.data.split" in settings and not {"eval.data.preset", "eval.data.source"} & settings.keys():
        migration.leave("data.validation.split", migration.drop("eval.data.split"), "of a dataset that is not here")
    if settings.get("data.on_policy_fraction", 1.0) < 1.0:
        migration.remark("data.on_policy_fraction below 1 trains on answers too: data.answer_key, or data.fixed_source")
