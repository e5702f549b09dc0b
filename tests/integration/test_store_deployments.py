"""The whole service on a Redis Cluster with a durable copy: what it acknowledged is there again after every server was emptied."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from pydantic import SecretStr
from tests.fakes.feature_world import TOKEN, make_batch, statuses, tensor
from tests.fakes.redis_cluster import RedisCluster

from feature_retrieval.app import open_service
from feature_retrieval.settings import FeatureRetrievalSettings, PrivacySettings, RowStoreSettings
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.registry.manifests import Manifest
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput
from plait.registry.store import Store
from plait.rpc.process import Tasks
from plait.settings import RegistrySettings, RpcSettings

IDS = [f"i{n}" for n in range(60)]
RECORDS: list[FeatureView | FeatureSet] = [
    FeatureView(name="stats", entity=Entity(type="item"), features=(Feature(name="a", default=0.5),), durable="before"),
    FeatureSet(name="home", inputs=(ModelInput(name="item", entity="item", features=("stats:a",)),)),
]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PLAIT_FEATURE_RETRIEVAL_")]:
        monkeypatch.delenv(name)


@asynccontextmanager
async def running(url: str, dsn: str) -> AsyncIterator[tuple[Any, Any]]:
    settings = FeatureRetrievalSettings(
        rpc=RpcSettings(service_token=SecretStr("t0ken"), grace_s=5),
        redis=RowStoreSettings(url=SecretStr(url), mode="cluster"),
        registry=RegistrySettings(dsn=SecretStr(dsn)),
        privacy=PrivacySettings(key=SecretStr("k" * 32)),
    )
    async with AsyncExitStack() as stack:
        tasks = Tasks(await stack.enter_async_context(asyncio.TaskGroup()))
        stack.callback(tasks.stop)
        server = await open_service(settings, stack, tasks)
        stack.callback(server.tracing.close)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield server, pb_grpc.FeatureRetrievalServiceStub(channel)
        await server.drain()


async def read(stub: Any) -> Any:
    request = pb.GetFeaturesRequest(feature_set="home")
    request.entities.add(entity_type="item").ids.string_ids.extend(IDS)
    return await stub.GetFeatures(request, metadata=TOKEN, timeout=20)


async def test_a_cluster_that_was_lost_is_built_again(postgres_dsn: str) -> None:
    async with await Store.open(postgres_dsn) as registry:
        await registry.migrate()
        await registry.apply([Manifest(record=record) for record in RECORDS], actor="me")
    async with RedisCluster() as cluster, running(cluster.url, postgres_dsn) as (server, stub):
        batch = make_batch("stats", IDS, {"a": range(60)})
        written = await stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=TOKEN, timeout=20)
        assert (written.applied, written.durability) == (60, pb.DURABILITY_COMMITTED)
        erase = pb.EraseEntityRequest(reason="asked")
        erase.entities.entity_type = "item"
        erase.entities.ids.string_ids.append(IDS[0])
        [certificate] = (await stub.EraseEntity(erase, metadata=TOKEN, timeout=20)).certificates
        assert [(view.rows, view.durable_rows) for view in certificate.views] == [(1, 1)]
        expected = [[0.5], *([float(n)] for n in range(1, 60))]
        assert tensor(await read(stub), "item").tolist() == expected
        cluster.flush()

        async def lost() -> bool:  # the near cache hears of it
            return set(statuses(await read(stub), "stats")) == {"DEFAULTED"}

        async with asyncio.timeout(20):
            while not await lost():
                await asyncio.sleep(0.01)
        answers = [a async for a in stub.RebuildFeatures(pb.RebuildFeaturesRequest(), metadata=TOKEN, timeout=60)]
        assert (answers[-1].read, answers[-1].applied, answers[-1].erasures) == (59, 59, 1)

        async def back() -> bool:
            return bool(tensor(await read(stub), "item").tolist() == expected)

        async with asyncio.timeout(20):
            while not await back():
                await asyncio.sleep(0.01)
        again = await stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=TOKEN, timeout=20)
        assert [(error.row, error.reason) for error in again.errors] == [(0, "ENTITY_ERASED")]
        value = server.metrics.registry.get_sample_value
        assert value("plait_features_store_seconds_count", {"operation": "write"}) >= 2
        assert value("plait_features_durable_queue_rows") == 0
