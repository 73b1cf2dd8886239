"""What Prometheus reads, on a port and a thread of its own: it answers while the model loads and while the event loop
is busy. The only importer of prometheus_client. Counts nothing: it reads what the service knows (counts.py).

The sets of labels are closed: transports, outcomes from the table of errors, and what /v1/info says of the one model.
docs/operations.md lists the metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from teacher_server.service import TeacherService

STOP_S = 1.0


class ServiceMetrics(Collector):
    """One service's state at the time of a scrape."""

    def __init__(self, service: TeacherService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield from self._teacher()
        yield from self._work()
        yield from self._load()

    def _teacher(self) -> Iterator[Metric]:
        """Once the model is loaded."""
        info = self._service.known_info
        if info is None:
            return
        facts = {
            "model": info.model_name,
            "fingerprint": info.fingerprint,
            "engine": info.engine,
            "scoring_path": info.scoring_path,
        }
        yield InfoMetricFamily("preceptor_teacher", "Who is served, as /v1/info says it.", value=facts)
        yield GaugeMetricFamily(
            "preceptor_scoring_path_fallback",
            "1 where --scoring-path auto fell back from the fused path; scoring_path_note in /v1/info says why.",
            value=float(bool(info.scoring_path_note)),
        )

    def _work(self) -> Iterator[Metric]:
        counts = self._service.counts
        received = CounterMetricFamily(
            "preceptor_requests_received", "Requests and calls but the probes.", labels=["transport"]
        )
        finished = CounterMetricFamily(
            "preceptor_requests_finished",
            "Those that are over, by outcome: ok, or the kind of the error.",
            labels=["transport", "outcome"],
        )
        for transport, ended in counts.requests.items():
            received.add_metric([transport], ended.received)
            for outcome, number in ended.by_outcome.items():
                finished.add_metric([transport, outcome], number)
        yield received
        yield finished
        yield CounterMetricFamily(
            "preceptor_sequences_received",
            "Sequences of the requests that were not refused as a whole.",
            value=counts.sequences.received,
        )
        sequences = CounterMetricFamily(
            "preceptor_sequences_finished", "Sequences that are over, by outcome.", labels=["outcome"]
        )
        for outcome, number in counts.sequences.by_outcome.items():
            sequences.add_metric([outcome], number)
        yield sequences
        tokens = CounterMetricFamily(
            "preceptor_scored_tokens",
            "Tokens of the sequences that were scored: computed by the model, or from its cache.",
            labels=["source"],
        )
        tokens.add_metric(["computed"], counts.computed_tokens)
        tokens.add_metric(["cached"], counts.cached_tokens)
        yield tokens
        yield CounterMetricFamily("preceptor_scored_positions", "Positions that got a score.", value=counts.positions)
        yield CounterMetricFamily(
            "preceptor_engine_restarts",
            "Times that an engine which had died was started again.",
            value=self._service.engine_restarts,
        )

    def _load(self) -> Iterator[Metric]:
        admission = self._service.admission
        for name, what, value in (
            ("queue_tokens", "Tokens accepted and not yet answered.", admission.tokens),
            ("queue_limit_tokens", "Most of them, --queue-tokens.", admission.max_tokens),
            ("queue_bytes", "Bytes of answers accepted and not yet delivered.", admission.num_bytes),
            ("queue_limit_bytes", "Most of them, --queue-bytes.", admission.max_bytes),
            ("receiving_bytes", "Bytes of HTTP bodies being received.", self._service.receiving.num_bytes),
            ("open_streams", "Streams open.", self._service.open_streams),
        ):
            yield GaugeMetricFamily(f"preceptor_{name}", what, value=value)


class MetricsServer:
    """Serves the metrics of `service` until `close`. Raises ValueError where the port can't be had."""

    def __init__(self, service: TeacherService, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(ServiceMetrics(service))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"cannot listen for metrics on {host}:{port}: {reason}") from None
        self.port: int = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(STOP_S)
