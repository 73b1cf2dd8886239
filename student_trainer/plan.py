"""What `--dry-run` prints: what would be trained against whom, and the memory it will take, by formula and
measured."""

from __future__ import annotations

from student_trainer import metrics
from student_trainer.data import fixed
from student_trainer.measure import measure
from student_trainer.rollout.likely import with_likely_ids
from student_trainer.run import Run, make_sampler
from student_trainer.student import activation_bytes
from teacher_api.types import TeacherInfo

OPTIMIZER_VALUES = {"adamw": 2, "muon": 2}
"""float32 values of optimizer state per parameter: AdamW's two moments (Muon keeps one for its matrices)."""
LOSS_COPIES = 4
"""Arrays as large as a chunk's logits that exist at once: logits, log-softmax, its exponential, their gradient."""
HELD_BEFORE = ("weights", "optimizer")
"""There before a micro-batch begins, or not yet: optimizer state comes with the first step."""
DRY_RUN_NEW_TOKENS = 8


def micro_batch_tokens(run: Run) -> int:
    """Most padded tokens that one forward and backward can get on one rank."""
    train, longest = run.config.train, run.longest_tokens
    per_step = train.batch_size * run.config.rollout.group_size
    sequences = min(-(-per_step // run.dist.world), train.micro_batch_size or per_step)
    return min(max(train.micro_batch_tokens, longest), sequences * longest)


def memory(run: Run, tokens: int) -> dict[str, int]:
    """Expected bytes by what holds them, on the training device of one process, at micro-batches of `tokens`."""
    config, student = run.config, run.student
    trained = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
    weights = 4 * sum(p.numel() for p in student.model.parameters())
    width = student.parts.logit_width
    held = min(run.chunk_rows, tokens)
    teacher = width if run.needs.top_k == "all" else 2 * (run.needs.top_k + run.needs.student_top_k + 1)
    parts = run.strategy.parts()
    averaged = int(config.optim.ema_decay > 0)
    return {
        "weights": weights // parts["weights"],
        "gradients": 4 * trained // parts["gradients"],
        "optimizer": 4 * trained * (OPTIMIZER_VALUES[config.optim.name] + averaged) // parts["optimizer"],
        "activations": activation_bytes(student, tokens, gradient_checkpointing=config.student.gradient_checkpointing),
        "logits": LOSS_COPIES * 4 * held * width,
        "teacher_scores": 4 * tokens * teacher,
    }


def measured(run: Run) -> str:
    """Runs the largest micro-batch of longest sequences once, without an optimizer step; a line of what it took."""
    got = measure(run)
    formula = memory(run, got.sequences * got.tokens)
    expected = sum(size for name, size in formula.items() if name not in HELD_BEFORE)
    return (
        f"forward and backward of {got.sequences} sequences of {got.tokens} tokens took {human(got.num_bytes)} on "
        f"{run.student.device.type} beside weights and optimizer; by the formula {human(expected)}"
    )


def try_once(run: Run) -> str:
    """Samples a few tokens, or takes a fixed completion, has it scored, and says so in a line."""
    (prompt,) = run.prompts.batch(0, 1, run.config.train.seed)
    kept = run.needs.student_top_k
    with run.strategy.whole(), run.student.arithmetic():
        if run.config.data.on_policy_fraction:
            sampler = make_sampler(run.config, run.student, {"max_new_tokens": DRY_RUN_NEW_TOKENS})
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
    parts = memory(run, micro_batch_tokens(run))
    lines = [
        f"student   {config.student.model} ({type(run.student.model).__name__}, {parameters:,} parameters, "
        f"{config.student.dtype} on {run.student.device})",
        *(_teacher(name, info) for name, info in run.teachers.items()),
        f"prompts   {_prompts(run)} from {config.data.named}; completed up to {run.longest_tokens} tokens",
        f"loss      {config.loss.objective}, teacher top-k {run.needs.top_k}, student top-k {run.needs.student_top_k}",
        f"steps     {config.train.steps - run.step} of {config.train.steps} to do, {per_step} samples each, on "
        f"{run.dist.world} process{'es' if run.dist.world > 1 else ''} ({run.strategy})",
        "memory    "
        + ", ".join(f"{name.replace('_', ' ')} {human(size)}" for name, size in parts.items())
        + f"; together about {human(sum(parts.values()))} per process",
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


def human(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
