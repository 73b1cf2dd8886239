"""What a rollout server does, behind its routes: takes weights, says whose and which they are, and samples from these
alone. In vLLM's API server, above its engine.

A request names the weights that it means, and gets tokens of no others.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

import numpy as np

from student_trainer.rollout.vllm_side.plugin import GLOO
from student_trainer.rollout.vllm_side.request import PROTOCOL, Draws, Record, Weights, parameters
from teacher_api.types import FloatArray

GRACE_S = 15.0
"""Over the sender's own timeout, after which a hand-over that hangs ends the server."""


class OtherWeights(Exception):
    """The server has other weights than a request means; the client hands over the right ones first."""


class HandOverFailed(Exception):
    """Weights did not come, or not all; the server has none that anybody may use."""


class RolloutService:
    """One engine's. Everything runs on the API server's event loop."""

    def __init__(self, engine: Any, dtype: str) -> None:
        self._engine = engine
        self._dtype = dtype
        self._instance = uuid.uuid4().hex
        self._weights = Weights()
        self._sampling = 0
        self._updating = False
        self._changed = asyncio.Condition()
        self._workers = asyncio.Lock()  # who may have them do something about weights
        self._numbers = itertools.count()

    @classmethod
    async def on(cls, engine: Any) -> RolloutService:
        """Puts our sampler into the engine's workers. Raises ValueError where the engine samples in another way."""
        config = engine.vllm_config
        if config.speculative_config is not None:
            raise ValueError("speculative decoding: expected none, since its tokens are not drawn by our sampler")
        if config.weight_transfer_config is None or config.model_config.max_logprobs != -1:
            raise ValueError(
                "started without --weight-transfer-config or --max-logprobs -1: start it with rollout-serve"
            )
        dtypes = await engine.collective_rpc("rollout_install")
        return cls(engine, dtypes[0])

    def info(self) -> dict[str, Any]:
        """Whose weights there are, and what a client must know of the server."""
        config = self._engine.vllm_config
        return {
            "protocol": PROTOCOL,
            "instance": self._instance,
            "session": self._weights.session,
            "version": self._weights.version,
            "model": config.model_config.model,
            "dtype": self._dtype,
            "logit_width": int(config.model_config.get_vocab_size()),
            "max_model_len": int(config.model_config.max_model_len),
            "transport": config.weight_transfer_config.backend,
            "num_workers": int(config.parallel_config.world_size_across_dp),
        }

    async def connect(self, parameters: dict[str, Any]) -> None:
        """Has the workers join a sender; returns once they have. One whose client has gone while others were first is
        never begun: its sender would be waited for in vain. Raises HandOverFailed."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        async with self._workers:
            joining = self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=parameters))
            with _failing("the workers did not reach the sender"):
                await _to_its_end(joining)

    async def take(self, new: Weights, update: dict[str, Any], *, timeout_s: float) -> str:
        """New weights in place of those before. What is being sampled is finished with the old ones first.

        Returns:
            SHA-256 of the bytes that came; empty where the transport computes none.
        Raises:
            HandOverFailed: from then on the server has no weights, until the next hand-over.
        """
        async with self._alone(), self._workers:
            self._weights = Weights()
            try:
                digest = await asyncio.wait_for(self._load(new, update), timeout_s + GRACE_S)
            except TimeoutError as error:
                _end_server()
                raise HandOverFailed(f"no end after {timeout_s + GRACE_S:g} s; the server ends") from error
            except HandOverFailed:
                if self._engine.vllm_config.weight_transfer_config.backend != GLOO:
                    _end_server()  # its groups don't survive a failure, and half a layer may be new
                raise
            self._weights = new
        return digest

    async def logprobs(self, weights: Weights, ids: Sequence[int]) -> FloatArray:
        """log q(ids[n + 1]) given those before it, [N - 1], at T = 1 over all columns of the model."""
        from vllm import SamplingParams

        asked = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True
        )
        async with self._with(weights):
            output = await self._last(ids, asked, weights)
        flat = output.prompt_logprobs
        return np.array([flat.logprobs[i] for i in flat.start_indices[1:]], dtype=np.float32)

    async def sample(
        self, weights: Weights, prompt_ids: Sequence[int], draws: Draws, stop_ids: Sequence[int], keep_top_k: int
    ) -> Record:
        """One completion. Raises OtherWeights; ValueError where vLLM refuses the request."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kept = min(keep_top_k, draws.vocabulary_size)
        asked = SamplingParams(**parameters(draws, stop_ids, kept), output_kind=RequestOutputKind.FINAL_ONLY)
        async with self._with(weights):
            output = await self._last(prompt_ids, asked, weights)
        return Record.of(output.outputs[0], kept)

    async def _load(self, new: Weights, update: dict[str, Any]) -> str:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        with _failing("the weights did not come"):
            await self._engine.start_weight_update()
            await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update))
            await self._engine.finish_weight_update(f"{new.session}/{new.version}")
            await self._engine.collective_rpc("rollout_set_version", args=(new.version,))
            digests = set(await self._engine.collective_rpc("rollout_weights_digest"))
        if len(digests) != 1:
            raise HandOverFailed(f"the workers got different bytes: {sorted(digests)}")
        return str(digests.pop())

    async def _last(self, ids: Sequence[int], asked: Any, weights: Weights) -> Any:
        # The salt keeps cached keys and values of other weights from ever being found.
        prompt = {"prompt_token_ids": list(ids), "cache_salt": f"{weights.session}/{weights.version}"}
        output = None
        async for found in self._engine.generate(prompt, asked, f"rollout-{next(self._numbers)}"):
            output = found
        return output

    @contextlib.asynccontextmanager
    async def _with(self, weights: Weights) -> AsyncIterator[None]:
        """Inside, these are the weights. Waits for a hand-over that is under way."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._updating)
            if self._weights != weights:
                raise OtherWeights(f"asked for {weights}, has {self._weights}")
            self._sampling += 1
        try:
            yield
        finally:
            # Shielded: a request that is cancelled must be counted out as well.
            await asyncio.shield(self._left())

    async def _left(self) -> None:
        async with self._changed:
            self._sampling -= 1
            self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Inside, nothing samples: what did has ended, and what comes waits."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._updating)
            self._updating = True
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._sampling)
            yield
        finally:
            async with self._changed:
                self._updating = False
                self._changed.notify_all()


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Also where the caller is cancelled: the workers can't be."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


@contextlib.contextmanager
def _failing(what: str) -> Any:
    try:
        yield
    except Exception as error:  # what a worker raised comes back as a bare Exception
        raise HandOverFailed(f"{what}: {' '.join(str(error).split())[:300]}") from error


def _end_server() -> None:
    """As an operator would; its supervisor starts it anew."""
    os.kill(os.getpid(), signal.SIGTERM)
