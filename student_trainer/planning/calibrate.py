"""How fast this machine is at this run: a short piece of each part of a step, timed, and the time of a whole step from
it. Changes no weights.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from student_trainer import measure
from student_trainer.planning.speed import UPDATE_BYTES, Seconds, Step
from student_trainer.rollout.engines import make_torch
from student_trainer.train import accumulate
from student_trainer.types import ScoredRollout

FEW, MORE = 2, 10
"""New tokens of the two short samplings; their difference is what a token takes, without the prompts."""
LEARNED_TOKENS = 2_048
"""Of the micro-batch that is timed, if a step has so many."""
SCORED_TOKENS = 16_384
COPIED_VALUES = 2**24
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Seconds."""

    prompts: float  # of the prompts of one batch that is decoded
    decode: float  # of one new token of all of its sequences
    score: float  # of the teacher, for one token of prompt or completion, as this process waits for it
    learn: float  # forward and backward of one token of prompt or completion
    update: float  # of the optimizer

    def of(self, step: Step) -> Seconds:
        """Of a whole step on this device."""
        passes = -(-step.sequences // step.decoded) if step.decoded else 0
        return Seconds(
            sample=passes * (self.prompts + step.new_tokens * self.decode),
            score=step.tokens * self.score,
            learn=step.tokens * self.learn + self.update,
        )


def calibrate(run: Any, step: Step, clock: Clock = time.perf_counter) -> Calibration:
    """Every rank calls it; each speaks for itself."""
    prompts = decode = 0.0
    if step.decoded:
        rows = min(step.decoded, step.sequences)
        with run.strategy.whole():
            few, more = (_sampling(run, rows, num, clock) for num in (FEW, MORE))
        decode = max(more - few, 0.0) / (MORE - FEW)
        prompts = max(few - FEW * decode, 0.0)
    return Calibration(prompts, decode, _scoring(run, step, clock), _learning(run, step, clock), _update(run, clock))


def _sampling(run: Any, rows: int, new_tokens: int, clock: Clock) -> float:
    """Seconds of so many new tokens after the first prompts of the run."""
    sampler = make_torch(run.config, run.student, {"max_new_tokens": new_tokens, "batch_sequences": rows})
    group = run.config.rollout.group_size
    prompts = run.prompts.take(0, -(-rows // group), run.config.train.seed)
    chosen = [p for p in prompts for _ in range(group)][:rows]
    with run.student.arithmetic():
        sampler.sample(chosen[:1], [0])
        started = clock()
        sampler.sample(chosen, list(range(rows)), keep_top_k=run.needs.student_top_k)
    return clock() - started


def _made_up(run: Any, step: Step, most: int) -> list[ScoredRollout]:
    """Samples of whole length, in whole groups, of `most` tokens together if that is no less than one."""
    sequences = max(1, min(step.sequences, most // (step.prompt + step.new_tokens)))
    shapes = [(i // step.group, step.prompt, step.new_tokens) for i in range(sequences)]
    return measure.made_up(shapes, run.student.vocabulary_size, run.needs)


def _scoring(run: Any, step: Step, clock: Clock) -> float:
    """Seconds per token, of as many sequences as this process has in flight at a time."""
    config = next(iter(run.config.all_teachers.values()))
    made = [s.rollout for s in _made_up(run, step, SCORED_TOKENS)][: config.max_concurrency * config.request_sequences]
    # On real prompts: a teacher may be chosen by their domain.
    prompts = run.prompts.take(0, len(made), run.config.train.seed)
    rollouts = [dataclasses.replace(r, prompt=p) for r, p in zip(made, prompts, strict=True)]
    run.scorer.score(rollouts[:1])  # the first call opens connections
    started = clock()
    run.scorer.score(rollouts)
    taken = clock() - started
    return taken / sum(len(r.prompt.token_ids) + r.num_tokens for r in rollouts)


def _learning(run: Any, step: Step, clock: Clock) -> float:
    """Seconds per token of one micro-batch."""
    scored = _made_up(run, step, min(LEARNED_TOKENS, run.config.train.micro_batch_tokens))
    accumulate(run, scored)  # the first one makes the gradients' memory
    started = clock()
    accumulate(run, scored)
    taken = clock() - started
    run.optimizer.zero_grad()
    return taken / (len(scored) * (step.prompt + step.new_tokens))


def _update(run: Any, clock: Clock) -> float:
    """Seconds of the optimizer, from the speed of a copy: it moves memory, and computes next to nothing."""
    values = torch.ones(COPIED_VALUES, device=run.student.device)
    copy = torch.empty_like(values)
    copy.copy_(values)
    started = clock()
    copy.copy_(values)
    float(copy[0])  # waits for the device
    bytes_s = 8 * COPIED_VALUES / max(clock() - started, 1e-9)
    trained = sum(p.numel() for _, p in run.strategy.named_parameters() if p.requires_grad)
    return float(UPDATE_BYTES * trained / run.strategy.parts()["optimizer"] / bytes_s)
