"""The cache and repeated calls over the wire, with features and a worker behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.questions import rank, strings
from tests.fakes.router_world import INPUTS, KEY, OTHER_KEY, RouterWorld, route, router_world, snapshot

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import InvalidArgument, PermissionDenied, from_rpc_error
from plait.registry.policies import CachePolicy

MISS, HIT, SHARED, REPEATED = (getattr(explanation_pb, f"CACHE_STATUS_{word}") for word in ("MISS", "HIT", "SHARED", "REPEATED"))
REGISTRY = snapshot(route(cache=CachePolicy(ttl_s=600)), route("plain"), route("again", repeat_window_s=600, cache=CachePolicy(ttl_s=600)))


class World:
    def __init__(self, router: RouterWorld, features: FakeFeatureRetrieval, worker: FakeModelWorker) -> None:
        self.router = router
        self.features = features
        self.worker = worker

    async def ask(self, *, key: str = KEY, **fields: Any) -> Any:
        return await self.router.rank(rank(**fields), key=key)


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, REGISTRY) as router,
    ):
        yield World(router, features, worker)


async def test_an_answer_is_kept_and_signed_for_each_caller(world: World) -> None:
    first, second = await world.ask(request_id="r1"), await world.ask(request_id="r2")
    assert (first.cache, second.cache) == (MISS, HIT)
    assert (first.request_id, second.request_id) == ("r1", "r2")
    assert (second.item_ids, second.scores, second.model, second.model_version) == (first.item_ids, first.scores, "ranker", "2")
    assert (second.variant, second.tier, second.registry_revision) == ("main", "full", 7)
    assert second.age_us > 0
    assert len(world.worker.requests) == len(world.features.requests) == 1


async def test_a_hundred_callers_of_a_cold_key_are_one_call_of_the_model(world: World) -> None:
    world.worker.gate = asyncio.Event()
    tasks = [asyncio.create_task(world.ask(request_id=f"r{n}")) for n in range(100)]
    await world.worker.started.wait()
    while f"waiting={len(tasks)}" not in repr(world.router.ranking):
        await asyncio.sleep(0)
    world.worker.gate.set()
    answers = await asyncio.gather(*tasks)
    assert len(world.worker.requests) == 1
    assert sorted(answer.cache for answer in answers) == [MISS, *[SHARED] * 99]
    assert {answer.request_id for answer in answers} == {f"r{n}" for n in range(100)}
    assert len({tuple(answer.item_ids.string_ids) for answer in answers}) == 1


async def test_a_caller_that_leaves_takes_nothing_with_it(world: World) -> None:
    world.worker.gate = asyncio.Event()
    leaving = asyncio.create_task(world.ask())
    await world.worker.started.wait()
    staying = asyncio.create_task(world.ask())
    while "waiting=2" not in repr(world.router.ranking):
        await asyncio.sleep(0)
    leaving.cancel()
    while "waiting=1" not in repr(world.router.ranking):
        await asyncio.sleep(0)
    world.worker.gate.set()
    assert (await staying).cache == SHARED
    assert world.worker.cancelled == 0


async def test_when_the_last_one_leaves_the_work_ends(world: World) -> None:
    world.worker.gate = asyncio.Event()
    leaving = asyncio.create_task(world.ask())
    await world.worker.started.wait()
    leaving.cancel()
    while not world.worker.cancelled:
        await asyncio.sleep(0.001)
    assert "in_flight=0/" in repr(world.router.ranking)


async def test_degraded_answers_are_not_kept(world: World) -> None:
    world.features.statuses = {types_pb2.ROW_STATUS_STALE: 1}
    assert [(await world.ask()).cache for _ in range(2)] == [MISS, MISS]
    world.features.statuses = {}
    assert [tuple((await world.ask()).degraded_reasons) for _ in range(2)] == [(), ()]


async def test_tenants_and_routes_without_a_cache_stay_apart(world: World) -> None:
    await world.ask()
    assert (await world.ask(key=OTHER_KEY)).cache == MISS
    plain = [await world.ask(route="plain") for _ in range(2)]
    assert [answer.cache for answer in plain] == [0, 0]


async def test_a_sold_item_is_asked_for_again(world: World) -> None:
    await world.ask(top_k=2)
    items = types_pb2.EntityRows(entity_type="item", ids=strings("i3"))
    await world.router.invalidate(pb.InvalidateCacheRequest(items=items))
    assert [(await world.ask(top_k=2)).cache for _ in range(2)] == [MISS, HIT]
    await world.router.invalidate(pb.InvalidateCacheRequest(items=types_pb2.EntityRows(entity_type="item", ids=strings("i1"))))
    assert (await world.ask(top_k=2)).cache == HIT  # it is not among the first two


@pytest.mark.parametrize("named", [{"route": "home"}, {"model": "ranker"}])
async def test_routes_and_models_are_forgotten(world: World, named: dict[str, str]) -> None:
    await world.ask()
    await world.router.invalidate(pb.InvalidateCacheRequest(**named))
    assert (await world.ask()).cache == MISS


async def test_forgetting_needs_the_scope(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.router.invalidate(pb.InvalidateCacheRequest(route="home"), key=KEY)
    error = from_rpc_error(caught.value)
    assert isinstance(error, PermissionDenied)
    assert error.reason == "SCOPE_MISSING"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.InvalidateCacheRequest(), ""),
        (pb.InvalidateCacheRequest(route="x" * 64), "route"),
        (pb.InvalidateCacheRequest(items=types_pb2.EntityRows(ids=strings("i1"))), "items.entity_type"),
        (pb.InvalidateCacheRequest(items=types_pb2.EntityRows(entity_type="item")), "items.ids"),
        (pb.InvalidateCacheRequest(items=types_pb2.EntityRows(entity_type="item", ids=strings(*map(str, range(1001))))), "items.ids"),
    ],
)
async def test_what_to_forget_is_checked(world: World, request_: Any, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.router.invalidate(request_)
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidArgument)
    assert field in [violation.field for violation in error.violations]


async def test_a_call_made_again_is_answered_alike(world: World) -> None:
    first = await world.ask(route="again", request_id="r1")
    second = await world.ask(route="again", request_id="r1")
    assert (first.cache, second.cache) == (MISS, REPEATED)
    assert len(world.worker.requests) == 1
    for answer in (first, second):
        answer.ClearField("cache")
        answer.ClearField("age_us")
    assert first.SerializeToString() == second.SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.ask(route="again", request_id="r1", subject="u2")
    assert from_rpc_error(caught.value).reason == "REQUEST_ID_REUSED"
