"""Scientific controls: a teacher that says as much as the real one and teaches nothing. Wraps any backend; the kind
is part of `scoring_path`, hence of the fingerprint.

`shuffle`: p'(v | context) = p(π(v) | context) with one fixed permutation π of the tokenizer's ids: same entropies and
same dependence on context, wrong names. `random`: p' is a hash of the context, with no trace of the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from teacher_api.errors import TeacherError
from teacher_api.types import ScoreOptions, Scores
from teacher_server.backends.base import BatchPolicy, ModelFacts, ScoreJob, ScoringBackend
from teacher_server.backends.exact_rows import F64, score_rows
from teacher_server.backends.fake import noise_logits

PERMUTATION_SEED = 20240613  # any fixed number: the control must be the same teacher after a restart


class ControlBackend(ScoringBackend):
    def __init__(self, inner: ScoringBackend, kind: Literal["shuffle", "random"]) -> None:
        self.inner = inner
        self.kind = kind
        self.name = inner.name
        self.features = frozenset({"top_k", "full_vocabulary", "candidates", "temperature"}) | {
            "float16",
            "entropy",
            "rank",
            "exact_tail",
        }
        self._facts: ModelFacts | None = None

    @property
    def policy(self) -> BatchPolicy:
        return self.inner.policy

    def load(self) -> ModelFacts:
        facts = self.inner.load()
        if self.kind == "shuffle" and "full_vocabulary" not in self.inner.features:
            raise ValueError(
                f"control shuffle needs the whole vocabulary of each row, and backend {self.inner.name} does not give "
                "it for this model; use backend torch, or control random"
            )
        self._facts = replace(facts, scoring_path=f"control {self.kind}: {facts.scoring_path}")
        generator = np.random.Generator(np.random.Philox(key=PERMUTATION_SEED))
        self._permutation = generator.permutation(facts.tokenizer_size)
        return self._facts

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        assert self._facts is not None, "score() before load()"
        width, vocabulary = self._facts.logit_width, self._facts.tokenizer_size
        if self.kind == "random":
            return [await asyncio.to_thread(score_rows, job, _noise_of(job, width), width, vocabulary) for job in jobs]
        options = [ScoreOptions(top_k="all", temperature=job.options.temperature) for job in jobs]
        asked = [replace(job, options=o, candidates=None) for job, o in zip(jobs, options, strict=True)]
        answers = await self.inner.score(asked)
        return [await asyncio.to_thread(self._shuffled, job, answer) for job, answer in zip(jobs, answers, strict=True)]

    def _shuffled(self, job: ScoreJob, answer: Scores | TeacherError) -> Scores | TeacherError:
        if isinstance(answer, TeacherError):
            return answer
        assert answer.topk_logprob is not None, "the inner backend was asked for all"
        # The columns without a token share the tail's mass; as one extra column it stays where it was.
        full = np.concatenate([answer.topk_logprob[:, self._permutation], answer.log_tail[:, None]], axis=1)
        plain = replace(job, options=replace(job.options, temperature=1.0))  # the inner answer has it already
        index = {int(position): n for n, position in enumerate(job.positions)}

        def logits_of(positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
            return full[[index[int(p)] for p in positions]].astype(np.float64)

        return score_rows(plain, logits_of, full.shape[1], full.shape[1] - 1)

    def is_up(self) -> bool:
        return self.inner.is_up()

    def is_frozen(self) -> bool:
        return self.inner.is_frozen()

    async def close(self) -> None:
        await self.inner.close()


def _noise_of(job: ScoreJob, width: int) -> Callable[[npt.NDArray[np.int32]], F64]:
    return lambda rows: noise_logits(job.token_ids, rows, width)
