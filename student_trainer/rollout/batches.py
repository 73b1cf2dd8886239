"""Fixed batches of like length, for models whose sequences can't come and go (sliding windows, states, no cache): all
start together, and what has finished is dropped from time to time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from student_trainer.rollout.decoding import Decoder, Strategy
from student_trainer.rollout.jobs import Finished, Job
from student_trainer.rollout.ledger import Ledger, Rules

DROP_FINISHED_BELOW = 0.75
"""Share of unfinished rows under which copying the cache costs less than dragging them on."""
DEVICE_CHECK_EVERY = 8
"""Steps between looks at who has stopped; each makes the host wait for the accelerator."""


def batches(jobs: Sequence[Job], strategy: Strategy, most: int) -> Iterator[list[Job]]:
    """At most so many jobs at a time, of like length; of one length where padding isn't exact."""
    ordered = sorted(jobs, key=_length)
    groups: Iterator[Sequence[Job]]
    if strategy == "padded":
        groups = iter([ordered])
    else:
        groups = (list(group) for _, group in itertools.groupby(ordered, key=_length))
    for group in groups:
        for start in range(0, len(group), most):
            yield list(group[start : start + most])


def _length(job: Job) -> int:
    return len(job.prompt.token_ids)


class Batch:
    """See jobs.Work."""

    def __init__(self, decoder: Decoder, jobs: Sequence[Job], rules: Rules, device: torch.device) -> None:
        self._decoder, self._device = decoder, device
        self._jobs: list[Job | None] = list(jobs)  # by row; None: given out, not yet dropped
        self._ledger = Ledger(rules, len(jobs), device)
        self._ledger.enter(0, [job.uid for job in jobs])
        self._prompts = [job.prompt.token_ids for job in jobs]
        self._max_new_tokens = rules.config.max_new_tokens
        self._check_every = 1 if device.type == "cpu" else DEVICE_CHECK_EVERY
        self._token_B: Tensor | None = None
        self._step = 0

    @property
    def is_done(self) -> bool:
        return not self._jobs

    def advance(self) -> Finished:
        """See jobs.Work.advance."""
        while not self.is_done:
            if self._token_B is None:
                logits = self._decoder.start(self._prompts)
            else:
                logits = self._decoder.step(self._token_B)
            self._token_B = self._ledger.draw(logits)
            self._step += 1
            finished = self._finished()
            if finished:
                return self._leave(finished)
        return []

    def _finished(self) -> list[int]:
        """Rows that have not been given out."""
        if self._step == self._max_new_tokens:
            ended = np.ones(len(self._jobs), dtype=np.bool_)
        elif self._step % self._check_every == 0:
            ended = self._ledger.stopped(len(self._jobs))
        else:
            return []
        return [row for row, job in enumerate(self._jobs) if ended[row] and job is not None]

    def _leave(self, finished: list[int]) -> Finished:
        left = []
        for row, record in zip(finished, self._ledger.take(finished), strict=True):
            job = self._jobs[row]
            assert job is not None
            left.append((job, record))
            self._jobs[row] = None
        going = [row for row, job in enumerate(self._jobs) if job is not None]
        if not going:
            self._jobs = []
        elif len(going) <= DROP_FINISHED_BELOW * len(self._jobs):
            self._ledger.move(range(len(going)), going)
            rows = torch.tensor(going, device=self._device)
            self._decoder.keep(rows)
            assert self._token_B is not None
            self._token_B = self._token_B[rows]
            self._jobs = [self._jobs[row] for row in going]
        return left
