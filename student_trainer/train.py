"""The algorithm: the student samples, the teacher scores every token of it, the objective turns both into a gradient.
Everything a step needs stands in `Run`, put together by run.py. A step is a pure function of its number and weights.
"""

from __future__ import annotations

import torch

from student_trainer import guards, metrics
from student_trainer.data import fixed
from student_trainer.losses import importance, normalise
from student_trainer.losses.mask import loss_mask
from student_trainer.losses.rows import loss_rows
from student_trainer.microbatch import divide_by_teacher
from student_trainer.rollout.given import with_prompt
from student_trainer.rollout.likely import with_likely_ids
from student_trainer.run import Run
from student_trainer.teachers.refresh import refresh
from student_trainer.types import Metrics, Rollout, ScoredRollout


def train(run: Run) -> None:
    """Runs the steps that are left; leaves the final student in output_dir/final.

    Raises:
        StopRequested, TeacherGone: the checkpoint of the last whole step has been written.
        TrainingError, ScoreError, TeacherError: training can't go on; earlier checkpoints are untouched.
    """
    run.evaluate_if_due()
    while run.step < run.config.train.steps:
        refresh(run)
        clock = metrics.Clock()
        with run.strategy.whole(), run.whole_or_not_at_all():
            rollouts = sample(run)
            clock.lap("sample")
            scored = run.scorer.score(rollouts)
            clock.lap("score")
        for _ in range(run.config.train.updates):
            learned = learn(run, scored)
        clock.lap("learn")
        run.step += 1
        run.report(scored, learned, clock)
        run.evaluate_if_due()
        run.checkpoint_if_due()
    run.finish()


def sample(run: Run) -> list[Rollout]:
    """This rank's samples of this step: of prompt rows with row % world == rank, drawn by the student or fixed data."""
    size, group = run.config.train.batch_size, run.config.rollout.group_size
    prompts = run.prompts.batch(run.step, size, run.config.train.seed)
    rows = [(row, member) for row in range(size) if run.dist.owns(row) for member in range(group)]
    uids = {(run.step * size + row) * group + member: (prompts[row], member) for row, member in rows}
    given = [fixed.rollout(*uids[uid], uid=uid) for uid in uids if run.mix.is_fixed(run.step, uid)]
    own = [uid for uid in uids if not run.mix.is_fixed(run.step, uid)]
    run.sampler.update(run.step)
    with run.student.arithmetic():
        drawn = run.sampler.sample([uids[uid][0] for uid in own], own, keep_top_k=run.needs.student_top_k)
    rollouts = sorted([*drawn, *given], key=lambda rollout: rollout.uid)
    if run.config.loss.on_prompt:
        rollouts = [with_prompt(r) for r in rollouts]
    return with_likely_ids(run.strategy.plain, rollouts, run.needs.student_top_k, run.config.train.micro_batch_tokens)


def learn(run: Run, scored: list[ScoredRollout]) -> Metrics:
    """One optimizer step on the global batch; skipped, alike on every rank, where loss or gradient is not finite."""
    counted_tokens, local, trouble = accumulate(run, scored)
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


def accumulate(run: Run, scored: list[ScoredRollout]) -> tuple[float, Metrics, str]:
    """Adds the gradient of this rank's share of the global loss to the parameters.

    Returns:
        The global number of counted tokens, this rank's part of the loss and plain sums of its metrics, and where the
        first value that is not finite came up ("" if none did).
    """
    config, device = run.config, run.student.device
    masks = [loss_mask(s.rollout, config.loss) for s in scored]
    global_counts = run.dist.all_reduce_sum(normalise.count(masks))
    weights = normalise.token_weights(masks, global_counts, config.loss.normalise)
    advantages = run.objective.prepare(scored, run.dist.all_reduce_sum)
    train, samples = config.train, [s.rollout for s in scored]
    sums: Metrics = {"scored_tokens": float(sum(len(mask) for mask in masks))}
    trouble = ""
    divided = divide_by_teacher(scored, train.micro_batch_tokens, train.micro_batch_size, run.student.packing)
    learning = [batch for batch in divided if any(weights[i].any() for i in batch)]
    for batch in run.strategy.together(learning):
        members, rollouts = [scored[i] for i in batch], [samples[i] for i in batch]
        rows = loss_rows(members, config.loss, device, [advantages[i] for i in batch] if advantages else None)
        weights_N = torch.cat([torch.from_numpy(weights[i]) for i in batch])
        run.student.seed_dropout(train.seed, rollouts[0].uid)
        hidden_NH = run.student.hidden_rows(rollouts)
        if hidden_NH.requires_grad:
            hidden_NH.retain_grad()  # for guards.locate_non_finite
        loss, partial = importance.backward(run.student.head, hidden_NH, run.objective, rows, weights_N, run.chunk_rows)
        metrics.add(sums, {"loss": loss, **partial})
        metrics.add(sums, metrics.of_teacher(members[0].teacher, partial))
        trouble = trouble or guards.locate_non_finite(loss, hidden_NH, rollouts)
    return float(global_counts[0]), sums, trouble
