"""The composition root: a whole service on a real Redis, with a registry from a file or from a real PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr
from tests.fakes.feature_world import TOKEN, make_batch, statuses, tensor

from feature_retrieval.app import CurrentPlans, open_service
from feature_retrieval.erasure_guard import LOADED_KEY
from feature_retrieval.row_codec import entity_prefix
from feature_retrieval.settings import FeatureRetrievalSettings, NearCacheSettings, RowStoreSettings
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.errors import Unavailable, from_rpc_error
from plait.registry import last_known_good
from plait.registry.manifests import Manifest
from plait.registry.records import ApiKey, Entity, Feature, FeatureSet, FeatureView, ModelInput, Snapshot, Tenant
from plait.registry.store import Store
from plait.rpc.process import Tasks
from plait.rpc.server import RpcServer
from plait.settings import RegistrySettings, RpcSettings

VIEW = FeatureView(name="stats", entity=Entity(type="item"), features=(Feature(name="a", default=0.5),))
SET = FeatureSet(name="home", inputs=(ModelInput(name="item", entity="item", features=("stats:a",)),))
SNAPSHOT = Snapshot(revision=7, feature_views={"stats": VIEW}, feature_sets={"home": SET})
NOBODY = SecretStr("postgresql://plait@127.0.0.1:1/none")  # port 1 is tcpmux: nothing listens there


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PLAIT_FEATURE_RETRIEVAL_")]:
        monkeypatch.delenv(name)


def settings_of(redis_url: str, registry: RegistrySettings, **more: Any) -> FeatureRetrievalSettings:
    return FeatureRetrievalSettings(
        rpc=RpcSettings(service_token=SecretStr("t0ken"), grace_s=5),
        redis=RowStoreSettings(url=SecretStr(redis_url)),
        registry=registry,
        **more,
    )


def kept_in(file: Path, snapshot: Snapshot = SNAPSHOT) -> RegistrySettings:
    last_known_good.write(file, snapshot)
    return RegistrySettings(dsn=NOBODY, last_known_good=file, first_snapshot_timeout_s=10)


@asynccontextmanager
async def running(settings: FeatureRetrievalSettings) -> AsyncIterator[tuple[RpcServer, Any]]:
    """Do what the process does, without its signals: open, serve, drain, close in reverse."""
    async with AsyncExitStack() as stack:
        tasks = Tasks(await stack.enter_async_context(asyncio.TaskGroup()))
        stack.callback(tasks.stop)
        server = await open_service(settings, stack, tasks)
        stack.callback(server.tracing.close)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield server, pb_grpc.FeatureRetrievalServiceStub(channel)
        await server.drain()


async def write(stub: Any, value: float, at_s: float) -> Any:
    batch = make_batch("stats", ["i"], {"a": [value]}, at_s=at_s)
    return await stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=TOKEN, timeout=20)


async def read(stub: Any) -> Any:
    request = pb.GetFeaturesRequest(feature_set="home", entities=[{"entity_type": "item", "ids": {"string_ids": ["i"]}}])
    return await stub.GetFeatures(request, metadata=TOKEN, timeout=20)


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 20) -> None:
    give_up = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("near_cache_bytes", [0, 1 << 22])
async def test_it_serves_from_the_last_known_good_file(redis_url: str, tmp_path: Path, near_cache_bytes: int) -> None:
    settings = settings_of(redis_url, kept_in(tmp_path / "registry.json"), near_cache=NearCacheSettings(max_bytes=near_cache_bytes))
    with redis.Redis.from_url(redis_url) as client:
        client.set(LOADED_KEY, 0)  # a Redis that was told of every erasure there is
    async with running(settings) as (server, stub):
        assert (await write(stub, 1, 1e9)).applied == 1
        for n in range(2, 12):  # whatever is cached follows
            await write(stub, n, 1e9 + n)

            async def seen(n: int = n) -> bool:
                answer = await read(stub)
                return bool(tensor(answer, "item").tolist() == [[n]])

            await eventually(seen)
        answer = await read(stub)
        assert (answer.registry_revision, statuses(answer, "stats")) == (7, ["PRESENT"])
        async with grpc.aio.insecure_channel(server.address) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name() in {"registry", "near-cache"}] == []


async def test_a_redis_that_was_lost_takes_no_writes_while_postgres_is_away_and_is_read(redis_url: str, tmp_path: Path) -> None:
    async with running(settings_of(redis_url, kept_in(tmp_path / "registry.json"))) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await write(stub, 1, 1e9)
        assert from_rpc_error(caught.value).reason == "ERASURES_NOT_LOADED"
        assert statuses(await read(stub), "stats") == ["DEFAULTED"]
        with redis.Redis.from_url(redis_url) as client:
            client.set(LOADED_KEY, 0)
        assert (await write(stub, 1, 1e9)).applied == 1


async def test_it_opens_although_redis_is_away(tmp_path: Path) -> None:
    async with running(settings_of("redis://127.0.0.1:1", kept_in(tmp_path / "registry.json"))) as (_, stub):
        answer = await read(stub)
        assert (statuses(answer, "stats"), tensor(answer, "item").tolist()) == (["UNAVAILABLE"], [[0.5]])


async def test_without_any_registry_it_does_not_open(redis_url: str) -> None:
    registry = RegistrySettings(dsn=NOBODY, first_snapshot_timeout_s=0.05)
    with pytest.raises(ExceptionGroup) as caught:
        async with running(settings_of(redis_url, registry)):
            pass
    assert caught.group_contains(Unavailable, match="no snapshot of the registry")


async def test_it_follows_the_registry(redis_url: str, postgres_dsn: str) -> None:
    async with await Store.open(postgres_dsn) as store:
        await store.migrate()
        await store.apply([Manifest(record=VIEW), Manifest(record=SET)], actor="test", reason="")
        async with running(settings_of(redis_url, RegistrySettings(dsn=SecretStr(postgres_dsn)))) as (_, stub):
            await write(stub, 3, 1e9)
            before = await read(stub)
            assert tensor(before, "item").tolist() == [[3]]
            longer = FeatureView(name="stats", entity=VIEW.entity, features=(*VIEW.features, Feature(name="b", default=9)))
            wider = FeatureSet(name="home", inputs=(ModelInput(name="item", entity="item", features=("stats:b", "stats:a")),))
            await store.apply([Manifest(record=longer), Manifest(record=wider)], actor="test", reason="")

            async def wider_now() -> bool:
                answer = await read(stub)
                return bool(tensor(answer, "item").tolist() == [[9, 3]])

            await eventually(wider_now)
            assert (await read(stub)).registry_revision > before.registry_revision


def test_plans_are_swapped_whole() -> None:
    current = CurrentPlans(Snapshot())
    before = current.plans()
    current.swap(SNAPSHOT)
    assert before.snapshot.revision == 0  # who holds the old world keeps it
    assert current.plans().snapshot is SNAPSHOT
    assert current.plans() is current.plans()


def test_every_tenant_s_entity_types_are_tracked() -> None:
    user = FeatureView(name="profile", entity=Entity(type="user"), features=(Feature(name="age"),))
    snapshot = Snapshot(
        feature_views={"stats": VIEW, "more": VIEW, "profile": user},
        tenants={"shop": Tenant(name="shop")},
        keys={"0": ApiKey(id="k", tenant="other", sha256="0")},
    )
    wanted = sorted(entity_prefix(tenant, kind) for tenant in ("default", "shop", "other") for kind in ("item", "user"))
    assert CurrentPlans(snapshot).key_prefixes() == wanted
    assert CurrentPlans(Snapshot()).key_prefixes() == []
