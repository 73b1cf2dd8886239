"""A soak: a steady stream of questions to one teacher, some of them hurt on purpose, and what the teacher holds
meanwhile. Every answer is held to the fake teacher's distribution by its definition, in float64."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from faultproxy import FaultProxy, Hurt
from serving import request_of

from teacher_api import wire
from teacher_api.client import AsyncTeacherClient
from teacher_api.errors import TeacherError
from teacher_api.types import Completion, ScoreRequest
from teacher_server.backends.fake import noise_logits

VOCABULARY, PADDING = 512, 8  # the fake teacher's own
POISON, NAN = 500, 501
LATENCY_S, BATCH = 0.1, 2  # so that the engine, and not this machine, says what 100 % are: BATCH / LATENCY_S a second
SETTINGS = {
    "model": "fake",
    "backend": "fake",
    "http_port": 0,
    "grpc_port": 0,
    "lame_duck_s": 0,
    "grace_s": 5,
    "log_level": "error",
    "header_s": 1.0,
    "body_idle_s": 1.0,
    "batch_sequences": BATCH,
    "cache": {"memory_bytes": 1 << 20},  # full within a minute
    "fake_latency_s": LATENCY_S,
    "fake_poison_token": POISON,
    "fake_nan_token": NAN,
}
PROTOBUF = {"content-type": "application/x-protobuf"}


@dataclass
class Report:
    sent: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    hurts: Counter[str] = field(default_factory=Counter)
    held: list[dict[str, int]] = field(default_factory=list)  # while it ran, from the start
    before: dict[str, int] = field(default_factory=dict)  # idle, after a first load
    after: dict[str, int] = field(default_factory=dict)  # idle, at the end

    @property
    def growth_bytes(self) -> float:
        """Of the memory over the second half, by a straight line through it."""
        memory = np.array([one["rss"] for one in self.held[len(self.held) // 2 :]], np.float64)
        slope = np.polyfit(np.arange(len(memory)), memory, 1)[0]
        return float(slope * len(memory))


class Teacher:
    def __init__(self, leak_bytes: int = 0) -> None:
        tests = Path(__file__).parent
        command = [sys.executable, str(tests / "soakserver.py"), json.dumps(SETTINGS), "--leak", str(leak_bytes)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "MALLOC_ARENA_MAX": "2"},
        )
        ready = self._line()
        self.http_url, self.grpc_url = ready["http_url"], ready["grpc_url"]

    def _line(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        return dict(json.loads(self._child.stdout.readline()))

    def held(self) -> dict[str, int]:
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        return self._line()

    def close(self) -> int:
        """Lets it drain; its exit status."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(30)
        self._child.kill()
        assert self._child.stdout is not None
        self._child.stdout.close()
        return self._child.wait()


