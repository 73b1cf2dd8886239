"""One stream's budget where it is easily lost: in the moment in which a sequence has been accepted and nothing of it
has run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from teacher_api.types import ScoreOptions
from teacher_api.wire import DecodedRequest
from teacher_server.backends.base import ScoreJob
from teacher_server.cache import Lookup
from teacher_server.caller import Caller
from teacher_server.config import ServerConfig
from teacher_server.lifecycle import Lifecycle
from teacher_server.service import TeacherService
from teacher_server.stream import StreamSession


def a_job() -> ScoreJob:
    return ScoreJob("a", np.arange(4, dtype=np.int32), 0, np.arange(1, 4, dtype=np.int32), ScoreOptions())


async def silence() -> AsyncIterator[DecodedRequest]:
    await asyncio.Event().wait()
    yield  # type: ignore[misc]  # never reached: it makes this a generator


def test_a_caller_that_leaves_as_its_sequence_is_accepted_gives_the_budget_back(monkeypatch: Any) -> None:
    service = TeacherService(
        ServerConfig(model="m", backend="fake", cache={"enabled": False}), Lifecycle(stall_s=1.0, high_water=1.0)
    )
    begun = []

    async def run_one(lookup: Lookup, deadline: float) -> Any:
        begun.append(lookup.job.id)
        await asyncio.Event().wait()

    monkeypatch.setattr(service, "run_one", run_one)

    async def leaving() -> None:
        async with StreamSession(service, silence(), Caller(), None, Caller) as session:
            await session._room.acquire()
            session.in_work += 1
            await session._start(a_job(), 100, asyncio.get_running_loop().time() + 60, Caller(), "f")
            assert service.admission.tokens == 4
        assert session.in_work == 0

    asyncio.run(leaving())
    assert begun == [], "the task was to be cancelled before it began"
    assert (service.admission.tokens, service.admission.num_bytes) == (0, 0)
