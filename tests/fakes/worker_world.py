"""A model-worker on a real grpc.aio server over real artifacts, with a registry snapshot made by hand."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from tests.fakes.registry_world import eventually
from torch import Tensor, nn

from model_worker.controls import Controls
from model_worker.inference import Inference
from model_worker.instruments import Instruments
from model_worker.lifecycle import State
from model_worker.load_report import LoadReport, StreamLoad
from model_worker.models import Models
from model_worker.served import Loader, Prepared, Served
from model_worker.servicer import InferenceServicer, StreamServicer
from model_worker.settings import BatchingSettings, ModelSettings, ProtocolSettings
from model_worker.triton_metrics import TritonMetrics
from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.inference.v2 import inference_pb2_grpc as pb_grpc
from plait.api.model_worker.v1 import model_worker_service_pb2 as stream_pb
from plait.api.model_worker.v1 import model_worker_service_pb2_grpc as stream_pb_grpc
from plait.dtypes import BY_NAME, BY_OIP
from plait.registry import artifact
from plait.registry.artifact import ArtifactManifest, SelfTest
from plait.registry.records import ApiKey, Batching, Execution, Model, ModelVersion, Snapshot, TensorSpec
from plait.rpc.channel import open_channel, service_metadata
from plait.rpc.credentials import Authenticator, digest
from plait.rpc.deadline import Deadline
from plait.rpc.multiplex import Multiplexer
from plait.rpc.server import RpcServer
from plait.settings import ChannelSettings, RpcSettings
from plait.telemetry.metrics import Metrics
from plait.telemetry.tracing import off

SERVICE_TOKEN = "the-token"
TOKEN = (("x-plait-service-token", SERVICE_TOKEN),)
POISON = -13.0
Arrays = Mapping[str, np.ndarray[Any, Any]]

USER = TensorSpec(name="user", dtype="float32", shape=(1, 3), per="request")
ITEM = TensorSpec(name="item", dtype="float32", shape=(-1, 3))
SCORE = TensorSpec(name="score", dtype="float32", shape=(-1,))
RANK = TensorSpec(name="rank", dtype="int64", shape=(-1,))


class DotRanker(nn.Module):
    """score = scale · (user · item), rank = the row's place within its own request.

    Fails on an item that begins with POISON. Exact for small whole numbers, so an answer can be compared bit by bit.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, user: Tensor, item: Tensor, row_splits: Tensor) -> tuple[Tensor, Tensor]:
        if bool((item[:, 0] == -13.0).any()):
            raise RuntimeError("poison")
        counts = row_splits[1:] - row_splits[:-1]
        users = user.repeat_interleave(counts, dim=0)
        place = torch.arange(item.shape[0]) - row_splits[:-1].repeat_interleave(counts)
        return (users * item).sum(1) * self.scale, place


class Doubler(nn.Module):
    """y = 2 · x, row by row."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def dot_scores(user: Any, item: Any, scale: float = 1.0) -> list[float]:
    """Return what DotRanker answers, computed without it."""
    scores: list[float] = ((np.asarray(user) * np.asarray(item)).sum(1) * scale).tolist()
    return scores


def publish_ranker(
    folder: Path, *, scale: float = 1.0, self_test_scale: float | None = None, execution: Execution | None = None, **batching: Any
) -> ModelVersion:
    """Publish a DotRanker as TorchScript; its self test is right unless `self_test_scale` differs from `scale`."""
    folder.mkdir(parents=True)
    scripted(DotRanker(scale)).save(str(folder / "model.pt"))
    user, item = np.array([[1, 2, 3]], np.float32), np.arange(12, dtype=np.float32).reshape(4, 3)
    expected = np.array(dot_scores(user, item, scale if self_test_scale is None else self_test_scale), np.float32)
    np.savez(
        folder / "self_test.npz",
        **{"input.user": user, "input.item": item, "output.score": expected, "output.rank": np.arange(4)},
    )
    manifest = ArtifactManifest(
        name="ranker",
        format="torchscript",
        entry="model.pt",
        feature_set="home",
        inputs=(USER, ITEM),
        outputs=(SCORE, RANK),
        batching=Batching(row_splits="row_splits", **batching),
        execution=execution or Execution(),
        self_test=SelfTest(file="self_test.npz"),
    )
    return published(folder, manifest)


def publish_doubler(folder: Path, **batching: Any) -> ModelVersion:
    """Publish a Doubler as a torch.export archive, without a self test."""
    folder.mkdir(parents=True)
    rows = torch.export.Dim("rows", min=1, max=1 << 20)
    program = torch.export.export(Doubler(), (torch.ones(4, 2),), dynamic_shapes=({0: rows},))
    torch.export.save(program, str(folder / "model.pt2"))
    tensors = [TensorSpec(name=name, dtype="float32", shape=(-1, 2)) for name in "xy"]
    manifest = ArtifactManifest(
        name="doubler",
        format="torch_export",
        entry="model.pt2",
        inputs=(tensors[0],),
        outputs=(tensors[1],),
        batching=Batching(**batching),
    )
    return published(folder, manifest)


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    """Return the module as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script: torch.jit.ScriptModule = torch.jit.script(module.eval())
    return script


