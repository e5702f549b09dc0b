"""Spans form one tree across a hop, and cost nothing when off."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from plait.settings import TelemetrySettings
from plait.telemetry.tracing import Tracing, off


def test_off_makes_no_spans() -> None:
    tracing = off()
    with tracing.span("work") as span:
        assert not span.get_span_context().is_valid
        assert tracing.traceparent() == ""
    assert tracing.server_interceptors() == []
    assert not tracing.enabled
    assert tracing.span("a") is tracing.span("b")


def test_a_traceparent_joins_two_processes_into_one_tree() -> None:
    sent, received = InMemorySpanExporter(), InMemorySpanExporter()
    here = Tracing(TelemetrySettings(trace_sample_ratio=1), "router", sent)
    there = Tracing(TelemetrySettings(trace_sample_ratio=0), "worker", received)  # the caller's decision is kept
    with here.span("call"):
        traceparent = here.traceparent()
    with there.span("serve", traceparent=traceparent, kind=trace.SpanKind.SERVER):
        pass
    here.close()
    there.close()
    [client], [server] = sent.get_finished_spans(), received.get_finished_spans()
    assert server.parent is not None
    assert (server.parent.span_id, server.context.trace_id) == (client.context.span_id, client.context.trace_id)
    assert server.resource.attributes["service.name"] == "worker"


def test_unsampled_traces_stay_unsampled_over_the_hop() -> None:
    sent, received = InMemorySpanExporter(), InMemorySpanExporter()
    here = Tracing(TelemetrySettings(trace_sample_ratio=0), "router", sent)
    there = Tracing(TelemetrySettings(trace_sample_ratio=1), "worker", received)
    with here.span("call"):
        traceparent = here.traceparent()
    with there.span("serve", traceparent=traceparent):
        pass
    here.close()
    there.close()
    assert sent.get_finished_spans() == received.get_finished_spans() == ()


def test_the_share_of_traces_can_be_changed_while_it_runs() -> None:
    sent = InMemorySpanExporter()
    tracing = Tracing(TelemetrySettings(trace_sample_ratio=0), "worker", sent)
    for ratio in (0.0, 1.0, 0.0):
        tracing.ratio = ratio
        with tracing.span(f"at {ratio:g}"):
            pass
    tracing.close()
    assert [span.name for span in sent.get_finished_spans()] == ["at 1"]
    assert off().ratio == 0


def test_a_span_holds_no_stack_trace() -> None:
    sent = InMemorySpanExporter()
    tracing = Tracing(TelemetrySettings(trace_sample_ratio=1), "router", sent)
    with tracing.span("call") as span:
        span.record_exception(KeyError("anna"))
    tracing.close()
    [told] = sent.get_finished_spans()
    assert "anna" not in told.to_json()
