"""What the trainer asks of whatever samples for it. An engine is one file that has this method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from student_trainer.types import Prompt, Rollout


class RolloutError(RuntimeError):
    """Sampling failed in a way that no other settings would cure, such as weights that give NaN."""


class RolloutEngine(Protocol):
    def sample(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> list[Rollout]:
        """One completion per (prompt, uid), in the order given.

        A sample is a function of the weights, its prompt and (seed, uid): not of the others in the call, up to
        floating-point rounding of batched arithmetic, and bit for bit for the same call.

        Args:
            prompts: repeat a prompt to sample it several times.
            uids: one a prompt, each >= 0; equal uids draw equal random numbers.
            keep_top_k: also keep so many of the student's most likely ids at each position (T = 1, best first), the
                whole vocabulary at most; 0 keeps none.
        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, or a prompt that leaves no room for
                `max_new_tokens` in the model's context.
            RolloutError: the model's logits are not finite.
        """
        ...
