"""From a caller of the router to the model's tensor: what is sent along, computed and stored under a key of several parts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from tests.fakes.feature_world import TOKEN, FeatureWorld, feature_world, make_batch
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.router_world import KEY, RouterWorld, router_world, snapshot

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.client import RankingClient, Tensor
from plait.errors import InvalidArgument, from_rpc_error
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, KeyPart, ModelInput, RequestFeature, Snapshot, Transform

OFFER = Entity(type="item", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="sku", type="int64")))


def world_snapshot() -> Snapshot:
    """The router's usual world, but items have keys of two parts, and two of their columns are not stored."""
    usual = snapshot()
    items = FeatureView(name="item-view", entity=OFFER, features=(Feature(name="price", default=0.5),))
    ranker = FeatureSet(
        name="ranker",
        request=(RequestFeature(name="km", entity="item", minimum=0), RequestFeature(name="hour", default=12)),
        transforms=(Transform(name="cost", entity="item", expression="{item-view:price} + {$request:km} + {user-view:f0}", default=-1),),
        inputs=(
            usual.feature_sets["ranker"].inputs[0],
            ModelInput(name="item", entity="item", features=("$transform:cost", "$request:hour", "$request:km")),
        ),
    )
    return replace(usual, feature_views={**usual.feature_views, "item-view": items}, feature_sets={"ranker": ranker})


async def fill(features: FeatureWorld) -> None:
    items = make_batch("item-view", [], {"price": [10, 20]})
    for sku in (1, 2):
        key = items.ids.composite_ids.add()
        key.parts.add(string_part="a")
        key.parts.add(int64_part=sku)
    users = make_batch("user-view", ["u1"], {"f0": [100], "f1": [0]})
    for batch in (items, users):
        written = await features.stub.WriteFeatures(
            pb.WriteFeaturesRequest(batch=batch), metadata=(*TOKEN, ("x-plait-tenant", "shop")), timeout=20
        )
        assert not written.errors


@pytest.mark.parametrize("near_cache", [False, True])
async def test_the_model_gets_what_the_caller_sent(redis_url: str, near_cache: bool) -> None:
    registry = world_snapshot()
    async with (
        feature_world(registry, redis_url, near_cache=near_cache) as features,
        FakeModelWorker(token="t0ken") as worker,
        router_world(features.server.address, worker.address, registry, token="t0ken") as router,
        RankingClient(router.address, api_key=KEY) as client,
    ):
        await fill(features)
        items: list[Any] = [("a", 2), ("a", 1), ("b", 1)]
        along = [Tensor.of("km", np.array([1, 2, 3], np.float32)), Tensor.of("hour", np.float32(9))]
        for _ in range(2):
            ranking = await client.rank("home", "u1", items, request_features=along)
            assert dict(ranking.items) == {("a", 2): 121, ("a", 1): 112, ("b", 1): 103.5}
            item = np.frombuffer(worker.requests[-1].raw_input_contents[1], "<f4").reshape(3, 3)
            assert item.tolist() == [[121, 9, 1], [112, 9, 2], [103.5, 9, 3]]
        with pytest.raises(InvalidArgument) as caught:
            await client.rank("home", "u1", items)
        assert (caught.value.reason, [v.field for v in caught.value.violations]) == ("REQUEST_FEATURE_INVALID", ["request_features"])
        await _refused(router, items)


async def _refused(router: RouterWorld, items: list[Any]) -> None:
    """One value too few is the caller's fault, told as it was found."""
    from plait.api.router.v1 import router_service_pb2

    request = router_service_pb2.RankRequest(route="home")
    request.subject.string_ids.append("u1")
    for shop, sku in items:
        key = request.candidates.composite_ids.add()
        key.parts.add(string_part=shop)
        key.parts.add(int64_part=sku)
    request.request_features.add(name="km", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[2], data=bytes(8))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(router.rank(request), 20)
    error = from_rpc_error(caught.value)
    assert error.reason == "REQUEST_FEATURE_INVALID"
    assert "needs one value per 'item' of this request: [3]" in error.violations[0].description
