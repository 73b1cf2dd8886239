"""Ten times more than a server can do (S8): its queue stays within its bound, who doesn't fit is told so at once, and
as much is done as without the burst."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import httpx
import numpy as np
import pytest
from reliability import holds
from serving import PROTOBUF, Server, serving

from teacher_api import wire
from teacher_api.types import Completion, ScoreRequest

pytestmark = pytest.mark.slow

TOKENS = 32  # of a call
FORWARD_S = 0.25  # each call is one: four a second are what it can do
QUEUED = 8  # calls
TIMES = 10
REJECT_S, GOODPUT = 0.05, 0.9
TRIES = 2  # where the machine makes everything late, which says nothing of the server


async def ask(http: httpx.AsyncClient, name: str) -> tuple[int, float, float]:
    """Status, seconds, and when it was answered."""
    request = ScoreRequest([Completion(name, np.ones(TOKENS, np.int32))])
    body, started = wire.encode_request(request).SerializeToString(), time.monotonic()
    answer = await http.post("/v1/score", content=body, headers=PROTOBUF)
    if answer.status_code == 429:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["kind"] == "overloaded"
    return answer.status_code, time.monotonic() - started, time.monotonic()


async def unloaded(http: httpx.AsyncClient, seconds: float) -> float:
    """Calls per second that three callers get done, which are enough to keep the engine busy and the queue open."""
    end, numbers = time.monotonic() + seconds, itertools.count()

    async def caller() -> list[float]:
        done = []
        while time.monotonic() < end:
            status, _, at = await ask(http, f"unloaded-{next(numbers)}")
            assert status == 200
            done.append(at)
        return done

    return per_second([at for done in await asyncio.gather(*(caller() for _ in range(3))) for at in done])


def per_second(moments: list[float]) -> float:
    return (len(moments) - 1) / (max(moments) - min(moments))


async def burst(http: httpx.AsyncClient, server: Server, rate: float, seconds: float) -> tuple[list[Any], int]:
    """Calls sent at `rate` whatever becomes of them; and the most tokens that were held at a time."""
    admission, started, most = server.app.service.admission, time.monotonic(), 0
    calls = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
        calls.append(asyncio.create_task(ask(http, f"burst-{number}")))
        most = max(most, admission.tokens)
    return await asyncio.gather(*calls), most


async def lag(seconds: float) -> float:
    """The 99th percentile of how late it is by its own clock, a hundred times a second: what a busy machine does to any
    call. One that stands still makes each of the moments late that it lets pass, as it does calls."""
    late, started = [], time.monotonic()
    for tick in range(int(100 * seconds)):
        moment = started + tick / 100
        await asyncio.sleep(max(0.0, moment - time.monotonic()))
        late.append(time.monotonic() - moment)
    return float(np.percentile(late, 99))


async def drill(server: Server, seconds: float) -> tuple[float, float, list[float], int, float]:
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=server.http_url, limits=limits, timeout=60) as http:
        before = await unloaded(http, 4.0)
        (answers, most), late_s = await asyncio.gather(burst(http, server, TIMES * before, seconds), lag(seconds))
    assert {status for status, *_ in answers} == {200, 429}
    goodput = per_second([at for status, _, at in answers if status == 200])
    return before, goodput, [took for status, took, _ in answers if status == 429], most, late_s


@pytest.mark.parametrize("seconds", [8.0, pytest.param(60.0, marks=pytest.mark.long)])
def test_a_burst_of_ten_times_the_work_is_refused_at_once_and_costs_nothing_of_it(
    seconds: float, record_property: Any
) -> None:
    bound = QUEUED * TOKENS
    limits = {"max_sequence_tokens": TOKENS, "queue_tokens": bound}
    for _ in range(TRIES):
        with serving(fake_latency_s=FORWARD_S, batch_sequences=1, **limits) as server:
            before, goodput, rejects, most, late_s = asyncio.run(drill(server, seconds))
        if late_s < REJECT_S / 10:
            break
    assert most <= bound
    assert most >= bound - TOKENS, "the bound was never reached"
    assert goodput >= GOODPUT * before
    p99 = float(np.percentile(rejects, 99))
    assert p99 < REJECT_S + 2 * late_s  # a call waits for a processor twice: at the server, and with its answer
    holds(
        record_property,
        "S8",
        f"{TIMES}× for {seconds:g} s: at most {most} of {bound} tokens queued; {len(rejects)} refused, p99 "
        f"{1000 * p99:.0f} ms (< 50; a clock: {1000 * late_s:.0f} ms late); "
        f"{goodput:.1f} calls/s done, {before:.1f} unloaded",
    )
