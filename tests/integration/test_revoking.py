"""A revoked key is refused everywhere, and what it holds open ends: on both kinds of server, with and without the registry's NOTIFY."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import asyncpg
import grpc
import pytest

from feature_retrieval.permissions import ADMIN, SCOPES
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.errors import PlaitError, from_rpc_error
from plait.registry.store import Store
from plait.registry.watcher import Watcher
from plait.rpc.credentials import Authenticator
from plait.rpc.server import RpcServer
from plait.settings import RpcSettings

Kind = Literal["core", "aio"]


@pytest.fixture
def dsn(postgres_dsn: str) -> str:
    return postgres_dsn


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    async with await Store.open(dsn) as opened:
        await opened.migrate()
        yield opened


class Features(pb_grpc.FeatureRetrievalServiceServicer):
    """Answers in each of the ways that a service of ours does."""

    async def GetFeatures(self, request: Any, context: Any) -> Any:
        return pb.GetFeaturesResponse()

    async def IngestFeatures(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            yield pb.IngestFeaturesResponse(batch_id=request.batch_id)

    async def StreamFeatures(self, requests: Any, context: Any) -> None:  # type: ignore[override]
        async for request in requests:
            await context.write(pb.StreamFeaturesResponse(call_id=request.call.call_id))

    async def ExportFeatures(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            yield pb.ExportFeaturesResponse()
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(kind: Kind, watcher: Watcher) -> AsyncIterator[Any]:
    server = RpcServer(RpcSettings(grace_s=1, server=kind), authenticator=Authenticator(lambda sha: watcher.snapshot.keys.get(sha)))  # noqa: PLW0108
    name = pb.DESCRIPTOR.services_by_name["FeatureRetrievalService"].full_name
    server.add(pb_grpc.add_FeatureRetrievalServiceServicer_to_server, Features(), name, scope=ADMIN, scopes=SCOPES)  # type: ignore[abstract]
    watcher.subscribe(server.reexamine)
    await server.start()
    tending = asyncio.create_task(server.tend())
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield pb_grpc.FeatureRetrievalServiceStub(channel)
    finally:
        tending.cancel()
        await asyncio.gather(tending, return_exceptions=True)
        await server.drain()


async def ending(call: Any) -> PlaitError:
    """Read a stream until it fails."""

    async def read() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read(), 20)
    return from_rpc_error(caught.value)


async def open_streams(stub: Any, metadata: Any) -> list[Any]:
    """Open one of each kind, and see that it answers."""
    ingest, stream = stub.IngestFeatures(metadata=metadata), stub.StreamFeatures(metadata=metadata)
    await ingest.write(pb.IngestFeaturesRequest(batch_id=1))
    assert (await ingest.read()).batch_id == 1
    frame = pb.StreamFeaturesRequest()
    frame.call.call_id = 7
    await stream.write(frame)
    assert (await stream.read()).call_id == 7
    export = stub.ExportFeatures(pb.ExportFeaturesRequest(), metadata=metadata)
    await export.read()
    return [ingest, stream, export]


@pytest.mark.parametrize("kind", ["core", "aio"])
@pytest.mark.parametrize("notified", [True, False])
async def test_a_revoked_key_is_refused_and_its_streams_end(store: Store, dsn: str, kind: Kind, notified: bool) -> None:
    key, secret = await store.create_key("default", ("features", "admin"), actor="anna")
    _, other = await store.create_key("default", ("features", "admin"), actor="anna")
    async with Watcher(dsn, poll_s=0.5) as watcher:
        await watcher.first(10)
        async with serving(kind, watcher) as stub:
            theirs, others = (("x-api-key", secret),), (("x-api-key", other),)
            revoked, kept = await open_streams(stub, theirs), await open_streams(stub, others)
            if notified:
                await store.revoke_key(key.id, actor="anna")
            else:  # as when a pooler swallows notifications
                connection = await asyncpg.connect(dsn)
                async with connection.transaction():
                    await connection.execute("update plait.api_key set revoked_at = now() where id = $1", key.id)
                    await connection.execute("update plait.revision set value = value + 1")
                await connection.close()
            assert {error.reason for error in await asyncio.gather(*map(ending, revoked))} == {"API_KEY_INVALID"}
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetFeatures(pb.GetFeaturesRequest(), metadata=theirs)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            await kept[0].write(pb.IngestFeaturesRequest(batch_id=2))
            assert (await kept[0].read()).batch_id == 2
            await kept[2].read()
            for call in kept:
                call.cancel()


async def test_streams_of_a_key_end_when_it_expires(store: Store, dsn: str) -> None:
    key, secret = await store.create_key("default", ("features", "admin"), actor="anna")
    async with Watcher(dsn) as watcher:
        await watcher.first(10)
        async with serving("core", watcher) as stub:
            opened = await open_streams(stub, (("x-api-key", secret),))
            await store.rotate_key(key.id, overlap_s=1, actor="anna")
            assert {error.reason for error in await asyncio.gather(*map(ending, opened))} == {"API_KEY_EXPIRED"}


async def test_roles_part_readers_from_writers(store: Store, dsn: str) -> None:
    _, reader = await store.create_key("default", ("read",), actor="anna")
    _, publisher = await store.create_key("default", ("publish",), actor="anna")
    async with Watcher(dsn) as watcher:
        await watcher.first(10)
        async with serving("core", watcher) as stub:
            await stub.GetFeatures(pb.GetFeaturesRequest(), metadata=(("x-api-key", reader),))
            refused = await ending(stub.IngestFeatures(metadata=(("x-api-key", reader),)))
            assert (refused.reason, "role publish" in refused.message) == ("SCOPE_MISSING", True)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetFeatures(pb.GetFeaturesRequest(), metadata=(("x-api-key", publisher),))
            assert from_rpc_error(caught.value).reason == "SCOPE_MISSING"
            ingest = stub.IngestFeatures(metadata=(("x-api-key", publisher),))
            await ingest.write(pb.IngestFeaturesRequest(batch_id=1))
            assert (await ingest.read()).batch_id == 1
            ingest.cancel()
