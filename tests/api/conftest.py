"""What the client's tests run against: both transports of a fake teacher."""

from __future__ import annotations

from typing import Any

import pytest
from fake_teacher import SERVE


@pytest.fixture(params=["grpc", "http"])
def serve(request: pytest.FixtureRequest) -> Any:
    return SERVE[request.param]
