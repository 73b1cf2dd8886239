"""Text of the fake backend: drawn from its invented distribution with numpy, in float64 and straight from the
definition in generation.py. Without a seed the random numbers follow from how many texts were begun before: texts
differ, and those of the next server are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from teacher_api.errors import BackendFailed
from teacher_server.backends.generation import Generated, GenerationJob, Generator, Sampling, TokenWatch

if TYPE_CHECKING:
    from teacher_server.backends.fake import Faults

F64 = npt.NDArray[np.float64]


class FakeGenerator(Generator):
    """
    Args:
        logits: of the token after the given ones, over the tokenizer's ids.
        is_up: whether the engine is alive.
        die: kills it.
    """

    def __init__(
        self, logits: Callable[[list[int]], F64], faults: Faults, is_up: Callable[[], bool], die: Callable[[], None]
    ) -> None:
        self._logits, self._faults, self._is_up, self._die = logits, faults, is_up, die
        self.begun = self.running = self.most_running = 0

    async def generate(self, job: GenerationJob) -> Generated:
        if not self._is_up():
            raise BackendFailed("injected: the engine is dead", retry_after_s=self._faults.restart_s)
        self.begun += 1
        key = [self.begun, 1] if job.sampling.seed is None else [job.sampling.seed % 2**64, 0]
        random = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._write(job, random)
        finally:
            self.running -= 1

    async def _write(self, job: GenerationJob, random: np.random.Generator) -> Generated:
        prompt = job.prompt_ids.tolist()
        if self._faults.hang_token in prompt:
            await asyncio.Event().wait()
        if self._faults.poison_token in prompt:
            raise RuntimeError("injected: this prompt holds the poison token")
        if self._faults.death_token in prompt:
            self._die()
            raise BackendFailed("injected: the engine died", retry_after_s=self._faults.restart_s)
        watch = TokenWatch(job)
        while True:
            await asyncio.sleep(self._faults.latency_s)
            token = draw(self._logits([*prompt, *watch.token_ids]), job.sampling, random.random())
            if watch.add([token]):
                return watch.result()


def draw(logits_V: F64, sampling: Sampling, uniform: float) -> int:
    """The id at which the cumulative mass, most likely first, passes `uniform` in [0, 1)."""
    order_V = np.argsort(-logits_V, kind="stable")
    if sampling.temperature == 0:
        return int(order_V[0])
    z_V = logits_V[order_V] / sampling.temperature
    p_V = np.exp(z_V - z_V[0])  # in units of the most likely one's
    p_V[p_V < sampling.min_p] = 0.0
    if sampling.top_k:
        p_V[sampling.top_k :] = 0.0
    p_V /= p_V.sum()
    p_V[np.cumsum(p_V) - p_V >= sampling.top_p] = 0.0
    mass_V = np.cumsum(p_V)
    return int(order_V[np.searchsorted(mass_V, uniform * mass_V[-1], side="right")])
