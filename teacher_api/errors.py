"""The one error table: every failure that can cross the wire, with its HTTP status, its gRPC code and whether a retry
can help. Server and client both read it; nothing else maps errors.

Tree (to add a kind: add a subclass here with its row, and its line in docs/protocol.md)::

    TeacherError
    ├── InvalidRequest          400  INVALID_ARGUMENT     a field is wrong: `field` names it
    ├── TooLarge                413  INVALID_ARGUMENT     over a stated limit
    ├── Unsupported             422  UNIMPLEMENTED        this teacher can't honour an option
    ├── FingerprintMismatch     412  FAILED_PRECONDITION  another teacher than the caller expects
    ├── Unauthenticated         401  UNAUTHENTICATED
    ├── PermissionDenied        403  PERMISSION_DENIED
    ├── NotFound                404  NOT_FOUND
    ├── Incomplete              408  UNAVAILABLE          retryable: the request did not come whole, and in time
    ├── Overloaded              429  RESOURCE_EXHAUSTED   retryable, with retry_after_s
    ├── Unavailable             503  UNAVAILABLE          retryable: starting, draining, or unreachable
    ├── BackendFailed           503  UNAVAILABLE          retryable: the engine failed on this work
    ├── InvalidBackendOutput    503  DATA_LOSS            retryable: short or non-finite output, withheld
    ├── CorruptResponse         502  DATA_LOSS            retryable: checksum or alignment failed at the client
    ├── DeadlineExceeded        504  DEADLINE_EXCEEDED    the caller's own deadline; not retried
    ├── Cancelled               499  CANCELLED
    └── InternalError           500  INTERNAL             a bug; never retried
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

MAX_MESSAGE_BYTES = 1024
MAX_TEACHER_CHARS = 128  # of a teacher's name that an error repeats


class TeacherError(Exception):
    """Base of all errors of the contract.

    Args:
        message: what was got, what was expected, what to do. Cut to 1,024 bytes.
        field: path of the offending request field, such as ``completions[3].token_ids[17]``.
        retry_after_s: seconds after which a retry is welcome (retryable kinds only).
        request_id: the id under which the server logged it.
    """

    kind: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"  # a name of grpc.StatusCode
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        message = message.encode("utf-8", "replace")[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore")
        super().__init__(message)
        self.message = message
        self.field = field[:256]
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.field, self.retry_after_s, self.request_id))

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{self.kind}: {where}{self.message}"


def _rebuild(
    cls: type[TeacherError], message: str, field: str, retry_after_s: float | None, request_id: str
) -> TeacherError:
    return cls(message, field=field, retry_after_s=retry_after_s, request_id=request_id)


class InvalidRequest(TeacherError, ValueError):
    kind, http_status, grpc_code = "invalid_request", 400, "INVALID_ARGUMENT"


class TooLarge(TeacherError, ValueError):
    kind, http_status, grpc_code = "too_large", 413, "INVALID_ARGUMENT"


class Unsupported(TeacherError, ValueError):
    kind, http_status, grpc_code = "unsupported", 422, "UNIMPLEMENTED"


class FingerprintMismatch(TeacherError):
    kind, http_status, grpc_code = "fingerprint_mismatch", 412, "FAILED_PRECONDITION"


class Unauthenticated(TeacherError):
    kind, http_status, grpc_code = "unauthenticated", 401, "UNAUTHENTICATED"


class PermissionDenied(TeacherError):
    kind, http_status, grpc_code = "permission_denied", 403, "PERMISSION_DENIED"


class NotFound(TeacherError):
    kind, http_status, grpc_code = "not_found", 404, "NOT_FOUND"


class Incomplete(TeacherError):
    kind, http_status, grpc_code, retryable = "incomplete", 408, "UNAVAILABLE", True


class Overloaded(TeacherError):
    kind, http_status, grpc_code, retryable = "overloaded", 429, "RESOURCE_EXHAUSTED", True


class Unavailable(TeacherError):
    kind, http_status, grpc_code, retryable = "unavailable", 503, "UNAVAILABLE", True


class BackendFailed(TeacherError):
    kind, http_status, grpc_code, retryable = "backend_failed", 503, "UNAVAILABLE", True


class InvalidBackendOutput(TeacherError):
    kind, http_status, grpc_code, retryable = "invalid_backend_output", 503, "DATA_LOSS", True


class CorruptResponse(TeacherError):
    kind, http_status, grpc_code, retryable = "corrupt_response", 502, "DATA_LOSS", True


class DeadlineExceeded(TeacherError, TimeoutError):
    kind, http_status, grpc_code = "deadline_exceeded", 504, "DEADLINE_EXCEEDED"


class Cancelled(TeacherError):
    kind, http_status, grpc_code = "cancelled", 499, "CANCELLED"


class InternalError(TeacherError):
    kind, http_status, grpc_code = "internal", 500, "INTERNAL"


KINDS: dict[str, type[TeacherError]] = {
    cls.kind: cls
    for cls in (
        InvalidRequest,
        TooLarge,
        Unsupported,
        FingerprintMismatch,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        Incomplete,
        Overloaded,
        Unavailable,
        BackendFailed,
        InvalidBackendOutput,
        CorruptResponse,
        DeadlineExceeded,
        Cancelled,
        InternalError,
    )
}


def unknown_teacher(name: str, served: Sequence[str]) -> NotFound:
    """For a request that names a teacher which is none of `served`, the adapters beside the base."""
    what = f"expected one of {', '.join(served)}, or none for the base" if served else "there is only the base"
    return NotFound(f"there is no teacher {name[:MAX_TEACHER_CHARS]!r}; {what}", field="teacher")


def error_of_kind(
    kind: str, message: str, *, field: str = "", retry_after_s: float | None = None, request_id: str = ""
) -> TeacherError:
    """The exception of `kind`; a kind this version doesn't know becomes an InternalError and is not retried."""
    cls = KINDS.get(kind, InternalError)
    text = message if cls.kind == kind else f"unknown error kind {kind!r}: {message}"
    return cls(text, field=field, retry_after_s=retry_after_s, request_id=request_id)
