"""The seam between the service and an engine that writes text. Stands beside ScoringBackend: a backend whose server was
started with `generate` has a Generator, which owns how tokens are drawn and nothing of requests, text or logprobs.

The distribution that is drawn from, in vLLM's order: softmax of the logits divided by `temperature`; ids whose
probability is below min_p times the largest removed; then all but the top_k most likely; then all beyond the shortest
prefix, most likely first, whose mass reaches top_p. Ids at or above the tokenizer's size are never drawn.

Logprobs of what was written come from the scoring path (teacher_server/generation.py), so that they are the numbers
that a score of the same text gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from teacher_api.types import IntArray

Ending = Literal["stop", "length"]
"""Why a text ended: an id or a string that ends it, or that no more tokens were asked for."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Equal for the jobs that may share a batch, but for `seed`."""

    temperature: float = 1.0  # 0: the most likely id, whatever the other fields say
    top_p: float = 1.0  # in (0, 1]
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # in [0, 1]
    seed: int | None = None  # the same, prompt and parameters too: the same text; None: another one each time


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """One completion to write."""

    id: str
    prompt_ids: IntArray  # [T], at least one
    max_tokens: int  # at least one
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()  # the text ends with the first of these
    ended: Callable[[int], bool] | None = field(default=None, compare=False)
    """Told of each new token but one of `stop_ids`, in order and from one thread at a time; True: the text ends with
    it."""


@dataclass(frozen=True, slots=True)
class Generated:
    token_ids: tuple[int, ...]  # at least one; what ended the text is the last of them
    ending: Ending


class Generator(ABC):
    """Writes completions, one per call and any number of calls at a time; the service bounds how many. Cancelling a
    call stops its work in the engine."""

    takes_seed: bool = True
    why_no_seed: str = ""
    """For a caller that sent one, where `takes_seed` is False."""

    @abstractmethod
    async def generate(self, job: GenerationJob) -> Generated:
        """Raises TeacherError where the engine failed."""


class TokenWatch:
    """Follows one completion and says when it has ended."""

    def __init__(self, job: GenerationJob) -> None:
        self._job = job
        self.token_ids: list[int] = []
        self.ending: Ending | None = None

    def add(self, new_ids: Sequence[int]) -> bool:
        """Whether the text has ended. What comes after its end is dropped."""
        for token in new_ids:
            if self.ending is not None:
                break
            self.token_ids.append(token)
            if token in self._job.stop_ids or (self._job.ended is not None and self._job.ended(token)):
                self.ending = "stop"
            elif len(self.token_ids) >= self._job.max_tokens:
                self.ending = "length"
        return self.ending is not None

    def result(self) -> Generated:
        assert self.ending is not None, "a text that has not ended"
        return Generated(tuple(self.token_ids), self.ending)
