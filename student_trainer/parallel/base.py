"""The seam between the algorithm and the ranks it runs on, and its plainest side: weights, gradients and optimizer
state whole on every rank. Every method is called by all ranks at the same point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from student_trainer.distributed import Distributed
from student_trainer.optim import OptimConfig, Optimizer
from student_trainer.student import Student

BatchT = TypeVar("BatchT")


class Replicated:
    """One process, or data parallelism with whole copies (`ddp`): gradients are summed once per step."""

    name = "ddp"
    collective_passes = False
    """Whether all ranks take part in every forward and backward pass."""
    optimizer: Optimizer
    plain: Student
    """The student as it was loaded: for forward passes inside `whole`, which no other rank takes part in."""

    def __init__(self, dist: Distributed) -> None:
        self.dist = dist

    def spread(self, student: Student, config: OptimConfig, total_steps: int) -> Student:
        """Takes over the student and makes the optimizer; called once, before the first step.

        Returns:
            The student to train with. Its `model` stays the plain model: with its weights only inside `whole`.

        Raises:
            ValueError: this strategy can't train this student, or not with this optimizer.
        """
        self.plain = student
        self._trained: Any = student.model
        self.optimizer = self._optimizer(config, total_steps)
        return student

    def _optimizer(self, config: OptimConfig, total_steps: int) -> Optimizer:
        return Optimizer(self.named_parameters(), config, total_steps)

    def named_parameters(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        """What is trained, as this rank holds it, under the plain model's names."""
        return self._trained.named_parameters()  # type: ignore[no-any-return]

    def together(self, batches: Sequence[BatchT]) -> Iterator[BatchT]:
        """This rank's micro-batches of a step. Where forward passes are collective, ranks with fewer than others take
        part in theirs without samples of their own, after the last that is yielded."""
        yield from batches

    def sum_gradients(self) -> None:
        """Makes every gradient that this rank holds the ranks' sum, where the backward passes have not."""
        self.dist.sum_gradients(p for _, p in self.named_parameters())

    def divide_gradients(self, divisor: float) -> None:
        """Divides every gradient that this rank holds. Not where passes are collective: there losses are weighted."""
        gradients = [p.grad for _, p in self.named_parameters() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1.0 / divisor)

    @contextlib.contextmanager
    def whole(self, *, main_only: bool = False, on_host: bool = False) -> Iterator[None]:
        """Inside, the plain model has its weights: for sampling, evaluation, export. May be nested.

        Args:
            main_only: on the other ranks it need not, and nothing is kept there.
            on_host: weights that had to be gathered may stay in the host's memory; enough to save them.
        """
        yield

    def parts(self) -> dict[str, int]:
        """Into how many parts weights, gradients and optimizer state are cut."""
        return {"weights": 1, "gradients": 1, "optimizer": 1}

    def __str__(self) -> str:
        return self.name if self.dist.world > 1 else "one process"
