"""The wire work of the model-worker's two services, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from model_worker.inference import Inference
from model_worker.lifecycle import State
from model_worker.models import Models
from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.inference.v2 import inference_pb2_grpc as pb_grpc
from plait.api.model_worker.v1 import model_worker_service_pb2 as stream_pb
from plait.api.model_worker.v1 import model_worker_service_pb2_grpc as stream_pb_grpc
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, PermissionDenied, Unavailable
from plait.registry.records import TensorSpec
from plait.rpc import multiplex
from plait.rpc.call import current
from plait.telemetry.tracing import Tracing

_NAME: Final = "plait-model-worker"
_EXTENSIONS: Final = ("model_repository",)


class InferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """The Open Inference Protocol v2."""

    def __init__(self, models: Models, inference: Inference, *, version: str) -> None:
        self._models = models
        self._inference = inference
        self._version = version

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """An answer is the answer."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Whether every model that should be served is."""
        return pb.ServerReadyResponse(ready=self._models.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """False while it loads, and when it failed to."""
        try:
            self._models.get(request.name, request.version)
        except (Unavailable, FailedPrecondition):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Who is this?"""
        return pb.ServerMetadataResponse(name=_NAME, version=self._version, extensions=_EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """The signature of a version that is ready, and which others are."""
        served = self._models.get(request.name, request.version)
        response = pb.ModelMetadataResponse(name=served.model, versions=self._models.serving(served.model), platform=served.platform)
        _describe(served.manifest.inputs, response.inputs)
        _describe(served.manifest.outputs, response.outputs)
        response.properties["version"] = served.version
        response.properties["feature_set"] = served.manifest.feature_set
        response.properties["max_rows"] = str(served.limits.max_rows)
        return response

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """One call, one answer."""
        response = pb.ModelInferResponse()
        await self._inference.infer(request, response)
        return response

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        """What is held, and in which state."""
        response = pb.RepositoryIndexResponse()
        for model, entry in self._models.entries():
            if entry.state is State.READY or not request.ready:
                reason = entry.error.message if entry.error is not None else ""
                response.models.add(name=model, version=entry.version.version, state=entry.state.wire, reason=reason)
        return response

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        """Follow the registry for this model again; answered once it is ready, or with the reason why it cannot be."""
        await self._models.load(request.model_name or request.repository_name, current().deadline.remaining_s())
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        """Let go of this model; answered once what it held was answered. `unload_dependents` means nothing here."""
        await self._models.unload(request.model_name or request.repository_name, current().deadline.remaining_s())
        return pb.RepositoryModelUnloadResponse()


class StreamServicer(stream_pb_grpc.ModelWorkerServiceServicer):
    """The router's fast road: many ModelInfer calls over one stream."""

    def __init__(self, inference: Inference, *, max_in_flight: int, tracing: Tracing) -> None:
        self._inference = inference
        self._max_in_flight = max_in_flight
        self._tracing = tracing

    async def StreamInfer(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]  # it writes to the context
        """Answer each call as it is ready."""
        if not current().is_service:
            raise PermissionDenied("StreamInfer is for plait services: call ModelInfer", reason="SERVICE_TOKEN_MISSING")
        await multiplex.serve(
            request_iterator,
            context,
            self._inference.infer,
            stream_pb.StreamInferResponse,
            max_in_flight=self._max_in_flight,
            tracing=self._tracing,
            span_name="inference.GRPCInferenceService/ModelInfer",
        )


def _describe(specs: tuple[TensorSpec, ...], tensors: Any) -> None:
    for spec in specs:
        tensors.add(name=spec.name, datatype=BY_NAME[spec.dtype].oip, shape=spec.shape)
