"""What is to be sampled, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
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


def require_continuable(
    prompts: Sequence[Prompt], vocabulary_size: int, new_tokens: int, limit: int | None, whose: str
) -> None:
    """Raises ValueError where a prompt is empty, has an id outside the vocabulary, or leaves no room for `new_tokens`
    in a context of `limit` tokens (`whose`: for the message; None: no limit)."""
    for prompt in prompts:
        ids = prompt.token_ids
        if not len(ids):
            raise ValueError(f"prompt {prompt.index} is empty; a completion must follow something")
        if ids.min() < 0 or ids.max() >= vocabulary_size:
            raise ValueError(f"prompt {prompt.index} has an id outside the vocabulary of {vocabulary_size}")
        if limit and len(ids) + new_tokens > limit:
            raise ValueError(
                f"prompt {prompt.index} has {len(ids)} tokens; with rollout.max_new_tokens {new_tokens} it exceeds the "
                f"{whose}'s context of {limit}"
            )
