"""What the scheduler tells of its batches, next to what a backend of our own saw."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np

from teacher_api.errors import TeacherError
from teacher_api.tracing import Tracing
from teacher_api.types import ScoreOptions, Scores
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.fake import FakeBackend
from teacher_server.forwards import Forwards
from teacher_server.scheduler import Scheduler


class Slow(FakeBackend):
    """Takes 0.1 s a batch, one at a time, and fails the batches of two."""

    def __init__(self) -> None:
        super().__init__(batch_sequences=2)
        self.sizes: list[int] = []

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        self.sizes.append(len(jobs))
        await asyncio.sleep(0.1)
        if len(jobs) == 2:
            raise RuntimeError("a batch that fails is told of once, and its sequences are scored one by one")
        return await super().score(jobs)


def job(name: str) -> ScoreJob:
    ids = np.arange(4, dtype=np.int32)
    return ScoreJob(name, ids, 1, np.arange(1, 4, dtype=np.int32), ScoreOptions(top_k=0))


def test_batches_are_told_of_once_with_waits_and_sizes() -> None:
    asyncio.run(_told_of_once())


async def _told_of_once() -> None:
    backend, forwards = Slow(), Forwards(Tracing())
    backend.load()
    scheduler = Scheduler(backend, forwards=forwards)
    started = time.monotonic()
    futures = [scheduler.submit(job(str(number)), asyncio.get_running_loop().time() + 60) for number in range(3)]
    running = asyncio.create_task(scheduler.run())
    try:
        await asyncio.wait_for(asyncio.gather(*futures), 30)
        took = time.monotonic() - started
        assert forwards.running == 0
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert sorted(backend.sizes) == [1, 1, 1, 2]  # the batch of two that failed, one after another, and the third
    assert forwards.tokens == 12
    assert sum(forwards.sequences.counts) == 2
    assert forwards.sequences.total == 3
    assert 0.4 <= forwards.took.total <= 2 * took  # three turns of the first batch and one of the second
    assert sum(forwards.waited.counts) == 3
