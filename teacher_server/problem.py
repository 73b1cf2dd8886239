"""Errors as HTTP carries them: `application/problem+json` (RFC 9457) from the one table in teacher_api/errors.py, and
the request ids under which both transports report them."""

from __future__ import annotations

import json
import math
import re
import uuid

from teacher_api.errors import InvalidRequest, TeacherError

PROBLEM_TYPE = "application/problem+json"
REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id_of(sent: str | None) -> str:
    """The caller's request id, or a new one. Raises InvalidRequest where the caller's could break a log or a header."""
    if sent is None:
        return uuid.uuid4().hex
    if not _REQUEST_ID.fullmatch(sent):
        raise InvalidRequest(
            "expected 1 to 128 letters, digits, dots, colons, dashes or underscores", field=REQUEST_ID_HEADER
        )
    return sent


def problem(
    error: TeacherError, request_id: str, status: int | None = None
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of `error`. Never more than 4 KiB: message and field are bounded by TeacherError.

    Args:
        status: what HTTP says more precisely than the error's kind; None: the kind's own.
    """
    status = error.http_status if status is None else status
    body = {
        "type": f"urn:preceptor:error:{error.kind}",
        "title": error.kind.replace("_", " "),
        "status": status,
        "detail": error.message,
        "kind": error.kind,
        "retryable": error.retryable,
        "request_id": request_id,
    }
    headers = [(b"content-type", PROBLEM_TYPE.encode()), (REQUEST_ID_HEADER.encode(), request_id.encode())]
    if error.field:
        body["field"] = error.field
    if error.retry_after_s is not None:
        body["retry_after_s"] = round(error.retry_after_s, 3)
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    encoded = json.dumps(body, ensure_ascii=False).encode(errors="replace")
    headers.append((b"content-length", str(len(encoded)).encode()))
    return status, headers, encoded
