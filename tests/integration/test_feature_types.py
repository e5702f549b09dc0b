"""Every type and a transform, from a writer to a ranking: real feature-retrieval, Redis and router; only the model is a formula."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.fakes.feature_world import TOKEN, FeatureWorld, feature_world
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.router_world import KEY, router_world, snapshot

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.client import RankingClient, Tensor
from plait.errors import InvalidArgument
from plait.registry.crosschecks import check
from plait.registry.records import (
    Entity,
    Feature,
    FeatureSet,
    FeatureView,
    KeyPart,
    Model,
    ModelInput,
    ModelVersion,
    RequestFeature,
    Route,
    Signature,
    Snapshot,
    TensorSpec,
    Transform,
    Variant,
)

SKU = Entity(type="sku", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="number", type="int64")))
FACTS = FeatureView(
    name="facts",
    entity=SKU,
    features=(
        Feature(name="colour", dtype="string", vocabulary=("red", "green"), default="red"),
        Feature(name="sizes", dtype="int16", max_length=3, pad=-1),
        Feature(name="listed_at", dtype="timestamp"),
    ),
)
TEXT = FeatureView(name="text", entity=SKU, features=(Feature(name="vector", dtype="int8", width=2, scale=0.5),))
TASTE = FeatureView(name="taste", entity=Entity(type="user"), features=(Feature(name="vector", width=2, default=0),))
SET = FeatureSet(
    name="skus",
    request=(RequestFeature(name="boost", entity="sku", minimum=0, default=1),),
    transforms=(
        Transform(name="affinity", entity="sku", expression="cosine({taste:vector}, {text:vector}) * {$request:boost}", default=-9),
        Transform(name="days", entity="sku", expression="floor(time_since({facts:listed_at}) / 86400)", default=-1),
    ),
    inputs=(
        ModelInput(
            name="item",
            entity="sku",
            features=("$transform:affinity", "facts:colour", "facts:sizes", "text:vector", "$transform:days", "$request:boost"),
        ),
        ModelInput(name="user", entity="user", features=("taste:vector",)),
    ),
)
SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="user", dtype="float32", shape=(1, 2), per="request"),
        TensorSpec(name="item", dtype="float32", shape=(-1, 9)),
    ),
    outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
    feature_set="skus",
)
IDS: list[tuple[str | int, ...]] = [("a|b", 1), ("a", 1), ("", -1), ("a", 2)]  # the last one was never written
VECTORS = [[2, 0], [0, 4], [2, 2]]


def world() -> Snapshot:
    version = ModelVersion(version="1", artifact="/m", digest="sha256:" + "a" * 64, signature=SIGNATURE)
    return replace(
        snapshot(),
        models={"skus": Model(name="skus", versions=(version,))},
        feature_views={view.name: view for view in (FACTS, TEXT, TASTE)},
        feature_sets={"skus": SET},
        routes={"skus": Route(name="skus", subject="user", candidate="sku", variants=(Variant(name="a", model="skus", use="1"),))},
    )


async def write(features: FeatureWorld, view: str, ids: Any, *columns: Any) -> None:
    batch = pb.FeatureBatch(feature_view=view, event_times_us=[1_700_000_000_000_000], ids=ids)
    for column in columns:
        batch.columns.add(**column)
    answer = await features.stub.WriteFeatures(
        pb.WriteFeaturesRequest(batch=batch), metadata=(*TOKEN, ("x-plait-tenant", "shop")), timeout=20
    )
    assert not answer.errors


async def write_all(features: FeatureWorld) -> None:
    skus = types_pb2.EntityIds()
    for shop, number in IDS[:3]:
        skus.composite_ids.add(parts=[{"string_part": shop}, {"int64_part": number}])  # type: ignore[list-item]
    colours = {"features": ["colour"], "dtype": types_pb2.DATA_TYPE_BYTES, "data": b"greenblue", "null_bits": b"\x04"}
    sizes = {"features": ["sizes"], "dtype": types_pb2.DATA_TYPE_INT16, "data": np.array([7, 8, 9, 1], "<i2").tobytes()}
    times = {"features": ["listed_at"], "dtype": types_pb2.DATA_TYPE_INT64, "data": np.array([1, 1, 1], "<i8").tobytes()}
    colours["offsets"], sizes["offsets"] = (np.array(o, "<u4").tobytes() for o in ([0, 5, 9, 9], [0, 6, 8, 8]))
    await write(features, "facts", skus, colours, sizes, times)
    vectors = {"features": ["vector"], "dtype": types_pb2.DATA_TYPE_INT8, "data": np.array(VECTORS, "|i1").tobytes()}
    await write(features, "text", skus, vectors)
    taste = {"features": ["vector"], "dtype": types_pb2.DATA_TYPE_FLOAT32, "data": np.array([3, 0], "<f4").tobytes()}
    await write(features, "taste", types_pb2.EntityIds(string_ids=["ann"]), taste)


def test_the_world_is_one_that_apply_takes() -> None:
    assert check(world()) == ()


@pytest.mark.parametrize("near_cache", [False, True])
async def test_every_type_and_a_transform_reach_the_model(redis_url: str, near_cache: bool) -> None:
    registry = world()
    async with (
        feature_world(registry, redis_url, near_cache=near_cache) as features,
        FakeModelWorker(token="t0ken") as worker,
        router_world(features.server.address, worker.address, registry, token="t0ken") as router,
        RankingClient(router.address, api_key=KEY) as client,
    ):
        await write_all(features)
        boost = Tensor("boost", "float32", (4,), np.array([1, 1, 2, 5], "<f4").tobytes())
        for sent, weights in (((), [1, 1, 1, 1]), ((boost,), [1, 1, 2, 5])):
            ranking = await client.rank("skus", "ann", IDS, request_features=sent, explain=True)
            [raw] = [
                data for i, data in zip(worker.requests[-1].inputs, worker.requests[-1].raw_input_contents, strict=True) if i.name == "item"
            ]
            item = np.frombuffer(raw, "<f4").reshape(4, 9)
            affinity = [weights[0], 0, math.sqrt(0.5) * weights[2], -9]
            np.testing.assert_allclose(item[:, 0], affinity, rtol=1e-6)
            assert item[:, 1].tolist() == [2, 0, 1, 1]  # green, out of the vocabulary, the default twice
            assert item[:, 2:5].tolist() == [[7, 8, 9], [1, -1, -1], [-1, -1, -1], [-1, -1, -1]]
            np.testing.assert_array_equal(item[:, 5:7], [[1, 0], [0, 2], [1, 1], [math.nan, math.nan]])
            assert (item[:3, 7] > 19_000).all()
            assert item[3, 7] == -1
            assert item[:, 8].tolist() == weights
            order = np.argsort([-value for value in affinity], kind="stable").tolist()
            assert ranking.item_ids == [IDS[at] for at in order]
            told = {report.feature_view: (report.present, report.null, report.not_found) for report in ranking.feature_report}
            assert told == {"facts": (2, 1, 1), "text": (3, 0, 1), "taste": (1, 0, 0)}


async def test_what_is_sent_along_is_checked_by_the_set(redis_url: str) -> None:
    registry = world()
    async with (
        feature_world(registry, redis_url) as features,
        FakeModelWorker(token="t0ken") as worker,
        router_world(features.server.address, worker.address, registry, token="t0ken") as router,
        RankingClient(router.address, api_key=KEY) as client,
    ):
        await write_all(features)
        with pytest.raises(InvalidArgument) as caught:
            await client.rank(
                "skus", "ann", IDS, request_features=[Tensor("boost", "float32", (4,), np.array([1, 1, -2, 5], "<f4").tobytes())]
            )
        assert caught.value.reason == "REQUEST_FEATURE_INVALID"
        with pytest.raises(InvalidArgument, match="composite_ids"):
            await client.rank("skus", "ann", ["a", "b"])
        assert worker.requests == []


async def test_without_features_the_router_stands_in_and_says_so() -> None:
    async with (
        FakeModelWorker(token="t0ken") as worker,
        router_world("127.0.0.1:1", worker.address, world(), token="t0ken") as router,
        RankingClient(router.address, api_key=KEY) as client,
    ):
        ranking = await client.rank("skus", "ann", IDS, explain=True)
        assert ranking.degraded_reasons == ("features_unavailable",)
        assert {report.feature_view: report.unavailable for report in ranking.feature_report} == {"facts": 4, "text": 4, "taste": 1}
        [raw] = [d for i, d in zip(worker.requests[0].inputs, worker.requests[0].raw_input_contents, strict=True) if i.name == "item"]
        row = np.frombuffer(raw, "<f4").reshape(4, 9)[0]
        np.testing.assert_array_equal(row, [-9, 1, -1, -1, -1, math.nan, math.nan, -1, 1])
