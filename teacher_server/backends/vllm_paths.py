"""The ways to have scores from a vLLM engine: inside it, at the cost of a prefill and the head on the rows asked for
(`fused`), or from the prompt logprobs that it computes for everybody (`prompt-logprobs`).

Each says which engine it needs, what it offers, and how one job is asked. Owns no engine and no event loop.

Shape legend: N rows, E entries asked per row, W logit width, V tokenizer size, H hidden size.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from teacher_api.errors import InvalidBackendOutput
from teacher_api.types import Scores
from teacher_server.backends.base import FEATURES, ModelFacts, ScoreJob
from teacher_server.backends.room import Room
from teacher_server.backends.vllm_adapters import VllmAdapters
from teacher_server.backends.vllm_engine import EngineHost
from teacher_server.backends.vllm_rows import TooFewIds, read_rows, scores_from_full_rows, scores_from_top_k
from teacher_server.vllm_plugin.request import TASK, Asked, fields_of, unpack

PADDING_ALLOWANCE = 8
"""Entries asked beyond k where the logits have columns without a token. Trained models give those next to nothing; if
more of them than this are among a row's best, the sequence is asked again with room for all."""
BYTES_PER_ENTRY = 128  # of an answer in vLLM's front end: a float, two ints, a None, and their places in four lists
ANSWER_BYTES = 2 << 30
"""Of answers in the front end at a time; a longer one is scored alone."""
LOGIT_BYTES = 2 << 30
"""vLLM's prompt logprobs hold the logits of a whole prefill chunk, about 12 bytes a column, outside the memory it
accounts for."""
MAX_CONCURRENT = 64
PREFILL_TOKENS = 8192


class ScoringPath(ABC):
    """One way of asking."""

    name: str
    features: frozenset[str]
    max_concurrent: int
    detail: str = ""
    """What else of it can change a number; follows the name in TeacherInfo.scoring_path."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Engine arguments that it cannot do without."""

    @abstractmethod
    def defaults(self) -> dict[str, Any]:
        """Engine arguments that a user may set otherwise."""

    @abstractmethod
    async def score(self, host: EngineHost, job: ScoreJob) -> Scores:
        """Scores one job, on the engine's event loop. Raises TeacherError."""


@dataclass(frozen=True)
class FusedPath(ScoringPath):
    """Our pooler in vLLM's model runner (teacher_server/vllm_plugin).

    Args:
        architecture: of the checkpoint, as vLLM knows it.
        head_dtype: of the head's product: "model", or "float32" for half-precision models where that is free.
        overrides: the user's `hf_overrides`.
        asynchronous: vLLM may schedule a step while the one before runs.
    """

    facts: ModelFacts
    architecture: str
    head_dtype: str
    head_chunk_rows: int
    overrides: dict[str, Any]
    additional: dict[str, Any]
    asynchronous: bool
    adapters: VllmAdapters

    name = "fused"
    features = frozenset({*FEATURES, "exact_tail"})
    max_concurrent = 256

    def arguments(self) -> dict[str, Any]:
        scheduler = "TeacherAsyncScheduler" if self.asynchronous else "TeacherScheduler"
        own = {"tokenizer_size": self.facts.tokenizer_size, "head_chunk_rows": self.head_chunk_rows}
        return {
            "runner": "pooling",
            "hf_overrides": {
                **self.overrides,
                "architectures": [f"Teacher{self.architecture}"],
                "head_dtype": self.head_dtype,
            },
            "additional_config": {**self.additional, **own},
            "scheduler_cls": f"teacher_server.vllm_plugin.scheduler.{scheduler}",
            "async_scheduling": self.asynchronous,
            "enable_chunked_prefill": True,
            "max_model_len": self.facts.max_sequence_tokens,
            **self.adapters.arguments(),
        }

    def defaults(self) -> dict[str, Any]:
        return {
            "enable_prefix_caching": True,
            "max_num_batched_tokens": PREFILL_TOKENS,
            "max_num_seqs": self.max_concurrent,
            **self.adapters.defaults(),
        }

    async def score(self, host: EngineHost, job: ScoreJob) -> Scores:
        from vllm import PoolingParams

        asked = Asked.of(job)
        # The token of the last scored position is a target only, but its row needs the one before: nothing after
        # that is computed.
        tokens = job.token_ids[: int(job.positions[-1]) + 1].tolist()
        parameters = PoolingParams(task=TASK, skip_reading_prefix_cache=False, extra_kwargs=asked.to_extra())
        adapter = self.adapters.request(job.teacher)

        def ask(engine: Any, request_id: str) -> AsyncIterator[Any]:
            answers: AsyncIterator[Any] = engine.encode(
                {"prompt_token_ids": tokens}, parameters, request_id, lora_request=adapter
            )
            return answers

        output = await host.last_output(job.id, ask)
        facts = self.facts
        hidden_dtype = facts.dtype
        layout = fields_of(asked, facts.tokenizer_size, facts.hidden_size, hidden_dtype)
        try:
            arrays: dict[str, Any] = unpack(output.outputs.data.numpy(), layout)
        except ValueError as error:
            raise InvalidBackendOutput(f"sequence {job.id!r}: an answer of another size: {error}") from error
        bad = np.flatnonzero(np.isnan(arrays["token_logprob"]))
        if len(bad):
            raise InvalidBackendOutput(
                f"sequence {job.id!r}: the model's output is not finite at position {job.positions[bad[0]]} "
                f"({len(bad)} of {len(job.positions)} rows); withheld"
            )
        if "hidden" in arrays:
            arrays["hidden"] = _float32(arrays["hidden"])
        if "rank" in arrays:
            arrays["rank"] = arrays["rank"].view(np.uint32)
        cached = max(int(output.num_cached_tokens or 0), 0)
        return Scores(
            id=job.id,
            positions=job.positions,
            computed_tokens=len(tokens) - cached,
            cached_tokens=cached,
            **arrays,
        )


