"""Batches keep to the policy, keep like with like, starve nobody; a poison job fails alone; what is cancelled or late
never reaches the backend."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_api.errors import BackendFailed, DeadlineExceeded, InvalidBackendOutput, TeacherError
from teacher_api.types import ScoreOptions, Scores
from teacher_server.backends.base import BatchPolicy, ModelFacts, ScoreJob, ScoringBackend
from teacher_server.batching import MAX_PADDING, Entry
from teacher_server.fair import FairQueue
from teacher_server.scheduler import Scheduler

pytestmark = pytest.mark.slow


def job(name: str, num_tokens: int = 4, prompt_key: bytes = b"") -> ScoreJob:
    positions = np.arange(1, num_tokens, dtype=np.int32)
    return ScoreJob(name, np.zeros(num_tokens, np.int32), 1, positions, ScoreOptions(), None, prompt_key)


def answer(one: ScoreJob) -> Scores:
    zeros = np.zeros(len(one.positions), np.float32)
    return Scores(one.id, one.positions, zeros, zeros)


class Recorder(ScoringBackend):
    """Notes each batch; holds it while `gate` is closed; raises for batches that hold a job called `poison`."""

    name = "recorder"
    features = frozenset()

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        self.batches: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.running = self.most_running = 0

    def load(self) -> ModelFacts:
        raise NotImplementedError

    @property
    def policy(self) -> BatchPolicy:
        return self._policy

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        self.batches.append([one.id for one in jobs])
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await self.gate.wait()
        self.running -= 1
        if any(one.id == "poison" for one in jobs):
            raise ZeroDivisionError("poison")
        if any(one.id == "short" for one in jobs):
            return [answer(one) for one in jobs if one.id != "short"]
        return [answer(one) for one in jobs]


def entries(jobs: Sequence[ScoreJob]) -> list[Entry]:
    loop = asyncio.new_event_loop()
    try:
        return [Entry(one, loop.create_future(), call_tokens=1) for one in jobs]
    finally:
        loop.close()


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=60),
    max_tokens=st.integers(1, 2000),
    max_sequences=st.integers(1, 20),
)
def test_batches_keep_to_the_policy_and_take_everything_once(lengths, max_tokens, max_sequences):
    policy = BatchPolicy(max_tokens, max_sequences)
    queue, waiting = FairQueue(), entries([job(str(n), length) for n, length in enumerate(lengths)])
    for entry in waiting:
        queue.put(entry)
    taken: list[str] = []
    while len(queue):
        oldest = next(entry for entry in waiting if entry.job.id not in taken)
        batch = queue.take(policy)
        assert oldest in batch, "the oldest job is always served"
        sizes = [entry.job.num_tokens for entry in batch]
        assert len(batch) <= max_sequences
        assert len(batch) == 1 or max(sizes) * len(batch) <= max_tokens
        assert 1 - sum(sizes) / (max(sizes) * len(sizes)) <= MAX_PADDING
        taken += [entry.job.id for entry in batch]
    assert sorted(taken) == sorted(entry.job.id for entry in waiting)


def test_jobs_of_one_prompt_go_together_and_stand_side_by_side():
    queue = FairQueue()
    for entry in entries([job("a0", 8, b"A"), job("b0", 8, b"B"), job("a1", 8, b"A"), job("b1", 8, b"B")]):
        queue.put(entry)
    assert [entry.job.id for entry in queue.take(BatchPolicy(16, 8))] == ["a0", "a1"]
    assert [entry.job.id for entry in queue.take(BatchPolicy(1000, 8))] == ["b0", "b1"]
    for entry in entries([job("a0", 8, b"A"), job("b0", 8, b"B"), job("a1", 8, b"A"), job("b1", 8, b"B")]):
        queue.put(entry)
    ids = [entry.job.id for entry in queue.take(BatchPolicy(1000, 8))]
    assert ids[:2] == ["a0", "a1"]
    assert set(ids[2:]) == {"b0", "b1"}


def run(backend: Recorder, scenario):
    async def whole():
        scheduler = Scheduler(backend)
        feeding = asyncio.create_task(scheduler.run())
        try:
            return await scenario(scheduler)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    return asyncio.run(whole())


def later(seconds: float = 60.0) -> float:
    return asyncio.get_running_loop().time() + seconds


def test_a_poison_job_fails_alone():
    backend = Recorder(BatchPolicy(10_000, 64))

    async def scenario(scheduler: Scheduler):
        names = [str(n) for n in range(8)] + ["poison"] + [str(n) for n in range(8, 15)]
        return await asyncio.gather(*[scheduler.submit(job(name), later()) for name in names])

    results = run(backend, scenario)
    failed = [result for result in results if isinstance(result, TeacherError)]
    assert len(results) == 16
    assert [type(one) for one in failed] == [BackendFailed]
    assert results[8] is failed[0]
    assert "ZeroDivisionError" in failed[0].message
    assert backend.batches[0] != ["poison"], "it was in company at first"


def test_a_batch_answered_short_is_sorted_out_one_by_one():
    backend = Recorder(BatchPolicy(10_000, 64))

    async def scenario(scheduler: Scheduler):
        return await asyncio.gather(*[scheduler.submit(job(name), later()) for name in ("a", "short", "b")])

    first, second, third = run(backend, scenario)
    assert isinstance(first, Scores)
    assert isinstance(third, Scores)
    assert isinstance(second, InvalidBackendOutput)
    assert second.retryable


def test_the_deadline_comes_on_time_and_the_backend_never_sees_the_job():
    backend = Recorder(BatchPolicy(10_000, 1))
    backend.gate.clear()

    async def scenario(scheduler: Scheduler):
        blocking = scheduler.submit(job("long"), later())
        behind = scheduler.submit(job("late"), later(0.05))
        started = asyncio.get_running_loop().time()
        result = await behind
        took = asyncio.get_running_loop().time() - started
        backend.gate.set()
        await blocking
        return result, took

    result, took = run(backend, scenario)
    assert isinstance(result, DeadlineExceeded)
    assert took < 1.0
    assert backend.batches == [["long"]]


def test_a_cancelled_job_leaves_the_queue():
    backend = Recorder(BatchPolicy(10_000, 1))
    backend.gate.clear()

    async def scenario(scheduler: Scheduler):
        blocking = scheduler.submit(job("long"), later())
        gone = scheduler.submit(job("gone"), later())
        last = scheduler.submit(job("last"), later())
        await asyncio.sleep(0)
        gone.cancel()
        backend.gate.set()
        await asyncio.gather(blocking, last)

    run(backend, scenario)
    assert backend.batches == [["long"], ["last"]]


@pytest.mark.parametrize("limit", [1, 3])
def test_at_most_so_many_batches_run_at_once(limit):
    backend = Recorder(BatchPolicy(10_000, 1, max_concurrent_batches=limit))
    backend.gate.clear()

    async def scenario(scheduler: Scheduler):
        futures = [scheduler.submit(job(str(n)), later()) for n in range(8)]
        while backend.running < limit:
            await asyncio.sleep(0)
        assert scheduler.idle_s >= 0
        backend.gate.set()
        await asyncio.gather(*futures)
        assert scheduler.idle_s == 0

    run(backend, scenario)
    assert backend.most_running == limit


def test_silence_of_the_engine_is_measured_only_while_there_is_work():
    backend = Recorder(BatchPolicy(10_000, 1))
    backend.gate.clear()

    async def scenario(scheduler: Scheduler):
        assert scheduler.idle_s == 0
        future = scheduler.submit(job("hung"), later())
        await asyncio.sleep(0.02)
        assert scheduler.idle_s >= 0.01
        backend.gate.set()
        await future
        await asyncio.sleep(0)
        assert scheduler.idle_s == 0
        assert scheduler.tokens_per_s > 0

    run(backend, scenario)


def test_a_shared_prompt_counts_once_where_the_backend_computes_it_once():
    def group(name: str, count: int) -> list[ScoreJob]:
        key, positions = name.encode(), np.arange(100, 120, dtype=np.int32)
        return [
            ScoreJob(f"{name}{n}", np.zeros(120, np.int32), 100, positions, ScoreOptions(), None, key)
            for n in range(count)
        ]

    def first_batch(policy: BatchPolicy) -> list[str]:
        queue = FairQueue()
        for entry in entries([*group("a", 6), *group("b", 2), job("c", 120)]):
            queue.put(entry)
        return [entry.job.id for entry in queue.take(policy)]

    # 100 + 6 · 20 tokens of the first prompt, 100 + 2 · 20 of the second: 360 in all
    assert first_batch(BatchPolicy(360, 64)) == ["a0", "a1", "a2"]
    assert first_batch(BatchPolicy(360, 64, shares_prompts=True)) == ["a0", "a1", "a2", "a3", "a4", "a5", "b0", "b1"]
    assert first_batch(BatchPolicy(359, 64, shares_prompts=True)) == ["a0", "a1", "a2", "a3", "a4", "a5", "b0"]
