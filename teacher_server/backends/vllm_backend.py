"""Scores with a vLLM engine. Owns what is settled from the checkpoint before an engine starts, the choice of the
scoring path, and the engine's place in the server; vllm_paths.py knows how an engine is asked, vllm_engine.py how it
lives.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from teacher_api.errors import TeacherError
from teacher_api.types import Scores
from teacher_server.backends.adapters import Adapter, read_adapters
from teacher_server.backends.base import BatchPolicy, ModelFacts, OutputHead, ScoreJob, ScoringBackend
from teacher_server.backends.room import Room
from teacher_server.backends.torch_loading import find_checkpoint, tokenizer_facts
from teacher_server.backends.vllm_adapters import ARGUMENTS, VllmAdapters
from teacher_server.backends.vllm_check import check_adapters, check_answers
from teacher_server.backends.vllm_engine import EngineHost, one_line, prepare_environment, progress
from teacher_server.backends.vllm_generation import VllmGenerator, memory_shares
from teacher_server.backends.vllm_head import read_output_head
from teacher_server.backends.vllm_paths import ANSWER_BYTES, FusedPath, PromptLogprobsPath, ScoringPath
from teacher_server.backends.weights import adapted_digest, weights_digest

logger = logging.getLogger(__name__)

OWN_ARGUMENTS = {
    "model": "model",
    "tokenizer": "model",
    "revision": "revision",
    "dtype": "dtype",
    "max_model_len": "max_sequence_tokens",
    "max_logprobs": "max_top_k",
    "runner": "scoring_path",
    "scheduler_cls": "scoring_path",
    "async_scheduling": "scoring_path",
    **dict.fromkeys(ARGUMENTS, "lora"),
}
PROBED = ("pipeline_parallel_size", "data_parallel_size")
"""Engine arguments with which the fused path is tried, and refused where it does not work."""
SECRET_ARGUMENTS = ("hf_token",)
PLACES = ("node_rank", "master_addr", "master_port")
"""Engine arguments that say where its parts are, and change no number."""
FIXED_ARGUMENTS: dict[str, Any] = {"skip_tokenizer_init": True, "disable_log_stats": True}


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the checkpoint's configuration settles before an engine starts."""

    facts: ModelFacts
    arguments: dict[str, Any]  # of the engine, whatever the path
    generator_arguments: dict[str, Any]  # of the second engine alone
    environment: dict[str, str]  # while an engine starts
    config: Any  # vllm's ModelConfig
    directory: Path
    adapters: VllmAdapters


