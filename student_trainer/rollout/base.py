"""What the trainer asks of whatever samples for it. An engine is one file that has these methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

from student_trainer.types import Metrics, Prompt, Rollout


class RolloutError(RuntimeError):
    """Sampling failed in a way that no other settings would cure, such as weights that give NaN."""


class RolloutGone(RuntimeError):
    """The servers that sample stayed away past their budget. Nothing was lost: the run goes on from its checkpoint."""

    def __init__(self, urls: str, seconds: float, causes: str) -> None:
        super().__init__(
            f"no rollout server at {urls} for {seconds:.0f} s ({causes}); run the same command again to go on"
        )
        self.urls, self.seconds, self.causes = urls, seconds, causes

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.urls, self.seconds, self.causes))


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

    def stream(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> Iterator[Rollout]:
        """What `sample` returns, each as soon as it is finished, in any order. Raises as `sample`.

        While its consumer has the turn, gradient mode and the modes of the model's modules are as they were found, so
        that a consumer may train on what it got; it must not change the weights before the last item.
        """
        ...

    def update(self, version: int) -> None:
        """From here on, samples come from the student's weights as they are now; called while nothing is in flight,
        and, where ranks hold parts of the weights, by all of them inside Replicated.whole.

        Args:
            version: optimizer steps done. Rollout.versions says it of every token.
        Raises:
            RolloutError: the weights could not be handed over.
        """
        ...

    def figures(self) -> Metrics:
        """Of the engine since the last update, for the metrics of a step, which take the ranks' largest; the same names
        on every rank."""
        ...

    def close(self) -> None:
        """Ends what belongs to the engine alone: its processes, its memory."""
        ...


class ByPlace(ABC):
    """`sample` and `stream` of an engine that finishes completions in any order."""

    @abstractmethod
    def _finished(
        self, prompts: Sequence[Prompt], uids: Sequence[int], keep_top_k: int
    ) -> Iterator[tuple[int, Rollout]]:
        """Each completion, when it is finished, with its prompt's place among `prompts`."""

    def sample(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> list[Rollout]:
        """See RolloutEngine.sample."""
        found = dict(self._finished(prompts, uids, keep_top_k))
        return [found[place] for place in range(len(prompts))]

    def stream(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> Iterator[Rollout]:
        """See RolloutEngine.stream."""
        for _, rollout in self._finished(prompts, uids, keep_top_k):
            yield rollout
