"""A copy of the training weights to sample from while they change: one more of all that is trained, in the student's
memory. What is frozen is shared.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import torch

from student_trainer.student import Student
from teacher_api import causal_lm


class Ended(Exception):
    """The run has ended while something was sampled for it."""


class Copied:
    """`student` has the weights that the trained one had at the last `take`. All methods but `end` are for the thread
    that samples.

    Args:
        trained: whose weights change.
    """

    _ended = False

    def __init__(self, trained: Student) -> None:
        self._source = trained.model
        frozen = {id(p): p for p in trained.model.parameters() if not p.requires_grad}
        model = copy.deepcopy(trained.model, frozen).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        parts = causal_lm.split(model)
        parts.body.register_forward_pre_hook(self._look_up)  # decoding with slots calls this, and not the model
        self.student = dataclasses.replace(trained, model=model, parts=parts)
        on_gpu = trained.device.type == "cuda"
        self._stream = torch.cuda.Stream(trained.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """The next forward pass raises Ended: a completion may take long."""
        self._ended = True

    def _look_up(self, *_: Any) -> None:
        if self._ended:
            raise Ended

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, a GPU's work is queued apart from the learner's."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @torch.no_grad()
    def take(self) -> None:
        """Copies the weights as they are; when this returns they may change again. Called inside `beside`."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))
        own = self.student.model
        held = [(self._source.parameters(), own.parameters()), (self._source.buffers(), own.buffers())]
        for sources, copies in held:
            for source, target in zip(sources, copies, strict=True):
                if target is not source:
                    target.copy_(source)
        if self._stream is not None:
            self._stream.synchronize()