def published(folder: Path, manifest: ArtifactManifest, version: str = "1") -> ModelVersion:
    """Write model.yaml and return the version as the registry would hold it."""
    return ModelVersion(version=version, artifact=str(folder), digest=artifact.write(folder, manifest))


def model(name: str, *versions: ModelVersion, **aliases: str) -> Model:
    """Return a model whose versions are numbered from 1."""
    numbered = tuple(dataclasses.replace(v, version=str(n)) for n, v in enumerate(versions, 1))
    return Model(name=name, versions=numbered, aliases=aliases)


def snapshot(*models: Model, revision: int = 1, **more: Any) -> Snapshot:
    """Return a registry that holds these models and nothing else, unless `more` says so."""
    return Snapshot(revision=revision, models={m.name: m for m in models}, **more)


def api_key(secret: str, *scopes: str) -> ApiKey:
    """Return the record of a key."""
    return ApiKey(id="k", tenant="shop", sha256=digest(secret), scopes=scopes)


def infer_request(model_name: str, arrays: Arrays, *, version: str = "", typed: bool = False, **more: Any) -> pb.ModelInferRequest:
    """Return a request with these inputs, raw unless `typed` (float32 only)."""
    request = pb.ModelInferRequest(model_name=model_name, model_version=version, **more)
    for name, array in arrays.items():
        tensor = request.inputs.add(name=name, datatype=BY_NAME[array.dtype.name].oip, shape=array.shape)
        if typed:
            tensor.contents.fp32_contents.extend(array.ravel().tolist())
        else:
            request.raw_input_contents.append(array.tobytes())
    return request


def ranking(user: Any, item: Any, model_name: str = "ranker", **more: Any) -> pb.ModelInferRequest:
    """Return a request to a DotRanker: `user` [3] and `item` [rows, 3]."""
    return infer_request(model_name, {"user": np.array([user], np.float32), "item": np.array(item, np.float32)}, **more)