class VllmBackend(ScoringBackend):
    """One vLLM engine.

    Args:
        model: checkpoint directory or hub id.
        revision: branch, tag or commit of a hub id; empty: the default branch.
        dtype: of weights and logits; "auto": as the checkpoint is stored.
        max_sequence_tokens: longest sequence; 0: the model's own limit.
        max_top_k: most entries a client may ask for, where rows are not whole.
        full_row_limit: most logit columns for which whole rows are asked of vLLM's prompt logprobs.
        head_chunk_rows: rows whose logits exist at once on the fused path; 0: chosen from the vocabulary.
        scoring_path: "fused" or "prompt-logprobs"; "auto": fused where the engine starts with it and its answers
            pass the check at start (vllm_check.py), else prompt-logprobs, which the log and the facts say.
        engine_args: passed to vLLM's AsyncEngineArgs as they are.
        adapters: name -> directory of a LoRA adapter that is a teacher on the same base.
        start_timeout_s: longest start of an engine, and longest check of its answers.
        generated_texts: written at a time, by a second engine; 0: there is none.
        generator_args: as `engine_args`, for the second engine alone; stronger.
    """

    name = "vllm"
    features = FusedPath.features
    """Before `load`: what it may come to offer."""
    generator: VllmGenerator | None = None

    def __init__(
        self,
        model: str,
        *,
        revision: str = "",
        dtype: str = "auto",
        max_sequence_tokens: int = 0,
        max_top_k: int = 256,
        full_row_limit: int = 4096,
        head_chunk_rows: int = 0,
        scoring_path: Literal["auto", "fused", "prompt-logprobs"] = "auto",
        engine_args: Mapping[str, Any] | None = None,
        adapters: Mapping[str, str] | None = None,
        start_timeout_s: float = 1800.0,
        generated_texts: int = 0,
        generator_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._revision = revision
        self._dtype = dtype
        self._max_sequence_tokens = max_sequence_tokens
        self._max_top_k = max_top_k
        self._full_row_limit = full_row_limit
        self._head_chunk_rows = head_chunk_rows
        self._scoring_path = scoring_path
        self._user_arguments = dict(engine_args or {})
        self._adapter_places = dict(adapters or {})
        self._start_timeout_s = start_timeout_s
        self._generated_texts = generated_texts
        self._generator_arguments = dict(generator_args or {})
        self._facts: ModelFacts | None = None
        self._plan: _Plan | None = None
        self._path: ScoringPath | None = None
        self._fallback = ""  # why it is not the fused path, where that was tried
        self._host = EngineHost()

    @property
    def policy(self) -> BatchPolicy:
        """vLLM forms its own batches: each job is sent on its own, many at a time."""
        longest = self._facts.max_sequence_tokens if self._facts else 1
        most = self._path.max_concurrent if self._path else 1
        return BatchPolicy(max_tokens=longest, max_sequences=1, max_concurrent_batches=most)

    def load(self) -> ModelFacts:
        prepare_environment()
        directory, commit = find_checkpoint(self._model, self._revision)
        adapters = read_adapters(self._adapter_places, directory)  # before the seconds that importing vLLM takes
        self._plan = plan = self._planned(directory, commit, adapters)
        self._path = self._started(plan)
        self.features = self._path.features
        note = self._fallback.replace(str(directory), directory.name)  # clients see it
        self._facts = replace(
            plan.facts,
            scoring_path=self._described(self._path),
            scoring_path_note=note,
            batch_tokens=self._host.batch_tokens,
        )
        if self._generated_texts:
            self.generator = self._started_generator(plan)
        return self._facts

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        self._host.require_up()
        return await self._host.run(self._score(jobs))

    def node_arguments(self) -> tuple[Any, dict[str, str]]:
        """What the engine's part on another node starts with: vllm's AsyncEngineArgs as `load` makes them, and the
        environment of its processes. Raises ValueError."""
        prepare_environment()
        directory, commit = find_checkpoint(self._model, self._revision)
        plan = self._planned(directory, commit, read_adapters(self._adapter_places, directory))
        path = self._stock(plan) if self._scoring_path == "prompt-logprobs" else self._fused(plan)
        return self._arguments_for(plan, path), plan.environment

    def output_head(self) -> OutputHead:
        assert self._plan is not None, "head before load"
        plan = self._plan
        return read_output_head(plan.directory, plan.config.hf_text_config, plan.config.architectures[0], plan.facts)

    @property
    def restarts(self) -> int:
        return self._host.restarts

    def is_up(self) -> bool:
        if self.generator is not None:
            self.generator.is_up()  # starts it again where it died; scoring goes on meanwhile
        return self._host.is_up()

    def is_frozen(self) -> bool:
        return self._host.is_frozen()

    async def close(self) -> None:
        ends = [self._host.close] if self.generator is None else [self._host.close, self.generator.close]
        await asyncio.gather(*(asyncio.to_thread(end) for end in ends))

    async def _score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        return list(await asyncio.gather(*(self._score_one(job) for job in jobs)))

    async def _score_one(self, job: ScoreJob) -> Scores | TeacherError:
        assert self._path is not None, "score before load"
        try:
            return await self._path.score(self._host, job)
        except TeacherError as error:
            if self._host.is_dead():
                raise
            return error

    def _started(self, plan: _Plan) -> ScoringPath:
        """The first of the paths allowed whose engine starts and whose answers pass the check."""
        fused, stock = self._fused(plan), self._stock(plan)
        if self._scoring_path == "prompt-logprobs":
            self._start(plan, stock)
            return stock
        try:
            self._start(plan, fused)
            return fused
        except ValueError as error:
            cause = f"{error}{self._combination()}"
            if self._scoring_path == "fused":
                raise ValueError(cause) from error
            logger.warning("scoring falls back from the fused path to prompt-logprobs, which is slower: %s", cause)
            self._fallback = f"fell back from fused: {' '.join(cause.split())[:400]}"
        self._host.stop()
        self._start(plan, stock)
        return stock

    def _arguments_for(self, plan: _Plan, path: ScoringPath) -> Any:
        """vllm's AsyncEngineArgs."""
        from vllm import AsyncEngineArgs

        own = path.arguments()
        for name in sorted(own.keys() & self._user_arguments.keys() - {"hf_overrides", "additional_config"}):
            if self._user_arguments[name] != own[name]:
                raise ValueError(f"engine argument {name!r} is always {own[name]!r} on the {path.name} path")
        return AsyncEngineArgs(**{**progress(), **path.defaults(), **plan.arguments, **own})

    def _start(self, plan: _Plan, path: ScoringPath) -> None:
        limit_s = self._start_timeout_s
        self._host.start(self._arguments_for(plan, path), plan.environment, timeout_s=limit_s)
        for name in plan.adapters.adapters:
            self._host.run_blocking(self._host.load_adapter(plan.adapters.request(name)), timeout_s=limit_s)

        def ask(jobs: Sequence[ScoreJob]) -> list[Scores]:
            try:
                return self._host.run_blocking(self._asked(path, jobs), timeout_s=limit_s)
            except TeacherError as error:
                raise ValueError(f"the check at start failed: {error.message}") from error

        if isinstance(path, FusedPath):
            check_answers(ask, plan.facts, plan.directory)
        if plan.adapters.adapters:
            check_adapters(ask, plan.facts, plan.directory, path.features, plan.adapters.adapters)

    def _started_generator(self, plan: _Plan) -> VllmGenerator:
        from vllm.platforms import current_platform

        generator = VllmGenerator(plan.facts, max_texts=self._generated_texts, on_cpu=current_platform.is_cpu())
        try:
            generator.start(
                plan.arguments,
                self._user_arguments,
                plan.generator_arguments,
                plan.environment,
                timeout_s=self._start_timeout_s,
            )
        except ValueError as error:
            generator.close()
            raise ValueError(f"the second engine, for --generate: {error}") from error
        return generator

    async def _asked(self, path: ScoringPath, jobs: Sequence[ScoreJob]) -> list[Scores]:
        return list(await asyncio.gather(*(path.score(self._host, job) for job in jobs)))

    def _stock(self, plan: _Plan) -> PromptLogprobsPath:
        overrides = dict(self._user_arguments.get("hf_overrides", {}))
        limit = self._full_row_limit
        return PromptLogprobsPath(plan.facts, self._max_top_k, limit, overrides, plan.adapters, Room(ANSWER_BYTES))

    def _fused(self, plan: _Plan) -> FusedPath:
        from vllm.platforms import current_platform

        half = plan.facts.dtype != "float32"
        # Elsewhere a float32 product of half-precision weights casts all of the weight for each chunk.
        head_dtype = "float32" if half and current_platform.is_cuda() and not plan.facts.quantisation else "model"
        return FusedPath(
            plan.facts,
            plan.config.architectures[0],
            head_dtype,
            self._head_chunk_rows,
            dict(self._user_arguments.get("hf_overrides", {})),
            dict(self._user_arguments.get("additional_config", {})),
            asynchronous=current_platform.is_cuda() and self._size("pipeline_parallel_size") == 1,
            adapters=plan.adapters,
        )

    def _size(self, name: str) -> int:
        return int(self._user_arguments.get(name, 1))

    def _combination(self) -> str:
        """What this engine is asked for that is not tested everywhere, for a refusal."""
        parts = [f"{name} {self._size(name)}" for name in PROBED if self._size(name) > 1]
        parts += ["LoRA adapters"] if self._adapter_places else []
        return f" (scoring path fused with {' and '.join(parts)})" if parts else ""

    def _described(self, path: ScoringPath) -> str:
        parts = [f"{path.name} {path.detail}".strip()]
        if isinstance(path, FusedPath) and path.head_dtype != "model":
            parts.append(f"head {path.head_dtype}")
        given = {name: self._user_arguments[name] for name in sorted(self._user_arguments) if name not in PLACES}
        if given:
            parts.append(f"engine arguments {given}")
        return ", ".join(parts)

    def _planned(self, directory: Path, commit: str, adapters: Mapping[str, Adapter]) -> _Plan:
        import torch
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform

        known = {field.name for field in fields(AsyncEngineArgs)}
        self._check_arguments(known)
        self._check_arguments(known, self._generator_arguments)
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
        size, fingerprint, parts = tokenizer_facts(directory, width)
        limit = self._limit(config)
        dtype = str(config.dtype).removeprefix("torch.")
        weights = weights_digest(directory)
        facts = ModelFacts(
            model_name=self._model,
            tokenizer_size=size,
            logit_width=width,
            hidden_size=config.get_hidden_size(),
            max_sequence_tokens=limit,
            weights_digest=weights,
            tokenizer_fingerprint=fingerprint,
            tokenizer_parts=parts,
            model_revision=commit,
            dtype=dtype,
            quantisation=str(config.quantization or ""),
            head_dtype=dtype,
            engine="vllm",
            engine_version=f"vllm {vllm.__version__}, torch {torch.__version__}",
            adapters={name: adapted_digest(weights, adapter.digest) for name, adapter in adapters.items()},
        )
        arguments = {**_defaults(config, limit), **base}
        own = dict(self._generator_arguments)
        if self._generated_texts and not current_platform.is_cpu():
            first, second = memory_shares(self._user_arguments, own)
            arguments["gpu_memory_utilization"], own["gpu_memory_utilization"] = first, second
        served = VllmAdapters(adapters, current_platform.is_cpu())
        return _Plan(facts, arguments, own, self._environment(config, limit), config, directory, served)

    def _check_arguments(self, known: set[str], given: Mapping[str, Any] | None = None) -> None:
        for name in self._user_arguments if given is None else given:
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
        return asked or own

    def _environment(self, config: Any, limit: int) -> dict[str, str]:
        from vllm.platforms import current_platform

        result = {}
        if limit == int(config.max_model_len):
            result["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # for the one token more
        if current_platform.is_cpu():
            # vLLM divides NUMA nodes among its processes, and refuses more processes than nodes.
            processes = self._size("tensor_parallel_size") * math.prod(self._size(name) for name in PROBED)
            result["VLLM_CPU_OMP_THREADS_BIND"] = _cores(processes)
        return result


def _model_config(engine_args: Any, directory: Path) -> Any:
    try:
        return engine_args.create_model_config()
    except (ValueError, OSError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
        raise ValueError(f"vLLM can't serve the model in {directory}: {one_line(error)}") from error


def _cores(processes: int) -> str:
    """This process's cores divided among several, as vLLM writes it; one process is left to vLLM."""
    if processes == 1:
        return "auto"
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = len(cores) // processes
    if not share:
        return "nobind"
    return "|".join(",".join(map(str, cores[i * share : (i + 1) * share])) for i in range(processes))


def _defaults(config: Any, limit: int) -> dict[str, Any]:
    """Engine arguments that a teacher wants and vLLM does not choose by itself; the user's own come after them."""
    from vllm.platforms import current_platform

    result: dict[str, Any] = {"enforce_eager": True}  # nothing is generated: captured graphs would lengthen the start
    if not current_platform.is_cpu():
        return result
    # Left alone, vLLM takes most of the machine's memory, and does not start where that much is not free. Room for four
    # of the longest sequences.
    asked_gib = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 0)
    per_token = 2 * config.get_total_num_hidden_layers() * config.get_total_num_kv_heads() * config.get_head_size()
    enough = max(1 << 29, 4 * (limit + 1) * per_token * config.dtype.itemsize)
    result["kv_cache_memory_bytes"] = asked_gib << 30 or enough
    return result
