"""The algorithm: the student samples, the teacher scores every token of it, the objective turns both into a gradient.
Everything a step needs stands in `Run`, put together by run.py. A step is a pure function of its number and weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from student_trainer import guards, metrics
from student_trainer.data import fixed
from student_trainer.losses import importance, normalise
from student_trainer.losses.mask import loss_mask
from student_trainer.losses.rows import loss_rows
from student_trainer.microbatch import InOrder, divide_in_order
from student_trainer.pipeline.arrivals import Arrivals
from student_trainer.pipeline.schedule import Draw, Send, scheduled
from student_trainer.rollout.given import with_prompt
from student_trainer.rollout.likely import with_likely_ids
from student_trainer.run import Run
from student_trainer.teachers.refresh import refresh
from student_trainer.types import Metrics, ScoredRollout
from teacher_api.types import FloatArray

Gradient = tuple[float, Metrics, str]
"""What a step's backward passes tell, besides what they add to the parameters' `.grad`: the global number of counted
tokens, this rank's part of the loss and plain sums of its metrics, and where the first value that is not finite came up
("" if none did)."""


def train(run: Run) -> None:
    """Runs the steps that are left; leaves the final student in output_dir/final.

    Raises:
        StopRequested, TeacherGone: the checkpoint of the last whole step has been written.
        TrainingError, ScoreError, TeacherError: training can't go on; earlier checkpoints are untouched.
    """
    run.evaluate_if_due()
    with scheduled(run, draw, sample) as schedule:
        while run.step < run.config.train.steps:
            refresh(run)
            run.timeline.begin()
            with run.strategy.whole(), run.whole_or_not_at_all():
                samples = schedule.begin()  # on their way to the teacher and back
                early = accumulate_early(run, samples) if run.learns_early else None
                scored = samples.all()
            with schedule.weights_move():
                learned = update(run, divided(run, *early)) if early else learn(run, scored)
                for _ in range(1, run.config.train.updates):
                    learned = learn(run, scored)
                run.step += 1
            run.report(samples, learned)
            run.evaluate_if_due()
            run.checkpoint_if_due()
    run.finish()


def draw(run: Run, step: int) -> Draw:
    """What this rank samples in `step`: completions of prompt rows with row % world == rank, the student's or given."""
    size, group = run.config.train.batch_size, run.config.rollout.group_size
    prompts = run.prompts.batch(step, size, run.config.train.seed)
    rows = [(row, member) for row in range(size) if run.dist.owns(row) for member in range(group)]
    uids = {(step * size + row) * group + member: (prompts[row], member) for row, member in rows}
    given = [fixed.rollout(*uids[uid], uid=uid) for uid in uids if run.mix.is_fixed(step, uid)]
    return Draw(step, {uid: uids[uid][0] for uid in uids if not run.mix.is_fixed(step, uid)}, given)


def sample(run: Run, draw: Draw, send: Send) -> None:
    """Hands each sample to `send` when it is finished. Those that get their candidates in a forward pass of their own
    go together: fixed data, and with loss.on_prompt all."""
    keep, on_prompt = run.needs.student_top_k, run.config.loss.on_prompt
    drawn = run.sampler.stream(list(draw.own.values()), list(draw.own), keep_top_k=keep)
    with run.student.arithmetic():
        together = [*draw.given, *(drawn if on_prompt and keep else ())]
        shaped = [with_prompt(r) if on_prompt else r for r in sorted(together, key=lambda r: r.uid)]
        send(with_likely_ids(run.sampled_from, shaped, keep, run.config.train.micro_batch_tokens))
        for rollout in drawn:
            send([with_prompt(rollout) if on_prompt else rollout])


def learn(run: Run, scored: Sequence[ScoredRollout]) -> Metrics:
    """One optimizer step on the global batch."""
    return update(run, accumulate(run, scored))


def update(run: Run, gradient: Gradient) -> Metrics:
    """The optimizer step of a gradient that is accumulated; skipped, alike on every rank, where it or the loss is not
    finite."""
    counted_tokens, local, trouble = gradient
    run.strategy.sum_gradients()
    totals = run.dist.sum_metrics(local)
    learned = {**metrics.means(totals), "loss": totals.get("loss", 0.0)}
    learned["learning_rate"] = run.optimizer.learning_rate(run.step)
    learned["grad_norm"] = run.optimizer.grad_norm()
    if not counted_tokens:
        trouble = "no token of this step counts (loss.ignore_token_ids)"
    elif not metrics.finite(learned["loss"], learned["grad_norm"]):
        trouble = run.dist.first(trouble) or guards.first_non_finite_gradient(run.strategy.named_parameters())
    else:
        run.optimizer.step(run.step)
        trouble = ""
    run.optimizer.zero_grad()
    learned["skipped"] = float(bool(trouble))
    if trouble:
        run.bad_steps.bad(run.step, trouble)
    else:
        run.bad_steps.good()
    return learned


