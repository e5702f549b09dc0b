"""OpenTelemetry spans: made through opentelemetry-instrumentation-grpc at the edges, by hand inside multiplexed streams.

With the exporter "none" nothing is installed and `span` costs next to nothing. No attribute ever holds an id of a person or a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import grpc
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.grpc import aio_server_interceptor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind
from opentelemetry.util.types import AttributeValue

from plait.settings import TelemetrySettings

_NOTHING: Final = nullcontext(trace.INVALID_SPAN)
# Spans of these would last as long as the process; each call inside them has a span of its own.
_UNTRACED: Final = ("StreamFeatures", "StreamInfer", "ModelStreamInfer", "Check", "Watch", "ServerReflectionInfo")


class Tracing:
    """The tracer of one process, or nothing at all when the exporter is "none"."""

    def __init__(self, settings: TelemetrySettings, service: str, exporter: SpanExporter | None = None) -> None:
        exporter = exporter or _exporter(settings)
        self._provider: TracerProvider | None = None
        self._tracer: trace.Tracer | None = None
        self._sampler = _Sampler()
        if exporter is not None:
            self._sampler.ratio = settings.trace_sample_ratio
            self._provider = TracerProvider(
                sampler=ParentBased(self._sampler),
                resource=Resource.create({"service.name": service}),
                span_limits=SpanLimits(
                    max_events=0
                ),  # they would be stack traces, with the words of every cause: the log has the trace's id
            )
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
            self._tracer = self._provider.get_tracer("plait")

    @property
    def enabled(self) -> bool:
        """Whether spans are made at all."""
        return self._tracer is not None

    @property
    def ratio(self) -> float:
        """Share (0..1) of the traces started here that are recorded."""
        return self._sampler.ratio

    @ratio.setter
    def ratio(self, ratio: float) -> None:
        self._sampler.ratio = ratio

    def server_interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """Return what a server needs so that each unary call is a span, child of its caller's."""
        if self._provider is None:
            return []
        return [
            aio_server_interceptor(  # type: ignore[no-untyped-call]
                tracer_provider=self._provider, filter_=lambda d: d.method.rsplit("/", 1)[-1] not in _UNTRACED
            )
        ]

    def span(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, AttributeValue] | None = None,
        traceparent: str = "",
    ) -> AbstractContextManager[Span]:
        """Return a context manager that is the current span: child of `traceparent` (W3C) where given, else of the current span."""
        if self._tracer is None:
            return _NOTHING
        parent = propagate.extract({"traceparent": traceparent}) if traceparent else None
        return self._tracer.start_as_current_span(name, context=parent, kind=kind, attributes=attributes)

    def started_span(
        self, name: str, *, kind: SpanKind = SpanKind.INTERNAL, attributes: Mapping[str, AttributeValue] | None = None, traceparent: str
    ) -> Span:
        """Return a started child span of `traceparent` (W3C) that is not made the current one, for work that ends elsewhere; end it yourself."""
        if self._tracer is None:
            return trace.INVALID_SPAN
        return self._tracer.start_span(name, context=propagate.extract({"traceparent": traceparent}), kind=kind, attributes=attributes)

    def linked_span(self, name: str, links: Iterable[trace.SpanContext | None]) -> Span:
        """Return a started span of a trace of its own that links to each of `links`, for work that many calls share; end it yourself."""
        if self._tracer is None:
            return trace.INVALID_SPAN
        found = [trace.Link(context) for context in links if context is not None and context.is_valid]
        return self._tracer.start_span(name, context=Context(), links=found)

    def traceparent(self) -> str:
        """Return the W3C trace context of the current span, or an empty string."""
        if self._tracer is None:
            return ""
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return carrier.get("traceparent", "")

    def close(self) -> None:
        """Send what is still held and stop."""
        if self._provider is not None:
            self._provider.shutdown()


class _Sampler(Sampler):
    """Records a share of the traces, which can be changed while spans are made. 0 where nothing is exported."""

    def __init__(self) -> None:
        self._inner = TraceIdRatioBased(0.0)

    @property
    def ratio(self) -> float:
        return self._inner.rate

    @ratio.setter
    def ratio(self, ratio: float) -> None:
        self._inner = TraceIdRatioBased(ratio)

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
        return self._inner.should_sample(*args, **kwargs)

    def get_description(self) -> str:
        return self._inner.get_description()


def off() -> Tracing:
    """Return tracing that does nothing."""
    return Tracing(TelemetrySettings(trace_exporter="none"), "")


def _exporter(settings: TelemetrySettings) -> SpanExporter | None:
    if settings.trace_exporter == "console":
        return ConsoleSpanExporter()
    if settings.trace_exporter == "otlp":
        # Imported where it is needed: it is a third of the import time of a service that does not trace.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        return OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=settings.otlp_endpoint.startswith("http://"))
    return None
