"""Explain tells what GetFeatures answers, and truly where it came from."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.feature_world import tensor

from feature_retrieval.explanation import Explanation
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.near_cache import NearCache
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.row_codec import KeySpace, entity_prefix
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.store.rows import Read
from feature_retrieval.views import Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import InvalidArgument
from plait.local.redis import EmbeddedRedis
from plait.registry.records import (
    Entity,
    Epochs,
    Feature,
    FeatureSet,
    FeatureView,
    ModelInput,
    RequestFeature,
    Snapshot,
    Transform,
)
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline

NOW_S = 1_700_000_000.0
NOW_US = int(NOW_S * 1e6)
ITEM = Entity(type="item")
VIEW = FeatureView(
    name="stats",
    entity=ITEM,
    version=3,
    features=(
        Feature(name="price", default=1.5),
        Feature(name="colour", dtype="string", vocabulary=("red", "green")),
        Feature(name="brand", dtype="string", hash_buckets=5),
        Feature(name="text", dtype="int16", max_length=2, pad=-1),
    ),
    max_age_s=60,
    retention_s=1000,
)
SET = FeatureSet(
    name="home",
    request=(RequestFeature(name="hour", default=12), RequestFeature(name="km", entity="item")),
    transforms=(Transform(name="ratio", entity="item", expression="{stats:price} / {$request:km}", default=-3),),
    inputs=(
        ModelInput(
            name="item", entity="item",
            features=("stats:text", "$request:hour", "stats:colour", "$transform:ratio", "$request:km", "stats:price", "stats:brand"),
        ),
    ),
)  # fmt: skip
SNAPSHOT = Snapshot(revision=6, feature_views={"stats": VIEW}, feature_sets={"home": SET}, epochs={("shop", "stats", 3): Epochs(serving=4)})


class World:
    def __init__(self, url: str, *, near_cache: bool) -> None:
        self.store = RedisStore(url)
        self.cache = NearCache(1 << 20 if near_cache else 0, 60)
        self.cache.connected([entity_prefix("shop", "item")])
        plans = Plans(SNAPSHOT)
        self.page = Retrieval(self.store, self.cache, lambda: plans, clock=lambda: NOW_S)
        self.explanation = Explanation(self.page, lambda: plans, self.store.times_to_live)

    async def explain(self, request: Any) -> Any:
        response = pb.ExplainFeaturesResponse()
        await self.explanation.explain(request, response, call())
        return response

    async def read(self, request: Any) -> Any:
        response = pb.GetFeaturesResponse()
        asked = pb.GetFeaturesRequest(feature_set="home", entities=request.entities, request_features=request.request_features)
        asked.include_ages = asked.include_event_times = True
        await self.page.get_features(asked, response, call())
        return response


def call() -> Call:
    return Call(method="test", tenant="shop", deadline=Deadline.after(20))


def request_of(entity_id: str, km: float = 2, hour: float | None = None) -> Any:
    request = pb.ExplainFeaturesRequest(feature_set="home")
    request.entities.add(entity_type="item").ids.string_ids.append(entity_id)
    request.request_features.add(name="km", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[1], data=np.array([km], "<f4").tobytes())
    if hour is not None:
        request.request_features.add(name="hour", dtype=types_pb2.DATA_TYPE_FLOAT32, data=np.array(hour, "<f4").tobytes())
    return request


def batch_of(price: float | None, colour: str | None, sizes: list[int], *, age_us: int = 0, expires_us: int = 0) -> Any:
    batch = pb.FeatureBatch(feature_view="stats", event_times_us=[NOW_US - age_us], sequences=[7], ids={"string_ids": ["i"]})
    if expires_us:
        batch.expires_at_us.append(expires_us)
    if price is not None:
        batch.columns.add(features=["price"], dtype=types_pb2.DATA_TYPE_FLOAT32, data=np.array([price], "<f4").tobytes())
    for name, text in (("colour", colour), ("brand", "acme")):
        if text is not None:
            word = text.encode()
            batch.columns.add(
                features=[name], dtype=types_pb2.DATA_TYPE_BYTES, data=word, offsets=np.array([0, len(word)], "<u4").tobytes()
            )
    batch.columns.add(
        features=["text"],
        dtype=types_pb2.DATA_TYPE_INT16,
        data=np.array(sizes, "<i2").tobytes(),
        offsets=np.array([0, 2 * len(sizes)], "<u4").tobytes(),
    )
    return batch


async def write(store: RedisStore, batch: Any) -> bytes:
    """Write a row; return what is stored in the tenant's serving epoch."""
    await Ingestion(store, lambda: SNAPSHOT, clock=lambda: NOW_S).write(batch, pb.WriteFeaturesResponse(), call())
    [row] = (await store.read(KeySpace.of("shop", "item", "stats", 3, 4).keys(["i"]), 5)).rows
    assert row is not None
    return row


