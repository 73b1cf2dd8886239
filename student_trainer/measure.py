"""What one forward and backward pass of the largest micro-batch takes, measured: `--dry-run` shows it beside the
formula of plan.py. The samples are made up, of the shape that real ones can have at most; nothing is learned from them.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from student_trainer.losses.base import Needs
from student_trainer.run import Run
from student_trainer.train import accumulate
from student_trainer.types import Prompt, Rollout, ScoredRollout
from teacher_api.types import Scores

KIB = 1024
RESET_PEAK = "5"
"""Written to clear_refs, sets the peak of resident memory back to what it is now: proc_pid_clear_refs(5)."""


@dataclass(frozen=True, slots=True)
class Measured:
    sequences: int
    tokens: int  # of each
    num_bytes: int  # peak above what was there before


def largest_micro_batch(run: Run) -> int:
    """Sequences of the greatest length that one forward and backward may hold on one rank."""
    config = run.config
    per_step = config.train.batch_size * config.rollout.group_size
    fit = max(1, config.train.micro_batch_tokens // run.longest_tokens)
    return min(fit, config.train.micro_batch_size or fit, -(-per_step // run.dist.world))


def measure(run: Run) -> Measured:
    """Runs the objective once, without an optimizer step, and drops the gradients. Every rank calls it."""
    scored = worst_case(run)
    before = _restart_peak(run.student.device)
    accumulate(run, scored)
    peak = _peak(run.student.device) - before
    run.optimizer.zero_grad()
    return Measured(len(scored), run.longest_tokens, peak)


def worst_case(run: Run) -> list[ScoredRollout]:
    """Made-up samples of the longest prompt and the longest completion. No two have a prompt in common, so that none is
    shared."""
    fraction = run.config.data.on_policy_fraction
    num = max(run.config.rollout.longest_completion if fraction else 0, run.prompts.longest.fixed)
    prompt_tokens, on_prompt = max(run.longest_tokens - num, 1), run.config.loss.on_prompt
    num, cut = (num + prompt_tokens - 1, 1) if on_prompt else (num, prompt_tokens)
    shapes = [(uid, cut, num) for uid in range(largest_micro_batch(run))]
    return made_up(shapes, run.student.vocabulary_size, run.needs, scored_prompt_tokens=prompt_tokens - cut)


def made_up(
    shapes: Sequence[tuple[int, int, int]], vocabulary: int, needs: Needs, *, scored_prompt_tokens: int = 0
) -> list[ScoredRollout]:
    """Random samples with a teacher that finds all ids as likely.

    Args:
        shapes: of each: the number of its prompt, tokens of that prompt, tokens of the completion.
        scored_prompt_tokens: tokens at the beginning of each completion that belong to the prompt (loss.on_prompt).
    """
    draw = np.random.default_rng(0)
    prompts = {index: Prompt(index, draw.integers(0, vocabulary, num, dtype=np.int32)) for index, num, _ in shapes}
    top_k, kept = needs.top_k, needs.student_top_k
    width = vocabulary if top_k == "all" else top_k
    samples = []
    for uid, (index, _, num) in enumerate(shapes):
        token_ids = draw.integers(0, vocabulary, num, dtype=np.int32)
        values = np.full(num, -math.log(vocabulary), dtype=np.float32)
        # Consecutive ids, from anywhere: the two sides have few of them in common, which is the larger case.
        start = draw.integers(0, vocabulary, (num, 1))
        student_ids = ((start + np.arange(kept)) % vocabulary).astype(np.int32) if kept else None
        teacher_ids = ((start + kept + np.arange(width)) % vocabulary).astype(np.int32)
        scores = Scores(
            id=str(uid),
            positions=np.arange(num, dtype=np.int32) + len(prompts[index].token_ids),
            token_logprob=values,
            log_tail=values,
            topk_ids=None if top_k in (0, "all") else teacher_ids,
            topk_logprob=None if top_k == 0 else np.repeat(values[:, None], width, axis=1),
            candidate_logprob=np.repeat(values, kept) if kept else None,
        )
        rollout = Rollout(
            uid, prompts[index], token_ids, "length", values, values, student_ids,
            scored_prompt_tokens=scored_prompt_tokens,
        )  # fmt: skip
        samples.append(ScoredRollout(rollout, scores))
    return samples


def _restart_peak(device: torch.device) -> int:
    """Bytes in use now, which later peaks are counted from."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is taken
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        return _status("VmRSS")
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform.startswith("linux"):
        return _status("VmHWM")
    # Of the whole life of the process, so only what goes beyond loading shows. macOS counts bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * KIB if found else 0
