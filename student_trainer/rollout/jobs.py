"""What is to be sampled, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from student_trainer.rollout.ledger import Record
from student_trainer.types import Prompt


@dataclass(frozen=True, slots=True)
class Job:
    place: int  # in the caller's list
    prompt: Prompt
    uid: int


Finished = list[tuple[Job, Record]]


class Work(Protocol):
    """Sequences on their way. Everything it does follows from what it was made with, never from time."""

    @property
    def is_done(self) -> bool: ...

    def advance(self) -> Finished:
        """Decodes until sequences have finished, and gives them."""
        ...
