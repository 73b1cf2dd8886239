"""A score cache between its callers and a scheduler with a fake engine, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from teacher_api.errors import BackendFailed, TeacherError
from teacher_api.types import ScoreOptions, Scores
from teacher_server.admission import Admission
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.fake import FakeBackend
from teacher_server.cache import ScoreCache
from teacher_server.cache_config import CacheConfig
from teacher_server.caller import Caller
from teacher_server.output_check import checked
from teacher_server.scheduler import Scheduler

A, B = Caller("a"), Caller("b")


def job(name: str, *tokens: int, **options: Any) -> ScoreJob:
    ids = np.array(tokens or (1, 2, 3, 4), np.int32)
    values = {"top_k": 3, "entropy": True, "rank": True, **options}
    return ScoreJob(name, ids, 1, np.arange(1, len(ids), dtype=np.int32), ScoreOptions(**values))


class Gated(FakeBackend):
    """Holds every batch while its gate is closed; `fails` fails that many batches."""

    def __init__(self) -> None:
        super().__init__(batch_sequences=1, batch_tokens=4)
        self.load()
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails = 0

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        await self.gate.wait()
        if self.fails:
            self.fails -= 1
            raise BackendFailed("injected")
        return await super().score(jobs)


class Bench:
    """A cache between its callers and a scheduler with a fake engine."""

    def __init__(self, backend: Gated, **settings: Any) -> None:
        self.backend = backend
        self.admission = Admission(10_000, 1 << 30, lambda: 0.0)
        self.scheduler = Scheduler(backend)
        self.fingerprint = "fp"
        self.spared: list[tuple[str, int]] = []
        self.cache = ScoreCache(
            CacheConfig(**settings),
            submit=lambda lookup, deadline, begun: self.scheduler.submit(
                lookup.job, deadline, lookup.caller, begun=begun
            ),
            check=lambda job, result: checked(job, result, backend.vocabulary),
            fingerprint_of=lambda teacher: self.fingerprint + teacher,
            admission=self.admission,
            spared=lambda caller, tokens: self.spared.append((caller.tenant, tokens)),
        )

    async def begin(self, one: ScoreJob, caller: Caller = A, timeout_s: float = 60.0) -> asyncio.Future[Any]:
        (lookup,) = await self.cache.look([one], caller)
        return self.cache.start(lookup, asyncio.get_running_loop().time() + timeout_s)

    async def ask(self, one: ScoreJob, caller: Caller = A, timeout_s: float = 60.0) -> Any:
        return await (await self.begin(one, caller, timeout_s))

    @property
    def computed(self) -> int:
        return len(self.backend.scored_ids)


def run(scenario: Any, **settings: Any) -> Any:
    async def whole() -> Any:
        bench = Bench(Gated(), **settings)
        feeding = asyncio.create_task(bench.scheduler.run())
        await bench.cache.open()
        try:
            return await scenario(bench)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            await bench.cache.close()

    return asyncio.run(whole())


ARRAYS = [field.name for field in fields(Scores) if "Array" in str(field.type)]


def assert_same_bits(got: Scores, want: Scores) -> None:
    assert len(ARRAYS) == 9
    for name in ARRAYS:
        one, other = getattr(got, name), getattr(want, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype, name
            assert one.tobytes() == other.tobytes(), name


async def settled(turns: int = 10) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)
