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

    async def caller() -> int:
        done = 0
        while time.monotonic() < end:
            status, _, at = await ask(http, f"unloaded-{next(numbers)}")
            assert status == 200
            done += at <= end
        return done

    return sum(await asyncio.gather(*(caller() for _ in range(3)))) / seconds


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
    """The 99th percentile of how late a short sleep ends, server or no server: what a busy machine does to any call."""
    late, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.monotonic()
        await asyncio.sleep(0.01)
        late.append(time.monotonic() - started - 0.01)
    return float(np.percentile(late, 99))


async def drill(server: Server, seconds: float) -> tuple[float, float, list[float], int, float]:
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
    async with httpx.AsyncClient(base_url=server.http_url, limits=limits, timeout=60) as http:
        before = await unloaded(http, 4.0)
        started = time.monotonic()
        (answers, most), late_s = await asyncio.gather(burst(http, server, TIMES * before, seconds), lag(seconds))
    assert {status for status, *_ in answers} == {200, 429}
    good = [at for status, _, at in answers if status == 200]
    goodput = sum(at <= started + seconds for at in good) / seconds
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
        f"{1000 * p99:.0f} ms (< 50; a bare sleep was {1000 * late_s:.0f} ms late); {goodput:.1f} calls/s done, {before:.1f} unloaded",
    )