@pytest_asyncio.fixture(params=[False, True])
async def world(redis_url: str, request: Any) -> AsyncIterator[World]:
    made = World(redis_url, near_cache=request.param)
    yield made
    await made.store.close()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    price=st.none() | st.integers(-5, 5),
    colour=st.sampled_from([None, "red", "green", "blue", ""]),
    sizes=st.lists(st.integers(-9, 9), max_size=2),
    age_us=st.sampled_from([0, 5_000_000, 61_000_000]),
    written=st.booleans(),
    km=st.integers(0, 3),
    hour=st.none() | st.integers(0, 23),
    near_cache=st.booleans(),
)
async def test_it_tells_what_get_features_answers(
    redis_server: EmbeddedRedis, price: Any, colour: Any, sizes: list[int], age_us: int, written: bool, km: int, hour: Any, near_cache: bool
) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    w = World(redis_server.url, near_cache=near_cache)
    try:
        row = await write(w.store, batch_of(price, colour, sizes, age_us=age_us)) if written else b""
        request = request_of("i", km, hour)
        for turn in range(2):
            told, answer = await w.explain(request), await w.read(request)
            assert told.tensors == answer.tensors
            assert [c.value for c in told.columns] == pytest.approx(tensor(told, "item")[0].tolist(), nan_ok=True)
            assert [(c.column, c.reference) for c in told.columns] == list(
                enumerate(
                    ["stats:text"] * 2 + ["$request:hour", "stats:colour", "$transform:ratio", "$request:km", "stats:price", "stats:brand"]
                )
            )
            [view], [report] = told.views, answer.views
            assert bytes([view.status]) == report.statuses
            assert view.age_us == np.frombuffer(report.ages_us, "<i8")[0]
            assert view.event_time_us == np.frombuffer(report.event_times_us, "<i8")[0]
            values = [c.defaulted for c in told.columns if c.reference.startswith("stats:")]
            assert sum(values) == report.defaulted_cells
            assert view.source == (
                (pb.ROW_SOURCE_NEAR_CACHE if near_cache and turn else pb.ROW_SOURCE_REDIS) if written else pb.ROW_SOURCE_NONE
            )
            assert row.startswith(view.stored)
            assert view.stored == row or (near_cache and turn)
            by_name = {c.reference: c for c in told.columns}
            assert by_name["$request:hour"].defaulted == (hour is None)
            assert by_name["$transform:ratio"].defaulted == (km == 0)
            word = by_name["stats:colour"].stored_value
            unknown_word = near_cache and turn and written and colour in ("", "blue")  # of a cached row only the code is there
            assert word == ("code 0" if unknown_word else (colour or "") if written else "")
    finally:
        await w.store.close()


