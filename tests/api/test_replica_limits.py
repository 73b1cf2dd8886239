"""A replica that can do less than clients were told: it gets no request that it would refuse for good."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

import pytest
from client_calls import a_request, check
from fake_teacher import FakeTeacher

from teacher_api import replicas
from teacher_api.client import AsyncTeacherClient

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_retries")]


@pytest.mark.parametrize("less", [{"max_completions": 2}, {"features": ("exact_tail",)}], ids=["limit", "feature"])
def test_a_replica_that_joins_later_and_can_do_less_is_left_out_while_there_is_another(
    serve: Any, less: dict[str, Any], caplog: Any, monkeypatch: pytest.MonkeyPatch
):
    """Requests are of the size that the first one takes: the smaller one would refuse them for good."""

    class Smaller(FakeTeacher):
        @property
        def info(self) -> Any:
            return replace(super().info, **less)

    monkeypatch.setattr(replicas, "REFUSED_PROBE_S", 0.2)

    async def main() -> None:
        small = Smaller()
        small.down = True
        large = FakeTeacher()
        async with contextlib.AsyncExitStack() as stack:
            second = await stack.enter_async_context(serve(small))
            async with serve(large) as first:
                client = await stack.enter_async_context(AsyncTeacherClient([first, second], timeout_s=20))
                check(a_request(5), await client.score(a_request(5)))
                small.down = False
                async with asyncio.timeout(15):
                    while "stays left out" not in caplog.text:
                        await asyncio.sleep(0.01)
                assert next(iter(less)) in caplog.text or "features" in caplog.text
                for _ in range(10):
                    check(a_request(5), await client.score(a_request(5)))
                assert not small.asked
            check(a_request(1), await client.score(a_request(1)))  # nobody else is left
            assert small.asked

    asyncio.run(main())
