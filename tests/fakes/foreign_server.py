"""A server of the Open Inference Protocol that is not ours: plain grpc.aio, no service token, its own error codes; faults to order."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np

from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.inference.v2 import inference_pb2_grpc as pb_grpc


class ForeignServer(pb_grpc.GRPCInferenceServiceServicer):
    """Answers the first column of input "item" as output "score".

    `held`: (model, version) it has ready, None = RepositoryIndex is not implemented. `fail`: (code, words) instead of an answer; `gate` is
    waited for before one.
    """

    def __init__(self, *held: tuple[str, str], lists: bool = True) -> None:
        self.held = held
        self.lists = lists
        self.fail: tuple[grpc.StatusCode, str] | None = None
        self.gate: asyncio.Event | None = None
        self.started = asyncio.Event()
        self.index_asked = asyncio.Event()
        self.index_gate: asyncio.Event | None = None
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.cancelled = 0
        self.server = grpc.aio.server()
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(self, self.server)

    async def __aenter__(self) -> ForeignServer:
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(None)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.started.set()
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.fail is not None:
            await context.abort(*self.fail)
        response = pb.ModelInferResponse(model_name=request.model_name, model_version=request.model_version, id=request.id)
        items = next(
            np.frombuffer(raw, "<f4").reshape(tuple(i.shape))
            for i, raw in zip(request.inputs, request.raw_input_contents, strict=True)
            if i.name == "item"
        )
        response.outputs.add(name="score", datatype="FP32", shape=[len(items)])
        response.raw_output_contents.append(items[:, 0].tobytes())
        return response

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        self.index_asked.set()
        if self.index_gate is not None:
            await self.index_gate.wait()
        if not self.lists:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method here")
        models = [pb.RepositoryIndexResponse.ModelIndex(name=m, version=v, state="READY") for m, v in self.held]
        return pb.RepositoryIndexResponse(models=models)