async def test_every_part_of_a_row_is_told(world: World) -> None:
    row = await write(world.store, batch_of(3, "green", [8], age_us=5, expires_us=NOW_US + 9))
    told = await world.explain(request_of("i"))
    [view] = told.views
    assert (view.feature_view, view.view_version, view.epoch, view.schema_id, view.sequence) == ("stats", 3, 4, 1, 7)
    assert (view.event_time_us, view.expires_at_us, view.age_us) == (NOW_US - 5, NOW_US + 9, 5)
    assert (view.deleted, view.backfilled, view.stored) == (False, False, row)
    assert view.key == KeySpace.of("shop", "item", "stats", 3, 4).keys(["i"])[0]
    assert 900 < view.time_to_live_s <= 2000  # the retention, and what the writer and the store add to it
    assert [(c.stored_value, c.defaulted) for c in told.columns] == [
        ("8", False), ("-1", False), ("", True), ("green", False), ("", False), ("", False), ("3.0", False), ("acme", False),
    ]  # fmt: skip
    assert told.registry_revision == 6
    if world.cache.on:  # of a cached row the text is not kept: a word is known by its code
        again = await world.explain(request_of("i"))
        assert [c.stored_value for c in again.columns if c.reference == "stats:colour"] == ["green"]
        assert again.views[0].source == pb.ROW_SOURCE_NEAR_CACHE


async def test_a_tombstone_and_nothing_at_all_are_told_apart(world: World) -> None:
    tombstone = batch_of(None, None, [])
    del tombstone.columns[:]
    tombstone.deleted.append(True)
    await write(world.store, tombstone)
    [view] = (await world.explain(request_of("i"))).views
    assert (view.deleted, view.event_time_us, view.age_us, view.status) == (True, NOW_US, -1, types_pb2.ROW_STATUS_NOT_FOUND)
    assert view.source == pb.ROW_SOURCE_REDIS
    [view] = (await world.explain(request_of("nobody"))).views
    assert (view.deleted, view.event_time_us, view.age_us, view.stored, view.time_to_live_s) == (False, 0, -1, b"", -1)
    assert view.source == pb.ROW_SOURCE_NONE


async def test_bytes_nobody_can_read_are_shown(world: World, redis_url: str) -> None:
    space = KeySpace.of("shop", "item", "stats", 3, 4)
    with redis.Redis.from_url(redis_url) as client:
        client.set(space.keys(["i"])[0], b"noise")
    told = await world.explain(request_of("i"))
    assert (told.views[0].stored, told.views[0].source, told.views[0].schema_id) == (b"noise", pb.ROW_SOURCE_REDIS, 0)
    assert told.views[0].status == types_pb2.ROW_STATUS_NOT_FOUND
    assert all(c.defaulted for c in told.columns if c.reference.startswith("stats:"))


@pytest.mark.parametrize("ids", [[], ["i", "j"]])
async def test_exactly_one_entity_of_a_type_is_explained(world: World, ids: list[str]) -> None:
    request = request_of("i")
    request.entities[0].ids.string_ids[:] = ids
    with pytest.raises(InvalidArgument) as caught:
        await world.explain(request)
    assert [v.description for v in caught.value.violations] == [f"exactly one id is explained, and {len(ids)} are given"]


async def test_a_row_that_only_the_durable_copy_had_is_told_as_that(redis_url: str) -> None:
    kept = dataclasses.replace(VIEW, durable="behind")
    plans = Plans(dataclasses.replace(SNAPSHOT, feature_views={"stats": kept}))
    store = RedisStore(redis_url)

    class Copy:
        """Has one row that Redis has lost."""

        def __init__(self, row: bytes) -> None:
            self.row = row

        async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
            return Read([self.row] * len(keys))

    await write(store, batch_of(2.5, "red", [1]))
    [row] = (await store.read(KeySpace.of("shop", "item", "stats", 3, 4).keys(["i"]), 10)).rows
    assert row is not None
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    page = Retrieval(Copy(row), NearCache(0, 60), lambda: plans, clock=lambda: NOW_S)
    told = pb.ExplainFeaturesResponse()
    await Explanation(page, lambda: plans, store.times_to_live).explain(request_of("i"), told, call())
    assert (told.views[0].source, told.views[0].stored) == (pb.ROW_SOURCE_DURABLE, row)
    await store.close()
