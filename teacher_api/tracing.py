"""Traces by OpenTelemetry (extra `trace`), for whoever wants them: the one module that imports it, and only when a
program asks for traces or traces by itself. Off, nothing of it is loaded and every call here does nothing.

Invariants: ids come from the system's randomness, so that no seeded generator is touched; ending never hangs on a
collector that does not answer.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

PATH = "/v1/traces"
SEND_S = 5.0
"""Longest time for one message to the collector."""
CLOSE_S = 3.0
"""Longest wait at the end for what has not been sent."""
DELAY_MS = 1000.0
Value = str | int | float | bool
Attributes = Mapping[str, Value]


def headers() -> dict[str, str]:
    """The `traceparent` (W3C Trace Context) of the span that is current, in a program that uses OpenTelemetry."""
    if "opentelemetry.trace" not in sys.modules:
        return {}
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found)
    return found


class Span:
    """Of a piece of work that goes on. `context` is what its parts are children of; None: it is not traced."""

    __slots__ = ("_span", "context")

    def __init__(self, span: Any = None, context: Any = None) -> None:
        self._span = span
        self.context = context

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits; empty without a trace."""
        return "" if self._span is None else f"{self._span.get_span_context().trace_id:032x}"

    def set(self, attributes: Attributes) -> None:
        if self._span is not None:
            self._span.set_attributes(dict(attributes))

    def fail(self, what: str) -> None:
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, what)

    def end(self) -> None:
        if self._span is not None:
            self._span.end()


class Tracing:
    """Where spans go; `Tracing()` is off. Any thread may use it."""

    def __init__(self, tracer: Any = None, processor: Any = None) -> None:
        self._tracer = tracer
        self._processor = processor

    @classmethod
    def to(cls, endpoint: str, *, service: str, share: float = 1.0) -> Tracing:
        """Sends to the collector at `endpoint`, by OTLP over HTTP; "" gives one that is off.

        Args:
            endpoint: base URL, such as http://collector:4318.
            service: `service.name` of what is sent, unless OTEL_SERVICE_NAME says otherwise.
            share: of the traces that begin here, 0 to 1; a caller's own trace is followed if the caller's is recorded.

        Raises:
            ValueError: no URL of a collector, or the extra `trace` is not installed.
        """
        if not endpoint:
            return cls()
        split = urlsplit(endpoint)
        if split.scheme not in ("http", "https") or not split.hostname or split.path not in ("", "/"):
            raise ValueError(f"got {endpoint!r:.200}; expected the base URL of a collector, such as http://host:4318")
        try:
            return cls(*_provider(endpoint.rstrip("/") + PATH, service, share))
        except ImportError:
            raise ValueError("needs OpenTelemetry; expected the extra: pip install 'preceptor[trace]'") from None

    @property
    def is_on(self) -> bool:
        return self._tracer is not None

    def current(self) -> Any:
        """The context of the current span, to be handed to other threads and tasks; None where it is not traced."""
        if self._tracer is None:
            return None
        from opentelemetry import context, trace

        return context.get_current() if trace.get_current_span().is_recording() else None

    def incoming(self, carried: Mapping[str, str]) -> Any:
        """The context that a caller's headers (lower case) name; what is not well-formed is as good as none."""
        if self._tracer is None:
            return None
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        return TraceContextTextMapPropagator().extract(carried, context=Context())

    def open(self, name: str, attributes: Attributes, *, parent: Any = None, server: bool = False) -> Span:
        """A span that the caller ends; without a parent it begins a trace."""
        if self._tracer is None:
            return Span()
        from opentelemetry import trace
        from opentelemetry.context import Context

        kind = trace.SpanKind.SERVER if server else trace.SpanKind.INTERNAL
        within = Context() if parent is None else parent
        span = self._tracer.start_span(name, context=within, kind=kind, attributes=dict(attributes))
        return Span(span, trace.set_span_in_context(span, within))

    @contextlib.contextmanager
    def span(self, name: str, attributes: Attributes, *, parent: Any = None, server: bool = False) -> Iterator[Span]:
        """As `open`; within the block the span is the current one of this thread or task."""
        if self._tracer is None:
            yield Span()
            return
        from opentelemetry import context

        span = self.open(name, attributes, parent=parent, server=server)
        token = context.attach(span.context)
        try:
            yield span
        finally:
            context.detach(token)
            span.end()

    def past(self, name: str, attributes: Attributes, parent: Any, started_ns: int, ended_ns: int) -> None:
        """A span that is over, by the time of day in nanoseconds."""
        if self._tracer is not None and parent is not None:
            span = self._tracer.start_span(name, context=parent, attributes=dict(attributes), start_time=started_ns)
            span.end(ended_ns)

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Sends what is left, for as long as `limit_s`."""
        if self._processor is not None:
            ending = threading.Thread(target=self._processor.shutdown, name="traces-end", daemon=True)
            ending.start()
            ending.join(limit_s)


def _provider(url: str, service: str, share: float) -> tuple[Any, Any]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    class SystemIds(IdGenerator):
        """The SDK's own draws from Python's global generator, which belongs to whoever seeds it."""

        _random = random.SystemRandom()

        def generate_span_id(self) -> int:
            return self._random.randrange(1, 1 << 64)

        def generate_trace_id(self) -> int:
            return self._random.randrange(1, 1 << 128)

    name = os.environ.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(share)),
        resource=Resource.create({"service.name": name}),
        shutdown_on_exit=False,
        id_generator=SystemIds(),
    )
    exporter = OTLPSpanExporter(endpoint=url, timeout=SEND_S)
    processor = BatchSpanProcessor(exporter, schedule_delay_millis=DELAY_MS)
    provider.add_span_processor(processor)
    return provider.get_tracer("preceptor"), processor
