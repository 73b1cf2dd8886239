"""The deadline that a caller gives over HTTP: gRPC's own header, `grpc-timeout`, which its proxies know as well. It
runs from the moment at which the head of the request has come. Knows no route."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping

from fastapi import Request

from teacher_api.errors import DeadlineExceeded, InvalidRequest, TeacherError

HEADER = "grpc-timeout"
PATTERN = "[0-9]{1,8}[HMSmun]"
"""As gRPC over HTTP/2 has it."""
_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def ends_at(headers: Mapping[str, str]) -> float | None:
    """Event-loop time at which the deadline of a request that comes now is over; None: it has none.

    Args:
        headers: with lower-case names.

    Raises:
        InvalidRequest: the header is there and no such value.
    """
    value = headers.get(HEADER)
    if value is None:
        return None
    if not re.fullmatch(PATTERN, value, re.ASCII) or not int(value[:-1]):
        raise InvalidRequest(
            "expected 1 to 8 digits, above 0, and one of H, M, S, m (milliseconds), u, n: 2500m is 2.5 s", field=HEADER
        )
    return asyncio.get_running_loop().time() + int(value[:-1]) * _SECONDS[value[-1]]


def left_s(request: Request) -> float | None:
    """Seconds until the caller's deadline; None: it gave none. Raises DeadlineExceeded once it is over."""
    end: float | None = request.scope["ends_at"]
    if end is None:
        return None
    left = end - asyncio.get_running_loop().time()
    if left <= 0:
        raise _late()
    return left


@contextlib.asynccontextmanager
async def in_time(request: Request) -> AsyncIterator[None]:
    """Gives the block up with DeadlineExceeded when the caller's deadline is over."""
    left_s(request)
    try:
        async with asyncio.timeout_at(request.scope["ends_at"]) as limit:
            yield
    except TeacherError:
        raise
    except TimeoutError:
        if not limit.expired():
            raise
        raise _late() from None


def _late() -> DeadlineExceeded:
    return DeadlineExceeded(f"the deadline that {HEADER} gave is over")
