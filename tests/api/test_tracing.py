"""Spans as a collector gets them, and that nobody pays for traces who does not ask for them."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import time

import pytest
from collector import collecting
from openai_calls import a_request, fake, run

from teacher_api.client import AsyncTeacherClient
from teacher_api.tracing import CLOSE_S, Tracing, headers

OFF = """
import sys
from teacher_api import client, tracing, transport_grpc, transport_http
off = tracing.Tracing.to("", service="x")
with off.span("a", {}) as span:
    assert (span.trace_id, span.context, off.current(), tracing.headers()) == ("", None, None, {})
off.past("a", {}, None, 0, 1)
off.close()
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_off_nothing_is_loaded_and_nothing_happens() -> None:
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_trace_goes_through_threads_and_headers_to_the_collector() -> None:
    with collecting() as collector:
        near, far = Tracing.to(collector.url, service="near"), Tracing.to(collector.url, service="far")
        root = near.open("step", {"step": 1})

        def elsewhere() -> None:
            with (
                near.span("score", {}, parent=root.context),
                far.span("serve", {}, parent=far.incoming(headers()), server=True) as span,
            ):
                span.fail("broken")
                far.past("forward", {"n": 3}, far.current(), 10, 20)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert headers() == {}
        root.end()
        near.close()
        far.close()
        spans = {span.name: span for span in collector.wait(1, "step")}
    assert set(spans) == {"step", "score", "serve", "forward"}
    assert {span.trace_id for span in spans.values()} == {root.trace_id}
    assert spans["step"].parent_id == ""
    for child, parent in (("score", "step"), ("serve", "score"), ("forward", "serve")):
        assert spans[child].parent_id == spans[parent].span_id
    assert [spans[name].service for name in ("step", "score", "serve", "forward")] == ["near", "near", "far", "far"]
    assert spans["serve"].kind == 2  # SPAN_KIND_SERVER of the protocol
    assert spans["serve"].is_error
    assert not spans["score"].is_error
    assert (spans["forward"].started_ns, spans["forward"].ended_ns) == (10, 20)
    assert spans["forward"].attributes == {"n": 3}


@pytest.mark.slow
def test_calls_to_a_stock_server_carry_it_too() -> None:
    vllm = fake()
    with collecting() as collector:
        tracing = Tracing.to(collector.url, service="s")

        async def work(client: AsyncTeacherClient) -> str:
            await client.score(a_request(1))
            assert vllm.traces == []
            with tracing.span("scored", {}) as span:
                await client.score(a_request(1))
                return span.trace_id

        trace_id = run(vllm, work)
        tracing.close()
        (scored,) = collector.wait(1, "scored")
    assert vllm.traces == [f"00-{trace_id}-{scored.span_id}-01"]


def test_the_share_is_of_traces_that_begin_here_and_a_callers_own_is_followed() -> None:
    sampled, not_sampled = "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "00-" + "c" * 32 + "-" + "b" * 16 + "-00"
    with collecting() as collector:
        tracing = Tracing.to(collector.url, service="s", share=0.0)
        for name, carried in (
            ("none", {}),
            ("asked", {"traceparent": sampled}),
            ("declined", {"traceparent": not_sampled}),
            ("nonsense", {"traceparent": "00-zz\r\nx: y"}),
        ):
            with tracing.span(name, {}, parent=tracing.incoming(carried), server=True):
                assert (tracing.current() is not None) == (name == "asked")
        tracing.close()
        assert [(span.name, span.trace_id, span.parent_id) for span in collector.wait(1, "asked")] == [
            ("asked", "a" * 32, "b" * 16)
        ]


def test_seeded_generators_are_not_touched() -> None:
    """Ids of spans must not change what a seeded run draws."""
    with collecting() as collector:
        tracing = Tracing.to(collector.url, service="s")
        state = random.getstate()
        ids = set()
        for _ in range(5):
            with tracing.span("a", {}) as span:
                ids.add(span.trace_id)
        assert random.getstate() == state
        tracing.close()
    assert len(ids) == 5


def test_a_collector_that_does_not_answer_holds_nobody_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracing = Tracing.to(f"http://127.0.0.1:{silent.getsockname()[1]}", service="s")
        started = time.monotonic()
        with tracing.span("a", {}):
            pass
        assert time.monotonic() - started < 1
        tracing.close(0.2)
        assert time.monotonic() - started < CLOSE_S


@pytest.mark.parametrize("url", ["collector:4318", "grpc://c:4317", "http://", "http://c:4318/v1/traces"])
def test_what_is_no_collector_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected the base URL of a collector"):
        Tracing.to(url, service="s")


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"expected the extra: pip install 'preceptor\[trace\]'"):
        Tracing.to("http://127.0.0.1:1", service="s")
