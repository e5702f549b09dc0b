"""Everything an answer says, against a model in plain Python: composite keys, epochs, pinned versions, expiry, ages, what was sent along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.feature_world import statuses, tensor

from feature_retrieval.explanation import Explanation
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.near_cache import NearCache
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.row_codec import FLAG_TOMBSTONE, Bytes2D, KeySpace, RowCodec, entity_prefix, header, split
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.views import ComputedColumn, Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from plait.local.redis import EmbeddedRedis
from plait.registry.records import (
    Entity,
    Epochs,
    Feature,
    FeatureSchema,
    FeatureSet,
    FeatureView,
    KeyPart,
    ModelInput,
    PastVersion,
    RequestFeature,
    Snapshot,
    Transform,
)
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline

NOW_S = 1_700_000_000.0
NOW_US = int(NOW_S * 1e6)
OFFER = Entity(type="offer", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="sku", type="int64")))
PAST = PastVersion(version=1, entity=OFFER, schemas=(FeatureSchema(id=1, features=(Feature(name="a", dtype="int64", default=-5),)),))
STATS = FeatureView(
    name="stats", entity=OFFER, version=2, features=(Feature(name="a", default=1.5), Feature(name="b")), max_age_s=60, versions=(PAST,)
)
SET = FeatureSet(
    name="offers",
    inputs=(ModelInput(name="offer", entity="offer", features=("stats:b", "$request:km", "stats@1:a", "$request:hour", "stats@2:a")),),
    request=(RequestFeature(name="km", entity="offer", minimum=0), RequestFeature(name="hour", default=12)),
)
SNAPSHOT = Snapshot(
    feature_views={"stats": STATS}, feature_sets={"offers": SET}, epochs={("shop", "stats", 2): Epochs(serving=3, building=4, previous=2)}
)
CODECS = {1: RowCodec(PAST.schemas[0]), 2: RowCodec(FeatureSchema(id=1, features=STATS.features))}
SPACES = {1: KeySpace.of("shop", "offer", "stats", 1), 2: KeySpace.of("shop", "offer", "stats", 2, epoch=3)}
IDS: tuple[tuple[str, int], ...] = (("x", 1), ("x", 2), ("", 1), ("x\0", 1), ("y", -1))
Row = tuple[int, int, bool, list[float | None]]  # event time, expiry (0 = never), deleted, columns


def encoded(version: int, row: Row) -> bytes:
    codec = CODECS[version]
    block: Bytes2D = codec.blank(1)
    at_us, expires_us, deleted, values = row
    head = header(block)
    head["event_time_us"], head["expires_us"], head["flags"] = at_us, expires_us, FLAG_TOMBSTONE if deleted else 0
    for column, value in zip(codec.columns.values(), values, strict=True):
        if value is not None:
            block[0, column.offset : column.offset + column.dtype.itemsize] = np.array([value], column.dtype).view(np.uint8)
    codec.set_nulls(block, np.array([[value is None for value in values]]))
    return split(block)[0]


def told_of(version: int, row: Row | None) -> str:
    if row is None or row[2]:
        return "DEFAULTED" if version == 1 else "NOT_FOUND"
    at_us, expires_us, _, values = row
    if (version == 2 and at_us < NOW_US - 60_000_000) or 0 < expires_us < NOW_US:
        return "STALE"
    return "NULL" if None in values else "PRESENT"


def request_of(ids: Sequence[tuple[str, int]], km: Sequence[float], hour: float | None, **more: Any) -> pb.GetFeaturesRequest:
    request = pb.GetFeaturesRequest(feature_set="offers", include_event_times=True, include_ages=True, **more)
    keys = request.entities.add(entity_type="offer").ids.composite_ids
    for shop, sku in ids:
        key = keys.add()
        key.parts.add(string_part=shop)
        key.parts.add(int64_part=sku)
    request.request_features.add(name="km", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[len(km)], data=np.array(km, "<f4").tobytes())
    if hour is not None:
        request.request_features.add(name="hour", dtype=types_pb2.DATA_TYPE_FLOAT32, data=np.array(hour, "<f4").tobytes())
    return request


async def ask(page: Retrieval, request: pb.GetFeaturesRequest) -> pb.GetFeaturesResponse:
    response = pb.GetFeaturesResponse()
    await page.get_features(request, response, call())
    return response


def call(tenant: str = "shop", caller: str = "key-1") -> Call:
    return Call(method="GetFeatures", tenant=tenant, caller=caller, deadline=Deadline.after(20))


def numbers(data: bytes) -> list[int]:
    return np.frombuffer(data, "<i8").tolist()  # type: ignore[no-any-return]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_the_whole_answer_against_a_model(redis_server: EmbeddedRedis, data: st.DataObject) -> None:
    cell = st.none() | st.integers(-1000, 1000)
    rows: dict[tuple[int, tuple[str, int]], Row] = {}
    for version in (1, 2):
        for entity_id in data.draw(st.sets(st.sampled_from(IDS))):
            at_us = NOW_US - data.draw(st.sampled_from([-5_000_000, 0, 1, 60_000_000, 60_000_001, 3_600_000_000]))
            expires_us = data.draw(st.sampled_from([0, 0, NOW_US - 1, NOW_US, NOW_US + 1]))
            values: list[float | None] = [data.draw(cell) for _ in CODECS[version].columns]
            rows[version, entity_id] = (at_us, expires_us, data.draw(st.booleans()) and data.draw(st.booleans()), values)
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        for (version, entity_id), row in rows.items():
            client.set(SPACES[version].keys([entity_id])[0], encoded(version, row))
            for epoch in (0, 2, 4):  # of other epochs nothing is seen
                client.set(KeySpace.of("shop", "offer", "stats", 2, epoch).keys([entity_id])[0], encoded(2, (NOW_US, 0, False, [8, 8])))
    ids = data.draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=8))
    km = data.draw(st.lists(st.integers(0, 9), min_size=len(ids), max_size=len(ids)))
    hour = data.draw(st.none() | st.integers(0, 23))

    def cells(entity_id: tuple[str, int], at: int) -> list[float]:
        def value(version: int, column: int, default: float) -> float:
            row = rows.get((version, entity_id))
            found = None if row is None or row[2] else row[3][column]
            return default if found is None else found

        return [value(2, 1, math.nan), km[at], value(1, 0, -5), 12 if hour is None else hour, value(2, 0, 1.5)]

    def defaulted(version: int, entity_id: tuple[str, int]) -> int:
        row = rows.get((version, entity_id))
        return len(CODECS[version].columns) if row is None or row[2] else row[3].count(None)

    cache = NearCache(data.draw(st.sampled_from([0, 1 << 22])), 60)
    cache.connected([entity_prefix("shop", "offer")])
    store = RedisStore(redis_server.url)
    plans = Plans(SNAPSHOT)
    page = Retrieval(store, cache, lambda: plans, clock=lambda: NOW_S)
    try:
        for _ in range(2):  # the second time from the near cache, where there is one
            answer = await ask(page, request_of(ids, km, hour))
            np.testing.assert_array_equal(tensor(answer, "offer"), np.array([cells(i, n) for n, i in enumerate(ids)], np.float32))
            assert len(answer.views) == 2  # the pinned version that is the current one is not read twice
            for report, version in zip(answer.views, (2, 1), strict=True):
                told = [types_pb2.RowStatus.Name(s).removeprefix("ROW_STATUS_") for s in report.statuses]
                assert told == [told_of(version, rows.get((version, i))) for i in ids]
                here = [rows.get((version, i)) for i in ids]
                assert numbers(report.event_times_us) == [0 if r is None or r[2] else r[0] for r in here]
                assert numbers(report.ages_us) == [-1 if r is None or r[2] else max(NOW_US - r[0], 0) for r in here]
                assert report.defaulted_cells == sum(defaulted(version, i) for i in ids)
            bad = sum(r.defaulted_cells for r in answer.views) + (len(ids) if hour is None else 0)
            total = 5 * len(ids)
            if bad:
                await ask(page, request_of(ids, km, hour, max_defaulted_cells=bad / total))
                with pytest.raises(FailedPrecondition, match=f"{bad} of {total} cells hold a default"):
                    await ask(page, request_of(ids, km, hour, max_defaulted_cells=(bad - 0.5) / total))
    finally:
        await store.close()


async def test_another_tenant_s_epoch_is_its_own(redis_url: str) -> None:
    view = Plans(SNAPSHOT).get("offers", ()).entities[0].views[0]
    assert view.key_space("shop") == SPACES[2]
    assert view.key_space("elsewhere") == KeySpace.of("elsewhere", "offer", "stats", 2, epoch=0)


async def test_ids_of_another_kind_and_bad_values_are_refused_before_anything_is_read(redis_url: str) -> None:
    store = RedisStore(redis_url)
    plans = Plans(SNAPSHOT)
    page = Retrieval(store, NearCache(0, 60), lambda: plans, clock=lambda: NOW_S)
    request = request_of([], [1], None)
    request.entities[0].ids.string_ids.append("x")
    with pytest.raises(InvalidArgument) as caught:
        await ask(page, request)
    assert [v.description for v in caught.value.violations] == [
        "string_ids are given, but the entity type's key is composite: set composite_ids"
    ]
    with pytest.raises(InvalidArgument) as caught:
        await ask(page, request_of([("x", 1)], [-1], None))
    assert caught.value.reason == "REQUEST_FEATURE_INVALID"
    assert repr(store) == "<RedisStore up connections=0+0>"
    assert statuses(await ask(page, request_of([("x", 1)], [1], None)), "stats") == ["NOT_FOUND"]
    await store.close()


# --- wide and coded columns ---------------------------------------------------------------------------------------------------------------

WIDE = FeatureView(
    name="wide",
    entity=Entity(type="item"),
    features=(Feature(name="text", dtype="int8", width=3, scale=0.5, default=-1), Feature(name="more", dtype="int8", width=2)),
)
CODED = FeatureView(
    name="coded",
    entity=Entity(type="item"),
    features=(
        Feature(name="colour", dtype="string", vocabulary=("red", "green"), default="green"),
        Feature(name="sizes", dtype="int16", max_length=3, pad=-7),
        Feature(name="listed", dtype="timestamp"),
    ),
)
COLUMNS = ("wide:more", "coded:sizes", "wide:text", "coded:colour", "coded:listed")
WIDE_SNAPSHOT = Snapshot(
    feature_views={"wide": WIDE, "coded": CODED},
    feature_sets={"s": FeatureSet(name="s", inputs=(ModelInput(name="x", entity="item", features=COLUMNS, dtype="float64"),))},
)


@pytest.mark.parametrize("near_cache", [False, True])
async def test_embeddings_lists_and_words_become_columns(redis_url: str, near_cache: bool) -> None:
    store, cache, plans = RedisStore(redis_url), NearCache(1 << 20 if near_cache else 0, 60), Plans(WIDE_SNAPSHOT)
    cache.connected([entity_prefix("shop", "item")])
    writer = Ingestion(store, lambda: WIDE_SNAPSHOT, clock=lambda: NOW_S)
    page = Retrieval(store, cache, lambda: plans, clock=lambda: NOW_S)
    wide = pb.FeatureBatch(feature_view="wide", event_times_us=[NOW_US], ids={"string_ids": ["a", "b"]})
    wide.columns.add(features=["text"], dtype=types_pb2.DATA_TYPE_INT8, data=np.array([1, 2, 3, 4, 5, 6], "i1").tobytes())
    wide.columns.add(features=["more"], dtype=types_pb2.DATA_TYPE_INT8, data=np.array([8, 9, 0, 0], "i1").tobytes(), null_bits=b"\2")
    coded = pb.FeatureBatch(feature_view="coded", event_times_us=[NOW_US], ids={"string_ids": ["a", "b", "c"]})
    words = b"redblue"
    coded.columns.add(
        features=["colour"], dtype=types_pb2.DATA_TYPE_BYTES, data=words, offsets=np.array([0, 3, 7, 7], "<u4").tobytes(), null_bits=b"\4"
    )
    lists = np.array([1, 2, 3, 4], "<i2").tobytes()
    coded.columns.add(features=["sizes"], dtype=types_pb2.DATA_TYPE_INT16, data=lists, offsets=np.array([0, 2, 8, 8], "<u4").tobytes())
    coded.columns.add(features=["listed"], dtype=types_pb2.DATA_TYPE_INT64, data=np.full(3, NOW_US, "<i8").tobytes())
    try:
        for batch in (wide, coded):
            result = pb.WriteFeaturesResponse()
            await writer.write(batch, result, call())
            assert (len(result.errors), result.applied) == (0, len(batch.ids.string_ids))
        request = pb.GetFeaturesRequest(feature_set="s")
        request.entities.add(entity_type="item").ids.string_ids.extend(["a", "b", "c", "d"])
        for _ in range(2):
            answer = await ask(page, request)
            np.testing.assert_array_equal(
                tensor(answer, "x"),
                [
                    [8, 9, 1, -7, -7, 0.5, 1, 1.5, 1, NOW_US],
                    [0, 0, 2, 3, 4, 2, 2.5, 3, 0, NOW_US],  # null: as int8 it has no NaN; "blue" is in no vocabulary
                    [0, 0, -7, -7, -7, -1, -1, -1, 2, NOW_US],
                    [0, 0, -7, -7, -7, -1, -1, -1, 2, 0],
                ],
            )
            assert [(v.feature_view, v.defaulted_cells) for v in answer.views] == [("wide", 2 + 5 + 5), ("coded", 1 + 5)]
            assert statuses(answer, "coded") == ["PRESENT", "PRESENT", "NULL", "NOT_FOUND"]
    finally:
        await store.close()


# --- transforms ---------------------------------------------------------------------------------------------------------------------------

TASTE = FeatureView(
    name="taste", entity=Entity(type="user"), features=(Feature(name="vector", width=2), Feature(name="age", dtype="int64"))
)
LISTING = FeatureView(
    name="listing", entity=Entity(type="item"),
    features=(Feature(name="vector", width=2), Feature(name="price", default=10), Feature(name="listed", dtype="timestamp")),
)  # fmt: skip
CROSSED = FeatureSet(
    name="crossed",
    request=(RequestFeature(name="hour", default=12), RequestFeature(name="km", entity="item")),
    transforms=(
        Transform(name="affinity", entity="item", expression="dot({taste:vector}, {listing:vector})", default=-1),
        Transform(name="cost", entity="item", expression="{listing:price} + {$request:km} * {$request:hour}"),
        Transform(name="fresh", entity="item", expression="time_since({listing:listed})", default=7),
        Transform(name="unseen", entity="item", expression="missing({listing:vector})"),
    ),
    inputs=(
        ModelInput(name="item", entity="item", features=("$transform:cost", "listing:price", "$transform:unseen", "$transform:affinity")),
        ModelInput(name="age", entity="item", features=("$transform:fresh",), dtype="int64"),
    ),
)
CROSSED_SNAPSHOT = Snapshot(feature_views={"taste": TASTE, "listing": LISTING}, feature_sets={"crossed": CROSSED})


def crossed_request(users: list[str], items: list[str], km: list[float], **more: Any) -> pb.GetFeaturesRequest:
    request = pb.GetFeaturesRequest(feature_set="crossed", **more)
    for entity_type, ids in (("user", users), ("item", items)):
        request.entities.add(entity_type=entity_type).ids.string_ids.extend(ids)
    request.request_features.add(name="km", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=[len(km)], data=np.array(km, "<f4").tobytes())
    return request


@pytest.mark.parametrize("near_cache", [False, True])
async def test_transforms_see_every_row_and_what_was_sent_with_it(redis_url: str, near_cache: bool) -> None:
    store, cache, plans = RedisStore(redis_url), NearCache(1 << 20 if near_cache else 0, 60), Plans(CROSSED_SNAPSHOT)
    cache.connected([entity_prefix("shop", entity_type) for entity_type in ("item", "user")])
    writer = Ingestion(store, lambda: CROSSED_SNAPSHOT, clock=lambda: NOW_S)
    page = Retrieval(store, cache, lambda: plans, clock=lambda: NOW_S)
    taste = pb.FeatureBatch(feature_view="taste", event_times_us=[NOW_US], ids={"string_ids": ["u"]})
    taste.columns.add(features=["vector"], dtype=types_pb2.DATA_TYPE_FLOAT32, data=np.array([2, 3], "<f4").tobytes())
    listing = pb.FeatureBatch(feature_view="listing", event_times_us=[NOW_US], ids={"string_ids": ["a", "b"]})
    listing.columns.add(
        features=["vector"], dtype=types_pb2.DATA_TYPE_FLOAT32, data=np.array([1, 1, 0, 0], "<f4").tobytes(), null_bits=b"\2"
    )
    listing.columns.add(features=["price"], dtype=types_pb2.DATA_TYPE_FLOAT32, data=np.array([5, 0], "<f4").tobytes(), null_bits=b"\2")
    listing.columns.add(features=["listed"], dtype=types_pb2.DATA_TYPE_INT64, data=np.array([NOW_US - 3_000_000] * 2, "<i8").tobytes())
    try:
        for batch in (taste, listing):
            result = pb.WriteFeaturesResponse()
            await writer.write(batch, result, call())
            assert result.applied == len(batch.ids.string_ids)
        for _ in range(2):
            answer = await ask(page, crossed_request(["u"], ["a", "b", "a", "c"], [1, 2, 3, 4]))
            np.testing.assert_array_equal(
                tensor(answer, "item"), [[17, 5, 0, 0, 5], [34, 10, 1, 1, -1], [41, 5, 0, 0, 5], [58, 10, 1, 1, -1]]
            )  # one id, two distances
            assert tensor(answer, "age").tolist() == [[3], [3], [3], [7]]
            assert [t.name for t in answer.tensors] == ["item", "age"]  # what was gathered for the transforms stays here
            assert [(v.feature_view, v.defaulted_cells) for v in answer.views] == [("listing", 2), ("taste", 0)]
            # two prices, two affinities and one time since are defaults; `hour` fills no column
            await ask(page, crossed_request(["u"], ["a", "b", "a", "c"], [1, 2, 3, 4], max_defaulted_cells=5 / 24))
            with pytest.raises(FailedPrecondition, match="5 of 24 cells"):
                await ask(page, crossed_request(["u"], ["a", "b", "a", "c"], [1, 2, 3, 4], max_defaulted_cells=4.9 / 24))
        alone = crossed_request(["u"], ["a"], [1], inputs=["age"])
        del alone.entities[0]
        assert tensor(await ask(page, alone), "age").tolist() == [[3]]  # an input whose transforms need no user asks for none
        with pytest.raises(InvalidArgument) as caught:
            await ask(page, crossed_request(["u", "v"], ["a"], [1]))
        assert caught.value.reason == "CROSS_NEEDS_ONE_ROW"
        assert [v.description for v in caught.value.violations] == ["transform 'affinity' takes one 'user' per request, and 2 are given"]
    finally:
        await store.close()


# --- who may read -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tenant", "caller", "good"), [("shop", "x", True), ("other", "key-7", True), ("other", "x", False)])
async def test_a_view_is_read_by_those_it_names(redis_url: str, tenant: str, caller: str, good: bool) -> None:
    """Also where only a transform reads it."""
    listing = replace(LISTING, readers=("shop", "key-7"))
    plans = Plans(replace(CROSSED_SNAPSHOT, feature_views={"taste": TASTE, "listing": listing}))
    store = RedisStore(redis_url)
    page = Retrieval(store, NearCache(0, 60), lambda: plans)
    request = pb.GetFeaturesRequest(feature_set="crossed", inputs=["age"])
    request.entities.add(entity_type="item").ids.string_ids.append("a")
    try:
        asked = page.get_features(request, pb.GetFeaturesResponse(), call(tenant, caller))
        if good:
            await asked
        else:
            with pytest.raises(PermissionDenied, match="'listing' is not for this caller") as caught:
                await asked
            assert caught.value.reason == "VIEW_NOT_READABLE"
    finally:
        await store.close()


# --- columns that are worked out ----------------------------------------------------------------------------------------------------------


class Since:
    """A stand-in for a window: the seconds since the time that is stored, none where that is 0."""

    size_bytes = 8

    def evaluate(self, state: Bytes2D, now_us: int) -> tuple[Any, Any]:
        stored = state.copy().view("<i8")[:, 0]
        return (now_us - stored) / 1e6, stored > 0


@pytest.mark.parametrize("near_cache", [False, True])
async def test_a_computed_column_is_what_it_is_worth_now(redis_url: str, near_cache: bool) -> None:
    view = FeatureView(
        name="v", entity=Entity(type="item"), features=(Feature(name="a", default=1), Feature(name="t", dtype="int64", default=-9))
    )
    one = ModelInput(name="x", entity="item", features=("v:t", "v:a"), dtype="float64")
    snapshot = Snapshot(feature_views={"v": view}, feature_sets={"s": FeatureSet(name="s", inputs=(one,))})
    plans, now = Plans(snapshot), [NOW_S]
    plan = plans.get("s", ())
    [read] = plan.entities[0].views
    picture, column = read.current, read.current.codec.columns["t"]
    computed = ComputedColumn(Since(), column.offset, column.end, column.index, 0, 0)
    picture = replace(picture, runs=tuple(r for r in picture.runs if r.column_from == 1), computed=(computed,))
    entity = replace(plan.entities[0], views=(replace(read, current=picture, pictures={1: picture}),))
    plans._compiled["s", ()] = replace(plan, entities=(entity,))
    store, cache = RedisStore(redis_url), NearCache(1 << 20 if near_cache else 0, 60)
    cache.connected([entity_prefix("shop", "item")])
    page = Retrieval(store, cache, lambda: plans, clock=lambda: now[0])
    batch = pb.FeatureBatch(feature_view="v", event_times_us=[NOW_US], ids={"string_ids": ["i", "j"]})
    batch.columns.add(features=["t"], dtype=types_pb2.DATA_TYPE_INT64, data=np.array([NOW_US - 2_000_000, 0], "<i8").tobytes())
    batch.columns.add(features=["a"], dtype=types_pb2.DATA_TYPE_FLOAT32, data=np.array([5, 6], "<f4").tobytes())
    try:
        await Ingestion(store, lambda: snapshot, clock=lambda: NOW_S).write(batch, pb.WriteFeaturesResponse(), call())
        request = pb.GetFeaturesRequest(feature_set="s")
        request.entities.add(entity_type="item").ids.string_ids.extend(["i", "j", "k"])
        for later_s in (0, 3, 8):
            now[0] = NOW_S + later_s
            answer = await ask(page, request)
            assert tensor(answer, "x").tolist() == [[2 + later_s, 5], [-9, 6], [-9, 1]]
            assert statuses(answer, "v") == ["PRESENT", "NULL", "DEFAULTED"]
            assert answer.views[0].defaulted_cells == 3
    finally:
        await store.close()


# --- numbers that a tensor cannot hold ----------------------------------------------------------------------------------------------------

LARGE = FeatureView(
    name="large",
    entity=Entity(type="item"),
    features=(
        Feature(name="price", dtype="float64", default=-1),
        Feature(name="seen", dtype="int32"),
        Feature(name="text", width=2),
        Feature(name="fine", dtype="int16"),
    ),
)
LARGE_SNAPSHOT = Snapshot(
    feature_views={"large": LARGE},
    feature_sets={
        "s": FeatureSet(
            name="s",
            inputs=(
                ModelInput(name="x", entity="item", features=("large:price",)),
                ModelInput(name="y", entity="item", features=("large:fine", "large:text", "large:seen"), dtype="float16"),
            ),
        )
    },
)
HALF = 65_504  # the largest float16


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([None, 1.5, 3e38, -1e39, 1e300, math.inf, math.nan]),
            st.sampled_from([None, -5, HALF, 65_536, -(2**31)]),
            st.tuples(*[st.sampled_from([0.25, HALF, 1e5, -math.inf])] * 2),
        ),
        min_size=1,
        max_size=4,
    ),
    near_cache=st.booleans(),
)
async def test_a_number_beyond_its_tensor_is_a_default_and_said_to_be(
    redis_server: EmbeddedRedis, rows: list[tuple[Any, Any, Any]], near_cache: bool
) -> None:
    """A finite number never comes out as infinity; what was stored as infinity, or not a number, stays that."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    store, cache, plans = RedisStore(redis_server.url), NearCache(1 << 20 if near_cache else 0, 60), Plans(LARGE_SNAPSHOT)
    cache.connected([entity_prefix("shop", "item")])
    ids = [f"i{n}" for n in range(len(rows))]
    batch = pb.FeatureBatch(feature_view="large", event_times_us=[NOW_US], ids={"string_ids": ids})
    for name, dtype, kind, values in (
        ("price", types_pb2.DATA_TYPE_FLOAT64, "<f8", [row[0] for row in rows]),
        ("seen", types_pb2.DATA_TYPE_INT32, "<i4", [row[1] for row in rows]),
    ):
        nulls = np.packbits([value is None for value in values], bitorder="little").tobytes()
        data = np.array([0 if value is None else value for value in values], kind).tobytes()
        batch.columns.add(features=[name], dtype=dtype, data=data, null_bits=nulls)
    batch.columns.add(features=["text"], dtype=types_pb2.DATA_TYPE_FLOAT32, data=np.array([row[2] for row in rows], "<f4").tobytes())
    batch.columns.add(features=["fine"], dtype=types_pb2.DATA_TYPE_INT16, data=np.full(len(rows), 7, "<i2").tobytes())

    def lost(value: float | None, largest: float) -> bool:
        return value is None or (math.isfinite(value) and abs(value) > largest)

    single = float(np.finfo(np.float32).max)
    try:
        result = pb.WriteFeaturesResponse()
        await Ingestion(store, lambda: LARGE_SNAPSHOT, clock=lambda: NOW_S).write(batch, result, call())
        assert result.applied == len(rows)
        page = Retrieval(store, cache, lambda: plans, clock=lambda: NOW_S)
        request = pb.GetFeaturesRequest(feature_set="s")
        request.entities.add(entity_type="item").ids.string_ids.extend(ids)
        for _ in range(2):
            answer = await ask(page, request)
            prices = [-1 if lost(row[0], single) else row[0] for row in rows]
            np.testing.assert_array_equal(tensor(answer, "x")[:, 0], np.array(prices, np.float32))
            texts = [[math.nan] * 2 if any(lost(v, HALF) for v in row[2]) else row[2] for row in rows]
            seen = [0 if lost(row[1], HALF) else row[1] for row in rows]
            wanted = [[7, *text, number] for text, number in zip(texts, seen, strict=True)]
            np.testing.assert_array_equal(tensor(answer, "y"), np.array(wanted, np.float16))
            bad = [[lost(row[0], single), lost(row[1], HALF), *[any(lost(v, HALF) for v in row[2])] * 2] for row in rows]
            assert statuses(answer, "large") == ["NULL" if any(row) else "PRESENT" for row in bad]
            assert answer.views[0].defaulted_cells == sum(map(sum, bad))
            explained = pb.ExplainFeaturesResponse()
            one = pb.ExplainFeaturesRequest(feature_set="s")
            one.entities.add(entity_type="item").ids.string_ids.append(ids[0])
            await Explanation(page, lambda: plans, store.times_to_live).explain(one, explained, call())
            told = {(c.reference, c.column): c.defaulted for c in explained.columns}
            assert [told["large:price", 0], told["large:seen", 3], told["large:text", 1], told["large:text", 2]] == bad[0]
    finally:
        await store.close()
