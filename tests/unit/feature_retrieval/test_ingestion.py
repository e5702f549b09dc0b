"""From a columnar batch to packed rows: everything that is wrong is said, nothing that is wrong is stored."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.feature_world import make_batch

from feature_retrieval.ingestion import Ingestion, encode
from feature_retrieval.row_codec import KeySpace, RowCodec, header
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
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
DTYPES = ("bool", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


def batch_of(ids: list[str], **more: Any) -> Any:
    return make_batch("stats", ids, {}, at_s=NOW_S, **more)


def add(batch: Any, names: list[str], values: Any, dtype: str = "float32", null_bits: bytes = b"") -> Any:
    known = BY_NAME[dtype]
    batch.columns.add(features=names, dtype=known.number, data=np.asarray(values, known.numpy).tobytes(), null_bits=null_bits)
    return batch


def violations(batch: Any, ids: int = 2) -> list[tuple[str, str]]:
    with pytest.raises(InvalidArgument) as caught:
        encode(batch, CODEC, [f"i{n}" for n in range(ids)], VIEW)
    return [(v.field, v.description) for v in caught.value.violations]


def column(block: Any, name: str) -> list[Any]:
    place = CODEC.columns[name]
    values: list[Any] = block[:, place.offset : place.offset + place.dtype.itemsize].copy().view(place.dtype)[:, 0].tolist()
    return values


def nulls(block: Any) -> list[str]:
    """Per row the names of its null columns."""
    names = list(CODEC.columns)
    return [" ".join(names[at] for at in np.flatnonzero(row)) for row in CODEC.nulls(block)]


def test_columns_come_alone_or_as_a_matrix_in_any_order() -> None:
    batch = add(batch_of(["x", "y"]), ["b", "a"], [[10, 1], [20, 2]])
    block = encode(add(batch, ["n"], [5, -6], "int64"), CODEC, ["x", "y"], VIEW)
    assert (column(block, "a"), column(block, "b"), column(block, "n")) == ([1, 2], [10, 20], [5, -6])
    assert nulls(block) == ["flag", "flag"]
    assert header(block)["event_time_us"].tolist() == [int(NOW_S * 1e6)] * 2


def test_null_bits_are_row_major_and_null_cells_are_zero() -> None:
    batch = add(batch_of(["x", "y"]), ["a", "b"], [[1, 2], [3, 4]], null_bits=bytes([0b0110]))
    batch = add(batch, ["flag"], [True, True], "bool", null_bits=bytes([0b10]))
    block = encode(batch, CODEC, ["x", "y"], VIEW)
    assert nulls(block) == ["b n", "a n flag"]
    assert (column(block, "a"), column(block, "b"), column(block, "flag")) == ([1, 0], [0, 4], [True, False])


def test_equal_rows_have_equal_bytes_whatever_lay_under_a_null() -> None:
    one, other = (
        encode(add(batch_of(["x"]), ["a"], [value], null_bits=b"\x01"), CODEC, ["x"], VIEW).tobytes() for value in (1.0, float("nan"))
    )
    assert one == other == encode(batch_of(["x"]), CODEC, ["x"], VIEW).tobytes()


@st.composite
def wide(draw: st.DrawFn) -> tuple[FeatureView, Any, Any, Any]:
    """A view, the order in which its columns are sent and in how large blocks, [rows, columns] values, [rows, columns] nulls."""
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=20))
    features = tuple(Feature(name=f"f{n}", dtype=dtype) for n, dtype in enumerate(dtypes))  # type: ignore[arg-type]
    order = draw(st.permutations(range(len(features))))
    cuts = draw(st.sets(st.integers(1, len(features)), max_size=4))
    blocks: list[list[int]] = [[]]
    for at, index in enumerate(order):
        if blocks[-1] and (at in cuts or dtypes[index] != dtypes[blocks[-1][0]]):
            blocks.append([])
        blocks[-1].append(index)
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    shape = (draw(st.integers(1, 4)), len(features))
    return (
        FeatureView(name="wide", entity=Entity(type="item"), features=features),
        blocks,
        random.integers(0, 100, shape),
        random.random(shape) < draw(st.sampled_from([0.0, 0.3])),
    )


@settings(max_examples=80, deadline=None)
@given(wide())
def test_any_grouping_of_columns_gives_the_same_rows(made: tuple[FeatureView, list[list[int]], Any, Any]) -> None:
    view, blocks, values, missing = made
    rows = len(values)
    codec = RowCodec(FeatureSchema(id=1, features=view.features))
    batch = pb.FeatureBatch(feature_view="wide", event_times_us=[7])
    for members in blocks:
        bits = np.packbits(missing[:, members].ravel(), bitorder="little").tobytes() if missing[:, members].any() else b""
        add(batch, [view.features[m].name for m in members], values[:, members], view.features[members[0]].dtype, bits)
    block = encode(batch, codec, [f"i{n}" for n in range(rows)], view)
    np.testing.assert_array_equal(codec.nulls(block), missing)
    for index, feature in enumerate(view.features):
        place = codec.columns[feature.name]
        found = block[:, place.offset : place.offset + place.dtype.itemsize].copy().view(place.dtype)[:, 0]
        np.testing.assert_array_equal(found, np.where(missing[:, index], 0, values[:, index]).astype(place.dtype))


def test_times_sequences_and_tombstones_per_row() -> None:
    batch = batch_of(["x", "y", "z"], sequences=[3, 2, (1 << 64) - 1], deleted=[False, True, False])
    batch.event_times_us[:] = [3, 1, 2]
    head = header(encode(batch, CODEC, ["x", "y", "z"], VIEW))
    assert head["event_time_us"].tolist() == [3, 1, 2]
    assert head["sequence"].tolist() == [3, 2, (1 << 64) - 1]
    assert head["flags"].tolist() == [0, 1, 0]
    assert head["schema"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("names", "values", "dtype", "null_bits", "words"),
    [
        (["zz"], [1, 2], "float32", b"", "unknown features ['zz']"),
        ([], [], "float32", b"", "no feature is named"),
        (["a", "a"], [1, 2, 3, 4], "float32", b"", "given twice: ['a', 'a']"),
        (["a"], [1, 2], "float64", b"", "dtype float64 is not the declared dtype of ['a']"),
        (["a", "n"], [1, 2, 3, 4], "float32", b"", "dtype float32 is not the declared dtype of ['n']"),
        (["a"], [1, 2, 3], "float32", b"", "12 bytes of data, expected 2 rows x 1 features x 4 bytes = 8"),
        (["a", "b"], [1, 2], "float32", b"", "8 bytes of data, expected 2 rows x 2 features x 4 bytes = 16"),
        (["n"], [], "int64", b"", "0 bytes of data"),
        (["a"], [1, 2], "float32", b"\0\0", "2 bytes of null bits, expected 1"),
    ],
)
def test_a_column_that_does_not_fit_is_refused(names: list[str], values: Any, dtype: str, null_bits: bytes, words: str) -> None:
    [(field, description)] = violations(add(batch_of(["x", "y"]), names, values, dtype, null_bits))
    assert field == "columns[0]"
    assert words in description
    assert "'stats'" in description


@pytest.mark.parametrize("number", [0, types_pb2.DATA_TYPE_BYTES, types_pb2.DATA_TYPE_UINT8, types_pb2.DATA_TYPE_BFLOAT16, 99])
def test_a_dtype_no_feature_can_have_is_refused(number: int) -> None:
    batch = add(batch_of(["x", "y"]), ["a"], [1, 2])
    batch.columns[0].dtype = number
    [(_, description)] = violations(batch)
    assert "is not the declared dtype" in description


def test_every_violation_is_reported_at_once() -> None:
    batch = batch_of(["x", "y"], sequences=[1], deleted=[True, False, True])
    batch.event_times_us.extend([1, 2])
    add(add(add(add(batch, ["zz"], [1, 2]), ["a"], [1, 2]), ["a"], [1, 2]), ["b"], [1])
    assert [field for field, _ in violations(batch)] == ["event_times_us", "sequences", "deleted", "columns[0]", "columns[2]", "columns[3]"]


def test_a_batch_without_event_times_is_refused() -> None:
    batch = batch_of(["x", "y"])
    batch.ClearField("event_times_us")
    assert violations(batch) == [("event_times_us", "0 event times for 2 rows: give one per row, or one for all")]


# --- with the store -----------------------------------------------------------------------------------------------------------------------


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
