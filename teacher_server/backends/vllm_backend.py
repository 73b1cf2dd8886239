"""Scores with a vLLM engine through its `prompt_logprobs`. Owns the engine, the event loop it lives on, and what of it
the service must know; vllm_rows.py reads its answers.

The engine runs in processes of its own; its front end runs on an event loop in a thread of its own, because `load` is
called in a thread without one and because building the front end blocks for the whole start.

Shape legend: T tokens, E entries asked per row, W logit width, V tokenizer size.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import difflib
import itertools
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from teacher_api.errors import BackendFailed, InvalidRequest, TeacherError
from teacher_api.types import Scores
from teacher_server.backends.base import FEATURES, BatchPolicy, ModelFacts, ScoreJob, ScoringBackend
from teacher_server.backends.room import Room
from teacher_server.backends.torch_loading import find_checkpoint, tokenizer_facts
from teacher_server.backends.vllm_rows import TooFewIds, read_rows, scores_from_full_rows, scores_from_top_k
from teacher_server.backends.weights import weights_digest
from teacher_server.vllm_plugin import SERVER_PID

logger = logging.getLogger(__name__)

FULL_ROW_FEATURES = frozenset({*FEATURES, "exact_tail"} - {"hidden"})
TOP_K_FEATURES = frozenset({"top_k", "float16"})
PADDING_ALLOWANCE = 8
"""Entries asked beyond k where the logits have columns without a token. Trained models give those next to nothing; if
more of them than this are among a row's best, the sequence is asked again with room for all."""
BYTES_PER_ENTRY = 128  # of an answer in vLLM's front end: a float, two ints, a None, and their places in four lists
ANSWER_BYTES = 2 << 30
"""Of answers in the front end at a time; a longer one is scored alone."""
LOGIT_BYTES = 2 << 30
"""vLLM holds the logits of a whole prefill chunk, about 12 bytes a column, outside the memory it accounts for."""
MAX_CONCURRENT = 64
SHUTDOWN_S = 10.0
RETRY_AFTER_DEATH_S = 10.0  # a start takes about this long and longer
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # the checkpoint is on disk by then; the engine's processes have nothing to fetch
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # gRPC's threads do not survive a fork
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout carries the ready line
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Set at load, for this process and those it starts, where the environment says nothing else."""
OWN_ARGUMENTS = {
    "model": "model",
    "tokenizer": "model",
    "revision": "revision",
    "dtype": "dtype",
    "max_model_len": "max_sequence_tokens",
    "max_logprobs": "max_top_k",
}
SECRET_ARGUMENTS = ("hf_token",)
FIXED_ARGUMENTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,  # vLLM does not use it for prompt logprobs
    "logprobs_mode": "raw_logprobs",
    "runner": "generate",
    "disable_log_stats": True,
}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the checkpoint's configuration settles before the engine starts."""

    facts: ModelFacts
    engine_args: Any  # vllm.AsyncEngineArgs
    full_rows: bool


