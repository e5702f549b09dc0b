"""The whole worker in one process, over a real registry: started, used, drained."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.fakes.object_store import ObjectStore
from tests.fakes.registry_world import eventually
from tests.fakes.small_ranker import FEATURES, ITEMS, USERS, manifests, model, offline_scores, publish, route
from tests.fakes.worker_world import TOKEN

from model_worker.app import open_service
from model_worker.settings import ModelWorkerSettings
from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.inference.v2 import inference_pb2_grpc as pb_grpc
from plait.errors import Unavailable
from plait.registry import artifact
from plait.registry.manifests import pin_artifacts
from plait.registry.records import Model, ModelVersion
from plait.registry.sources import StoreOptions
from plait.registry.store import Store
from plait.rpc.channel import open_channel
from plait.rpc.process import serve
from plait.settings import ChannelSettings


async def test_a_model_in_an_object_store_is_served_from_a_copy(postgres_dsn: str, tmp_path: Path, object_store: ObjectStore) -> None:
    folder, stop = publish(tmp_path / "1"), asyncio.Event()
    object_store.objects.update({f"models/ranker/1/{file.name}": file.read_bytes() for file in folder.iterdir()})
    settings = ModelWorkerSettings(
        rpc={"service_token": "the-token", "port_file": tmp_path / "port", "grace_s": 2},  # type: ignore[arg-type]
        registry={"dsn": postgres_dsn},  # type: ignore[arg-type]
        artifacts={"cache": tmp_path / "cache", "allow_http": True},  # type: ignore[arg-type]
    )
    version = ModelVersion(version="1", artifact="s3://models/ranker/1")
    wanted = manifests(USERS, ITEMS, FEATURES, Model(name="ranker", versions=(version,), aliases={"champion": "1"}))
    async with await Store.open(postgres_dsn) as store:
        await store.migrate()
        await store.apply(pin_artifacts(wanted, options=StoreOptions(allow_http=True)), actor="test")
        process = asyncio.create_task(serve("model-worker", settings, open_service, stop))
        await eventually(lambda: (tmp_path / "port").exists() or process.done(), 60)
        async with open_channel(json.loads((tmp_path / "port").read_text())["rpc"], ChannelSettings()) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)

            async def ready() -> None:
                while not (await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True), metadata=TOKEN)).models:
                    pass

            await asyncio.wait_for(ready(), 60)
            object_store.objects.clear()
            request = pb.ModelInferRequest(model_name="ranker")
            request.inputs.add(name="user", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([30, 1])
            request.inputs.add(name="item", datatype="FP32", shape=[2, 3]).contents.fp32_contents.extend(range(6))
            answer = await stub.ModelInfer(request, metadata=TOKEN, timeout=20)
            assert len(answer.outputs[0].contents.fp32_contents) == 2
            stop.set()
        await process
    assert [path.name for path in (tmp_path / "cache").glob("sha256-*")] == [artifact.digest(folder).replace(":", "-")]
    assert object_store.asked("GET", "models/ranker/1/model.pt") == 1


async def test_it_serves_what_the_registry_names_until_it_is_told_to_stop(postgres_dsn: str, tmp_path: Path) -> None:
    first, second = publish(tmp_path / "1"), publish(tmp_path / "2", seed=1)
    stop = asyncio.Event()
    settings = ModelWorkerSettings(
        rpc={"service_token": "the-token", "port_file": tmp_path / "port", "grace_s": 2},  # type: ignore[arg-type]
        registry={"dsn": postgres_dsn, "last_known_good": tmp_path / "lkg"},  # type: ignore[arg-type]
        artifacts={"cache": tmp_path / "cache"},  # type: ignore[arg-type]
        models={"unload_after_s": 0},  # type: ignore[arg-type]
    )
    async with await Store.open(postgres_dsn) as store:
        await store.migrate()
        await store.apply(pin_artifacts(manifests(USERS, ITEMS, FEATURES, model("ranker", first), route("home"))), actor="test")
        process = asyncio.create_task(serve("model-worker", settings, open_service, stop))
        await eventually(lambda: (tmp_path / "port").exists() or process.done(), 60)
        async with open_channel(json.loads((tmp_path / "port").read_text())["rpc"], ChannelSettings()) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)

            async def version_with(number: str) -> None:
                while True:
                    index = await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True), metadata=TOKEN)
                    if [m.version for m in index.models] == [number]:
                        return

            async def scores() -> list[float]:
                request = pb.ModelInferRequest(model_name="ranker")
                request.inputs.add(name="user", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([30, 1])
                request.inputs.add(name="item", datatype="FP32", shape=[2, 3]).contents.fp32_contents.extend(range(6))
                answer = await stub.ModelInfer(request, metadata=TOKEN, timeout=20)
                return list(answer.outputs[0].contents.fp32_contents)

            await asyncio.wait_for(version_with("1"), 60)
            names = ("", "inference.GRPCInferenceService", "plait.api.model_worker.v1.ModelWorkerService")
            health = [await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name)) for name in names]
            assert [answer.status for answer in health] == [health_pb2.HealthCheckResponse.SERVING] * 3
            assert await scores() == pytest.approx(offline_scores(first, [30.0, 1.0], [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]), abs=1e-5)
            await store.apply(pin_artifacts(manifests(model("ranker", first, second))), actor="test")
            await asyncio.wait_for(version_with("2"), 60)
            assert await scores() == pytest.approx(offline_scores(second, [30.0, 1.0], [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]), abs=1e-5)
            stop.set()
            await process


async def test_without_a_registry_it_does_not_start(tmp_path: Path) -> None:
    settings = ModelWorkerSettings(
        artifacts={"cache": tmp_path / "cache"},  # type: ignore[arg-type]
        registry={"dsn": "postgresql://nobody@127.0.0.1:1/nothing", "first_snapshot_timeout_s": 0.1},  # type: ignore[arg-type]
    )
    with pytest.raises(ExceptionGroup) as failed:
        await serve("model-worker", settings, open_service, asyncio.Event())
    assert failed.group_contains(Unavailable)
