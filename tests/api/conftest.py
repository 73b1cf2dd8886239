"""What the client's tests run against: both transports of a fake teacher, with waits too short to notice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import stamina
from fake_teacher import SERVE

from teacher_api import asking


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(asking, "WAIT_INITIAL_S", 0.005)
    monkeypatch.setattr(asking, "WAIT_JITTER_S", 0.005)
    before = stamina.instrumentation.get_on_retry_hooks()
    stamina.instrumentation.set_on_retry_hooks([])
    yield
    stamina.instrumentation.set_on_retry_hooks(before)


@pytest.fixture(params=["grpc", "http"])
def serve(request: pytest.FixtureRequest) -> Any:
    return SERVE[request.param]
