"""What `--dry-run` prints of a run on this machine: what would be trained against whom, the memory it will take and how
long a step will, by formula and measured. Formulas are in planning/.
"""

from __future__ import annotations

import os

import torch

from student_trainer import metrics
from student_trainer.data import fixed
from student_trainer.measure import measure
from student_trainer.planning import asked, memory, speed
from student_trainer.planning.calibrate import calibrate
from student_trainer.planning.memory import Bytes
from student_trainer.planning.shape import Shape
from student_trainer.planning.text import human, listed
from student_trainer.rollout.engines import make_torch
from student_trainer.rollout.likely import with_likely_ids
from student_trainer.run import Run
from teacher_api.types import TeacherInfo

HELD_BEFORE = ("weights", "optimizer")
"""There before a micro-batch begins, or not yet: optimizer state comes with the first step."""
DRY_RUN_NEW_TOKENS = 8
NOT_VLLMS = "; sampling was timed with the torch sampler, for vLLM's engine is not started for that"


def phases(run: Run, tokens: int) -> dict[str, Bytes]:
    """Expected bytes on the training device of one process, in each phase of a step, at micro-batches of `tokens`."""
    student = run.student
    cut = run.strategy.parts()
    parts = (cut["weights"], cut["gradients"], cut["optimizer"])
    load = asked.load_of(
        run.config,
        run.needs,
        tokens=tokens,
        prompt=min(run.prompts.longest.prompt, run.longest_tokens),
        longest=run.longest_tokens,
        width=student.parts.logit_width,
        gpu_bytes=torch.cuda.get_device_properties(student.device).total_memory if student.device.type == "cuda" else 0,
        world=run.dist.world,
    )
    return memory.phases(Shape.of(student.model, student.parts), load, parts, run.dist.world)


def measured(run: Run) -> str:
    """Runs the largest micro-batch of longest sequences once, without an optimizer step; a line of what it took."""
    got = measure(run)
    learning = phases(run, got.sequences * got.tokens)["learn"]
    expected = sum(size for name, size in learning.items() if name not in HELD_BEFORE)
    return (
        f"forward and backward of {got.sequences} sequences of {got.tokens} tokens took {human(got.num_bytes)} on "
        f"{run.student.device.type} beside weights and optimizer; by the formula {human(expected)}"
    )


def timed(run: Run) -> str:
    """Times a short piece of each part of a step; a line of what a whole step will take."""
    step = asked.step_of(
        run.config,
        prompt=run.prompts.longest.prompt,
        longest=run.longest_tokens,
        world=run.dist.world,
        shares_prompt=run.student.packing.shared,
    )
    told = speed.told(calibrate(run, step).of(step), step, run.dist.world)
    return told + (NOT_VLLMS if step.engine_bytes else "")


def try_once(run: Run) -> str:
    """Samples a few tokens, or takes a fixed completion, has it scored, and says so in a line."""
    (prompt,) = run.prompts.batch(0, 1, run.config.train.seed)
    kept = run.needs.student_top_k
    with run.strategy.whole(), run.student.arithmetic():
        if run.config.data.on_policy_fraction:
            sampler = make_torch(run.config, run.student, {"max_new_tokens": DRY_RUN_NEW_TOKENS})
            rollouts = sampler.sample([prompt], [0], keep_top_k=kept)
        else:
            rollouts = with_likely_ids(run.strategy.plain, [fixed.rollout(prompt, 0, uid=0)], kept, 1)
    scored = run.scorer.score(rollouts)[0]
    if scored.rollout.source == "fixed":
        mean = float(scored.scores.token_logprob.mean())
        return f"scored one fixed completion of {scored.rollout.num_tokens} tokens: mean log p = {mean:.3f} nats"
    mean = metrics.mean_delta(scored)
    return f"scored one sequence of {scored.rollout.num_tokens} tokens: mean log q − log p = {mean:.3f} nats"


def describe(run: Run) -> list[str]:
    """The plan, a line each."""
    config = run.config
    parameters = sum(p.numel() for p in run.student.model.parameters())
    per_step = config.train.batch_size * config.rollout.group_size
    found = phases(run, asked.micro_batch_tokens(config, run.longest_tokens, run.dist.world))
    phase, most = memory.peak(found)
    room = _room(run.student.device)
    lines = [
        f"student   {config.student.model} ({type(run.student.model).__name__}, {parameters:,} parameters, "
        f"{config.student.dtype} on {run.student.device})",
        *(_teacher(name, info) for name, info in run.teachers.items()),
        f"prompts   {_prompts(run)} from {config.data.named}; completed up to {run.longest_tokens} tokens",
        f"loss      {config.loss.objective}, teacher top-k {run.needs.top_k}, student top-k {run.needs.student_top_k}",
        f"steps     {config.train.steps - run.step} of {config.train.steps} to do, {per_step} samples each, on "
        f"{run.dist.world} process{'es' if run.dist.world > 1 else ''} ({run.strategy})",
        *(
            f"memory    to {name}: {listed(parts)}; together {human(sum(parts.values()))}"
            for name, parts in found.items()
        ),
        f"fits      about {human(most)} per process, when it {phase}s, of {human(room)}"
        if most <= room
        else f"fits      not: about {human(most)} per process, when it {phase}s, of {human(room)}",
        f"output    {config.train.output_dir}"
        + (f" (goes on from {run.start.checkpoint})" if run.start.checkpoint else ""),
    ]
    return lines + [f"warning   {w}" for w in run.warnings]


def _prompts(run: Run) -> str:
    """How many there are, and what is done with them."""
    count, fraction = run.prompts.num_prompts, run.config.data.on_policy_fraction
    number = "a stream" if count is None else f"{count:,}"
    return number if fraction == 1.0 else f"{number} ({1 - fraction:.0%} of training on fixed completions)"


def _teacher(name: str, info: TeacherInfo) -> str:
    of = f"{name}: " if name else ""
    return (
        f"teacher   {of}{info.model_name} ({info.engine} {info.engine_version}, {info.dtype}, fingerprint "
        f"{info.fingerprint})"
    )


def _room(device: torch.device) -> int:
    """Memory that is planned with: of the device, or of this machine for all of its processes."""
    if device.type == "cuda":
        return int(memory.USABLE * torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(memory.USABLE * total) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
