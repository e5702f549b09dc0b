"""From a columnar batch to rows in the store: what is wrong with one row costs only that row, and the newest event wins."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from tests.fakes.calls import ADMIN, call_of
from tests.fakes.feature_world import make_batch

from feature_retrieval.ingestion import Ingestion
from feature_retrieval.row_codec import FLAG_BACKFILL, KeySpace, RowCodec, header
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.write_metrics import WriteMetrics
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, PlaitError, Unavailable
from plait.registry.records import (
    Aggregation,
    Entity,
    Epochs,
    FeastSource,
    Feature,
    FeatureSchema,
    FeatureView,
    PastVersion,
    Snapshot,
)
from plait.telemetry.metrics import Metrics

NOW_S = 1_700_000_000.0
NOW_US = int(NOW_S * 1e6)
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
        await ingestion.write(batch, result, call_of())
        told.append((result.applied, result.ignored))
    assert told == [(1, 0), (0, 1), (0, 1), (1, 0), (0, 1), (1, 0)]
    [row] = await stored(store, ["i"])
    assert column(np.frombuffer(row or b"", np.uint8)[None], "a") == [4.0]


async def test_rows_belong_to_their_tenant_and_keep_their_key_s_type(store: RedisStore) -> None:
    batch = pb.FeatureBatch(feature_view="profile", event_times_us=[NOW_US])
    batch.ids.int64_ids.extend([1, -1])
    result = pb.WriteFeaturesResponse()
    await ingestion_of(store).write(add(batch, ["age"], [30, 40]), result, call_of("shop"))
    assert result.applied == 2
    assert None not in await stored(store, [1, -1], NUMBERED, "shop")
    assert await stored(store, ["1", "-1"], NUMBERED, "shop") == [None, None]
    assert await stored(store, [1, -1], NUMBERED) == [None, None]


async def test_rows_are_kept_as_long_as_the_view_says(store: RedisStore, redis_url: str) -> None:
    import redis

    for batch, ids in ((add(batch_of(["i"]), ["a"], [1]), [1]), (None, [1])):
        given_batch = batch or add(pb.FeatureBatch(feature_view="profile", event_times_us=[NOW_US], ids={"int64_ids": ids}), ["age"], [1])
        await ingestion_of(store).write(given_batch, pb.WriteFeaturesResponse(), call_of())
    with redis.Redis.from_url(redis_url) as client:
        [forever] = KeySpace.of("default", "item", "stats", 1).keys(["i"])
        [an_hour] = KeySpace.of("default", "user", "profile", 1).keys([1])
        assert client.pttl(forever) == -1
        # An hour and how far ahead an event may be, and up to a tenth more, so that rows written together do not expire together.
        assert 3_800_000 < int(client.pttl(an_hour)) <= 4_290_000  # type: ignore[arg-type]


async def test_impossible_rows_are_refused_alone_each_with_its_reason(store: RedisStore) -> None:
    now_us = NOW_US
    ahead = 300_000_000
    ids = ["ok", "limit", "future", "zero", "past", "", "ü" * 129, "ü" * 128]
    batch = add(batch_of(ids), ["a"], range(8))
    batch.event_times_us[:] = [now_us, now_us + ahead, now_us + ahead + 1, 0, -5, now_us, now_us, now_us]
    result = pb.WriteFeaturesResponse()
    await ingestion_of(store).write(batch, result, call_of())
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
    await ingestion_of(store).write(add(batch_of([""]), ["a"], [1]), result, call_of())
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
        await ingestion_of(store).write(batch, pb.WriteFeaturesResponse(), call_of())
    [violation] = caught.value.violations
    assert violation.field == "ids"
    assert words in violation.description


async def test_an_unknown_view_is_refused_with_what_is_near(store: RedisStore) -> None:
    words = re.escape("no feature view 'stat'; did you mean 'stats'?: see 'plait get featureview'")
    with pytest.raises(NotFound, match=words) as caught:
        await ingestion_of(store).write(pb.FeatureBatch(feature_view="stat"), pb.WriteFeaturesResponse(), call_of())
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
    await ingestion.write(add(batch_of(["old"]), ["a"], [1]), pb.WriteFeaturesResponse(), call_of())
    with pytest.raises(InvalidArgument):
        await ingestion.write(add(batch_of(["new"]), ["new"], [1]), pb.WriteFeaturesResponse(), call_of())
    del snapshots[0]
    await ingestion.write(add(batch_of(["new"]), ["new"], [1]), pb.WriteFeaturesResponse(), call_of())
    rows = await stored(store, ["old", "new"])
    assert [row[2] for row in rows if row] == [1, 2]


async def refused(work: Any, kind: type[PlaitError]) -> str:
    with pytest.raises(kind) as caught:
        await work
    return caught.value.reason


def epochs_of(store: RedisStore, epochs: Epochs) -> Ingestion:
    snapshot = Snapshot(feature_views={"stats": VIEW}, epochs={("default", "stats", 1): epochs})
    return Ingestion(store, lambda: snapshot, clock=lambda: NOW_S)


async def in_epoch(store: RedisStore, epoch: int, entity_id: str = "i") -> float | None:
    [row] = (await store.read(KeySpace.of("default", "item", "stats", 1, epoch).keys([entity_id]), 10)).rows
    return None if row is None else float(column(np.frombuffer(row, np.uint8)[None], "a")[0])


async def test_a_streamed_row_goes_to_every_epoch_in_use_and_the_served_one_counts(store: RedisStore) -> None:
    ingestion = epochs_of(store, Epochs(serving=2, building=4, previous=1, newest=4))
    await ingestion.write(add(batch_of(["i"], epoch=4), ["a"], [1]), pb.WriteFeaturesResponse(), ADMIN)
    result = pb.WriteFeaturesResponse()
    older = add(batch_of(["i"]), ["a"], [2])
    older.event_times_us[:] = [NOW_US - 1]
    await ingestion.write(older, result, call_of())
    assert (result.applied, result.ignored) == (1, 0)
    assert [await in_epoch(store, epoch) for epoch in range(6)] == [None, 2, 2, None, 1, None]


async def test_an_epoch_is_named_by_administrators_and_must_be_in_use(store: RedisStore) -> None:
    ingestion = epochs_of(store, Epochs(building=1, newest=1))
    named = add(batch_of(["i"], epoch=1, backfill=True), ["a"], [1])
    assert await refused(ingestion.write(named, pb.WriteFeaturesResponse(), call_of()), PermissionDenied) == "SCOPE_MISSING"
    await ingestion.write(named, pb.WriteFeaturesResponse(), call_of(service=True))
    assert [await in_epoch(store, 0), await in_epoch(store, 1)] == [None, 1]
    named.epoch = 2
    assert await refused(ingestion.write(named, pb.WriteFeaturesResponse(), ADMIN), NotFound) == "EPOCH_NOT_FOUND"
    named.epoch = 0  # named, although it is the default of a number
    await ingestion.write(named, pb.WriteFeaturesResponse(), ADMIN)
    assert await in_epoch(store, 0) == 1


async def test_an_erased_entity_is_refused_alone_until_something_newer_happens(store: RedisStore) -> None:
    ingestion = epochs_of(store, Epochs(building=1, newest=1))
    space = KeySpace.of("default", "item", "stats", 1)
    await store.erase(space.mark_keys(["gone"]), [[]], [NOW_US])
    result = pb.WriteFeaturesResponse()
    batch = add(batch_of(["ok", "", "gone"]), ["a"], [1, 2, 3])
    await ingestion.write(batch, result, call_of())
    assert [(e.row, e.reason) for e in result.errors] == [(1, "ID_INVALID"), (2, "ENTITY_ERASED")]
    assert (result.applied, result.ignored) == (1, 0)
    assert [await in_epoch(store, epoch, "gone") for epoch in (0, 1)] == [None, None]
    batch.event_times_us[:] = [NOW_US + 1]
    await ingestion.write(batch, result, call_of())
    assert [await in_epoch(store, epoch, "gone") for epoch in (0, 1)] == [3, 3]


async def test_what_redis_has_forgotten_cannot_come_back_older(store: RedisStore) -> None:
    """A row with the latest time there may be is forgotten; whatever is taken from then on must be newer than it was."""
    now = [NOW_S]
    snapshot = Snapshot(feature_views={"profile": NUMBERED})
    ingestion = Ingestion(store, lambda: snapshot, clock=lambda: now[0])

    async def write(at_us: int) -> list[str]:
        batch = add(pb.FeatureBatch(feature_view="profile", event_times_us=[at_us], ids={"int64_ids": [1]}), ["age"], [1])
        result = pb.WriteFeaturesResponse()
        await ingestion.write(batch, result, call_of())
        return [error.reason for error in result.errors]

    newest = NOW_US + 300_000_000
    assert await write(newest) == []
    now[0] += ingestion._ttl_ms(NUMBERED) / 1000  # the soonest Redis forgets it
    assert await write(newest - 1) == ["EVENT_TIME_TOO_OLD"]
    assert await write(newest) == []
    assert await write(int(now[0] * 1e6) - 3_600_000_001) == ["EVENT_TIME_TOO_OLD"]


async def test_expiry_and_backfill_are_in_the_row(store: RedisStore) -> None:
    batch = add(batch_of(["i"], expires_at_us=[NOW_US + 5], backfill=True), ["a"], [1])
    await ingestion_of(store).write(batch, pb.WriteFeaturesResponse(), call_of())
    [row] = await stored(store, ["i"])
    head = header(np.frombuffer(row or b"", np.uint8)[None])[0]
    assert (head["expires_us"], head["flags"]) == (NOW_US + 5, FLAG_BACKFILL)


async def test_a_pinned_version_is_written_with_its_own_columns(store: RedisStore) -> None:
    old = FeatureSchema(id=1, features=(Feature(name="a"),))
    view = FeatureView(
        name="stats",
        entity=VIEW.entity,
        features=(Feature(name="b"),),
        version=2,
        versions=(PastVersion(version=1, entity=VIEW.entity, schemas=(old,)),),
    )
    ingestion = ingestion_of(store, view)
    await ingestion.write(add(batch_of(["i"], view_version=1), ["a"], [1]), pb.WriteFeaturesResponse(), call_of())
    await ingestion.write(add(batch_of(["i"]), ["b"], [2]), pb.WriteFeaturesResponse(), call_of())
    assert None not in [*await stored(store, ["i"], VIEW), *await stored(store, ["i"], view)]
    with pytest.raises(InvalidArgument):
        await ingestion.write(add(batch_of(["i"], view_version=1), ["b"], [1]), pb.WriteFeaturesResponse(), call_of())
    gone = ingestion.write(batch_of(["i"], view_version=3), pb.WriteFeaturesResponse(), call_of())
    assert await refused(gone, NotFound) == "VIEW_VERSION_NOT_FOUND"


@pytest.mark.parametrize(
    ("more", "kind", "reason"),
    [
        ({"writers": ("rival",)}, PermissionDenied, "VIEW_NOT_WRITABLE"),
        ({"aggregation": Aggregation()}, FailedPrecondition, "VIEW_IS_AGGREGATED"),
        ({"feast": FeastSource(project="p", view="v", join_keys=("k",))}, FailedPrecondition, "VIEW_IS_FOREIGN"),
    ],
)
async def test_views_that_a_caller_may_not_write(store: RedisStore, more: Any, kind: type[PlaitError], reason: str) -> None:
    view = FeatureView(name="stats", entity=VIEW.entity, features=VIEW.features, **more)
    work = ingestion_of(store, view).write(batch_of(["i"]), pb.WriteFeaturesResponse(), ADMIN)
    assert await refused(work, kind) == reason
    assert await stored(store, ["i"]) == [None]


async def test_nothing_is_written_before_redis_knows_every_erasure(store: RedisStore) -> None:
    loaded = [False]

    async def erasures() -> None:
        if not loaded[0]:
            raise Unavailable("not yet", reason="ERASURES_NOT_LOADED")

    snapshot = Snapshot(feature_views={"stats": VIEW})
    ingestion = Ingestion(store, lambda: snapshot, clock=lambda: NOW_S, erasures_loaded=erasures)
    batch = add(batch_of(["i"]), ["a"], [1])
    assert await refused(ingestion.write(batch, pb.WriteFeaturesResponse(), call_of()), Unavailable) == "ERASURES_NOT_LOADED"
    assert await stored(store, ["i"]) == [None]
    loaded[0] = True
    await ingestion.write(batch, pb.WriteFeaturesResponse(), call_of())
    assert await stored(store, ["i"]) != [None]


async def test_the_answer_says_how_safe_the_rows_are(store: RedisStore) -> None:
    result = pb.WriteFeaturesResponse()
    await ingestion_of(store).write(add(batch_of(["i"]), ["a"], [1]), result, call_of())
    assert result.durability in (pb.DURABILITY_APPLIED, pb.DURABILITY_SYNCED)


async def test_what_became_of_rows_and_how_long_it_took_is_counted(store: RedisStore) -> None:
    metrics = Metrics()
    snapshot = Snapshot(feature_views={VIEW.name: VIEW})
    ingestion = Ingestion(store, lambda: snapshot, clock=lambda: NOW_S, metrics=WriteMetrics(metrics))
    for ids in (["a", "b", ""], ["a", "c"]):
        await ingestion.write(add(batch_of(ids), ["a"], [1] * len(ids)), pb.WriteFeaturesResponse(), call_of())

    def rows(outcome: str) -> float | None:
        return metrics.registry.get_sample_value("plait_features_writes_total", {"view": "stats", "outcome": outcome})

    assert [rows(outcome) for outcome in ("applied", "ignored", "refused")] == [3, 1, 1]
    assert metrics.registry.get_sample_value("plait_features_ack_seconds_count", {"view": "stats"}) == 2
