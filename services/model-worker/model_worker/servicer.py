"""The wire work of the model-worker's two services, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any, Final

from opentelemetry.trace import SpanKind

from model_worker import costs, model_config
from model_worker.controls import Controls
from model_worker.costs import StreamCosts
from model_worker.inference import Inference
from model_worker.lifecycle import State
from model_worker.load_report import TRAILER, LoadReport, StreamLoad
from model_worker.models import Models
from model_worker.statistics import Statistics
from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.inference.v2 import inference_pb2_grpc as pb_grpc
from plait.api.model_worker.v1 import model_worker_service_pb2 as stream_pb
from plait.api.model_worker.v1 import model_worker_service_pb2_grpc as stream_pb_grpc
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, Internal, InvalidArgument, PermissionDenied, PlaitError, Unavailable, Unimplemented
from plait.registry.records import TensorSpec
from plait.rpc import multiplex
from plait.rpc.call import current, enter
from plait.rpc.deadline import Deadline
from plait.rpc.ordered_stream import answers
from plait.telemetry.logging import get_logger, without_words
from plait.telemetry.tracing import Tracing

log = get_logger(__name__)

_NAME: Final = "plait-model-worker"
_EXTENSIONS: Final = (
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "statistics",
    "trace",
)
_DEPENDENTS: Final = "unload_dependents"
_STRICT: Final = ("triton_grpc_error", "true")  # Triton's header for errors as status codes
_INFER: Final = "inference.GRPCInferenceService/ModelInfer"


class InferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """The Open Inference Protocol v2."""

    def __init__(
        self,
        models: Models,
        inference: Inference,
        statistics: Statistics,
        controls: Controls,
        *,
        version: str,
        max_in_flight: int,
        default_timeout_s: float,
        tracing: Tracing,
        load: LoadReport | None = None,
    ) -> None:
        """With `load`, answers carry trailers: what they cost, and an ORCA report."""
        self._load = load
        self._models = models
        self._infer = inference.infer if load is None else load.counting(inference.infer)
        self._statistics = statistics
        self._controls = controls
        self._version = version
        self._max_in_flight = max_in_flight
        self._default_timeout_s = default_timeout_s
        self._tracing = tracing

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """An answer is the answer."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Whether this worker should get traffic (setting models.ready_when)."""
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
        answer = await self._infer(request, response)
        if self._load is not None:
            context.set_trailing_metadata((*costs.trailers(answer, response.model_version), (TRAILER, self._load())))
        return response

    async def ModelStreamInfer(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]  # it writes to the context
        """Answer each request in its turn; what is wrong with one is its answer, or the end of the stream for who asks for that."""
        deadline = Deadline.never() if context.time_remaining() is None else current().deadline
        strict = _STRICT in (context.invocation_metadata() or ())
        spent = StreamCosts()
        answer = partial(self._answer_on_stream, deadline, strict, spent)
        try:
            async with aclosing(answers(request_iterator, answer, max_in_flight=self._max_in_flight)) as found:
                async for message in found:
                    await context.write(message)
        finally:
            if self._load is not None:
                context.set_trailing_metadata((*spent.trailers(), (TRAILER, self._load())))

    async def _answer_on_stream(self, deadline: Deadline, strict: bool, spent: StreamCosts, request: Any) -> Any:
        enter(dataclasses.replace(current(), deadline=deadline.at_most(self._default_timeout_s)))
        message = pb.ModelStreamInferResponse()
        try:
            with self._tracing.span(_INFER, kind=SpanKind.SERVER):
                answer = await self._infer(request, message.infer_response, watched=True)
        except Exception as error:  # (whatever it is, the stream goes on for the other requests)
            spent.failed += 1
            if strict:
                raise
            return _failure(request, error)
        spent.add(answer)
        message.infer_response.parameters["triton_final_response"].bool_param = True
        return message

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        """How a version that is ready is run."""
        served = self._models.get(request.name, request.version)
        response = pb.ModelConfigResponse()
        model_config.describe(served, self._models.version_policy(served.model), response.config)
        return response

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        """The counters of the versions that are ready."""
        response = pb.ModelStatisticsResponse()
        for model, version in self._asked(request.name, request.version):
            self._statistics.of(model, version).describe(response.model_stats.add(name=model, version=version))
        return response

    def _asked(self, name: str, version: str) -> list[tuple[str, str]]:
        if name:
            served = self._models.get(name, version)
            return [(name, v) for v in ([served.version] if version else self._models.serving(name))]
        return [(model, e.version.version) for model, e in self._models.entries() if e.state is State.READY]

    async def TraceSetting(self, request: Any, context: Any) -> Any:
        """Show, and perhaps change, the share of traces that is recorded."""
        response = pb.TraceSettingResponse()
        self._controls.traces(request, response, lambda model: self._models.get(model))  # noqa: PLW0108  (its version is optional)
        return response

    async def LogSettings(self, request: Any, context: Any) -> Any:
        """Show, and perhaps change, what is logged."""
        response = pb.LogSettingsResponse()
        self._controls.logs(request, response)
        return response

    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:
        """Not offered, nor are the five after it."""
        raise Unimplemented("shared memory is not offered here: send tensors in the messages", reason="SHARED_MEMORY_NOT_OFFERED")

    SystemSharedMemoryRegister = SystemSharedMemoryUnregister = SystemSharedMemoryStatus
    CudaSharedMemoryStatus = CudaSharedMemoryRegister = CudaSharedMemoryUnregister = SystemSharedMemoryStatus

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        """What is held, and in which state; then what could be, and why it is not."""
        response = pb.RepositoryIndexResponse()
        for model, entry in self._models.entries():
            if entry.state is State.READY or not request.ready:
                reason = entry.error.message if entry.error is not None else ""
                response.models.add(name=model, version=entry.version.version, state=entry.state.wire, reason=reason)
        if not request.ready:
            for model, state, reason in self._models.not_held():
                response.models.add(name=model, state=state, reason=reason)
        return response

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        """Follow the registry for this model again; answered once it is ready, or with the reason why it cannot be.

        What it is made of is the registry's to say, so nothing of that can be given here.
        """
        if request.parameters:
            given = ", ".join(sorted(request.parameters)[:5])[:80]
            raise InvalidArgument(f"a model is loaded as the registry has it: leave out the parameters {given}", reason="LOAD_PARAMETERS")
        await self._models.load(request.model_name or request.repository_name, current().deadline.remaining_s())
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        """Let go of this model; answered once what it held was answered. No model here has dependents, so all of them go along."""
        wrong = [name for name, value in request.parameters.items() if name != _DEPENDENTS or not value.HasField("bool_param")]
        if wrong:
            raise InvalidArgument(
                f"unloading takes {_DEPENDENTS} as bool_param only: leave out {', '.join(sorted(wrong)[:5])[:80]}",
                reason="UNLOAD_PARAMETERS",
            )
        await self._models.unload(request.model_name or request.repository_name, current().deadline.remaining_s())
        return pb.RepositoryModelUnloadResponse()


