"""The client's calls carry the trace of the span around them, over every transport, from whichever thread."""

from __future__ import annotations

import pytest
from collector import collecting
from serving import request_of, serving

from teacher_api.client import TeacherClient
from teacher_api.tracing import Tracing

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_callers_span_is_the_parent_of_the_servers(scheme: str) -> None:
    with collecting() as collector, serving(otlp_endpoint=collector.url, trace_share=0.0) as server:
        url = f"grpc://{server.grpc_target}" if scheme == "grpc" else server.http_url
        tracing = Tracing.to(collector.url, service="caller")
        with TeacherClient(url) as client:
            client.score(request_of([1, 2, 3]))  # outside a span: not traced, for trace_share is 0
            with tracing.span("unary", {}):
                client.score(request_of([1, 2, 3, 4]))
            with tracing.span("streamed", {}):
                list(client.score_many([request_of([1, 2, 3, 4, 5])]))
        tracing.close()
        spans = collector.wait(2, "forward")
    by_name = {span.name: span for span in spans}
    for outer, method in (("unary", "teacher.score"), ("streamed", "teacher.score_stream")):
        assert by_name[method].parent_id == by_name[outer].span_id
        assert by_name[method].attributes["preceptor.tenant"] == "default"
    forwards = sorted(
        (span.attributes["preceptor.batch_tokens"], span.parent_id) for span in spans if span.name == "forward"
    )
    assert forwards == [(4, by_name["teacher.score"].span_id), (5, by_name["teacher.score_stream"].span_id)]
