"""What keeps a run from ending badly: steps without a finite loss and gradient are skipped on every rank alike and
counted, and a request to stop (SIGTERM, SIGINT) is obeyed where the weights are those of a whole step.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from student_trainer.distributed import Distributed
from student_trainer.rollout.base import RolloutGone
from student_trainer.scoring import TeacherGone
from student_trainer.types import Rollout


class TrainingError(RuntimeError):
    """Training can't go on; the message says where it broke."""


class StopRequested(Exception):
    """A signal asked the run to stop while nothing but time is lost by it."""


GONE = (TeacherGone, RolloutGone)
"""A service of others stayed away past its budget."""
RESUMABLE = (StopRequested, *GONE)
"""Ends of a run after which the same command goes on from the checkpoint."""


def agree(dist: Distributed, failure: Exception | None) -> None:
    """Called by every rank at the same point: raises on all of them if one has a failure, the gravest where there are
    several: first an error, then a teacher or servers that are gone, then a request to stop."""
    worst = int(dist.all_reduce_max(_gravity(failure)))
    if worst == 0:
        return
    if failure is not None and _gravity(failure) == worst:
        told = failure
        dist.gather(_portable(failure))
        raise told
    others = dist.gather(None if failure is None else _portable(failure))
    raise next(f for f in others if f is not None and _gravity(f) == worst)


def _gravity(failure: Exception | None) -> int:
    if failure is None:
        return 0
    return 1 if isinstance(failure, StopRequested) else 2 if isinstance(failure, GONE) else 3


def _portable(failure: Exception) -> Exception:
    """As another rank can raise it."""
    if isinstance(failure, RESUMABLE):
        return failure
    return TrainingError(f"another process failed: {type(failure).__name__}: {failure}")


class FailedElsewhere(Exception):
    """Work failed on another rank as well or alone, and that rank says why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@contextlib.contextmanager
def told_once(dist: Distributed, exit_code: Callable[[Exception], int]) -> Iterator[None]:
    """For work that every rank does; collectives inside must come before anything that fails on some ranks only. What
    fails on one rank fails on all: the first with a failure keeps it, the others raise FailedElsewhere with its exit
    code."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # every rank must hear of it before any leaves
        failure = error
    codes = dist.gather(None if failure is None else exit_code(failure))
    teller = next((rank for rank, code in enumerate(codes) if code is not None), None)
    if teller is None:
        return
    if teller == dist.rank and failure is not None:
        raise failure
    raise FailedElsewhere(codes[teller]) from failure


class BadSteps:
    """Counts steps that had to be skipped: in a row, and in all."""

    def __init__(self, limit: int, in_a_row: int = 0, total: int = 0) -> None:
        self._limit = limit
        self.in_a_row = in_a_row
        self.total = total

    def good(self) -> None:
        self.in_a_row = 0

    def bad(self, step: int, reason: str) -> None:
        """Raises TrainingError where this is the `limit`-th bad step in a row."""
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self._limit:
            raise TrainingError(
                f"step {step}: {self.in_a_row} steps in a row without a finite loss and gradient (train.max_bad_steps "
                f"is {self._limit}); the last: {reason}"
            )


def locate_non_finite(loss: float, hidden_NH: Tensor, rollouts: Sequence[Rollout]) -> str:
    """Names the first sample and position whose hidden state, or the loss's gradient with respect to it, is not finite;
    empty where these and the loss are.

    Args:
        hidden_NH: after the backward pass, its gradient retained (`retain_grad`).
    """
    for what, rows_NH in (("hidden state", hidden_NH.detach()), ("loss or its gradient", hidden_NH.grad)):
        if rows_NH is None:
            continue
        bad = (~rows_NH.isfinite().all(dim=-1)).nonzero().flatten()
        if len(bad):
            return f"{_place(int(bad[0]), rollouts)}: the student's {what} is not finite"
    if math.isfinite(loss):
        return ""
    return f"samples {rollouts[0].uid} to {rollouts[-1].uid}: the loss is not finite, all hidden states are"


def _place(row: int, rollouts: Sequence[Rollout]) -> str:
    """Of hidden row `row` of all completion tokens of `rollouts`, one after the other."""
    for rollout in rollouts:
        if row < rollout.num_tokens:
            return (
                f"prompt {rollout.prompt.index}, sample {rollout.uid}, position {len(rollout.prompt.token_ids) + row}"
            )
        row -= rollout.num_tokens
    raise AssertionError("more hidden rows than completion tokens")


def first_non_finite_gradient(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> str:
    for name, parameter in named_parameters:
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"gradient of {name} is not finite"
    return "gradient norm is not finite"


class StopSignals:
    """Turns SIGTERM and SIGINT into a request. Inside `interruptible` it raises StopRequested at once; elsewhere it is
    remembered until the next step boundary. A second signal acts as Python's default does."""

    def __init__(self) -> None:
        self.received = 0
        self._interruptible = self._deferred = False
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells have it: 143 after SIGTERM, 130 after SIGINT."""
        return 128 + self.received

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Handles both signals inside; main thread only."""
        for handled in (signal.SIGTERM, signal.SIGINT):
            self._previous[handled] = signal.signal(handled, self._handle)
        try:
            yield self
        finally:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that may be dropped at any point: sampling, and waiting for the teacher."""
        self._interruptible = True
        try:
            if self.received:
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside `interruptible`, work that ranks do together: one that left in the middle would leave the others in a
        collective. A request is obeyed at the end. Main thread only."""
        before = self._interruptible, self._deferred
        self._interruptible, self._deferred = False, before[0]
        try:
            yield
        finally:
            self._interruptible, self._deferred = before
        if self._interruptible and self.received:
            self._interruptible = False
            raise StopRequested

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """Inside `deferred`, work of one rank that the others will hear of: a request is obeyed at once again."""
        with self.interruptible() if self._deferred else contextlib.nullcontext():
            yield

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[number])
        if self._interruptible:
            self._interruptible = False
            raise StopRequested
