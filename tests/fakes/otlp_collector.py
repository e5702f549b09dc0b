"""An OTLP/gRPC collector that keeps the spans it is sent."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent import futures
from types import TracebackType
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


class OtlpCollector(pb_grpc.TraceServiceServicer):
    """A context manager; `spans` holds (service name, span) in the order of arrival, `address` is an http:// endpoint."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, trace_pb2.Span]] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        pb_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.address = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
        return pb.ExportTraceServiceResponse()

    def wait(self, enough: Callable[[list[tuple[str, trace_pb2.Span]]], bool], timeout_s: float = 30) -> list[tuple[str, trace_pb2.Span]]:
        """Return the spans once `enough` of them are here."""
        give_up = time.monotonic() + timeout_s
        while not enough(self.spans):
            if time.monotonic() > give_up:
                raise TimeoutError(f"only these spans came: {[(service, span.name) for service, span in self.spans]}")
            time.sleep(0.05)
        return self.spans

    def __enter__(self) -> OtlpCollector:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.stop(None).wait()
