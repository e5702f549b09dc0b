"""Calls to a plait service: multiplexed streams, as many as the load on the endpoint asks for."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from typing import Any, Final

import grpc

from plait.api.inference.v2 import inference_pb2, inference_pb2_grpc
from plait.errors import from_rpc_error
from plait.rpc.channel import open_channel, service_metadata
from plait.rpc.deadline import Deadline
from plait.rpc.multiplex import Multiplexer
from plait.settings import ChannelSettings
from plait.telemetry.tracing import Tracing
from router.endpoints import INFERENCE, Metadata, OnLoad, Versions

_CROWD: Final = 64  # calls on one stream; more are worth another one, up to the most
_IDLE_S: Final = 60.0  # an extra stream that was not needed for so long is closed


class _Stream:
    """One connection with one stream on it."""

    __slots__ = ("calls", "channel", "used_s")

    def __init__(self, channel: grpc.aio.Channel, calls: Multiplexer) -> None:
        self.channel = channel
        self.calls = calls
        self.used_s = time.monotonic()

    async def close(self) -> None:
        await self.calls.close()
        await self.channel.close()


class PlaitTransport:
    """One to `most` streams to an endpoint: calls go to the first that is not crowded, so that the others fall idle when load does.

    `stream` is the full name of the service's stream, `response_type` its answers'; each is opened on first use and again after a break.
    `name` is what spans call it. `on_load` is told what answers say of the endpoint's load.
    """

    def __init__(
        self,
        address: str,
        name: str,
        stream: str,
        response_type: type[Any],
        settings: ChannelSettings,
        *,
        most: int = 1,
        on_load: OnLoad | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._address = address
        self._name = name
        self._stream = stream
        self._response_type = response_type
        self._settings = settings
        self._most = most
        self._on_load = on_load
        self._tracing = tracing
        self._metadata = service_metadata(settings)
        self._streams = [self._another()]

    def __repr__(self) -> str:
        return f"<PlaitTransport {self._address} streams={len(self._streams)}>"

    def typed(self, frame: Any, *, deadline: Deadline, tenant: str, request_id: str) -> Coroutine[Any, Any, Any]:
        """Send a filled frame and return the response."""
        return self._calls().call(frame, deadline=deadline, tenant=tenant, request_id=request_id)

    def raw(
        self, request: bytes, *, deadline: Deadline, tenant: str, request_id: str, metadata: Metadata = ()
    ) -> Coroutine[Any, Any, bytes]:
        """Send a serialized ModelInferRequest and return the serialized response. `metadata` stays here: a frame has no room for it."""
        return self._calls().call_raw(request, deadline=deadline, tenant=tenant, request_id=request_id)

    async def ask(self, method: str, request: bytes, deadline: Deadline) -> bytes:
        """Call another method of the protocol."""
        call: Any = self._streams[0].channel.unary_unary(INFERENCE + method)
        try:
            answer: bytes = await call(request, metadata=self._metadata, timeout=max(0.0, deadline.remaining_s()))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return answer

    async def ready_versions(self, deadline: Deadline) -> Versions | None:
        """Ask what the worker holds ready; and close a stream that load no longer asks for."""
        await self._tidy()
        stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(self._streams[0].channel)
        request = inference_pb2.RepositoryIndexRequest(ready=True)
        try:
            index = await stub.RepositoryIndex(request, metadata=self._metadata, timeout=deadline.remaining_s())
        except grpc.aio.AioRpcError:
            return None
        return frozenset((model.name, model.version) for model in index.models)

    async def close(self) -> None:
        """Close every stream."""
        for stream in self._streams:
            await stream.close()

    def _calls(self) -> Multiplexer:
        streams = self._streams
        first = streams[0].calls
        if first.in_flight < _CROWD or self._most == 1:
            return first
        for stream in streams[1:]:
            if stream.calls.in_flight < _CROWD:
                stream.used_s = time.monotonic()
                return stream.calls
        if len(streams) < self._most:
            streams.append(self._another())
            return streams[-1].calls
        return min((stream.calls for stream in streams), key=lambda calls: calls.in_flight)

    def _another(self) -> _Stream:
        channel = open_channel(self._address, self._settings)
        calls = Multiplexer(
            channel,
            self._stream,
            self._response_type,
            name=self._name,
            metadata=self._metadata,
            tracing=self._tracing,
            on_load=self._on_load,
        )
        return _Stream(channel, calls)

    async def _tidy(self) -> None:
        last = self._streams[-1]
        if len(self._streams) > 1 and not last.calls.in_flight and time.monotonic() - last.used_s > _IDLE_S:
            self._streams.pop()
            await last.close()
