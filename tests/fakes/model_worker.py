"""A model-worker that speaks the real wire and scores by a formula, with faults to order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.api.inference.v2 import inference_pb2
from plait.api.inference.v2 import inference_pb2_grpc as oip_grpc
from plait.api.model_worker.v1 import model_worker_service_pb2 as pb
from plait.api.model_worker.v1 import model_worker_service_pb2_grpc as pb_grpc
from plait.errors import PlaitError, Unimplemented
from plait.rpc import multiplex
from plait.rpc.call import Call, current
from plait.rpc.credentials import Authenticator
from plait.rpc.server import RpcServer
from plait.settings import RpcSettings

OIP_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
SERVICE = pb.DESCRIPTOR.services_by_name["ModelWorkerService"].full_name

Score = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[Any]]


def item_number(user: NDArray[np.float32], item: NDArray[np.float32]) -> NDArray[Any]:
    """The first column of each item: with the fake features, the number in its id."""
    return item[:, 0]


class _Index(oip_grpc.GRPCInferenceServiceServicer):
    """What the worker says it holds."""

    def __init__(self, worker: FakeModelWorker) -> None:
        self._worker = worker

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        if self._worker.held is None:
            raise Unimplemented("this worker cannot say")
        response = inference_pb2.RepositoryIndexResponse()
        for name, version in sorted(self._worker.held):
            response.models.add(name=name, version=version, state="READY")
        return response


class FakeModelWorker(pb_grpc.ModelWorkerServiceServicer):
    """Answers output "score" from inputs "user" and "item".

    Faults: `error` is raised instead of an answer (`refuse` and `score_of` tell requests apart); `gate` is waited for before one, unless it is
    `let_pass`. `load` is told on every answer.
    `held`: the (model, version) it says it has ready; None = it cannot say.
    """

    def __init__(self, score: Score = item_number, *, token: str = "the-token", port: int = 0, instant: bool = False) -> None:
        self.score = score
        self.calls: list[Call] = []
        self.requests: list[inference_pb2.ModelInferRequest] = []
        self.started = asyncio.Event()
        self.error: PlaitError | None = None
        self.refuse: Callable[[inference_pb2.ModelInferRequest], PlaitError | None] = lambda _: self.error
        self.score_of: Callable[[inference_pb2.ModelInferRequest], Score] = lambda _: self.score
        self.gate: asyncio.Event | None = None
        self.let_pass: Callable[[inference_pb2.ModelInferRequest], bool] = lambda _: False
        self.cancelled = 0
        self.load: pb.LoadReport | None = None
        self.held: set[tuple[str, str]] | None = None
        self.datatype = "FP32"
        self._instant = instant
        self._cache: dict[int, bytes] = {}
        settings = RpcSettings(grace_s=0, port=port)
        self.server = RpcServer(settings, authenticator=Authenticator(lambda _: None, service_token=token))
        self.server.add(pb_grpc.add_ModelWorkerServiceServicer_to_server, self, SERVICE, scope="infer")
        self.server.add(oip_grpc.add_GRPCInferenceServiceServicer_to_server, _Index(self), OIP_SERVICE, scope="infer")

    async def __aenter__(self) -> FakeModelWorker:
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.drain()

    @property
    def address(self) -> str:
        return self.server.address

    async def StreamInfer(self, requests: AsyncIterator[Any], context: Any) -> None:
        await multiplex.serve(requests, context, self.fill, pb.StreamInferResponse, finish=self._finish)

    def _finish(self, response: Any) -> None:
        if self.load is not None:
            response.load.CopyFrom(self.load)

    async def fill(self, request: Any, response: Any) -> None:
        if not self._instant:
            self.calls.append(current())
            self.requests.append(request)
            self.started.set()
            await self._faults(request)
        response.model_name = request.model_name
        response.model_version = request.model_version
        response.id = request.id
        scores = self._scores(request)
        response.outputs.add(name="score", datatype=self.datatype, shape=[len(scores) // 4])
        response.raw_output_contents.append(scores)
        response.parameters["queue_us"].int64_param = 11
        response.parameters["compute_us"].int64_param = 22

    async def _faults(self, request: inference_pb2.ModelInferRequest) -> None:
        if self.gate is not None and not self.let_pass(request):
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        error = self.refuse(request)
        if error is not None:
            raise error

    def _scores(self, request: inference_pb2.ModelInferRequest) -> bytes:
        rows = next(i.shape[0] for i in request.inputs if i.name == "item")
        if self._instant and rows in self._cache:
            return self._cache[rows]
        tensors = {
            i.name: np.frombuffer(raw, "<f4").reshape(tuple(i.shape))
            for i, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        self._cache[rows] = self.score_of(request)(tensors["user"], tensors["item"]).astype("<f4").tobytes()
        return self._cache[rows]
