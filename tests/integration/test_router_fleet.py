"""Three routers as real processes on one Redis: what one keeps, tells and answers holds for all of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.questions import rank, strings
from tests.fakes.registry_world import HOME, WORLD, eventually, manifests

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.router.v1 import router_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.errors import Unavailable, from_rpc_error
from plait.local.child import Child
from plait.local.redis import EmbeddedRedis
from plait.registry.policies import CachePolicy
from plait.registry.store import Store

TOKEN = (("x-plait-service-token", "the-token"), ("x-plait-tenant", "shop"))
ROUTE = replace(HOME, cache=CachePolicy(ttl_s=600), repeat_window_s=600, timeout_s=10.0)
MISS, HIT, REPEATED = (getattr(explanation_pb, f"CACHE_STATUS_{word}") for word in ("MISS", "HIT", "REPEATED"))


@dataclass
class Fleet:
    """`stubs` to the routers, `children` their processes."""

    stubs: list[Any]
    children: list[Child]
    worker: FakeModelWorker
    redis: EmbeddedRedis

    async def ask(self, router: int, **fields: Any) -> Any:
        return await self.stubs[router].Rank(
            rank(**{"top_k": 2, "candidates": ("i1", "i2", "i3", "i4"), **fields}), metadata=TOKEN, timeout=30
        )

    async def sold(self, router: int, *items: str) -> None:
        request = pb.InvalidateCacheRequest(items=types_pb2.EntityRows(entity_type="item", ids=strings(*items)))
        await self.stubs[router].InvalidateCache(request, metadata=TOKEN, timeout=30)


@asynccontextmanager
async def fleet(folder: Path, dsn: str, count: int = 3) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        redis = await enter(EmbeddedRedis())
        features = await enter(FakeFeatureRetrieval({"user": ("user", 2), "item": ("item", 2)}))
        worker = await enter(FakeModelWorker())
        store = await enter(await Store.open(dsn))
        await store.migrate()
        await store.apply(manifests(*(ROUTE if record is HOME else record for record in WORLD)), actor="test")
        children = []
        for number in range(count):
            settings = {
                "RPC__SERVICE_TOKEN": "the-token",
                "RPC__PORT_FILE": str(folder / f"port-{number}"),
                "REGISTRY__DSN": dsn,
                "REGISTRY__LAST_KNOWN_GOOD": str(folder / f"lkg-{number}"),
                "FEATURES__ADDRESSES": features.address,
                "WORKERS__ADDRESSES": worker.address,
                "REDIS__URL": redis.url,
                "CACHE__REDIS_BUDGET_S": "1",
                "TELEMETRY__METRICS_PORT": "0",
            }
            env = {**os.environ, **{f"PLAIT_ROUTER_{name}": value for name, value in settings.items()}}
            child = Child.start([sys.executable, "-m", "router"], name=f"router-{number}", log=folder / f"log-{number}", env=env)
            stack.push_async_callback(child.stop, grace_s=10)
            children.append(child)
        stubs = []
        for number, child in enumerate(children):
            port_file = folder / f"port-{number}"
            await eventually(lambda f=port_file, c=child: f.exists() or not c.running, 60)  # type: ignore[misc]
            assert child.running, child.log_tail()
            channel = await enter(grpc.aio.insecure_channel(json.loads(port_file.read_text())["rpc"]))
            stubs.append(pb_grpc.RouterServiceStub(channel))
        yield Fleet(stubs, children, worker, redis)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.02)


async def kept_everywhere(routers: Fleet) -> None:
    """Every router answers from what it keeps."""
    for router in range(len(routers.stubs)):

        async def kept(router: int = router) -> bool:
            return bool((await routers.ask(router)).cache == HIT)

        await until(kept)


async def gone_everywhere(routers: Fleet, item: str) -> None:
    for router in range(len(routers.stubs)):

        async def gone(router: int = router) -> bool:
            return item not in (await routers.ask(router)).item_ids.string_ids

        await until(gone)


def unlike(*numbers: float) -> Any:
    """Scores by the number in the id, but some come last: they are sold."""
    return lambda _, item: np.where(np.isin(item[:, 0], numbers), -1, item[:, 0])


async def test_a_sold_item_leaves_the_answers_of_every_router(postgres_dsn: str, tmp_path: Path) -> None:
    async with fleet(tmp_path, postgres_dsn) as routers:
        await kept_everywhere(routers)
        asked = len(routers.worker.requests)
        routers.worker.score = unlike(3)
        assert "i3" in (await routers.ask(1)).item_ids.string_ids  # nobody told them
        assert len(routers.worker.requests) == asked
        await routers.sold(0, "i3")
        await gone_everywhere(routers, "i3")

        # And once more over a Redis that died and came back with nothing.
        await kept_everywhere(routers)
        await routers.redis.child.stop(signal.SIGKILL, grace_s=10)
        assert (await routers.ask(2)).cache == HIT  # no router needs it
        routers.worker.score = unlike(3, 2)
        try:
            await routers.sold(1, "i2")
            raise AssertionError("the others cannot have been told")
        except grpc.aio.AioRpcError as error:
            told = from_rpc_error(error)
            assert isinstance(told, Unavailable)
            assert told.reason == "INVALIDATION_NOT_SHARED"
        await routers.redis.start()

        async def shared() -> bool:
            try:
                await routers.sold(1, "i2")
            except grpc.aio.AioRpcError:
                return False
            return True

        await until(shared)
        await gone_everywhere(routers, "i2")


async def test_a_call_is_answered_once_though_its_router_is_killed(postgres_dsn: str, tmp_path: Path) -> None:
    async with fleet(tmp_path, postgres_dsn, 2) as routers:
        first = await routers.ask(0, request_id="r1", subject="u9")
        asked = len(routers.worker.requests)
        second = await routers.ask(1, request_id="r1", subject="u9")
        await routers.children[0].stop(signal.SIGKILL, grace_s=10)
        third = await routers.ask(1, request_id="r1", subject="u9")
        assert (second.cache, third.cache) == (REPEATED, REPEATED)
        assert len(routers.worker.requests) == asked
        for answer in (first, second, third):
            answer.ClearField("cache")
            answer.ClearField("age_us")
        assert first.SerializeToString() == second.SerializeToString() == third.SerializeToString()
