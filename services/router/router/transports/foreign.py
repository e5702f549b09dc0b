"""Calls to any server of the Open Inference Protocol: one unary call each, its bytes untouched."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc

from plait.api.inference.v2 import inference_pb2, inference_pb2_grpc
from plait.errors import DeadlineExceeded, InvalidArgument, NotFound, PlaitError, Unavailable, from_rpc_error
from plait.rpc.channel import open_channel
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from router.endpoints import INFERENCE, Metadata, Versions

# What says who the caller is, is between them and us; the rest is gRPC's own business on each connection.
_OURS: Final = frozenset(
    (
        "authorization",
        "proxy-authorization",
        "cookie",
        "x-api-key",
        "content-type",
        "te",
        "user-agent",
        "accept-encoding",
        "host",
        "connection",
    )
)
_OURS_BY_START: Final = ("x-plait-", "x-forwarded-", "grpc-", ":")


class ForeignTransport:
    """One channel to a foreign server. It is not told our service token, whatever `settings` holds."""

    def __init__(self, address: str, settings: ChannelSettings) -> None:
        self._address = address
        self._channel = open_channel(address, settings)
        self._infer: Any = self._channel.unary_unary(INFERENCE + "ModelInfer")  # bytes in, bytes out

    def __repr__(self) -> str:
        return f"<ForeignTransport {self._address}>"

    async def typed(self, frame: Any, *, deadline: Deadline, tenant: str, request_id: str) -> Any:
        """Send the frame's request and return the response message."""
        answer = await self.raw(frame.request.SerializeToString(), deadline=deadline, tenant=tenant, request_id=request_id)
        return inference_pb2.ModelInferResponse.FromString(answer)

    async def raw(self, request: bytes, *, deadline: Deadline, tenant: str, request_id: str, metadata: Metadata = ()) -> bytes:
        """Send a serialized ModelInferRequest and return the serialized response. Whose call it is, is nothing to a foreign server: of the
        caller's `metadata` it gets all but credentials."""
        left_s = deadline.remaining_s()
        if left_s <= 0:
            raise DeadlineExceeded("no time was left to call the server: allow the call more time")
        try:
            answer: bytes = await self._infer(request, timeout=left_s, metadata=_passed_on(metadata))
        except grpc.aio.AioRpcError as error:
            raise _typed(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled us, so it was the channel, which takes its calls along when it is closed.
            raise Unavailable("the connection to the server was closed", reason="CONNECTION_LOST", retry_after_s=0.1) from None
        return answer

    async def ask(self, method: str, request: bytes, deadline: Deadline) -> bytes:
        """Call another method of the protocol."""
        call: Any = self._channel.unary_unary(INFERENCE + method)
        try:
            answer: bytes = await call(request, timeout=max(0.0, deadline.remaining_s()))
        except grpc.aio.AioRpcError as error:
            raise _typed(error) from error
        return answer

    async def ready_versions(self, deadline: Deadline) -> Versions | None:
        """Ask what it holds ready. Many servers cannot say, or leave out versions, which cannot be compared with ours: then it is unknown."""
        stub: Any = inference_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        try:
            index = await stub.RepositoryIndex(inference_pb2.RepositoryIndexRequest(ready=True), timeout=deadline.remaining_s())
        except grpc.aio.AioRpcError:
            return None
        if not index.models or not all(model.version for model in index.models):
            return None
        return frozenset((model.name, model.version) for model in index.models if model.state in ("READY", ""))

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _passed_on(metadata: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    return tuple((name, value) for name, value in metadata if name not in _OURS and not name.startswith(_OURS_BY_START))


def _typed(error: grpc.aio.AioRpcError) -> PlaitError:
    """Say what a foreign server's status means in our words. UNAVAILABLE without more is what grpc itself says of a broken connection."""
    typed = from_rpc_error(error)
    if isinstance(typed, Unavailable) and typed.retry_after_s is None:
        return Unavailable(f"the server cannot be reached: {typed.message}", reason="CONNECTION_LOST", retry_after_s=0.1)
    if isinstance(typed, InvalidArgument) and "unknown model" in typed.message.lower():  # Triton's way of saying it
        return NotFound(typed.message, reason="MODEL_NOT_FOUND")
    return typed
