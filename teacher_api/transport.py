"""What the client needs of a transport, and errors as HTTP carries them. A transport moves messages and turns every
failure into a TeacherError; it never retries and never looks inside an answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from teacher_api import errors
from teacher_api.errors import CorruptResponse, TeacherError, error_of_kind
from teacher_api.info import check_seal
from teacher_api.v1 import teacher_pb2 as pb

PROTOBUF = "application/x-protobuf"
REQUEST_ID = "x-request-id"
MAX_MESSAGE_BYTES = 1 << 30
"""Of one message either way: far above any server's stated limit, far below what breaks protobuf (2 GiB)."""


class Transport(Protocol):
    """One connection to one teacher. Every method gives up after `timeout_s` with DeadlineExceeded."""

    async def info(self, *, timeout_s: float, request_id: str, teacher: str = "") -> pb.TeacherInfo: ...

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float, request_id: str) -> pb.ScoreResponse: ...

    def stream(
        self, request: pb.ScoreRequest, *, timeout_s: float, request_id: str
    ) -> AsyncIterator[pb.ScoreFrame]: ...

    def head(self, request: pb.GetHeadRequest, *, timeout_s: float, request_id: str) -> AsyncIterator[pb.HeadChunk]: ...

    async def close(self) -> None: ...


M = TypeVar("M", bound=Message)


def parse(kind: type[M], data: bytes) -> M:
    """Raises CorruptResponse where `data` is no message of that kind."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise CorruptResponse(f"{len(data)} bytes that are no {kind.DESCRIPTOR.name}: {error}") from error


def parse_info(data: bytes) -> pb.TeacherInfo:
    """Raises CorruptResponse where `data` is no description of a teacher, or not the one that was sent."""
    message = parse(pb.TeacherInfo, data)
    check_seal(data, message)
    return message


_BY_STATUS: dict[int, type[TeacherError]] = {
    400: errors.InvalidRequest,
    401: errors.Unauthenticated,
    403: errors.PermissionDenied,
    404: errors.NotFound,
    408: errors.Incomplete,
    413: errors.TooLarge,
    422: errors.Unsupported,
    429: errors.Overloaded,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.Unavailable,
}
"""What an answer without a problem document means: something between us and the teacher gave it."""
_REDIRECTS = (301, 302, 303, 307, 308)


def error_of_problem(status: int, content_type: str, body: bytes, retry_after: str | None) -> TeacherError:
    """The error that an HTTP answer other than 200 stands for."""
    document: object = None
    if content_type.split(";")[0].strip() in ("application/problem+json", "application/json"):
        try:
            document = json.loads(body)
        except ValueError:
            document = None
    if isinstance(document, dict) and isinstance(document.get("kind"), str):
        seconds = document.get("retry_after_s")
        return error_of_kind(
            document["kind"],
            str(document.get("detail", "")),
            field=str(document.get("field", "")),
            retry_after_s=seconds_of(seconds if seconds is not None else retry_after),
            request_id=str(document.get("request_id", "")),
        )
    text = " ".join(body[:200].decode("utf-8", "replace").split())
    if not (status in _REDIRECTS or 400 <= status < 600):  # nobody's, but what became of 200 on its way
        return CorruptResponse(f"an answer of status {status}; expected 200, or that of an error")
    cls = _BY_STATUS.get(status, errors.InternalError)
    return cls(
        f"HTTP {status} without an error document: {text or 'empty body'}", retry_after_s=seconds_of(retry_after)
    )


def seconds_of(value: object) -> float | None:
    """A delay; dates and nonsense are as good as none."""
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
