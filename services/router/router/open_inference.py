"""The Open Inference Protocol v2 on the router: to its stock clients the whole mesh is one server, and routes are models among models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message_factory import GetMessageClass

from plait.api.inference.v2 import inference_pb2 as pb
from plait.errors import Internal, InvalidArgument, NotFound, PlaitError, Unimplemented
from plait.rpc.call import Call, current
from plait.rpc.deadline import Deadline
from plait.rpc.frames import field
from plait.rpc.ordered_stream import answers
from plait.rpc.server import RpcServer
from plait.telemetry.logging import get_logger
from router import fleet_statistics, wire
from router.pass_through import PassThrough, Target
from router.pools import Pools

log = get_logger(__name__)

if TYPE_CHECKING:
    _Handlers = dict[str, grpc.RpcMethodHandler[Any, Any]]

SCOPE: Final = "infer"
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_STRICT: Final = ("triton_grpc_error", "true")  # Triton's header for errors as status codes
_FINAL: Final = pb.ModelInferResponse(parameters={"triton_final_response": pb.InferParameter(bool_param=True)}).SerializeToString()
_NAME: Final = "plait-router"
_EXTENSIONS: Final = ("classification", "model_configuration", "statistics")
_PATIENCE_S: Final = 5.0  # with workers that are asked about something; those that are slower are left out
_HERE: Final = (
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
)


class OpenInference:
    """What the protocol's methods mean when the models are elsewhere."""

    def __init__(self, passing: PassThrough, workers: Pools, version: str, *, max_in_flight: int, default_timeout_s: float) -> None:
        """One stream may hold `max_in_flight` requests at once; each gets `default_timeout_s` where the stream has no deadline."""
        self._max_in_flight = max_in_flight
        self._default_timeout_s = default_timeout_s
        self._passing = passing
        self._workers = workers
        self._version = version

    async def ModelInfer(self, request: bytes, context: Any) -> bytes:
        """One inference, as its bytes."""
        return await self._passing.infer(request, current())

    async def ModelStreamInfer(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Many inferences, answered in order; what is wrong with one is its answer, or the end of the stream for who asks for that."""
        deadline = Deadline.never() if context.time_remaining() is None else current().deadline
        strict = _STRICT in (context.invocation_metadata() or ())
        answer = partial(self._on_stream, current(), deadline, strict)
        async with aclosing(answers(requests, answer, max_in_flight=self._max_in_flight)) as found:
            async for message in found:
                await context.write(message)

    async def _on_stream(self, call: Call, deadline: Deadline, strict: bool, request: bytes) -> bytes:
        try:
            answer = await self._passing.infer(request, replace(call, deadline=deadline.at_most(self._default_timeout_s)))
        except Exception as error:  # (whatever it is, the stream goes on for the other requests)
            if strict:
                raise
            return _failure(request, error)
        return field(2, answer + _FINAL)

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """An answer is the answer."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Whether any worker takes calls; the router itself serves from the moment that it knows the registry."""
        answers = await self._ask_all("ServerReady", pb.ServerReadyRequest())
        return pb.ServerReadyResponse(ready=any(pb.ServerReadyResponse.FromString(answer).ready for answer in answers))

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Whether any worker has it ready."""
        target = self._find(request.name, request.version)
        asked = pb.ModelReadyRequest(name=target.model, version=target.version)
        answers = await self._ask_all("ModelReady", asked)
        return pb.ModelReadyResponse(ready=any(pb.ModelReadyResponse.FromString(answer).ready for answer in answers))

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Who is this?"""
        return pb.ServerMetadataResponse(name=_NAME, version=self._version, extensions=_EXTENSIONS)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """What a worker says of the version that the name leads to, under the name that was asked for."""
        target = self._find(request.name, request.version)
        asked = pb.ModelMetadataRequest(name=target.model, version=target.version)
        answer = pb.ModelMetadataResponse.FromString(await self._ask(target, "ModelMetadata", asked))
        answer.name = request.name
        return answer

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        """How a worker runs it."""
        target = self._find(request.name, request.version)
        asked = pb.ModelConfigRequest(name=target.model, version=target.version)
        return pb.ModelConfigResponse.FromString(await self._ask(target, "ModelConfig", asked))

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        """The counters of all workers, summed up; of a name's, or of everything."""
        asked = pb.ModelStatisticsRequest()
        if request.name:
            target = self._find(request.name, request.version)
            asked = pb.ModelStatisticsRequest(
                name=target.model, version=target.version if request.version or target.route is not None else ""
            )
        answers = await self._ask_all("ModelStatistics", asked)
        if request.name and not answers:
            raise NotFound("no worker has it ready, so none counts for it", reason="MODEL_NOT_READY")
        return fleet_statistics.summed(answers)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        """What any worker holds; ready where one of them has it ready."""
        answers = await self._ask_all("RepositoryIndex", request)
        return fleet_statistics.united(answers)

    async def Elsewhere(self, request: Any, context: Any) -> Any:
        """Not a question to the mesh as a whole."""
        raise Unimplemented("this is between a client and one model-worker: call the worker itself", reason="ASK_THE_WORKER")

    def _find(self, name: str, version: str) -> Target:
        return self._passing.find(name, version, current())

    async def _ask(self, target: Target, method: str, request: Any) -> bytes:
        return await self._workers.ask(target.model, target.version, method, request.SerializeToString(), _soon())

    async def _ask_all(self, method: str, request: Any) -> list[bytes]:
        return await self._workers.ask_all(method, request.SerializeToString(), _soon())


def add(server: RpcServer, servicer: OpenInference) -> None:
    """Serve the protocol; callers need the scope "infer"."""
    server.add(_register, servicer, _SERVICE.full_name, scope=SCOPE)


def _register(servicer: Any, server: Any) -> None:
    """Register as generated code does, but that inferences come and go as bytes."""
    handlers: _Handlers = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(servicer.ModelInfer),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(servicer.ModelStreamInfer),
    }
    for method in _SERVICE.methods:
        if method.name in handlers:
            continue
        handlers[method.name] = grpc.unary_unary_rpc_method_handler(
            getattr(servicer, method.name if method.name in _HERE else "Elsewhere"),
            GetMessageClass(method.input_type).FromString,
            GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))
    server.add_registered_method_handlers(_SERVICE.full_name, handlers)


def _failure(request: bytes, error: Exception) -> bytes:
    """Return what a stream says of a request that failed, as Triton does: in words, with its id."""
    if not isinstance(error, PlaitError):
        log.error("a request on a stream failed by a fault of ours", exc_info=error)
        error = Internal("a fault inside plait; it was logged, please report it with the time of the call")
    message = pb.ModelStreamInferResponse(error_message=error.message)
    with suppress(InvalidArgument):
        message.infer_response.id = wire.head(request).id
    return message.SerializeToString()


def _soon() -> Deadline:
    return current().deadline.at_most(_PATIENCE_S)
