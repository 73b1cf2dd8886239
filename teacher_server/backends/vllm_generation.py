"""Text of the vllm backend: a second engine beside the one that scores, in vLLM's generate runner, as vLLM ships it.
Same checkpoint, dtype and engine arguments; weights, key-value cache, death and revival of its own (decision 0012).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from teacher_api.errors import InvalidBackendOutput
from teacher_server.backends.base import ModelFacts
from teacher_server.backends.generation import Generated, GenerationJob, Generator, TokenWatch
from teacher_server.backends.vllm_engine import EngineHost, progress

MAX_BIASED_COLUMNS = 1024  # of one request: what vLLM's second model runner takes
SHARE_OF_GPU = 0.45
"""Of a GPU's memory, for each of the two engines where nothing else is configured."""


class VllmGenerator(Generator):
    """One engine.

    Args:
        facts: of the engine that scores.
        max_texts: written at a time.
        on_cpu: whether vLLM runs on the CPU, where a seed needs an engine that computes each prompt in one step.
    """

    def __init__(self, facts: ModelFacts, *, max_texts: int, on_cpu: bool) -> None:
        self._facts = facts
        self._max_texts = max_texts
        self._on_cpu = on_cpu
        self._host = EngineHost()
        last = min(facts.logit_width, facts.tokenizer_size + MAX_BIASED_COLUMNS)
        self._never_drawn = dict.fromkeys(range(facts.tokenizer_size, last), float("-inf"))

    def start(
        self,
        shared: Mapping[str, Any],
        chosen: Mapping[str, Any],
        own: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        timeout_s: float,
    ) -> None:
        """Blocks until the engine is up.

        Args:
            shared: arguments of any engine of this checkpoint.
            chosen: of those, the ones that the user set.
            own: the user's for this engine alone.
            environment, timeout_s: as of EngineHost.start.

        Raises:
            ValueError: it can't be started; or an argument has another value than this engine must have.
        """
        from vllm import AsyncEngineArgs

        fixed = self._fixed()
        for name in sorted(fixed.keys() & own.keys()):
            if own[name] != fixed[name]:
                raise ValueError(f"engine argument {name!r} is always {fixed[name]!r} for the engine that generates")
        arguments = {**progress(), **shared, **self._defaults(), **chosen, **own, **fixed}
        self._host.start(AsyncEngineArgs(**arguments), environment, timeout_s=timeout_s)

    async def generate(self, job: GenerationJob) -> Generated:
        self._host.require_up()
        return await self._host.run(self._generate(job))

    def is_up(self) -> bool:
        """Starts an engine that died again, as EngineHost.is_up."""
        return self._host.is_up()

    def close(self) -> None:
        self._host.close()

    async def _generate(self, job: GenerationJob) -> Generated:
        watch = TokenWatch(job)
        parameters = self._parameters(job)

        async def ask(engine: Any, request_id: str) -> AsyncIterator[Any]:
            prompt = {"prompt_token_ids": job.prompt_ids.tolist()}
            # Closing it before its end aborts the request.
            async with aclosing(engine.generate(prompt, parameters, request_id)) as outputs:
                async for output in outputs:
                    ended = watch.add(output.outputs[0].token_ids)
                    yield output
                    if ended:
                        return

        await self._host.last_output(job.id, ask)
        size = self._facts.tokenizer_size
        if watch.ending is None or max(watch.token_ids) >= size:
            raise InvalidBackendOutput(
                f"completion {job.id!r}: vLLM gave {len(watch.token_ids)} tokens, of ids up to "
                f"{max(watch.token_ids, default=-1)}; expected {job.max_tokens} or an end, and ids below {size}"
            )
        return watch.result()

    def _parameters(self, job: GenerationJob) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = job.sampling
        return SamplingParams(
            max_tokens=job.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stop_token_ids=sorted(job.stop_ids),
            ignore_eos=True,  # the ids that end a text are among stop_ids
            detokenize=False,
            logit_bias=self._never_drawn or None,
            output_kind=RequestOutputKind.DELTA,
        )

    def _fixed(self) -> dict[str, Any]:
        longest = self._facts.max_sequence_tokens
        fixed: dict[str, Any] = {"runner": "generate", "max_model_len": longest}
        if self._on_cpu:
            # A prompt that is computed in pieces makes vLLM's CPU runner move a seeded generator back, which the CPU's
            # can't: the engine dies of it. In one piece the question never comes up.
            fixed |= {"enable_chunked_prefill": False, "long_prefill_token_threshold": 0}
            fixed["max_num_batched_tokens"] = max(longest, self._max_texts)
        return fixed

    def _defaults(self) -> dict[str, Any]:
        defaults = {"max_num_seqs": self._max_texts, "enable_prefix_caching": True}
        return defaults if self._on_cpu else {**defaults, "enforce_eager": False}


def memory_shares(scoring: Mapping[str, Any], generating: Mapping[str, Any]) -> tuple[float, float]:
    """gpu_memory_utilization of the two engines, from the user's engine arguments for both and for the second alone.

    Raises:
        ValueError: together they are more than a GPU has.
    """
    name = "gpu_memory_utilization"
    first = float(scoring.get(name, SHARE_OF_GPU))
    second = float(generating.get(name, min(SHARE_OF_GPU, max(0.9 - first, 0.0)) if name in scoring else SHARE_OF_GPU))
    if not 0 < second <= 1 or first + second > 1:
        raise ValueError(
            f"{name}: the engine that scores takes {first:g} of a GPU and the one that generates {second:g}; expected "
            "two shares above 0 that make at most 1: set vllm.gpu_memory_utilization and "
            "generate_vllm.gpu_memory_utilization"
        )
    return first, second
