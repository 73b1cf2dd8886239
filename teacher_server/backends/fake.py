"""A backend without a model: a deterministic, context-dependent distribution made from a hash of the preceding
tokens, with faults on demand. Tests of everything above the backend use it; its numbers honour every option but
`hidden`, and each adapter's are those of another hash."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from teacher_api.errors import BackendFailed, TeacherError
from teacher_api.types import Scores
from teacher_server.backends.base import FEATURES, BatchPolicy, ModelFacts, ScoreJob, ScoringBackend
from teacher_server.backends.exact_rows import F64, score_rows
from teacher_server.backends.fake_generation import FakeGenerator
from teacher_server.backends.weights import adapted_digest

U64 = npt.NDArray[np.uint64]
SPREAD = 10.0  # logits are uniform in [0, SPREAD): far from flat, and no column vanishes
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # constants of SplitMix64 (Steele, Lea and Flood 2014)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong on purpose; a token of -1 switches that fault off."""

    latency_s: float = 0.0  # of every batch
    poison_token: int = -1  # the whole batch raises
    nan_token: int = -1  # the sequence's first row is NaN
    short_token: int = -1  # the sequence loses its last row
    hang_token: int = -1  # the batch never returns
    death_token: int = -1  # the engine dies with this batch, and is up again after restart_s
    restart_s: float = 1.0


def mix(x: U64) -> U64:
    """SplitMix64's finaliser: a bijection of 64 bits that looks random."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def noise_logits(token_ids: npt.NDArray[np.int32], positions: npt.NDArray[np.int32], width: int, salt: int = 0) -> F64:
    """Logits [n, width], float64 in [0, SPREAD): row n is a function of token_ids[: positions[n]] and salt alone."""
    with np.errstate(over="ignore"):
        order = np.arange(len(token_ids), dtype=np.uint64) * _GOLDEN
        prefix = np.concatenate([[np.uint64(0)], np.cumsum(mix(mix(order) + token_ids.astype(np.uint64) + _GOLDEN))])
        prefix = prefix + np.uint64(salt)
        column = mix((np.arange(width, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
        bits = mix(mix(prefix[positions])[:, None] + column[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * (SPREAD / 2**53)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class FakeBackend(ScoringBackend):
    name = "fake"
    features = frozenset(FEATURES) - {"hidden"} | {"exact_tail"}

    def __init__(
        self,
        model: str = "fake",
        *,
        vocabulary: int = 512,
        padding_columns: int = 8,
        max_sequence_tokens: int = 0,
        batch_tokens: int = 8192,
        batch_sequences: int = 64,
        faults: Faults | None = None,
        adapters: Mapping[str, str] | None = None,  # name -> any text, of which equal ones are equal teachers
        generate: bool = False,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.padding_columns = padding_columns
        self.max_sequence_tokens = max_sequence_tokens or 32768
        self.faults = faults or Faults()
        self._seeds = {name: _digest(text) for name, text in (adapters or {}).items()}
        self.scored_ids: list[str] = []  # of every job that reached this backend, newest last
        self.up_at = 0.0  # by the monotonic clock: before it the engine is dead
        self._deaths = 0
        self._policy = BatchPolicy(batch_tokens, batch_sequences)
        if generate:
            self.generator = FakeGenerator(self._next_logits, self.faults, self.is_up, self._die)

    @property
    def policy(self) -> BatchPolicy:
        return self._policy

    def load(self) -> ModelFacts:
        digest, parts = "fake", {"fake": "fake"}
        if (Path(self.model) / "tokenizer.json").is_file():
            from transformers import AutoTokenizer

            from teacher_api.info import tokenizer_fingerprint

            tokenizer = AutoTokenizer.from_pretrained(self.model, local_files_only=True)
            self.vocabulary = len(tokenizer)
            digest, parts = tokenizer_fingerprint(tokenizer)
        elif Path(self.model).is_absolute():
            raise ValueError(f"model {self.model!r} has no tokenizer.json; expected a checkpoint directory or a name")
        width = self.vocabulary + self.padding_columns
        weights = _digest(f"fake {width}")
        return ModelFacts(
            model_name=self.model.rstrip("/").rsplit("/", 1)[-1],
            tokenizer_size=self.vocabulary,
            logit_width=width,
            hidden_size=0,
            max_sequence_tokens=self.max_sequence_tokens,
            weights_digest=weights,
            tokenizer_fingerprint=digest,
            tokenizer_parts=parts,
            dtype="float64",
            head_dtype="float64",
            engine="fake",
            engine_version="1",
            scoring_path="hash of the preceding tokens",
            batch_tokens=self._policy.max_tokens,
            adapters={name: adapted_digest(weights, seed) for name, seed in self._seeds.items()},
        )

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        faults = self.faults
        self.scored_ids.extend(job.id for job in jobs)
        if not self.is_up():
            raise BackendFailed("injected: the engine is dead", retry_after_s=faults.restart_s)
        if faults.latency_s:
            await asyncio.sleep(faults.latency_s)
        if any(faults.poison_token in job.token_ids for job in jobs):
            raise RuntimeError("injected: this batch holds the poison token")
        if any(faults.hang_token in job.token_ids for job in jobs):
            await asyncio.Event().wait()
        if any(faults.death_token in job.token_ids for job in jobs):
            self._die()
            raise BackendFailed("injected: the engine died", retry_after_s=faults.restart_s)
        return await asyncio.to_thread(lambda: [self._one(job) for job in jobs])

    @property
    def restarts(self) -> int:
        return self._deaths - (not self.is_up())

    def is_up(self) -> bool:
        return time.monotonic() >= self.up_at

    def _die(self) -> None:
        self._deaths += 1
        self.up_at = time.monotonic() + self.faults.restart_s

    def _next_logits(self, token_ids: list[int]) -> F64:
        ids, at = np.asarray(token_ids, np.int32), np.asarray([len(token_ids)], np.int32)
        return noise_logits(ids, at, self.vocabulary + self.padding_columns)[0, : self.vocabulary]

    def _one(self, job: ScoreJob) -> Scores:
        width = self.vocabulary + self.padding_columns
        salt = int(self._seeds[job.teacher][:16], 16) if job.teacher else 0
        scores = score_rows(job, lambda rows: noise_logits(job.token_ids, rows, width, salt), width, self.vocabulary)
        if self.faults.nan_token in job.token_ids:
            scores.token_logprob[0] = np.nan
        if self.faults.short_token in job.token_ids:
            scores = replace(scores, token_logprob=scores.token_logprob[:-1])
        return scores