def outputs(response: pb.ModelInferResponse) -> dict[str, list[Any]]:
    """Return the raw outputs of an answer by name."""
    return {
        tensor.name: np.frombuffer(raw, BY_OIP[tensor.datatype].numpy).reshape(tuple(tensor.shape)).tolist()
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


class Gate:
    """Stands before every forward pass: while closed, passes wait. `arrived` counts those that came, by rows of their last input."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.arrived: list[int] = []

    def close(self) -> None:
        """Hold the passes that come from now on."""
        self._open.clear()

    def open(self) -> None:
        """Let them through."""
        self._open.set()

    def wait(self, inputs: Sequence[Any]) -> None:
        """Note a pass and hold it while closed."""
        self.arrived.append(len(inputs[1] if len(inputs) > 1 else inputs[0]))
        if not self._open.wait(60):
            raise TimeoutError("a test left its gate closed")


class GatedModel:
    """A loaded model behind a gate."""

    def __init__(self, model: Any, gate: Gate) -> None:
        self._model = model
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, inputs: Sequence[Any]) -> Any:
        self._gate.wait(inputs)
        return self._model(inputs)


class GatedLoader(Loader):
    """The real loader, which puts a gate before the models it serves and can be made to wait before it loads."""

    def __init__(self, models: ModelSettings, batching: BatchingSettings, instruments: Instruments) -> None:
        super().__init__(models, batching, instruments)
        self.gate = Gate()
        self.may_load = threading.Event()
        self.may_load.set()

    def prepare(self, version: ModelVersion, admit: Any = lambda *_: None) -> Prepared:
        if not self.may_load.wait(60):
            raise TimeoutError("a test left its loader waiting")
        return super().prepare(version, admit)

    def serve(self, model: str, version: str, prepared: Prepared, health: Any = None) -> Served:
        return super().serve(
            model, version, dataclasses.replace(prepared, models=tuple(GatedModel(model, self.gate) for model in prepared.models)), health
        )


class WorkerWorld:
    """A running worker: `stub` speaks the Open Inference Protocol, `infer` and `stream` are shorthands for one call."""

    def __init__(self, models: Models, loader: GatedLoader, metrics: Metrics, server: RpcServer, channel: grpc.aio.Channel) -> None:
        self.models = models
        self.loader = loader
        self.gate = loader.gate
        self.metrics = metrics
        self.server = server
        self.stub: Any = pb_grpc.GRPCInferenceServiceStub(channel)
        self.stream_stub: Any = stream_pb_grpc.ModelWorkerServiceStub(channel)
        settings = ChannelSettings(service_token=SERVICE_TOKEN)  # type: ignore[arg-type]
        stream = "/plait.api.model_worker.v1.ModelWorkerService/StreamInfer"
        self.mux = Multiplexer(channel, stream, stream_pb.StreamInferResponse, name="worker", metadata=service_metadata(settings))

    async def settled(self) -> None:
        """Return once every version that should be served is, or has failed."""
        await eventually(self._is_settled, 60)

    def states(self) -> dict[str, str]:
        """Return the state of everything held, by "model/version"."""
        return {f"{name}/{entry.version.version}": entry.state.name for name, entry in self.models.entries()}

    def _is_settled(self) -> bool:
        held = {(name, entry.version.version): entry.state for name, entry in self.models.entries()}
        return all(held.get(key, State.LOADING) is not State.LOADING for key in self.models._wanted())

    async def infer(self, request: pb.ModelInferRequest, *, timeout_s: float | None = 20.0, metadata: Any = TOKEN) -> Any:
        """Call ModelInfer."""
        return await self.stub.ModelInfer(request, metadata=metadata, timeout=timeout_s)

    async def stream(self, request: pb.ModelInferRequest, *, timeout_s: float = 20.0) -> Any:
        """Call StreamInfer, as the router does."""
        frame = stream_pb.StreamInferRequest(request=request)
        return await self.mux.call(frame, deadline=Deadline.after(timeout_s))

    def sample(self, name: str, **labels: str) -> float:
        """Return a metric's value; 0 where there is none."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def worker_world(
    world: Snapshot,
    *,
    models: Mapping[str, Any] | None = None,
    batching: Mapping[str, Any] | None = None,
    protocol: Mapping[str, Any] | None = None,
    loader_type: type[GatedLoader] = GatedLoader,
    **rpc: Any,
) -> AsyncIterator[WorkerWorld]:
    """Run the service on a free port, and return it when every model of `world` was loaded or has failed."""
    metrics = Metrics()
    instruments = Instruments(metrics)
    model_settings = ModelSettings(**(models or {}))
    loader = loader_type(model_settings, BatchingSettings(**(batching or {})), instruments)
    held = Models(model_settings, loader, instruments)
    held.adopt(world)
    follower = asyncio.create_task(held.run())
    settings = RpcSettings(**{"grace_s": 2, **rpc})
    server = RpcServer(settings, authenticator=Authenticator(world.keys.get, service_token=SERVICE_TOKEN), metrics=metrics)
    inference = Inference(held, instruments.statistics, instruments.failed)
    metrics.registry.register(TritonMetrics(instruments.statistics))
    load = LoadReport(1, lambda: instruments.statistics.busy_s, lambda: held.queued_rows)
    server.add(
        pb_grpc.add_GRPCInferenceServiceServicer_to_server,
        InferenceServicer(
            held,
            inference,
            instruments.statistics,
            Controls(ProtocolSettings(**(protocol or {})), off()),
            version="0",
            max_in_flight=settings.max_in_flight,
            default_timeout_s=settings.default_timeout_s,
            tracing=off(),
            load=load,
        ),
        "inference.GRPCInferenceService",
        scope="infer",
    )
    server.add(
        stream_pb_grpc.add_ModelWorkerServiceServicer_to_server,
        StreamServicer(
            inference,
            max_in_flight=settings.max_in_flight,
            tracing=off(),
            stream_load=StreamLoad(lambda: held.queued_rows, lambda: server.draining),
            load=load,
        ),
        "plait.api.model_worker.v1.ModelWorkerService",
        scope="infer",
    )
    await server.start()
    async with open_channel(server.address, ChannelSettings()) as channel:
        w = WorkerWorld(held, loader, metrics, server, channel)
        try:
            await w.settled()
            yield w
        finally:
            loader.gate.open()
            loader.may_load.set()
            await w.mux.close()
            await server.drain()
            await held.close()
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