def expected(token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    positions = np.arange(1, len(token_ids), dtype=np.int32)
    logits = noise_logits(token_ids, positions, VOCABULARY + PADDING)
    return logits[np.arange(len(positions)), token_ids[1:]] - np.logaddexp.reduce(logits, axis=1)


class Soak:
    """Of one teacher: `load` of the engine's capacity for `seconds`, a share `hurt` of the calls hurt on purpose."""

    def __init__(self, teacher: Teacher, *, seconds: float, load: float, hurt: float, seed: int) -> None:
        self._teacher, self._seconds, self._hurt = teacher, seconds, hurt
        self._every_s = LATENCY_S / (BATCH * load)
        self._chance = random.Random(seed)
        self.report = Report()

    async def run(self) -> Report:
        await self._phase(min(3.0, self._seconds / 2))  # pools, caches and code that is loaded late
        self.report.before = await asyncio.to_thread(self._teacher.held)
        watching = asyncio.create_task(self._watch())
        await self._phase(self._seconds, watching)
        self.report.after = await asyncio.to_thread(self._teacher.held)
        return self.report

    async def _phase(self, seconds: float, watching: asyncio.Task[None] | None = None) -> None:
        """With clients of its own, and then a while in which nobody asks and what was left open is closed."""
        patience = {"timeout_s": 120.0, "attempt_timeout_s": 20.0, "max_concurrency": 64}
        async with contextlib.AsyncExitStack() as stack:
            self._proxy = stack.enter_context(FaultProxy(self._teacher.http_url.removeprefix("http://")))
            urls = (self._teacher.grpc_url, self._teacher.http_url)
            self._clients = [
                await stack.enter_async_context(AsyncTeacherClient(url, **patience))
                for url in (*urls, f"http://{self._proxy.target}")
            ]
            await self._clients[2].info()
            # Without our retries: a connection that is used again may be one that the server closes in that moment.
            fresh = httpx.Limits(max_keepalive_connections=0)
            self._http = await stack.enter_async_context(httpx.AsyncClient(timeout=60, limits=fresh))
            await self._stream(seconds)
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
        await asyncio.sleep(2 * SETTINGS["header_s"] + 0.5)

    async def _stream(self, seconds: float) -> None:
        """Calls begin at their times whether those before have ended or not."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with asyncio.TaskGroup() as group:
            for number in range(int(seconds / self._every_s)):
                await asyncio.sleep(max(0.0, started + number * self._every_s - loop.time()))
                hurt = self._chance.random() < self._hurt
                group.create_task(self._hurt_one() if hurt else self._ask(self._clients[number % 2]))

    async def _watch(self) -> None:
        while True:
            self.report.held.append(await asyncio.to_thread(self._teacher.held))
            await asyncio.sleep(min(1.0, self._seconds / 40))

    async def _ask(self, client: AsyncTeacherClient) -> None:
        ids = np.array([self._chance.randrange(400) for _ in range(12)], np.int32)
        name = f"q{self.report.sent}"
        self.report.sent += 1
        try:
            got = [scores async for scores in client.score_many([ScoreRequest([Completion(name, ids)])])]
        except TeacherError as error:
            self.report.wrong.append(f"{name}: {error}")
            return
        if [scores.id for scores in got] != [name]:
            self.report.wrong.append(f"{name}: answered {len(got)} times")
        elif np.abs(got[0].token_logprob - expected(ids)).max() > 1e-5:
            self.report.wrong.append(f"{name}: other scores")
        else:
            self.report.answered += 1

    async def _hurt_one(self) -> None:
        ways = {
            "cut in the answer": self._cut,
            "half-open": self._half_open,
            "bits flipped": self._flipped,
            "left in its body": self._left,
            "left while it waited": self._cancelled,
            "half its headers": self._half_headers,
            "poison": lambda: self._bad(POISON),
            "NaN": lambda: self._bad(NAN),
            "no such token": lambda: self._bad(10**6),
        }
        way = self._chance.choice(sorted(ways))
        self.report.hurts[way] += 1
        await ways[way]()

    async def _cut(self) -> None:
        self._proxy.faults.append(Hurt("cut", after=self._chance.randrange(600)))
        await self._ask(self._clients[2])

    async def _half_open(self) -> None:
        self._proxy.faults.append(Hurt("half-open", after=self._chance.randrange(200), direction="up"))
        client = AsyncTeacherClient(f"http://{self._proxy.target}", timeout_s=120, attempt_timeout_s=3)
        async with client:
            await self._ask(client)

    async def _flipped(self) -> None:
        """Anywhere in an answer of about this many bytes, its status line and headers too."""
        self._proxy.flip_next(self._chance.randrange(8 * 400))
        await self._ask(self._clients[2])

    async def _left(self) -> None:
        await self._half(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nhalf", wait=False)

    async def _half_headers(self) -> None:
        await self._half(b"POST /v1/score HTTP/1.1\r\nhost:", wait=True)

    async def _half(self, sent: bytes, *, wait: bool) -> None:
        host, port = self._teacher.http_url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        if wait:
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _cancelled(self) -> None:
        ids = np.arange(12, dtype=np.int32)
        call = asyncio.ensure_future(self._clients[0].score(ScoreRequest([Completion("left", ids)])))
        await asyncio.sleep(0.02)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async def _bad(self, token: int) -> None:
        """The others of its batch must not notice."""
        body = wire.encode_request(request_of([1, token, 3])).SerializeToString()
        answer = await self._http.post(f"{self._teacher.http_url}/v1/score", content=body, headers=PROTOBUF)
        if answer.status_code != (400 if token >= VOCABULARY else 200):
            self.report.wrong.append(f"token {token}: {answer.status_code}")
