"""What strategies with cut weights have in common: passes that are collective, and a plain model that is whole only for
a while.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Module

from student_trainer.distributed import Distributed
from student_trainer.parallel.base import BatchT, Replicated
from student_trainer.parallel.shell import Shell
from student_trainer.student import Student


class Sharded(Replicated):
    """Subclasses set `_trained`, `_shell` and `_student` in `spread`."""

    collective_passes = True
    _shell: Shell
    _student: Student

    def __init__(self, dist: Distributed) -> None:
        super().__init__(dist)
        self._is_whole = False

    @abstractmethod
    def _whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's whole value, one after the other; each is good until the next."""

    def together(self, batches: Sequence[BatchT]) -> Iterator[BatchT]:
        rounds = int(self.dist.all_reduce_max(len(batches)))
        yield from batches
        for _ in range(rounds - len(batches)):
            self._idle_pass()

    def _idle_pass(self) -> None:
        """Forward and backward of one token whose gradient is zero, for the collectives in it."""
        token = torch.full((1, 1), self._student.pad_token_id, device=self._student.device)
        with self._student.arithmetic():
            hidden = self._student.parts.trunk(token)
        hidden.backward(torch.zeros_like(hidden))

    def sum_gradients(self) -> None:
        """The backward passes have summed them."""

    @contextlib.contextmanager
    def whole(self, *, main_only: bool = False, on_host: bool = False) -> Iterator[None]:
        if self._is_whole:
            yield
            return
        keep = self.dist.is_main or not main_only
        device = torch.device("cpu") if on_host else self._student.device
        for name, tensor in self._whole_tensors():
            if keep:
                self._shell.fill([(name, tensor.detach().to(device, copy=True))])
        self._is_whole = True
        try:
            yield
        finally:
            self._is_whole = False
            self._shell.empty()


def refuse_untrainable(strategy: str, model: Module, body: Module) -> None:
    """Raises ValueError where a backward pass would never reach the trunk, whose hooks do the work."""
    if not any(parameter.requires_grad for parameter in body.parameters()):
        raise ValueError(
            f"train.strategy: {strategy} got {type(model).__name__} with nothing to train below its head; use ddp or "
            "ddp_sharded"
        )
