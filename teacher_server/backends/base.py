"""The seam between the service and an engine. A backend owns a loaded model and turns jobs into scores; it knows
nothing of requests, transports, tenants or queues. To add one: a file here with a subclass, registered in
backends/__init__.py; the contract suite (tests/contract) then runs over it.

Invariants: a backend answers each job with all of its rows or with an error, never with fewer rows; a backend that
can't honour an option leaves it out of `features`, and the service refuses requests for it by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from teacher_api.errors import TeacherError
from teacher_api.types import Candidates, IntArray, ScoreOptions, Scores
from teacher_server.backends.generation import Generator

FEATURES = ("top_k", "full_vocabulary", "candidates", "temperature", "float16", "entropy", "rank", "hidden")
"""Options a backend may declare. `exact_tail` stands beside them where log_tail is computed from logits, `generate`
where the backend has a generator."""


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One validated sequence. Shapes as in teacher_api.types."""

    id: str
    token_ids: IntArray  # [T]: prompt + completion
    prompt_tokens: int
    positions: IntArray  # [N], ascending, each in 1..T-1
    options: ScoreOptions
    candidates: Candidates | None = None
    prompt_key: bytes = b""  # equal for jobs that share a prompt and a teacher; b"" for none
    teacher: str = ""  # a name of ModelFacts.adapters; "" for the base

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How the scheduler may feed this backend."""

    max_tokens: int  # padded tokens of one batch (its number of sequences times its longest)
    max_sequences: int
    max_concurrent_batches: int = 1
    shares_prompts: bool = False  # the prompt of several jobs is computed once, and so counts once


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a loaded backend says of itself; the service completes it into TeacherInfo."""

    model_name: str
    tokenizer_size: int
    logit_width: int
    hidden_size: int
    max_sequence_tokens: int
    weights_digest: str
    tokenizer_fingerprint: str
    tokenizer_parts: dict[str, str] = field(default_factory=dict)
    model_revision: str = ""
    dtype: str = "float32"
    quantisation: str = ""
    head_dtype: str = "float32"
    engine: str = ""
    engine_version: str = ""
    scoring_path: str = ""
    scoring_path_note: str = ""  # why it is not the path that was to be used first; empty where it is
    batch_tokens: int = 0  # computed at once, over all engines; 0: unknown
    adapters: dict[str, str] = field(default_factory=dict)
    """Further teachers on this base: name -> digest of the weights that score for it, the base's among them."""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """logits = cap(scale · (weight h + bias)) of hidden states h as the backend answers them; torch tensors."""

    weight: Any  # [W, H], in the arithmetic of the model
    bias: Any | None  # [W]
    scale: float
    soft_cap: float | None


class ScoringBackend(ABC):
    """An engine that scores. `load` is called once, in a thread; `score` only afterwards, concurrently up to
    `policy.max_concurrent_batches`."""

    name: str
    features: frozenset[str]
    generator: Generator | None = None
    """After `load`: what writes text, where it was asked for. TeacherInfo then has the feature `generate`."""

    @property
    def restarts(self) -> int:
        """How often an engine that died was started again."""
        return 0

    @abstractmethod
    def load(self) -> ModelFacts:
        """Loads the model. Raises ValueError with one line of cause when it can't."""

    @property
    @abstractmethod
    def policy(self) -> BatchPolicy: ...

    @abstractmethod
    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        """Scores a batch; the answer has one entry per job, in order. A failure of one job is its entry, not an
        exception; an exception means that the whole batch failed."""

    def output_head(self) -> OutputHead:
        """The loaded model's head, for clients that may have it. Called in a thread, after `load`.

        Raises:
            ValueError: one line: it has none, or one that is not understood.
        """
        raise ValueError(f"backend {self.name} has no output head to share")

    def is_up(self) -> bool:
        """Whether the engine can score. False while one that died is being started again; where nobody has begun to,
        the call does. Asked about twice a second on the event loop, so it must not block."""
        return True

    def is_frozen(self) -> bool:
        """Whether a process of the engine has been stopped by a signal. Asked as `is_up` is."""
        return False

    async def close(self) -> None:
        """Frees the model. Idempotent."""
        return