@dataclass(frozen=True)
class PromptLogprobsPath(ScoringPath):
    """vLLM's own prompt logprobs.

    Up to `full_row_limit` logit columns it asks for whole rows and offers everything that follows from them, with an
    exact tail. Above, whole rows would be most of the cost: it offers top-k at temperature 1, and the tail is the
    rest to 1 (see vllm_rows.scores_from_top_k for its error).
    """

    facts: ModelFacts
    max_top_k: int
    full_row_limit: int
    overrides: dict[str, Any]
    adapters: VllmAdapters
    room: Room

    name = "prompt-logprobs"
    max_concurrent = MAX_CONCURRENT

    @property
    def full_rows(self) -> bool:
        return self.facts.logit_width <= self.full_row_limit

    @property
    def detail(self) -> str:  # type: ignore[override]
        return "full-row" if self.full_rows else "top-k"

    @property
    def features(self) -> frozenset[str]:  # type: ignore[override]
        if self.full_rows:
            return frozenset({*FEATURES, "exact_tail"} - {"hidden"})
        return frozenset({"top_k", "float16"})

    def arguments(self) -> dict[str, Any]:
        width, size = self.facts.logit_width, self.facts.tokenizer_size
        return {
            "runner": "generate",
            "logprobs_mode": "raw_logprobs",
            # vLLM's limit counts the one token that it must generate, which is never fed back: no position outside
            # the model's own is computed.
            "max_model_len": self.facts.max_sequence_tokens + 1,
            "max_logprobs": width if self.full_rows else min(width, self.max_top_k + width - size),
            "enable_prefix_caching": False,  # vLLM does not use it for prompt logprobs
            **({"hf_overrides": self.overrides} if self.overrides else {}),
            **self.adapters.arguments(),
        }

    def defaults(self) -> dict[str, Any]:
        chunk = max(MAX_CONCURRENT, min(PREFILL_TOKENS, LOGIT_BYTES // (12 * self.facts.logit_width)))
        own = self.adapters.defaults()
        own["max_num_batched_tokens"] = min(chunk, own.get("max_num_batched_tokens", chunk))
        return {"max_num_seqs": MAX_CONCURRENT, "enable_chunked_prefill": True, **own}

    async def score(self, host: EngineHost, job: ScoreJob) -> Scores:
        facts = self.facts
        if self.full_rows:
            rows = await self._rows(host, job, facts.logit_width)
            return await asyncio.to_thread(scores_from_full_rows, job, rows, facts.tokenizer_size)
        assert isinstance(job.options.top_k, int), "the service refuses what is not in features"
        padding = facts.logit_width - facts.tokenizer_size
        entries = min(job.options.top_k + min(padding, PADDING_ALLOWANCE), facts.logit_width)
        try:
            rows = await self._rows(host, job, entries if job.options.top_k else 0)
            return scores_from_top_k(job, rows, facts.tokenizer_size, facts.logit_width)
        except TooFewIds:
            rows = await self._rows(host, job, job.options.top_k + padding)
            return scores_from_top_k(job, rows, facts.tokenizer_size, facts.logit_width)

    async def _rows(self, host: EngineHost, job: ScoreJob, entries: int) -> Any:
        """Asks the engine for `entries` per row; only as far as the last scored position, for what follows it changes
        nothing."""
        from vllm import SamplingParams

        tokens = job.token_ids[: int(job.positions[-1]) + 1].tolist()
        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, flat_logprobs=True, prompt_logprobs=entries
        )
        adapter = self.adapters.request(job.teacher)
        flat = None

        async def ask(engine: Any, request_id: str) -> AsyncIterator[Any]:
            nonlocal flat
            answers = engine.generate({"prompt_token_ids": tokens}, parameters, request_id, lora_request=adapter)
            async for output in answers:
                flat = output.prompt_logprobs or flat
                yield output

        async with self.room.taken(len(tokens) * (entries + 1) * BYTES_PER_ENTRY):
            await host.last_output(job.id, ask)
            return await asyncio.to_thread(read_rows, job, flat, len(tokens), entries)


def _float32(values: np.ndarray) -> np.ndarray:
    """float32 of float32, float16, or bfloat16 given as its uint16 bits."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)
