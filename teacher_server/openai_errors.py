"""Errors as OpenAI's clients read them, in vLLM's words: `{"error": {message, type, param, code}}`. Imports nothing
slow: it answers while the application behind it is still being built."""

from __future__ import annotations

import json
import math
import re

from teacher_api.errors import TeacherError, Unsupported
from teacher_server.problem import REQUEST_ID_HEADER

PREFIXES = ("/v1/completions", "/v1/models", "/v1/chat/")
"""Paths whose callers read this form. The last is not served: its callers are told so in the form that they read."""

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    412: "PreconditionFailedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    499: "ClientClosedRequestError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
_PARAMS = {
    "completions": "prompt",
    "options.top_k": "logprobs",
    "options.temperature": "teacher_temperature",
    "options.rank": "prompt_logprobs",
}
_SEQUENCE = re.compile(r"completions(\[\d+\])(?:\.(?:token_ids|ranges))?(.*)")


def speaks_openai(path: str) -> bool:
    return path.startswith(PREFIXES)


def openai_error(
    error: TeacherError, request_id: str, status: int | None = None
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of `error`.

    Args:
        status: what HTTP says more precisely than the error's kind; None: the kind's own, but 400 for what can't be
            honoured here, as OpenAI and vLLM have it.
    """
    if status is None:
        status = 400 if isinstance(error, Unsupported) else error.http_status
    inside = {
        "message": error.message,
        "type": _TYPES.get(status, "InternalServerError"),
        "param": _param(error.field),
        "code": status,
    }
    headers = [(b"content-type", b"application/json"), (REQUEST_ID_HEADER.encode(), request_id.encode())]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    body = json.dumps({"error": inside}, ensure_ascii=False).encode(errors="replace")
    headers.append((b"content-length", str(len(body)).encode()))
    return status, headers, body


def _param(field: str) -> str | None:
    """A field of our own contract, by the name that the caller gave it."""
    sequence = _SEQUENCE.fullmatch(field)
    if sequence:
        return f"prompt{sequence[1]}{sequence[2]}"
    return _PARAMS.get(field, field) or None
