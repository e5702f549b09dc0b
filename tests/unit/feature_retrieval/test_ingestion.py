"""From a columnar batch to rows in the store: what is wrong with one row costs only that row, and the newest event wins."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from tests.fakes.feature_world import make_batch

from feature_retrieval.ingestion import Ingestion
from feature_retrieval.row_codec import KeySpace, RowCodec
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.dtypes import BY_NAME
from plait.errors import InvalidArgument, NotFound
from plait.registry.records import Entity, Feature, FeatureSchema, FeatureView, Snapshot

NOW_S = 1_700_000_000.0
VIEW = FeatureView(
    name="stats",
    entity=Entity(type="item"),
    features=(Feature(name="a"), Feature(name="b"), Feature(name="n", dtype="int64"), Feature(name="flag", dtype="bool")),
)
NUMBERED = FeatureView(name="profile", entity=Entity(type="user", key="int64"), features=(Feature(name="age"),), retention_s=3600)
CODEC = RowCodec(FeatureSchema(id=1, features=VIEW.features))


def batch_of(ids: list[str], **more: Any) -> Any:
    return make_batch("stats", ids, {}, at_s=NOW_S, **more)


def add(batch: Any, names: list[str], values: Any, dtype: str = "float32", null_bits: bytes = b"") -> Any:
    known = BY_NAME[dtype]
    batch.columns.add(features=names, dtype=known.number, data=np.asarray(values, known.numpy).tobytes(), null_bits=null_bits)
    return batch


def column(block: Any, name: str) -> list[Any]:
    place = CODEC.columns[name]
    values: list[Any] = block[:, place.offset : place.offset + place.dtype.itemsize].copy().view(place.dtype)[:, 0].tolist()
    return values


@pytest_asyncio.fixture
async def store(redis_url: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(redis_url)
    yield store
    await store.close()


def ingestion_of(store: RedisStore, *views: FeatureView) -> Ingestion:
    snapshot = Snapshot(feature_views={v.name: v for v in views or (VIEW, NUMBERED)})
    return Ingestion(store, lambda: snapshot, clock=lambda: NOW_S)


async def stored(store: RedisStore, ids: list[Any], view: FeatureView = VIEW, tenant: str = "default") -> list[bytes | None]:
    return (await store.read(KeySpace.of(tenant, view.entity.type, view.name, view.version).keys(ids), 10)).rows


async def test_the_newest_event_wins_whatever_comes_first(store: RedisStore) -> None:
    ingestion = ingestion_of(store)
    told = []
    for at_us, sequence, value in ((5, 0, 1.0), (4, 9, 2.0), (5, 0, 1.0), (5, 1, 3.0), (5, 0, 9.0), (6, 0, 4.0)):
        result = pb.WriteFeaturesResponse()
        batch = add(batch_of(["i"], sequences=[sequence]), ["a"], [value])
        batch.event_times_us[:] = [at_us]
        await ingestion.write(batch, result, "default")
        told.append((result.applied, result.ignored))
    assert told == [(1, 0), (0, 1), (0, 1), (1, 0), (0, 1), (1, 0)]
    [row] = await stored(store, ["i"])
    assert column(np.frombuffer(row or b"", np.uint8)[None], "a") == [4.0]


async def test_rows_belong_to_their_tenant_and_keep_their_key_s_type(store: RedisStore) -> None:
    batch = pb.FeatureBatch(feature_view="profile", event_times_us=[5])
    batch.ids.int64_ids.extend([1, -1])
    result = pb.WriteFeaturesResponse()
    await ingestion_of(store).write(add(batch, ["age"], [30, 40]), result, "shop")
    assert result.applied == 2
    assert None not in await stored(store, [1, -1], NUMBERED, "shop")
    assert await stored(store, ["1", "-1"], NUMBERED, "shop") == [None, None]
    assert await stored(store, [1, -1], NUMBERED) == [None, None]


async def test_rows_are_kept_as_long_as_the_view_says(store: RedisStore, redis_url: str) -> None:
    import redis

    for batch, ids in ((add(batch_of(["i"]), ["a"], [1]), [1]), (None, [1])):
        given_batch = batch or add(pb.FeatureBatch(feature_view="profile", event_times_us=[5], ids={"int64_ids": ids}), ["age"], [1])
        await ingestion_of(store).write(given_batch, pb.WriteFeaturesResponse(), "default")
    with redis.Redis.from_url(redis_url) as client:
        [forever] = KeySpace.of("default", "item", "stats", 1).keys(["i"])
        [an_hour] = KeySpace.of("default", "user", "profile", 1).keys([1])
        assert client.pttl(forever) == -1
        assert 3_500_000 < int(client.pttl(an_hour)) <= 3_960_000  # type: ignore[arg-type]


async def test_impossible_rows_are_refused_alone_each_with_its_reason(store: RedisStore) -> None:
    now_us = int(NOW_S * 1e6)
    ahead = 300_000_000
    ids = ["ok", "limit", "future", "zero", "past", "", "ü" * 129, "ü" * 128]
    batch = add(batch_of(ids), ["a"], range(8))
    batch.event_times_us[:] = [now_us, now_us + ahead, now_us + ahead + 1, 0, -5, now_us, now_us, now_us]
    result = pb.WriteFeaturesResponse()
    await ingestion_of(store).write(batch, result, "default")
    assert [(e.row, e.reason) for e in result.errors] == [
        (2, "EVENT_TIME_IN_FUTURE"),
        (3, "EVENT_TIME_INVALID"),
        (4, "EVENT_TIME_INVALID"),
        (5, "ID_INVALID"),
        (6, "ID_INVALID"),
    ]
    assert "microseconds" in result.errors[0].message
    assert not any(i and i in e.message for e in result.errors for i in ids)  # an id may be a person's
    assert (result.applied, result.ignored) == (3, 0)
    rows = await stored(store, ["ok", "limit", "ü" * 128, "future", "zero", "past"])
    assert [row is not None for row in rows] == [True] * 3 + [False] * 3
    assert column(np.frombuffer(rows[2] or b"", np.uint8)[None], "a") == [7]  # its own value, not its neighbour's


async def test_a_batch_of_bad_rows_only_writes_nothing(store: RedisStore) -> None:
    result = pb.WriteFeaturesResponse()
    await ingestion_of(store).write(add(batch_of([""]), ["a"], [1]), result, "default")
    assert (result.applied, result.ignored, len(result.errors)) == (0, 0, 1)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ({}, "at least one id"),
        ({"int64_ids": [1]}, "set string_ids"),
        ({"string_ids": ["a"], "int64_ids": [1]}, "only one of"),
        ({"composite_ids": [{"parts": [{"string_part": "a"}]}]}, "set string_ids"),
        ({"string_ids": ["a"] * 10_001}, "10001 rows are given, at most 10000"),
    ],
)
async def test_ids_that_cannot_be_used_refuse_the_batch(store: RedisStore, ids: Any, words: str) -> None:
    batch = pb.FeatureBatch(feature_view="stats", event_times_us=[5], ids=ids)
    with pytest.raises(InvalidArgument) as caught:
        await ingestion_of(store).write(batch, pb.WriteFeaturesResponse(), "default")
    [violation] = caught.value.violations
    assert violation.field == "ids"
    assert words in violation.description


async def test_an_unknown_view_is_refused_with_what_is_near(store: RedisStore) -> None:
    words = re.escape("no feature view 'stat'; did you mean 'stats'?: see 'plait get featureview'")
    with pytest.raises(NotFound, match=words) as caught:
        await ingestion_of(store).write(pb.FeatureBatch(feature_view="stat"), pb.WriteFeaturesResponse(), "default")
    assert caught.value.reason == "FEATURE_VIEW_NOT_FOUND"


async def test_the_newest_schema_of_the_newest_snapshot_is_written(store: RedisStore) -> None:
    longer = (*VIEW.features, Feature(name="new"))
    new = FeatureView(
        name="stats",
        entity=VIEW.entity,
        features=longer,
        schemas=(FeatureSchema(id=1, features=VIEW.features), FeatureSchema(id=2, features=longer)),
    )
    snapshots = [Snapshot(feature_views={"stats": VIEW}), Snapshot(feature_views={"stats": new})]
    ingestion = Ingestion(store, lambda: snapshots[0], clock=lambda: NOW_S)
    await ingestion.write(add(batch_of(["old"]), ["a"], [1]), pb.WriteFeaturesResponse(), "default")
    with pytest.raises(InvalidArgument):
        await ingestion.write(add(batch_of(["new"]), ["new"], [1]), pb.WriteFeaturesResponse(), "default")
    del snapshots[0]
    await ingestion.write(add(batch_of(["new"]), ["new"], [1]), pb.WriteFeaturesResponse(), "default")
    rows = await stored(store, ["old", "new"])
    assert [row[2] for row in rows if row] == [1, 2]