class StreamServicer(stream_pb_grpc.ModelWorkerServiceServicer):
    """The router's fast road: many ModelInfer calls over one stream."""

    def __init__(
        self, inference: Inference, *, max_in_flight: int, tracing: Tracing, stream_load: StreamLoad, load: LoadReport | None = None
    ) -> None:
        """With `load`, its calls count in the report that others get; `stream_load` is what the router gets."""
        infer = inference.infer if load is None else load.counting(inference.infer)
        self._infer = stream_load.counting(infer)
        self._stream_load = stream_load
        self._max_in_flight = max_in_flight
        self._tracing = tracing

    async def StreamInfer(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]  # it writes to the context
        """Answer each call as it is ready."""
        if not current().is_service:
            raise PermissionDenied("StreamInfer is for plait services: call ModelInfer", reason="SERVICE_TOKEN_MISSING")
        await multiplex.serve(
            request_iterator,
            context,
            self._infer,
            stream_pb.StreamInferResponse,
            max_in_flight=self._max_in_flight,
            tracing=self._tracing,
            span_name="inference.GRPCInferenceService/ModelInfer",
            finish=self._stream_load.reporter(),
        )


def _failure(request: Any, error: Exception) -> Any:
    if not isinstance(error, PlaitError):
        log.error("a request on a stream failed by a fault of ours", exc_info=without_words(error))
        error = Internal("a fault inside plait; it was logged, please report it with the time of the call")
    answer = pb.ModelStreamInferResponse(error_message=error.message)
    answer.infer_response.id = request.id
    return answer


def _describe(specs: tuple[TensorSpec, ...], tensors: Any) -> None:
    for spec in specs:
        tensors.add(name=spec.name, datatype=BY_NAME[spec.dtype].oip, shape=spec.shape)
