"""A fleet of thousands of clients on a simulated clock: admission, queue and scheduler are the server's own, the
engine is a formula and the clients are loops. Nothing sleeps, so that minutes of a GPU take seconds, and two runs give
the same figures.

The engine takes OVERHEAD_S for each batch and its padded tokens over TOKENS_PER_S.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import statistics
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from benchmarks.sharing_figures import jain, share_error
from teacher_api.errors import Overloaded, TeacherError
from teacher_api.types import ScoreOptions, Scores
from teacher_server.admission import Admission, Cost
from teacher_server.backends.base import BatchPolicy, ModelFacts, ScoreJob, ScoringBackend
from teacher_server.caller import Caller
from teacher_server.fair import FairQueue
from teacher_server.scheduler import Scheduler

TOKENS_PER_S, OVERHEAD_S = 100_000.0, 0.002
POLICY = BatchPolicy(8192, 64)
QUEUE_TOKENS = 2_000_000
CONTENDED_S = 0.05
RETRY_JITTER = 0.25  # as of the client
CALL_TOKENS = (64, 512)  # of a sequence
CALL_SEQUENCES = 4
SERIAL_CALL = [512] * 8
T = TypeVar("T")


class _Clock(selectors.SelectSelector):
    """Moves the time on instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits for something that will not come")
        self.now += max(timeout, 0.0)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def simulated(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs `work` on a clock of its own."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work())


class Engine(ScoringBackend):
    name = "simulated"
    features = frozenset()

    def __init__(self) -> None:
        self.tokens = 0

    @property
    def policy(self) -> BatchPolicy:
        return POLICY

    def load(self) -> ModelFacts:
        raise NotImplementedError

    async def score(self, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        took_s = OVERHEAD_S + max(job.num_tokens for job in jobs) * len(jobs) / TOKENS_PER_S
        await asyncio.sleep(took_s)
        self.tokens += sum(job.num_tokens for job in jobs)
        return [_scores(job) for job in jobs]


def _scores(job: ScoreJob) -> Scores:
    empty = np.zeros(0, np.float32)
    return Scores(job.id, job.positions, empty, empty, computed_tokens=job.num_tokens)


@dataclass
class Teacher:
    """What the clients of one simulation share."""

    weights: dict[str, float] = field(default_factory=dict)
    tokens: Counter[Caller] = field(default_factory=Counter)  # served
    refused: int = 0
    most_flows: int = 0
    most_queued: int = 0
    rate: float = 0.0  # of the engine, tokens/s in the time that counts

    def __post_init__(self) -> None:
        now = asyncio.get_running_loop().time
        self.queue = FairQueue(lambda tenant: self.weights.get(tenant, 1.0))
        self.engine = Engine()
        self.scheduler = Scheduler(self.engine, self.queue, contended_s=CONTENDED_S, clock=now)
        self.admission = Admission(
            QUEUE_TOKENS,
            1 << 40,
            lambda: self.scheduler.tokens_per_s,
            weight_of=lambda tenant: self.weights.get(tenant, 1.0),
            clock=now,
        )

    async def call(self, caller: Caller, lengths: Sequence[int], chance: random.Random) -> None:
        """One call of a client that obeys."""
        cost = Cost(sum(lengths), 0, caller)
        while True:
            try:
                self.admission.take(cost)
                break
            except Overloaded as error:
                self.refused += 1
                await asyncio.sleep((error.retry_after_s or 1.0) * (1 + RETRY_JITTER * chance.random()))
        self.most_queued = max(self.most_queued, self.admission.tokens)
        self.most_flows = max(self.most_flows, self.queue.num_remembered)
        deadline = asyncio.get_running_loop().time() + 1e9
        jobs = [ScoreJob("x", _ids(n), 0, _ids(1), ScoreOptions()) for n in lengths]
        submit = self.scheduler.submit
        await asyncio.gather(*[submit(job, deadline, caller, call_tokens=cost.tokens) for job in jobs])
        self.admission.give(cost)
        self.tokens[caller] += cost.tokens

    async def client(self, caller: Caller, seed: int, lengths: Callable[[random.Random], list[int]]) -> None:
        chance = random.Random(seed)
        await asyncio.sleep(chance.random() * 0.1)
        while True:
            await self.call(caller, lengths(chance), chance)


_IDS = np.zeros(1 << 16, np.int32)


def _ids(number: int) -> np.ndarray:
    return _IDS[:number]


def drawn(chance: random.Random) -> list[int]:
    return [chance.randint(*CALL_TOKENS) for _ in range(CALL_SEQUENCES)]


async def _served(
    callers: Sequence[Caller], seconds: float, weights: dict[str, float] | None = None, warm_s: float = 0.0
) -> tuple[Counter[Caller], Teacher]:
    """Tokens of each caller in `seconds` after `warm_s`, all of them asking all the time."""
    teacher = Teacher(weights or {})
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(teacher.scheduler.run())]
        tasks += [group.create_task(teacher.client(caller, n, drawn)) for n, caller in enumerate(callers)]
        await asyncio.sleep(warm_s)
        before, computed = teacher.tokens.copy(), teacher.engine.tokens
        await asyncio.sleep(seconds)
        after, teacher.rate = teacher.tokens.copy(), (teacher.engine.tokens - computed) / seconds
        for task in tasks:
            task.cancel()
    after.subtract(before)
    return after, teacher


def fleet(num_clients: int, num_tenants: int, seconds: float) -> dict[str, float]:
    """Clients, an experiment each, spread over tenants of equal weights; against one experiment with as many calls at a
    time, at most 1,000."""
    callers = [Caller(f"tenant-{n % num_tenants}", f"experiment-{n}") for n in range(num_clients)]
    got, teacher = simulated(lambda: _served(callers, seconds, warm_s=seconds / 4))
    alone = [Caller("alone")] * min(num_clients, 1000)  # one experiment, as many calls at a time
    _, greedy = simulated(lambda: _served(alone, seconds / 4, warm_s=seconds / 16))
    per_tenant: Counter[str] = Counter()
    for caller, tokens in got.items():
        per_tenant[caller.tenant] += tokens
    return {
        "throughput_ratio": teacher.rate / greedy.rate,
        "jain_index_tenants": jain(list(per_tenant.values())),
        "jain_index_experiments": jain([got[caller] for caller in callers]),
        "least_tokens": min(got[caller] for caller in callers),
        "most_queued_tokens": teacher.most_queued,
        "most_flows": teacher.most_flows,
        "refused": teacher.refused,
    }


def weighted(num_clients: int, seconds: float) -> dict[str, float]:
    """Three tenants of weights 1, 2 and 4, with as many clients each."""
    weights = {"one": 1.0, "two": 2.0, "four": 4.0}
    callers = [Caller(name, f"experiment-{n}") for n in range(num_clients // 3) for name in weights]
    got, _ = simulated(lambda: _served(callers, seconds, weights, warm_s=seconds / 4))
    per_tenant: Counter[str] = Counter()
    for caller, tokens in got.items():
        per_tenant[caller.tenant] += tokens
    return {"weighted_share_error": share_error(per_tenant, weights)}


def serial(num_clients: int, calls: int) -> dict[str, float]:
    """A tenant that asks one call after another, next to one with thousands at a time: the 95th percentile of its
    latency over that of the same calls alone."""

    async def latencies(others: int) -> list[float]:
        teacher, took, now = Teacher(), [], asyncio.get_running_loop().time
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(teacher.scheduler.run())]
            for n in range(others):
                tasks.append(group.create_task(teacher.client(Caller("many", f"experiment-{n}"), n, drawn)))
            await asyncio.sleep(5.0)
            chance = random.Random(-1)
            for _ in range(calls):
                began = now()
                await teacher.call(Caller("serial"), SERIAL_CALL, chance)
                took.append(now() - began)
                await asyncio.sleep(chance.random() * 0.05)
            for task in tasks:
                task.cancel()
        return took

    def p95(values: list[float]) -> float:
        return statistics.quantiles(values, n=20)[-1]

    return {"serial_p95_ratio": p95(simulated(lambda: latencies(num_clients))) / p95(simulated(lambda: latencies(0)))}
