"""The Open Inference Protocol v2 on the router: to its stock clients the whole mesh is one server, and routes are models among models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message_factory import GetMessageClass

from plait.api.inference.v2 import inference_pb2 as pb
from plait.errors import NotFound, Unimplemented
from plait.rpc.call import current
from plait.rpc.deadline import Deadline
from plait.rpc.server import RpcServer
from router import fleet_statistics
from router.pass_through import PassThrough, Target
from router.pools import Pools

if TYPE_CHECKING:
    _Handlers = dict[str, grpc.RpcMethodHandler[Any, Any]]

SCOPE: Final = "infer"
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
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

    def __init__(self, passing: PassThrough, workers: Pools, version: str) -> None:
        self._passing = passing
        self._workers = workers
        self._version = version

    async def ModelInfer(self, request: bytes, context: Any) -> bytes:
        """One inference, as its bytes."""
        return await self._passing.infer(request, current())

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
    """Register as generated code does, but that ModelInfer takes and gives bytes."""
    handlers: _Handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(servicer.ModelInfer)}
    for method in _SERVICE.methods:
        if method.name in handlers or method.client_streaming:
            continue
        handlers[method.name] = grpc.unary_unary_rpc_method_handler(
            getattr(servicer, method.name if method.name in _HERE else "Elsewhere"),
            GetMessageClass(method.input_type).FromString,
            GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))
    server.add_registered_method_handlers(_SERVICE.full_name, handlers)


def _soon() -> Deadline:
    return current().deadline.at_most(_PATIENCE_S)
