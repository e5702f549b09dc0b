"""The whole router in one process, over a real registry: started, used, told of news, drained."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import SecretStr
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.foreign_server import ForeignServer
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.registry_world import HOME, RANKER, VERSION, eventually, manifests

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.router.v1 import router_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.errors import FailedPrecondition, PlaitError, Unavailable, from_rpc_error
from plait.registry.policies import PoolEndpoint
from plait.registry.records import Pool
from plait.registry.store import Store
from plait.rpc.channel import open_channel
from plait.rpc.process import serve
from plait.settings import ChannelSettings
from router.app import _channel, open_service
from router.settings import RouterSettings

TOKEN = (("x-plait-service-token", "the-token"), ("x-plait-tenant", "shop"))
INPUTS = {"user": ("user", 2), "item": ("item", 2)}


def settings(folder: Path, dsn: str, features: str, workers: str) -> RouterSettings:
    tree: dict[str, Any] = {
        "rpc": {"service_token": "the-token", "port_file": folder / "port", "grace_s": 2},
        "registry": {"dsn": dsn, "last_known_good": folder / "lkg", "first_snapshot_timeout_s": 20.0},
        "features": {"addresses": features},
        "workers": {"addresses": workers},
    }
    return RouterSettings(**tree)


def rank(*candidates: str) -> pb.RankRequest:
    request = pb.RankRequest(route="home")
    request.subject.string_ids.append("u1")
    request.candidates.CopyFrom(types_pb2.EntityIds(string_ids=candidates))
    return request


async def test_it_serves_by_the_newest_snapshot_until_it_is_told_to_stop(postgres_dsn: str, tmp_path: Path) -> None:
    stop = asyncio.Event()
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        await Store.open(postgres_dsn) as store,
    ):
        await store.migrate()
        await store.apply(manifests(), actor="test")
        made = settings(tmp_path, postgres_dsn, features.address, worker.address)
        process = asyncio.create_task(serve("router", made, open_service, stop))
        await eventually(lambda: (tmp_path / "port").exists() or process.done(), 60)
        async with open_channel(json.loads((tmp_path / "port").read_text())["rpc"], ChannelSettings()) as channel:
            stub: Any = pb_grpc.RouterServiceStub(channel)
            answer = await stub.Rank(rank("i1", "i3", "i2"), metadata=TOKEN, timeout=20)
            assert list(answer.item_ids.string_ids) == ["i3", "i2", "i1"]
            assert [c.is_service for c in (*features.calls, *worker.calls)] == [True, True]  # the mesh's token was set once

            await store.apply(manifests(replace(HOME, max_candidates=2)), actor="test")

            async def refusal() -> PlaitError:
                while True:
                    try:
                        await stub.Rank(rank("i1", "i3", "i2"), metadata=TOKEN, timeout=20)
                    except grpc.aio.AioRpcError as error:
                        return from_rpc_error(error)

            assert "at most 2 on this route" in str(await asyncio.wait_for(refusal(), 30))
            later = await stub.Rank(rank("i1", "i2"), metadata=TOKEN, timeout=20)
            assert later.registry_revision > answer.registry_revision
            stop.set()
            await process


async def test_a_model_moves_to_a_foreign_server_while_it_serves(postgres_dsn: str, tmp_path: Path) -> None:
    stop = asyncio.Event()
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        ForeignServer(("ranker", "1")) as triton,
        await Store.open(postgres_dsn) as store,
    ):
        await store.migrate()
        await store.apply(manifests(), actor="test")
        made = settings(tmp_path, postgres_dsn, features.address, worker.address)
        process = asyncio.create_task(serve("router", made, open_service, stop))
        await eventually(lambda: (tmp_path / "port").exists() or process.done(), 60)
        async with open_channel(json.loads((tmp_path / "port").read_text())["rpc"], ChannelSettings()) as channel:
            stub: Any = pb_grpc.RouterServiceStub(channel)
            await stub.Rank(rank("i1"), metadata=TOKEN, timeout=20)
            pool = Pool(name="triton", protocol="oip", endpoints=(PoolEndpoint(address=triton.address),))
            there = replace(RANKER, pool="triton", versions=(replace(VERSION, artifact="", digest=""),))
            await store.apply(manifests(pool, there), actor="test")

            async def answered_there() -> Any:
                while True:
                    answer = await stub.Rank(rank("i1", "i3", "i2"), metadata=TOKEN, timeout=20)
                    if triton.requests:
                        return answer

            answer = await asyncio.wait_for(answered_there(), 30)
            assert list(answer.item_ids.string_ids) == ["i3", "i2", "i1"]
            assert "the-token" not in repr(triton.metadata)
            with pytest.raises(FailedPrecondition, match="Model ranker"):
                await store.delete("Pool", "triton", actor="test")
        stop.set()
        await process


async def test_what_is_behind_may_be_away_while_it_starts(postgres_dsn: str, tmp_path: Path) -> None:
    stop = asyncio.Event()
    async with FakeFeatureRetrieval(INPUTS) as features, FakeModelWorker() as worker, await Store.open(postgres_dsn) as store:
        await features.server.drain()
        await worker.server.drain()
        await store.migrate()
        await store.apply(manifests(), actor="test")
        made = settings(tmp_path, postgres_dsn, features.address, worker.address)
        process = asyncio.create_task(serve("router", made, open_service, stop))
        await eventually(lambda: (tmp_path / "port").exists() or process.done(), 60)
        async with open_channel(json.loads((tmp_path / "port").read_text())["rpc"], ChannelSettings()) as channel:
            stub: Any = pb_grpc.RouterServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Rank(rank("i1"), metadata=TOKEN, timeout=20)
            assert isinstance(from_rpc_error(caught.value), Unavailable)
        stop.set()
        await process


async def test_without_a_registry_it_does_not_start() -> None:
    tree: dict[str, Any] = {"registry": {"dsn": "postgresql://nobody@127.0.0.1:1/nothing", "first_snapshot_timeout_s": 0.1}}
    with pytest.raises(ExceptionGroup) as failed:
        await serve("router", RouterSettings(**tree), open_service, asyncio.Event())
    assert failed.group_contains(Unavailable)


@pytest.mark.parametrize(("own", "used"), [("", "the-mesh's"), ("its-own", "its-own")])
def test_a_channel_without_a_token_of_its_own_uses_the_meshs(own: str, used: str) -> None:
    tree: dict[str, Any] = {"rpc": {"service_token": "the-mesh's"}}
    channel = ChannelSettings(service_token=SecretStr(own), max_message_bytes=4096)
    made = _channel(channel, RouterSettings(**tree))
    assert (made.service_token.get_secret_value(), made.max_message_bytes) == (used, 4096)
