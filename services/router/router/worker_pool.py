"""How the router has scores computed: ModelInfer over a multiplexed stream to the least loaded worker, and what failures mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from plait.api.model_worker.v1 import model_worker_service_pb2 as pb
from plait.errors import Cancelled, FailedPrecondition, InvalidArgument, NotFound, PlaitError, Unavailable
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
