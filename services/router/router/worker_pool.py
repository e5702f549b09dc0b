"""How the router has scores computed: ModelInfer over a multiplexed stream to the least loaded worker, and what failures mean."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc

from plait.api.model_worker.v1 import model_worker_service_pb2 as pb
from plait.errors import Cancelled, FailedPrecondition, InvalidArgument, NotFound, PlaitError, Unavailable, from_rpc_error
from plait.rpc.channel import service_metadata
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from plait.telemetry.tracing import Tracing
from router.connections import Connections, lost
from router.discovery import static
from router.settings import WorkersSettings

if TYPE_CHECKING:
    from plait.api.inference.v2 import inference_pb2

_METHOD: Final = "inference.GRPCInferenceService/ModelInfer"
_STREAM: Final = "/plait.api.model_worker.v1.ModelWorkerService/StreamInfer"
_RETRY_S: Final = 0.25


class WorkerPool:
    """Calls model-workers."""

    def __init__(self, settings: WorkersSettings, channel: ChannelSettings, tracing: Tracing | None = None) -> None:
        self._metadata = service_metadata(channel)
        self._connections = Connections(
            _METHOD,
            static.parse(settings.addresses),
            _STREAM,
            pb.StreamInferResponse,
            channel,
            per_replica=settings.connections,
            ejection_s=settings.ejection_s,
            max_ejection_s=settings.max_ejection_s,
            tracing=tracing,
        )

    def __repr__(self) -> str:
        return f"<WorkerPool {self._connections!r}>"

    async def infer(
        self, frame: pb.StreamInferRequest, *, deadline: Deadline, tenant: str, request_id: str
    ) -> inference_pb2.ModelInferResponse:
        """Return the answer to a filled frame.

        Raises Unavailable: WORKER_UNAVAILABLE when no worker can be reached, MODEL_NOT_READY when none has the model yet;
        FailedPrecondition: SIGNATURE_MISMATCH when the worker refuses the tensors, MODEL_FAILED when the model did not load.
        ResourceExhausted and DeadlineExceeded are the worker's own.
        """
        try:
            response: inference_pb2.ModelInferResponse = await self._connections.call(
                frame, deadline=deadline, tenant=tenant, request_id=request_id, elsewhere=_not_here
            )
        except PlaitError as error:
            raise _to_caller(error) from error
        return response

    async def infer_raw(self, request: bytes, *, deadline: Deadline, tenant: str, request_id: str) -> bytes:
        """Return the serialized answer to a serialized ModelInferRequest.

        Raises as `infer`, but what the worker finds wrong with the tensors is InvalidArgument: they are the caller's.
        """
        try:
            response: bytes = await self._connections.call(
                request, deadline=deadline, tenant=tenant, request_id=request_id, elsewhere=_not_here
            )
        except InvalidArgument:
            raise
        except PlaitError as error:
            raise _to_caller(error) from error
        return response

    async def ask(self, model: str, method: str, request: bytes, deadline: Deadline) -> bytes:
        """Return the first answer that a worker has to a question about a model, bytes in and out. Raises as `infer`."""
        refused: PlaitError | None = None
        for channel in self._connections.channels():
            try:
                return await self._ask(channel, method, request, deadline)
            except PlaitError as error:
                refused = refused or error
                if not (lost(error) or _not_here(error) or isinstance(error, FailedPrecondition)):
                    break
        raise _to_caller(refused or Unavailable("there is no model-worker", reason="WORKER_UNAVAILABLE"))

    async def ask_all(self, method: str, request: bytes, deadline: Deadline) -> list[bytes]:
        """Return the answers of every worker that has one."""
        questions = (self._ask(channel, method, request, deadline) for channel in self._connections.channels())
        answers = await asyncio.gather(*questions, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, PlaitError):
                raise answer
        return [answer for answer in answers if isinstance(answer, bytes)]

    async def _ask(self, channel: grpc.aio.Channel, method: str, request: bytes, deadline: Deadline) -> bytes:
        call: Any = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        try:
            answer: bytes = await call(request, timeout=deadline.remaining_s(), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return answer

    async def close(self) -> None:
        """Close every connection."""
        await self._connections.close()


def _not_here(error: PlaitError) -> bool:
    """A worker that is loading the model, or has not heard of it yet, says nothing of the others."""
    return isinstance(error, Unavailable | NotFound)


def _to_caller(error: PlaitError) -> PlaitError:
    """Say what happened in terms of the router's caller, who chose neither model nor tensors."""
    if lost(error) or isinstance(error, Cancelled):
        return Unavailable("no model-worker can be reached: retry", reason="WORKER_UNAVAILABLE", retry_after_s=_RETRY_S)
    if isinstance(error, NotFound):
        return Unavailable(f"no model-worker has the model yet: {error.message}", reason="MODEL_NOT_READY", retry_after_s=_RETRY_S)
    if isinstance(error, Unavailable) and error.retry_after_s is None:
        return Unavailable(error.message, reason=error.reason, retry_after_s=_RETRY_S)
    if isinstance(error, InvalidArgument):  # what the caller sent was checked against the signature; the rest is ours
        message = f"the model does not take what its signature says: {error}; publish a version whose signature is true"
        return FailedPrecondition(message, reason="SIGNATURE_MISMATCH")
    return error
