"""Around every request of both transports: its id, one count, one log line, one span. Knows no wire."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import structlog

from teacher_api.errors import InvalidRequest
from teacher_api.tracing import Tracing
from teacher_server.caller import Caller
from teacher_server.counts import OK, Counts, Outcome
from teacher_server.problem import REQUEST_ID_HEADER, request_id_of

log = structlog.get_logger("teacher_server.requests")
POLLED = "status"
"""What each open page asks for every two seconds: not traced, and not logged at info where it is answered."""
SERVER_FAULTS = frozenset({"internal", "backend_failed", "invalid_backend_output", "unavailable"})
"""Outcomes that make a span an error: the others are the caller's doing, or the answer to it."""

_in_work: ContextVar[Outcome | None] = ContextVar("in_work", default=None)


def called_by(caller: Caller) -> None:
    """Says of the request in work, if there is one, for which experiment it is: its message may know better than its
    headers."""
    outcome = _in_work.get()
    if outcome is not None:
        outcome.called_by(caller)


@contextlib.contextmanager
def watched(
    counts: Counts, tracing: Tracing, transport: str, method: str, headers: Mapping[str, str]
) -> Iterator[Outcome]:
    """Around one request; whoever handles it says in the Outcome how it ends. Every log line within has its id.

    Args:
        headers: or gRPC metadata, names in lower case.
    """
    request_id = _usable_id(headers.get(REQUEST_ID_HEADER))
    told = {"preceptor.request_id": request_id, "preceptor.transport": transport}
    with (
        counts.request(transport, method) as outcome,
        (Tracing() if method == POLLED else tracing).span(
            f"teacher.{method}", told, parent=tracing.incoming(headers), server=True
        ) as span,
    ):
        outcome.request_id = request_id
        _in_work.set(outcome)  # of this task and those that it makes: each request has its own
        ids = {"request_id": request_id} | ({"trace_id": span.trace_id} if span.trace_id else {})
        with structlog.contextvars.bound_contextvars(**ids):
            try:
                yield outcome
            finally:
                who = {"tenant": outcome.tenant, "experiment": outcome.experiment, "run": outcome.run}
                span.set({"preceptor.outcome": outcome.name, **{f"preceptor.{key}": who[key] for key in who}})
                if outcome.name in SERVER_FAULTS:
                    span.fail(outcome.name)
                tell = log.debug if method == POLLED and outcome.name == OK else log.info
                tell(
                    "request",
                    transport=transport,
                    method=method,
                    outcome=outcome.name,
                    **who,
                    seconds=round(outcome.seconds(), 6),
                    **({} if outcome.name == OK else {"field": outcome.about}),
                )


def _usable_id(sent: str | None) -> str:
    """The caller's where it may be repeated; a new one where there is none, or one that is about to be refused."""
    try:
        return request_id_of(sent)
    except InvalidRequest:
        return request_id_of(None)