class VllmBackend(ScoringBackend):
    """One vLLM engine.

    Up to `full_row_limit` logit columns it asks for whole rows and offers everything that follows from them, with an
    exact tail. Above, whole rows would be most of the cost: it offers top-k at temperature 1, and the tail is the
    rest to 1 (see vllm_rows.scores_from_top_k for its error).

    Args:
        model: checkpoint directory or hub id.
        revision: branch, tag or commit of a hub id; empty: the default branch.
        dtype: of weights and logits; "auto": as the checkpoint is stored.
        max_sequence_tokens: longest sequence; 0: the model's own limit.
        max_top_k: most entries a client may ask for, where rows are not whole.
        full_row_limit: most logit columns for which whole rows are asked.
        engine_args: passed to vLLM's AsyncEngineArgs as they are.
    """

    name = "vllm"
    features = FULL_ROW_FEATURES
    """Before `load`: what it may come to offer."""

    def __init__(
        self,
        model: str,
        *,
        revision: str = "",
        dtype: str = "auto",
        max_sequence_tokens: int = 0,
        max_top_k: int = 256,
        full_row_limit: int = 4096,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._revision = revision
        self._dtype = dtype
        self._max_sequence_tokens = max_sequence_tokens
        self._max_top_k = max_top_k
        self._full_row_limit = full_row_limit
        self._user_arguments = dict(engine_args or {})
        self._plan: _Plan | None = None
        self._engine: Any = None  # vllm's AsyncLLM
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._room = Room(ANSWER_BYTES)
        self._revival: concurrent.futures.Future[None] | None = None
        self._revive_from = 0.0  # by the monotonic clock: no start before, for the last one failed
        self._request_ids = itertools.count()

    @property
    def policy(self) -> BatchPolicy:
        """vLLM forms its own batches: each job is sent on its own, many at a time."""
        longest = self._plan.facts.max_sequence_tokens if self._plan else 1
        return BatchPolicy(max_tokens=longest, max_sequences=1, max_concurrent_batches=MAX_CONCURRENT)

    def load(self) -> ModelFacts:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ[SERVER_PID] = str(os.getpid())
        directory, commit = find_checkpoint(self._model, self._revision)
        plan = self._planned(directory, commit)
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-front-end", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(plan), self._loop).result()
        self.features = FULL_ROW_FEATURES if plan.full_rows else TOP_K_FEATURES
        self._plan = plan
        return plan.facts

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        if self._engine is None:
            raise BackendFailed("the vLLM engine is not running")
        if self._is_dead():
            self._revive()
            raise BackendFailed("the vLLM engine died and is being started again", retry_after_s=RETRY_AFTER_DEATH_S)
        # Cancelling the wrapper cancels the work on the other loop, which aborts the engine's requests.
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._score(jobs), self._loop))

    def is_up(self) -> bool:
        if self._thread is None or self._engine is None:
            return False
        if self._is_dead():
            self._revive()
            return False
        return True

    async def close(self) -> None:
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        await asyncio.to_thread(self._stop, thread)

    def _planned(self, directory: Path, commit: str) -> _Plan:
        import torch
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs

        self._check_arguments({field.name for field in fields(AsyncEngineArgs)})
        base = {**FIXED_ARGUMENTS, **self._user_arguments, "model": str(directory)}
        config = _model_config(AsyncEngineArgs(**base, dtype=self._dtype), directory)
        stored = getattr(config.hf_text_config, "dtype", None)
        if self._dtype == "auto" and stored == torch.float32:
            # vLLM's "auto" would serve float32 weights in half precision.
            base["dtype"] = "float32"
            config = _model_config(AsyncEngineArgs(**base), directory)
        else:
            base["dtype"] = self._dtype
        width = config.get_vocab_size()
        full_rows = width <= self._full_row_limit
        size, fingerprint, parts = tokenizer_facts(directory, width)
        limit = self._limit(config)
        path = f"prompt_logprobs {'full-row' if full_rows else 'top-k'}"
        if self._user_arguments:
            path += f", engine arguments {dict(sorted(self._user_arguments.items()))}"
        facts = ModelFacts(
            model_name=self._model,
            tokenizer_size=size,
            logit_width=width,
            hidden_size=config.get_hidden_size(),
            max_sequence_tokens=limit,
            weights_digest=weights_digest(directory),
            tokenizer_fingerprint=fingerprint,
            tokenizer_parts=parts,
            model_revision=commit,
            dtype=str(config.dtype).removeprefix("torch."),
            quantisation=str(config.quantization or ""),
            head_dtype=str(config.dtype).removeprefix("torch."),
            engine="vllm",
            engine_version=f"vllm {vllm.__version__}, torch {torch.__version__}",
            scoring_path=path,
        )
        entries = width if full_rows else min(width, self._max_top_k + width - size)
        arguments = {**_defaults(config, limit), **base, "max_model_len": limit + 1, "max_logprobs": entries}
        return _Plan(facts, AsyncEngineArgs(**arguments), full_rows)

    def _check_arguments(self, known: set[str]) -> None:
        for name in self._user_arguments:
            if name in OWN_ARGUMENTS:
                raise ValueError(f"engine argument {name!r} is set by the option {OWN_ARGUMENTS[name]!r}; use that")
            if name in SECRET_ARGUMENTS:
                raise ValueError(
                    f"engine argument {name!r} is a secret, and clients see engine arguments; set HF_TOKEN"
                )
            if name in FIXED_ARGUMENTS:
                raise ValueError(f"engine argument {name!r} is always {FIXED_ARGUMENTS[name]!r} for a teacher")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"vLLM has no engine argument {name!r}{hint}")

    def _limit(self, config: Any) -> int:
        """Tokens of the longest sequence. vLLM's own limit includes the one token that it must generate, which is never
        fed back: the engine gets one more than the model's positions, and no position outside them is computed."""
        own = int(config.max_model_len)
        asked = self._max_sequence_tokens
        if asked > own:
            raise ValueError(f"max_sequence_tokens is {asked}, but the model has only {own} positions")
        if asked in (0, own):
            os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        return asked or own

    async def _start(self, plan: _Plan) -> None:
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            self._engine = AsyncLLM.from_engine_args(plan.engine_args)
        except (RuntimeError, ValueError, OSError, NotImplementedError, AssertionError) as error:
            raise ValueError(
                f"vLLM could not start with {self._model!r}: {_one_line(error)}; the cause is in its log above"
            ) from error

    def _is_dead(self) -> bool:
        return self._is_reviving() or self._engine is None or bool(self._engine.errored)

    def _is_reviving(self) -> bool:
        return self._revival is not None and not self._revival.done()

    def _revive(self) -> None:
        """Starts a new engine in place of a dead one, once at a time; called on the server's event loop only."""
        if self._is_reviving() or not self._engine.errored:  # a start may have ended since the caller looked
            return
        if time.monotonic() >= self._revive_from:
            logger.error("the vLLM engine died; starting it again")
            self._revival = asyncio.run_coroutine_threadsafe(self._restart(), self._loop)

    async def _restart(self) -> None:
        assert self._plan is not None, "revived before load"
        try:
            await asyncio.to_thread(self._engine.shutdown, timeout=SHUTDOWN_S)
            await self._start(self._plan)
        except Exception as error:  # the boundary to foreign code: whatever went wrong, it is tried again
            self._revive_from = time.monotonic() + RETRY_AFTER_DEATH_S
            logger.error("%s; trying again in %g s", error, RETRY_AFTER_DEATH_S)

    async def _score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        return list(await asyncio.gather(*(self._score_one(job) for job in jobs)))

    async def _score_one(self, job: ScoreJob) -> Scores | TeacherError:
        assert self._plan is not None, "score before load"
        facts = self._plan.facts
        try:
            if self._plan.full_rows:
                rows = await self._rows(job, facts.logit_width)
                return await asyncio.to_thread(scores_from_full_rows, job, rows, facts.tokenizer_size)
            assert isinstance(job.options.top_k, int), "the service refuses what is not in features"
            padding = facts.logit_width - facts.tokenizer_size
            entries = min(job.options.top_k + min(padding, PADDING_ALLOWANCE), facts.logit_width)
            try:
                rows = await self._rows(job, entries if job.options.top_k else 0)
                return scores_from_top_k(job, rows, facts.tokenizer_size, facts.logit_width)
            except TooFewIds:
                rows = await self._rows(job, job.options.top_k + padding)
                return scores_from_top_k(job, rows, facts.tokenizer_size, facts.logit_width)
        except TeacherError as error:
            if self._is_dead():
                raise
            return error

    async def _rows(self, job: ScoreJob, entries: int) -> Any:
        """Asks the engine for `entries` per row; only as far as the last scored position, for what follows it changes
        nothing."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError, VLLMServerError

        tokens = job.token_ids[: int(job.positions[-1]) + 1].tolist()
        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, flat_logprobs=True, prompt_logprobs=entries
        )
        request_id = f"score-{next(self._request_ids)}"
        flat = None
        async with self._room.taken(len(tokens) * (entries + 1) * BYTES_PER_ENTRY):
            try:
                async for output in self._engine.generate({"prompt_token_ids": tokens}, parameters, request_id):
                    flat = output.prompt_logprobs or flat
            except VLLMServerError as error:
                state = "died" if self._is_dead() else "failed"
                raise BackendFailed(f"the vLLM engine {state} on sequence {job.id!r}: {_one_line(error)}") from error
            except (VLLMClientError, ValueError) as error:
                raise InvalidRequest(f"vLLM refused sequence {job.id!r}: {_one_line(error)}") from error
            return await asyncio.to_thread(read_rows, job, flat, len(tokens), entries)

    def _stop(self, thread: threading.Thread) -> None:
        if self._revival is not None:
            concurrent.futures.wait([self._revival])
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown(timeout=SHUTDOWN_S)
        with contextlib.suppress(TimeoutError):  # a task that does not end is left to the thread, a daemon
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(SHUTDOWN_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        thread.join(SHUTDOWN_S)
        if not thread.is_alive():
            self._loop.close()


def _model_config(engine_args: Any, directory: Path) -> Any:
    try:
        return engine_args.create_model_config()
    except (ValueError, OSError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
        raise ValueError(f"vLLM can't serve the model in {directory}: {_one_line(error)}") from error


def _defaults(config: Any, limit: int) -> dict[str, Any]:
    """Engine arguments that a teacher wants and vLLM does not choose by itself; the user's own come after them."""
    from vllm.platforms import current_platform

    width = config.get_vocab_size()
    chunk = max(MAX_CONCURRENT, min(8192, LOGIT_BYTES // (12 * width)))
    result: dict[str, Any] = {
        "max_num_batched_tokens": chunk,
        "max_num_seqs": MAX_CONCURRENT,
        "enable_chunked_prefill": True,
        "enforce_eager": True,  # nothing is generated, so captured graphs would only lengthen the start
    }
    if current_platform.is_cpu() and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        # Left alone, vLLM takes most of the machine's memory. Room for four of the longest sequences.
        per_token = 2 * config.get_total_num_hidden_layers() * config.get_total_num_kv_heads() * config.get_head_size()
        result["kv_cache_memory_bytes"] = max(1 << 29, 4 * (limit + 1) * per_token * config.dtype.itemsize)
    return result


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
