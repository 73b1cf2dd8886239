"""What a tenant's rate comes to over sockets (S15): callers of both transports that come back when they are told to,
beside a tenant that has no rate."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from reliability import holds
from serving import PROTOBUF, Server, serving, status_of

from teacher_api import wire
from teacher_api.types import Completion, ScoreRequest

pytestmark = pytest.mark.slow

TOKENS = 32  # of a call
RATES = {"slow": 400, "fast": 800}  # tokens per second
KEYS = {name: f"pk_{name}-0123456789abcdef0123456789abcd" for name in (*RATES, "free")}
CALLERS = {"http": 8, "grpc": 24}  # of each tenant; over HTTP they are told whole seconds, and so are late
BURST_S = 2.0  # of a rate, for callers that a busy machine makes late
ALONE_S, WARM_S = 2.0, 2.0
LATE_S = 2.0  # for the last of those that are counted to come, too
STOOD_STILL_S, TRIES = 1.0, 3  # callers that can't come leave their buckets to run over: then it is measured again
NOISE_S = 0.02  # of a busy machine, on a call of a few milliseconds

Ask = Callable[[str, bytes], Awaitable[float | None]]
"""Of (key, message): None where it was answered, otherwise the seconds after which it is to come back."""


@dataclass
class Seen:
    """Of one tenant."""

    let_in: list[float] = field(default_factory=list)  # when, by the monotonic clock
    returns: int = 0
    at_once: int = 0  # returns that were let in


def message(name: str) -> bytes:
    return wire.encode_request(ScoreRequest([Completion(name, np.ones(TOKENS, np.int32))])).SerializeToString()


@asynccontextmanager
async def asking(server: Server) -> AsyncIterator[dict[str, Ask]]:
    """Callers that know nothing but what the protocol's documentation says."""
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=100)
    async with (
        httpx.AsyncClient(limits=limits, timeout=30) as http,
        grpc.aio.insecure_channel(server.grpc_target) as opened,
    ):
        score = opened.unary_unary("/teacher.v1.TeacherService/Score")

        async def over_http(key: str, body: bytes) -> float | None:
            headers = {**PROTOBUF, "authorization": f"Bearer {key}"}
            answer = await http.post(f"{server.http_url}/v1/score", content=body, headers=headers)
            if answer.status_code == 200:
                return None
            assert answer.status_code == 429, answer.text
            return float(int(answer.headers["retry-after"]))

        async def over_grpc(key: str, body: bytes) -> float | None:
            try:
                await score(body, timeout=30, metadata=(("authorization", f"Bearer {key}"),))
            except grpc.aio.AioRpcError as error:
                status, _, retry = status_of(error)
            else:
                return None
            assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], status.message
            return float(retry.retry_delay.ToNanoseconds() / 1e9)

        yield {"http": over_http, "grpc": over_grpc}


async def obedient(ask: Ask, tenant: str, name: str, seen: Seen, end: float) -> None:
    for number in itertools.count():
        body, was_told = message(f"{name}-{number}"), False
        while (wait_s := await ask(KEYS[tenant], body)) is not None:
            seen.returns += was_told
            was_told = True
            if time.monotonic() + wait_s > end:
                return
            await asyncio.sleep(wait_s)
        seen.returns += was_told
        seen.at_once += was_told
        seen.let_in.append(time.monotonic())


async def in_series(ask: Ask, end: float) -> list[float]:
    """Seconds of each call of the tenant without a rate. It never waits: a call as long as a bucket lasts is a machine
    that stood still."""
    took = []
    while time.monotonic() < end:
        started = time.monotonic()
        assert await ask(KEYS["free"], message("free")) is None, "another tenant's rate is none of its business"
        took.append(time.monotonic() - started)
        await asyncio.sleep(0.01)
    return took


async def measured(server: Server, seconds: float) -> tuple[dict[str, Seen], list[float], list[float], float]:
    async with asking(server) as ways, asyncio.TaskGroup() as group:
        alone = await in_series(ways["http"], time.monotonic() + ALONE_S)
        began = time.monotonic()
        end = began + WARM_S + seconds + LATE_S
        seen = {tenant: Seen() for tenant in RATES}
        for tenant, (way, ask) in itertools.product(RATES, ways.items()):
            for n in range(CALLERS[way]):
                group.create_task(obedient(ask, tenant, f"{tenant}-{way}-{n}", seen[tenant], end))
        beside = await in_series(ways["http"], end)
    return seen, alone, beside, began


@pytest.mark.parametrize("seconds", [12.0, pytest.param(60.0, marks=pytest.mark.long)])
def test_a_rate_is_kept_per_tenant_and_who_comes_back_when_told_is_let_in(seconds: float, record_property: Any) -> None:
    tenants: dict[str, Any] = {
        name: {"keys": [f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"]} for name, key in KEYS.items()
    }
    for name, rate in RATES.items():
        tenants[name] |= {"tokens_per_s": rate, "burst_tokens": int(BURST_S * rate)}
    for _ in range(TRIES):
        with serving(tenants=tenants) as server:
            seen, alone, beside, began = asyncio.run(measured(server, seconds))
        if max(beside) < STOOD_STILL_S:
            break
    figures = []
    for name, one in seen.items():
        since = began + WARM_S  # the burst is over by then
        tokens = TOKENS * sum(since <= at < since + seconds for at in one.let_in)
        assert tokens == pytest.approx(RATES[name] * seconds, rel=0.05), name
        assert one.returns >= 50
        assert one.at_once >= 0.95 * one.returns, name
        off = 100 * (tokens / (RATES[name] * seconds) - 1)
        figures.append(f"{off:+.1f} % of {RATES[name]} tokens/s, {one.at_once} of {one.returns} let in when told")
    (median, p95), (median_alone, p95_alone) = ([float(np.percentile(t, q)) for q in (50, 95)] for t in (beside, alone))
    assert median <= 2 * median_alone + NOISE_S
    holds(
        record_property,
        "S15",
        f"{seconds:g} s, 2 tenants of {sum(CALLERS.values())} callers: {'; '.join(figures)}; one without a rate: none "
        f"of {len(beside)} refused, median {1000 * median:.0f} ms, p95 {1000 * p95:.0f} ms ({1000 * median_alone:.0f}, "
        f"{1000 * p95_alone:.0f} alone)",
    )
