"""The plan for a machine that is described by options: will it fit, what limits it, how fast. Loads configurations,
tokenizer and prompts; no weights, and asks no teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from student_trainer import fits
from student_trainer.config import TrainConfig
from student_trainer.data import open_prompts
from student_trainer.losses import build
from student_trainer.losses.base import Needs
from student_trainer.planning import memory, shape, speed
from student_trainer.planning.asked import load_of, micro_batch_tokens, per_device, step_of
from student_trainer.planning.memory import USABLE, Bytes, Engine, Load, parts_of
from student_trainer.planning.shape import Shape
from student_trainer.planning.text import human, listed
from student_trainer.student import load_tokenizer

GIB = 2**30
NO_TEACHER = "teacher   left out: name plan.teacher_model, a directory or hub id with its config.json"
MOST_DEVICES = 1024
MIN_TOKENS = 256
"""Smaller micro-batches are not proposed."""


def plan(config: TrainConfig) -> list[str]:
    """The plan, a line each.

    Raises:
        ValueError: student, teacher or data can't be read.
    """
    wanted, world = config.plan, config.plan.devices
    student = shape.of_student(config.student)
    named = (
        {wanted.teacher_model: False}
        if wanted.teacher_model
        else {t.model: t.is_past for t in config.all_teachers.values() if t.model}
    )
    if wanted.teacher_devices and not named:
        raise ValueError(
            f"plan.teacher_devices: got {wanted.teacher_devices} and no teacher to plan for, expected "
            "plan.teacher_model as well"
        )
    teachers = {
        name: shape.of_past(config.student) if is_past else shape.of_teacher(name) for name, is_past in named.items()
    }
    tokenizer = load_tokenizer(config.student)
    fits.require_known_ids(config, tokenizer)
    lengths = open_prompts(config.data, tokenizer, eos_token_ids=[tokenizer.eos_token_id or 0]).longest
    sampled = lengths.prompt + config.rollout.longest_completion if config.data.on_policy_fraction else 0
    longest = max(sampled, lengths.sequence)
    needs = build(config.loss).needs(next(iter(config.all_teachers.values())).top_k)
    tokens = micro_batch_tokens(config, longest, world)
    load = load_of(
        config, needs, tokens=tokens, prompt=lengths.prompt, longest=longest, width=student.width,
        gpu_bytes=int(wanted.device_memory_gib * GIB), world=world,
    )  # fmt: skip
    rates = (
        f", {wanted.peak_tflops:g} TFLOP/s and {wanted.memory_bandwidth_gb_s:g} GB/s each" if _has_speed(config) else ""
    )
    return [
        f"machine   {world} × {wanted.device_memory_gib:g} GiB{rates}, as described by plan.*; {USABLE:.0%} of it is "
        "planned with",
        f"student   {config.student.model} ({student.name}, {student.parameters:,} parameters, {student.trained:,} "
        f"trained, {config.student.dtype})",
        f"step      {per_device(config, world)} sequences of up to {longest} tokens per device, {tokens:,} tokens in a "
        "micro-batch",
        *_student_lines(config, student, load),
        *(_teacher_line(config, teacher, name, longest, needs) for name, teacher in teachers.items()),
        *([] if teachers else [NO_TEACHER]),
        *_speed_lines(config, student, list(teachers.values()), lengths.prompt, longest, needs),
    ]


def _student_lines(config: TrainConfig, student: Shape, load: Load) -> list[str]:
    world, room = config.plan.devices, _room(config)
    lines: list[str] = []
    fitting: list[str] = []
    for strategy in memory.STRATEGIES if world > 1 else ("ddp",):
        found = memory.phases(student, load, parts_of(strategy, world), world)
        phase, size = memory.peak(found)
        name = strategy if world > 1 else "one"
        verdict = "fits" if size <= room else f"does not fit, most of it {_largest(found[phase])}"
        fitting += [strategy] if size <= room else []
        lines.append(f"{name:<11} {human(size)} when it {phase}s: {listed(found[phase])}; {verdict}")
    chosen = "ddp" if config.train.strategy == "auto" else config.train.strategy
    if world > 1 and chosen not in memory.STRATEGIES:
        raise ValueError(f"plan: no formula for train.strategy {chosen}; expected {', '.join(memory.STRATEGIES)}")
    if chosen not in fitting:
        lines.append(f"cure      {_cure(config, student, load, fitting)}")
    return lines


def _cure(config: TrainConfig, student: Shape, load: Load, fitting: list[str]) -> str:
    """The first of a few changes that makes it fit."""
    world, room = config.plan.devices, _room(config)
    if fitting:
        return f"train.strategy={fitting[0]} fits"
    strategy = "fsdp2" if world > 1 else "ddp"
    before, load = load, dataclasses.replace(load, gradient_checkpointing=True)
    while True:
        phase, size = memory.peak(memory.phases(student, load, parts_of(strategy, world), world))
        if size <= room:
            break
        if phase == "sample" and load.engine and (smaller := _smaller(load.engine, student, load)):
            load = dataclasses.replace(load, engine=smaller)
        elif phase == "sample" and load.decoded > 1:
            load = dataclasses.replace(load, decoded=load.decoded // 2)
        elif phase == "learn" and load.tokens // 2 >= max(MIN_TOKENS, load.longest):
            load = dataclasses.replace(load, tokens=load.tokens // 2)
        else:
            return f"more devices: with checkpointing, smaller batches and {strategy} {human(size)} are left"
    changes = {
        "student.gradient_checkpointing=true": load.gradient_checkpointing != before.gradient_checkpointing,
        f"train.micro_batch_tokens={load.tokens}": load.tokens != before.tokens,
        f"rollout.batch_sequences={load.decoded}": load.decoded != before.decoded,
        f"rollout.vllm.kv_cache_gib={_cache_gib(load):g}": load.engine != before.engine,
        f"train.strategy={strategy}": world > 1 and strategy != config.train.strategy,
    }
    return f"{' '.join(change for change, is_made in changes.items() if is_made)} fits"


def _smaller(engine: Engine, student: Shape, load: Load) -> Engine | None:
    """With half the cache, if that still holds a sequence."""
    half = engine.holds(load.arithmetic_bytes * student.parameters)["engine's cache"] // 2
    one = load.longest * memory.cache_bytes(student, 2 * load.arithmetic_bytes)
    return Engine(half, 0) if half >= one else None


def _cache_gib(load: Load) -> float:
    """In hundredths, rounded down: what fits is told."""
    return load.engine.cache_bytes * 100 // GIB / 100 if load.engine else 0.0


def _teacher_line(config: TrainConfig, teacher: Shape, named: str, longest: int, needs: Needs) -> str:
    devices, in_flight, parts = _teacher_on(config, teacher, longest, needs)
    size = sum(parts.values())
    verdict = "fits" if size <= _room(config) else f"does not fit, most of it {_largest(parts)}"
    return (
        f"teacher   {named} ({teacher.name}, {teacher.parameters:,} parameters) on {devices} device"
        f"{'s' if devices > 1 else ''}, {in_flight} sequences in flight: {human(size)} each: {listed(parts)}; {verdict}"
    )


def _teacher_on(config: TrainConfig, teacher: Shape, longest: int, needs: Needs) -> tuple[int, int, Bytes]:
    """Devices of the teacher, sequences in flight, and what one device holds."""
    world, room = config.plan.devices, _room(config)
    asked = next(iter(config.all_teachers.values()))
    concurrent = asked.max_concurrency * asked.request_sequences
    in_flight = world * min(concurrent, per_device(config, world))
    values = teacher.width if needs.top_k == "all" else 2 * (needs.top_k + needs.student_top_k + 1)
    devices = config.plan.teacher_devices or 1
    while True:
        parts = memory.teacher(teacher, in_flight, longest, values, devices)
        if sum(parts.values()) <= room or config.plan.teacher_devices or devices >= MOST_DEVICES:
            return devices, in_flight, parts
        devices *= 2


def _speed_lines(
    config: TrainConfig, student: Shape, teachers: Sequence[Shape], prompt: int, longest: int, needs: Needs
) -> list[str]:
    if not _has_speed(config):
        return ["speed     not predicted: give plan.peak_tflops and plan.memory_bandwidth_gb_s"]
    wanted, world = config.plan, config.plan.devices
    share = wanted.utilisation
    rates = speed.Rates(share * wanted.peak_tflops * 1e12, share * wanted.memory_bandwidth_gb_s * 1e9)
    shares = config.train.share_prompt != "off" and config.train.packing != "off"
    step = step_of(config, prompt=prompt, longest=longest, world=world, shares_prompt=shares)
    scoring = [
        speed.scoring(t, step, rates, trainers=world, devices=_teacher_on(config, t, longest, needs)[0])
        for t in teachers
    ]
    seconds = speed.Seconds(
        sample=speed.sampling(student, step, rates),
        score=max(scoring, default=0.0),  # several teachers work at a time
        learn=speed.learning(student, step, rates),
    )
    return [f"speed     {speed.told(seconds, step, world)}; at {share:.0%} of the peaks, without communication"]


def _largest(parts: Bytes) -> str:
    return max(parts, key=lambda part: parts[part])


def _room(config: TrainConfig) -> float:
    return USABLE * config.plan.device_memory_gib * GIB


def _has_speed(config: TrainConfig) -> bool:
    return config.plan.peak_tflops > 0
