"""Known scores over the wire: the model sees what is not known, and the answer is the one it would have given to everything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.questions import rank, strings
from tests.fakes.router_world import INPUTS, RouterWorld, route, router_world, snapshot

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import Unavailable
from plait.registry.policies import CachePolicy, Tier

HIT, PARTIAL = explanation_pb.CACHE_STATUS_HIT, explanation_pb.CACHE_STATUS_PARTIAL
MISS = explanation_pb.CACHE_STATUS_MISS
SCORES = CachePolicy(scores_ttl_s=600)
REGISTRY = snapshot(
    route(cache=SCORES, ladder=(Tier(tier="cached", max_age_s=600),)),
    route("plain"),
    route("both", cache=CachePolicy(ttl_s=600, scores_ttl_s=600)),
)


class World:
    def __init__(self, router: RouterWorld, features: FakeFeatureRetrieval, worker: FakeModelWorker) -> None:
        self.router = router
        self.features = features
        self.worker = worker

    async def ask(self, *numbers: int, **fields: Any) -> Any:
        return await self.router.rank(rank(candidates=tuple(f"i{n}" for n in numbers), **fields))

    @property
    def rows(self) -> list[int]:
        """How many candidates each call of the model was about."""
        return [next(i.shape[0] for i in request.inputs if i.name == "item") for request in self.worker.requests]


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker(lambda _, item: np.sin(item[:, 0] * 1e3)) as worker,
        router_world(features.address, worker.address, REGISTRY) as router,
    ):
        yield World(router, features, worker)


async def test_the_model_sees_only_what_is_not_known(world: World) -> None:
    answers = [await world.ask(*numbers) for numbers in ((1, 2, 3), (3, 4, 1, 5), (5, 1, 4))]
    assert [answer.cache for answer in answers] == [0, PARTIAL, HIT]
    assert world.rows == [3, 2]
    assert [len(request.entities[-1].ids.string_ids) for request in world.features.requests] == [3, 2]
    for answer, numbers in zip(answers, ((1, 2, 3), (3, 4, 1, 5), (5, 1, 4)), strict=True):
        whole = await world.ask(*numbers, route="plain")
        assert answer.item_ids == whole.item_ids
        assert np.array_equal(answer.scores, whole.scores)  # bit for bit
        assert (answer.tier, answer.model, answer.model_version) == ("full", "ranker", "2")
    assert answers[2].age_us > 0
    counted = [
        world.router.metrics.registry.get_sample_value("plait_router_scores_total", {"route": "home", "outcome": outcome})
        for outcome in ("known", "computed")
    ]
    assert counted == [5, 5]


async def test_top_k_and_whole_answers_go_together_with_it(world: World) -> None:
    first = await world.ask(1, 2, 3, route="both", top_k=2)
    again = await world.ask(1, 2, 3, route="both", top_k=2)
    other = await world.ask(1, 2, 3, 4, route="both", top_k=3)
    assert [first.cache, again.cache, other.cache] == [MISS, HIT, PARTIAL]
    assert world.rows == [3, 1]
    assert len(other.scores) == 3


async def test_a_changed_item_is_scored_again(world: World) -> None:
    await world.ask(1, 2, 3)
    items = types_pb2.EntityRows(entity_type="item", ids=strings("i2"))
    await world.router.invalidate(pb.InvalidateCacheRequest(items=items))
    assert (await world.ask(1, 2, 3)).cache == PARTIAL
    assert world.rows == [3, 1]


async def test_degraded_scores_are_not_kept(world: World) -> None:
    world.features.statuses = {types_pb2.ROW_STATUS_STALE: 1}
    assert [list((await world.ask(1, 2)).degraded_reasons) for _ in range(2)] == [["features_stale"]] * 2
    assert world.rows == [2, 2]


@pytest.mark.parametrize("fields", [{"explain": True}, {"inline_features": True}])
async def test_who_wants_to_know_or_knows_better_gets_it_computed(world: World, fields: dict[str, Any]) -> None:
    if "inline_features" in fields:
        user = types_pb2.Tensor(name="user", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[1, 2], data=bytes(8))
        fields = {"inline_features": [user]}
    await world.ask(1, 2)
    assert (await world.ask(1, 2, **fields)).cache == 0
    assert world.rows == [2, 2]


async def test_with_the_model_away_known_scores_answer_and_say_so(world: World) -> None:
    await world.ask(1, 2, 3)
    world.worker.error = Unavailable("away")
    answer = await world.ask(1, 2, 9)
    assert (answer.tier, list(answer.degraded_reasons)) == ("cached", ["tier_cached"])
    assert list(answer.item_ids.string_ids)[-1] == "i9"  # nothing is known of it
    assert answer.age_us > 0
    with pytest.raises(grpc.aio.AioRpcError, match="too few scores"):
        await world.ask(7, 8, 9)
