"""What `accelerate launch` asks for through the environment, held against the configuration: it is done, or refused
with the name of the variable. Settings that change neither results nor memory between steps pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from student_trainer.config import StrategyName, TrainConfig

SIGN = "ACCELERATE_MIXED_PRECISION"
"""Set by `accelerate launch` in all its forms."""
OUR_PRECISION = {"no": "float32", "bf16": "bfloat16"}
UNSET = ("", "none", "None", "auto")
"""How accelerate writes that nothing was said."""
ALWAYS_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not offered",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context and sequence parallelism are not offered (docs/training.md)",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "every process loads the whole student before it is cut",
}
FIXED = {
    "ACCELERATE_DYNAMO_BACKEND": ("NO", "the student is not compiled"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "train.micro_batch_tokens cuts a step into micro-batches"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none", "only fsdp2 offloads (train.cpu_offload)"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("none", "only fsdp2 offloads (train.cpu_offload)"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("none", "the engine is configured by the sections train and optim"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "a layer's weights are given back after its forward pass"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "checkpoints hold whole weights"),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "one part is one layer"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("none", "the layers are found by themselves"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "every process loads the whole student before it is cut"),
    "FSDP_IGNORED_MODULES": ("none", "all weights are cut"),
}
"""Variables that may say one thing only, and why."""


def asked_strategy(config: TrainConfig, environment: Mapping[str, str]) -> StrategyName | None:
    """The strategy that `accelerate launch` was configured for; None where it was not used, or says nothing of it.

    Raises:
        ValueError: it asks for something else than the configuration, or for what is not offered.
    """
    if SIGN not in environment:
        return None
    if "MASTER_PORT" in environment and "WORLD_SIZE" not in environment:
        raise ValueError(
            "accelerate launch started one process where several were asked for, as it does with --cpu; expected "
            "--multi_gpu (which works without GPUs, too), torchrun, or train.num_processes without a launcher"
        )
    precision = environment[SIGN]
    if precision not in OUR_PRECISION or (precision == "bf16" and config.student.dtype != "bfloat16"):
        raise _refusal(SIGN, precision, f"student.dtype is {config.student.dtype}")
    for name, why in ALWAYS_REFUSED.items():
        if environment.get(name, "false").lower() == "true":
            raise _refusal(name, environment[name], why)
    fsdp, deepspeed = (_is_on(environment, f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    for name, (only, why) in FIXED.items():
        said = environment.get(name, "")
        ours = fsdp if name.startswith("FSDP") else deepspeed or "DEEPSPEED" not in name
        if ours and said not in UNSET and said.lower() != only.lower():
            raise _refusal(name, said, f"expected {only}: {why}")
    if fsdp:
        return _fsdp(config, environment)
    if deepspeed:
        return _deepspeed(config, environment)
    return None


def _fsdp(config: TrainConfig, environment: Mapping[str, str]) -> StrategyName:
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise _refusal("FSDP_VERSION", version, "expected 2 (fsdp_version: 2)")
    for name, key, value in (
        ("FSDP_OFFLOAD_PARAMS", "train.cpu_offload", config.train.cpu_offload),
        ("FSDP_ACTIVATION_CHECKPOINTING", "student.gradient_checkpointing", config.student.gradient_checkpointing),
    ):
        if _is_on(environment, name) and not value:
            raise _refusal(name, environment[name], f"{key} is false")
    return "fsdp2"


def _deepspeed(config: TrainConfig, environment: Mapping[str, str]) -> StrategyName:
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "")
    if clipping not in UNSET and float(clipping) != config.optim.grad_clip:
        raise _refusal("ACCELERATE_GRADIENT_CLIPPING", clipping, f"optim.grad_clip is {config.optim.grad_clip}")
    if stage == "2":
        return "zero2"
    if stage == "3":
        return "zero3"
    raise _refusal("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage, "expected 2 or 3")


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")


def _refusal(name: str, got: str, why: str) -> ValueError:
    return ValueError(f"accelerate launch sets {name}={got}, but {why}")