def accumulate(run: Run, scored: Sequence[ScoredRollout]) -> Gradient:
    """Adds the gradient of this rank's share of the global loss to the parameters, where all samples are there."""
    config = run.config
    masks = [loss_mask(s.rollout, config.loss) for s in scored]
    global_counts = run.dist.all_reduce_sum(normalise.count(masks))
    weights = normalise.token_weights(masks, global_counts, config.loss.normalise)
    advantages = run.objective.prepare(scored, run.dist.all_reduce_sum)
    sums: Metrics = {"scored_tokens": float(sum(len(mask) for mask in masks))}
    trouble = ""
    batches = divide_in_order(
        scored, config.train.micro_batch_tokens, config.train.micro_batch_size, run.student.packing
    )
    learning = [batch for batch in batches if any(weights[i].any() for i in batch)]
    for batch in run.strategy.together(learning):
        chosen = None if advantages is None else [advantages[i] for i in batch]
        more, found = backward(run, [scored[i] for i in batch], [weights[i] for i in batch], chosen)
        metrics.add(sums, more)
        trouble = trouble or found
    return float(global_counts[0]), sums, trouble


def accumulate_early(run: Run, samples: Arrivals) -> tuple[normalise.Counts, Metrics, str]:
    """As `accumulate`, each micro-batch as soon as it is there. The loss and its gradient are not divided by the global
    counts, which nobody knows yet; returns this rank's instead. No collective: a rank may fail inside."""
    config, train = run.config, run.config.train
    counts, sums, trouble = normalise.count([]), {"scored_tokens": 0.0}, ""
    for members in samples.micro_batches(
        InOrder(train.micro_batch_tokens, train.micro_batch_size, run.student.packing)
    ):
        masks = [loss_mask(s.rollout, config.loss) for s in members]
        counts = counts + normalise.count(masks)
        sums["scored_tokens"] += float(sum(len(mask) for mask in masks))
        if any(mask.any() for mask in masks):
            advantages = run.objective.prepare(members, lambda values: values)  # of each sample alone: learns_early
            weights = normalise.undivided(masks, config.loss.normalise)
            more, found = backward(run, members, weights, advantages)
            metrics.add(sums, more)
            trouble = trouble or found
    return counts, sums, trouble


def divided(run: Run, counts: normalise.Counts, sums: Metrics, trouble: str) -> Gradient:
    """What `accumulate` gives, of what `accumulate_early` gave and left in the parameters."""
    global_counts = run.dist.all_reduce_sum(counts)
    divisor = normalise.divisor(global_counts, run.config.loss.normalise)
    run.strategy.divide_gradients(divisor)
    return float(global_counts[0]), {**sums, "loss": sums.get("loss", 0.0) / divisor}, trouble


def backward(
    run: Run, members: Sequence[ScoredRollout], weights: Sequence[FloatArray], advantages: Sequence[FloatArray] | None
) -> tuple[Metrics, str]:
    """One micro-batch: adds Σ_n w_n ∇D_n to the parameters' gradients; its loss and metrics, and where the first value
    that is not finite came up."""
    rollouts = [s.rollout for s in members]
    rows = loss_rows(members, run.config.loss, run.student.device, advantages)
    weights_N = torch.cat([torch.from_numpy(w) for w in weights])
    run.student.seed_dropout(run.config.train.seed, rollouts[0].uid)
    hidden_NH = run.student.hidden_rows(rollouts)
    if hidden_NH.requires_grad:
        hidden_NH.retain_grad()  # for guards.locate_non_finite
    loss, partial = importance.backward(run.student.head, hidden_NH, run.objective, rows, weights_N, run.chunk_rows)
    sums = {"loss": loss, **partial, **metrics.of_teacher(members[0].teacher, partial)}
    return sums, guards.locate_non_finite(loss, hidden_NH, rollouts)
