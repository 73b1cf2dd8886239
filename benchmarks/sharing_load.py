"""Who asks, each kind in a process of its own (systems.Child): callers of one teacher, an AsyncTeacherClient each with
a key and an experiment, that send call after call; and a backend that is fed without a server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.sharing_figures import Call
from teacher_api.client import AsyncTeacherClient
from teacher_api.types import CallMetadata, Completion, ScoreOptions, ScoreRequest, Scores
from teacher_server.backends import create
from teacher_server.backends.base import ScoreJob
from teacher_server.config import ServerConfig

TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the calls: sequences of random tokens, all of their positions scored."""

    sequences: int
    tokens: tuple[int, int]  # least and most of a sequence
    top_k: int
    vocabulary: int

    def request(self, random: np.random.Generator) -> ScoreRequest:
        low, high = self.tokens
        lengths = random.integers(low, high + 1, self.sequences)
        completions = [
            Completion(str(i), random.integers(2, self.vocabulary, length, dtype=np.int32))
            for i, length in enumerate(lengths)
        ]
        return ScoreRequest(completions, options=ScoreOptions(top_k=self.top_k))


@dataclass(frozen=True, slots=True)
class Who:
    """A caller, and how many calls it keeps in flight."""

    key: str
    experiment: str
    in_flight: int = 1


class Callers:
    """All of `who` at one teacher. Instants are of time.monotonic(), which is the same in all processes."""

    def __init__(self, url: str, who: list[Who], shape: Shape, seed: int = 0) -> None:
        self._runner = asyncio.Runner()
        self._shape = shape
        self._seed, self._round = seed, 0
        self._who = who
        self._clients = self._runner.run(self._open(url))

    async def _open(self, url: str) -> list[AsyncTeacherClient]:
        clients = []
        for one in self._who:
            clients.append(
                AsyncTeacherClient(
                    url,
                    api_key=one.key or None,
                    timeout_s=TIMEOUT_S,
                    attempt_timeout_s=TIMEOUT_S,
                    max_concurrency=one.in_flight,
                    metadata=CallMetadata(experiment=one.experiment),
                )
            )
            await clients[-1].info()
        return clients

    def close(self) -> None:
        async def all_closed() -> None:
            for client in self._clients:
                await client.close()

        self._runner.run(all_closed())
        self._runner.close()

    def ready(self) -> None:
        """Returns once all of them know their teacher."""

    def for_seconds(self, seconds: float) -> list[list[Call]]:
        """Everybody asks all the time, for so long; what was answered, of each caller. Waits for the last answers."""
        end = time.monotonic() + seconds
        return self._runner.run(self._all(lambda: time.monotonic() < end))

    def calls(self, number: int) -> list[list[Call]]:
        """So many calls, of all of them together."""
        left = iter(range(number))
        return self._runner.run(self._all(lambda: next(left, None) is not None))

    async def _all(self, is_more: Callable[[], bool]) -> list[list[Call]]:
        self._round += 1
        found: list[list[Call]] = [[] for _ in self._who]

        async def ask(number: int, slot: int) -> None:
            random = np.random.Generator(np.random.Philox([self._seed, self._round, number, slot]))
            while is_more():
                request = self._shape.request(random)
                tokens = sum(len(completion.token_ids) for completion in request.completions)
                began = time.monotonic()
                await self._clients[number].score(request)
                found[number].append(Call(began, time.monotonic(), tokens))

        async with asyncio.TaskGroup() as group:
            for number, one in enumerate(self._who):
                for slot in range(one.in_flight):
                    group.create_task(ask(number, slot))
        return found


class InProcess:
    """A backend without server and wire, fed as the scheduler feeds it: in the batches that its policy allows, as many
    at a time as it takes."""

    def __init__(self, config: ServerConfig) -> None:
        self._backend = create(config)
        self._backend.load()
        self._runner = asyncio.Runner()

    def close(self) -> None:
        self._runner.run(self._backend.close())
        self._runner.close()

    def seconds(self, number: int, shape: Shape, seed: int) -> float:
        """Of what `number` calls of `shape`, all of whose sequences are as long, ask for."""
        random = np.random.Generator(np.random.Philox(seed))
        jobs = []
        for request in [shape.request(random) for _ in range(number)]:
            for completion in request.completions:
                positions = np.arange(1, len(completion.token_ids), dtype=np.int32)
                jobs.append(ScoreJob(str(len(jobs)), completion.token_ids, 0, positions, request.options))
        policy = self._backend.policy
        size = max(1, min(policy.max_sequences, policy.max_tokens // shape.tokens[1]))
        batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        return self._runner.run(self._run(batches, policy.max_concurrent_batches))

    async def _run(self, batches: list[list[ScoreJob]], at_a_time: int) -> float:
        left = iter(batches)

        async def feed() -> None:
            for batch in left:
                for result in await self._backend.score(batch):
                    if not isinstance(result, Scores):
                        raise result

        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(at_a_time):
                group.create_task(feed())
        return time.monotonic() - started
