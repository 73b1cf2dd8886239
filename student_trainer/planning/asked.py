"""What a configuration asks of one device in a step, for the formulas."""

from __future__ import annotations

from student_trainer.config import TrainConfig
from student_trainer.losses.base import Needs
from student_trainer.losses.chunked import default_rows
from student_trainer.planning.memory import FLOAT32, Engine, Load
from student_trainer.planning.speed import Step
from student_trainer.rollout.config import CPU_CACHE_GIB, VllmConfig


def per_device(config: TrainConfig, world: int) -> int:
    """Samples of one device in a step, at most: those of its prompts."""
    return -(-config.train.batch_size // world) * config.rollout.group_size


def micro_batch_tokens(config: TrainConfig, longest: int, world: int) -> int:
    """Most tokens that one forward and backward can get on one device."""
    train, samples = config.train, per_device(config, world)
    sequences = min(samples, train.micro_batch_size or samples)
    return min(max(train.micro_batch_tokens, longest), sequences * longest)


def load_of(
    config: TrainConfig,
    needs: Needs,
    *,
    tokens: int,
    prompt: int,
    longest: int,
    width: int,
    gpu_bytes: int,
    world: int,
) -> Load:
    """
    Args:
        tokens: of a micro-batch.
        prompt, longest: tokens of the longest prompt and of the longest sequence.
        width: columns of the student's logits.
        gpu_bytes: memory of a GPU; 0: a CPU.
    """
    engine = config.rollout.engine if config.data.on_policy_fraction else "none"
    return Load(
        tokens=tokens,
        chunk_rows=config.train.loss_chunk_rows or default_rows(width, "cuda" if gpu_bytes else "cpu"),
        teacher_values=width if needs.top_k == "all" else 2 * (needs.top_k + needs.student_top_k + 1),
        decoded=min(config.rollout.batch_sequences, per_device(config, world)) if engine == "torch" else 0,
        group=config.rollout.group_size,
        prompt=prompt,
        longest=longest,
        arithmetic_bytes=2 if config.student.dtype == "bfloat16" else 4,
        gradient_checkpointing=config.student.gradient_checkpointing,
        optimizer=config.optim.name,
        averages=config.optim.ema_decay > 0,
        offloaded=config.train.cpu_offload,
        on_gpu=gpu_bytes > 0,
        samples_meanwhile=config.train.schedule == "async",
        engine=_engine(config.rollout.vllm, gpu_bytes) if engine == "vllm" else None,
    )


def _engine(options: VllmConfig, gpu_bytes: int) -> Engine:
    cache_gib = options.kv_cache_gib or (0 if gpu_bytes else CPU_CACHE_GIB)
    return Engine(cache_bytes=int(cache_gib * 2**30), most_bytes=int(options.gpu_memory_utilization * gpu_bytes))


def step_of(config: TrainConfig, *, prompt: int, longest: int, world: int, shares_prompt: bool) -> Step:
    """A step of samples that are all as long as they may be."""
    samples = per_device(config, world)
    engine = config.rollout.engine if config.data.on_policy_fraction else "none"
    casts = config.student.dtype == "bfloat16"
    return Step(
        sequences=samples,
        prompt=min(prompt, longest - 1),
        new_tokens=longest - min(prompt, longest - 1),
        group=config.rollout.group_size,
        decoded=min(config.rollout.batch_sequences, samples) if engine in ("torch", "vllm") else 0,
        shares_prompt=shares_prompt,
        recomputes=config.student.gradient_checkpointing,
        casts=casts,
        keeps_casts=casts
        and config.train.schedule != "async",  # autocast's cache: not of a copy, which needs no gradient
        engine_bytes=(2 if casts else FLOAT32) if engine == "vllm" else 0,
        elsewhere=engine == "vllm-server",
    )
