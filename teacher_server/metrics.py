"""What Prometheus reads, on a port and a thread of its own: it answers while the model loads and while the event loop
is busy. The only importer of prometheus_client. Counts nothing: it reads what the service knows (counts.py).

The sets of labels are closed: transports and what is asked of them, outcomes from the table of errors, tenants
that have keys, and what /v1/info says of the one model. docs/operations.md lists the metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from teacher_server.cache import SOURCES
from teacher_server.histogram import Histogram

if TYPE_CHECKING:
    from teacher_server.service import TeacherService

STOP_S = 1.0


class ServiceMetrics(Collector):
    """One service's state at the time of a scrape."""

    def __init__(self, service: TeacherService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield from self._server()
        yield from self._teacher()
        yield from self._requests()
        yield from self._work()
        yield from self._engine()
        yield from self._tenants()
        yield from self._cache()
        yield from self._load()

    def _server(self) -> Iterator[Metric]:
        lifecycle = self._service.lifecycle
        yield InfoMetricFamily("preceptor_build", "What runs here.", value={"version": version("preceptor")})
        for name, what, value in (
            ("ready", "1 while /readyz says yes: work that comes now is likely to be done.", lifecycle.readyz().ok),
            (
                "live",
                "0 where /livez says no: work waits, and no forward has finished for --stall-s.",
                lifecycle.livez().ok,
            ),
            ("engine_up", "0 while an engine that died is being started again.", lifecycle.engine_up),
        ):
            yield GaugeMetricFamily(f"preceptor_{name}", what, value=float(value))
        yield GaugeMetricFamily(
            "preceptor_last_progress_age_seconds",
            "Time for which work has waited without a forward having finished; 0 without work.",
            value=self._service.idle_s,
        )

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

    def _requests(self) -> Iterator[Metric]:
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
            for outcome, number in ended.by_outcome.items():
                finished.add_metric([transport, outcome], number)
            received.add_metric([transport], ended.received)  # last: never fewer than have finished
        yield received
        yield finished
        took = HistogramMetricFamily(
            "preceptor_request_duration_seconds",
            "Time from a request's headers to the last byte of its answer, whatever the outcome.",
            labels=["transport", "method"],
        )
        for labels, histogram in counts.took.items():
            _add(took, histogram, list(labels))
        yield took

    def _work(self) -> Iterator[Metric]:
        work = self._service.counts.all
        sequences = CounterMetricFamily(
            "preceptor_sequences_finished", "Sequences that are over, by outcome.", labels=["outcome"]
        )
        for outcome, number in work.sequences.by_outcome.items():
            sequences.add_metric([outcome], number)
        yield sequences
        yield CounterMetricFamily(
            "preceptor_sequences_received",
            "Sequences of the requests that were not refused as a whole.",
            value=work.sequences.received,
        )
        tokens = CounterMetricFamily(
            "preceptor_scored_tokens",
            "Tokens of the sequences that were scored: computed by the model, or from its cache.",
            labels=["source"],
        )
        tokens.add_metric(["computed"], work.computed_tokens)
        tokens.add_metric(["cached"], work.cached_tokens)
        yield tokens
        yield CounterMetricFamily("preceptor_scored_positions", "Positions that got a score.", value=work.positions)
        yield CounterMetricFamily(
            "preceptor_written_tokens",
            "Tokens of texts that the teacher wrote.",
            value=self._service.counts.written_tokens,
        )

    def _engine(self) -> Iterator[Metric]:
        forwards = self._service.forwards
        for name, what, histogram in (
            ("queue_wait_seconds", "Time that each sequence waited for its batch to begin.", forwards.waited),
            ("forward_duration_seconds", "Time that the engine took for each batch.", forwards.took),
            ("forward_sequences", "Sequences in each batch.", forwards.sequences),
        ):
            family = HistogramMetricFamily(f"preceptor_{name}", what, labels=[])
            _add(family, histogram, [])
            yield family
        yield CounterMetricFamily(
            "preceptor_forward_tokens", "Tokens of all batches that have ended.", value=forwards.tokens
        )
        yield GaugeMetricFamily("preceptor_forwards_running", "Batches in the engine.", value=forwards.running)
        yield CounterMetricFamily(
            "preceptor_engine_restarts",
            "Times that an engine which had died was started again.",
            value=self._service.engine_restarts,
        )

    def _tenants(self) -> Iterator[Metric]:
        """Of the tenants that have called, and the weights of those that are configured."""
        weights = GaugeMetricFamily("preceptor_tenant_weight", "Its share beside the others'.", labels=["tenant"])
        for tenant in self._service.tenants.names:
            weights.add_metric([tenant], self._service.tenants.weight_of(tenant))
        yield weights
        finished = CounterMetricFamily(
            "preceptor_tenant_requests_finished", "Requests for scores that are over.", labels=["tenant", "outcome"]
        )
        tokens = CounterMetricFamily(
            "preceptor_tenant_scored_tokens", "As preceptor_scored_tokens_total.", labels=["tenant", "source"]
        )
        for tenant, work in list(self._service.counts.tenants.items()):
            for outcome, number in work.requests.by_outcome.items():
                finished.add_metric([tenant, outcome], number)
            tokens.add_metric([tenant, "computed"], work.computed_tokens)
            tokens.add_metric([tenant, "cached"], work.cached_tokens)
        yield finished
        yield tokens

    def _cache(self) -> Iterator[Metric]:
        cache = self._service.cache
        looked = CounterMetricFamily(
            "preceptor_cache_sequences",
            "Sequences scored, by where their scores came from: memory, disk, work in flight for another, the engine.",
            labels=["tenant", "source"],
        )
        for tenant, tally in list(cache.tallies.items()):
            for source in SOURCES:
                looked.add_metric([tenant, source], tally.sequences[source])
        yield looked
        memory, disk = cache.memory, cache.disk
        tiers = {"memory": (memory.num_bytes, len(memory), memory.max_bytes, memory.evicted)}
        if disk is not None:
            tiers["disk"] = (disk.num_bytes, disk.num_entries, disk.max_bytes, disk.evicted)
            yield CounterMetricFamily(
                "preceptor_cache_disk_errors", "Reads and writes of the cache's disk that failed.", value=disk.errors
            )
            yield CounterMetricFamily(
                "preceptor_cache_disk_skipped", "Scores not kept on disk, for too much waited.", value=disk.skipped
            )
        evicted = CounterMetricFamily("preceptor_cache_evicted", "Scores given up for others.", labels=["tier"])
        for name, what, index in (
            ("bytes", "Bytes of kept scores.", 0),
            ("entries", "Sequences whose scores are kept.", 1),
            ("limit_bytes", "Most bytes of them.", 2),
        ):
            family = GaugeMetricFamily(f"preceptor_cache_{name}", what, labels=["tier"])
            for tier, values in tiers.items():
                family.add_metric([tier], values[index])
            yield family
        for tier, values in tiers.items():
            evicted.add_metric([tier], values[3])
        yield evicted
        yield CounterMetricFamily(
            "preceptor_cache_damaged", "Kept scores that failed their checksum and were dropped.", value=cache.damaged
        )

    def _load(self) -> Iterator[Metric]:
        admission = self._service.admission
        for name, what, value in (
            ("queue_tokens", "Tokens accepted and not yet answered.", admission.tokens),
            ("queue_limit_tokens", "Most of them, --queue-tokens.", admission.max_tokens),
            ("queue_bytes", "Bytes of answers accepted and not yet delivered.", admission.num_bytes),
            ("queue_limit_bytes", "Most of them, --queue-bytes.", admission.max_bytes),
            ("receiving_bytes", "Bytes of HTTP bodies being received.", self._service.receiving.num_bytes),
            ("open_streams", "Streams open.", self._service.streams.taken),
        ):
            yield GaugeMetricFamily(f"preceptor_{name}", what, value=value)


def _add(family: HistogramMetricFamily, histogram: Histogram, labels: list[str]) -> None:
    total = histogram.total
    family.add_metric(labels, histogram.cumulative(), total)


class MetricsServer:
    """Serves the metrics of `service` until `close`. Raises ValueError where the port can't be had."""

    def __init__(self, service: TeacherService, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(ServiceMetrics(service))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
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
