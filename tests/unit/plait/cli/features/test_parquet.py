"""Parquet → batches → Parquet: every type comes back as it was, and what does not fit is said at once."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.feature_retrieval.test_batch_encoding import send, tables

from feature_retrieval.batch_decoding import put_ids
from feature_retrieval.batch_encoding import Encoder
from feature_retrieval.row_codec import RowCodec
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.cli.features.parquet import ParquetRows, ParquetWriter, Position
from plait.errors import InvalidArgument
from plait.registry.entity_ids import composites
from plait.registry.records import Entity, Feature, FeatureSchema, FeatureView, KeyPart

COMPOSITE = Entity(type="item", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="sku", type="int64")))
ENTITIES = [(Entity(type="item"), ["ä", "b", "c", "d"]), (Entity(type="item", key="int64"), [1, -2, 3, 4])]
ENTITIES += [(COMPOSITE, [("a", 1), ("", -5), ("b", 1), ("a", 2)])]  # type: ignore[list-item]
HEAD = st.tuples(st.integers(1, 2**60), st.integers(0, 2**64 - 1), st.booleans(), st.integers(0, 2**60))


def stored(view: FeatureView, batches: list[Any]) -> dict[Any, bytes]:
    """The rows of batches as the service would store them, by id."""
    codec = RowCodec(FeatureSchema(id=3, features=view.features))
    rows: dict[Any, bytes] = {}
    for batch in batches:
        ids = [*batch.ids.string_ids, *batch.ids.int64_ids, *composites(batch.ids)]
        encoded = Encoder(view, codec).encode(batch, ids)
        rows |= dict(zip(ids, codec.pack(encoded.block, encoded.tails), strict=True))
    return rows


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables(), st.sampled_from(ENTITIES), st.data())
def test_what_is_written_to_a_file_is_read_back_byte_for_byte(
    tmp_path: Path, made: tuple[FeatureView, list[list[Any]]], entity: Any, data: st.DataObject
) -> None:
    view, rows = made
    view = dataclasses.replace(view, entity=entity[0])
    heads = data.draw(st.lists(HEAD, min_size=len(rows), max_size=len(rows)))
    times, sequences, deleted, expires = zip(*heads, strict=True)
    batch = pb.FeatureBatch(feature_view="any", event_times_us=times, sequences=sequences, deleted=deleted, expires_at_us=expires)
    put_ids(batch.ids, entity[1][: len(rows)])
    for at, feature in enumerate(view.features):
        send(batch, feature, [row[at] for row in rows])
    file = tmp_path / "rows.parquet"
    with ParquetWriter(file, view) as writer:
        writer.append(batch)
    source = ParquetRows.open(file, view, {})
    assert source.rows == writer.rows == len(rows)
    assert source.ignored == []
    again = [made for _, made in source.batches(Position())]
    source.close()
    assert stored(view, again) == stored(view, [batch])


VIEW = FeatureView(
    name="stats",
    entity=Entity(type="item"),
    features=(
        Feature(name="price"),
        Feature(name="listed", dtype="timestamp"),
        Feature(name="colour", dtype="string", vocabulary=("red",)),
        Feature(name="sizes", dtype="int16", max_length=3),
        Feature(name="text", dtype="float16", width=2),
        Feature(name="sold", dtype="bool"),
    ),
)
AT = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
GOOD: dict[str, Any] = {
    "item_id": pa.array(["a", "b"]),
    "event_time": pa.array([AT, AT], pa.timestamp("ns", "UTC")),
    "price": pa.array([1.5, None], pa.float64()),
    "listed": pa.array([AT.replace(tzinfo=None), None], pa.timestamp("s")),
    "colour": pa.array(["red", None]).dictionary_encode(),
    "sizes": pa.array([[1, 2], None], pa.large_list(pa.int64())),
    "text": pa.array([None, [1.0, 2.0]], pa.list_(pa.float32())),
    "sold": pa.array([True, False]),
}


def file_of(tmp_path: Path, **columns: Any) -> Path:
    file = tmp_path / "in.parquet"
    pq.write_table(pa.table({name: column for name, column in (GOOD | columns).items() if column is not None}), file)
    return file


def only(batches: Any) -> Any:
    [(_, batch)] = batches
    return batch


def test_files_of_other_tools_are_read_as_they_come(tmp_path: Path) -> None:
    source = ParquetRows.open(file_of(tmp_path, more=pa.array([1, 2])), VIEW, {})
    assert source.ignored == ["more"]
    batch = only(source.batches(Position()))
    at_us = int(AT.timestamp() * 1e6)
    assert list(batch.ids.string_ids) == ["a", "b"]
    assert list(batch.event_times_us) == [at_us, at_us]
    found = {column.features[0]: column for column in batch.columns}
    assert np.frombuffer(found["price"].data, "<f4").tolist() == [1.5, 0]
    assert np.frombuffer(found["listed"].data, "<i8").tolist() == [at_us, 0]
    assert (found["colour"].data, np.frombuffer(found["colour"].offsets, "<u4").tolist()) == (b"red", [0, 3, 3])
    assert (np.frombuffer(found["sizes"].data, "<i2").tolist(), np.frombuffer(found["sizes"].offsets, "<u4").tolist()) == (
        [1, 2],
        [0, 4, 4],
    )
    assert np.frombuffer(found["text"].data, "<f2").tolist() == [0, 0, 1, 2]
    assert [found[name].null_bits for name in ("price", "listed", "colour", "sizes", "text", "sold")] == [
        b"\2",
        b"\2",
        b"\2",
        b"\2",
        b"\1",
        b"",
    ]


def misfits(tmp_path: Path, names: dict[str, str] | None = None, **columns: Any) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        ParquetRows.open(file_of(tmp_path, **columns), VIEW, names or {})
    assert caught.value.reason == "PARQUET_MISFIT"
    return {violation.field: violation.description for violation in caught.value.violations}


def test_everything_that_does_not_fit_is_said_at_once(tmp_path: Path) -> None:
    found = misfits(
        tmp_path,
        names={"nothing": "price"},
        item_id=pa.array([1, 2]),
        event_time=pa.array([1.0, 2.0]),
        price=pa.array(["1", "2"]),
        listed=None,
        colour=pa.array([1, 2]),
        sizes=pa.array([1, 2]),
        text=pa.array([[1.0] * 3] * 2, pa.list_(pa.float32(), 3)),
        sold=pa.array([0, 1]),
    )
    assert set(found) == {"--map nothing", "item_id", "event_time", "price", "listed", "colour", "sizes", "text", "sold"}
    assert "--map listed=COLUMN" in found["listed"]
    assert "2 values in each row, and the column has 3" in found["text"]


def test_columns_of_other_names_are_named(tmp_path: Path) -> None:
    file = file_of(tmp_path, item_id=None, price=None, event_time=None, who=GOOD["item_id"], cost=GOOD["price"], at=GOOD["event_time"])
    assert only(ParquetRows.open(file, VIEW, {"id": "who", "price": "cost", "event_time": "at"}).batches(Position())).columns
    assert "did you mean" in misfits(tmp_path, names={"price": "prise"})["prise"]


@pytest.mark.parametrize(
    ("columns", "column", "words"),
    [
        ({"item_id": pa.array(["a", None])}, "item_id", "a value is missing (row 1 "),
        ({"event_time": pa.array([None, AT], pa.timestamp("us"))}, "event_time", "a value is missing (row 0 "),
        ({"sizes": pa.array([[1], [1 << 40]], pa.list_(pa.int64()))}, "sizes", "a value does not fit int16"),
        ({"sizes": pa.array([[1], [None]], pa.list_(pa.int16()))}, "sizes", "a list holds a null (row 1 "),
        ({"text": pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32()))}, "text", "takes 2 values in each row (row 1 "),
    ],
)
def test_a_value_that_fits_no_cell_is_named_by_column_and_row(tmp_path: Path, columns: Any, column: str, words: str) -> None:
    source = ParquetRows.open(file_of(tmp_path, **columns), VIEW, {})
    with pytest.raises(InvalidArgument) as caught:
        list(source.batches(Position()))
    [violation] = caught.value.violations
    assert violation.field == column
    assert words in violation.description


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing of the sort"])
def test_what_is_no_parquet_file_is_said(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.parquet"
    with pytest.raises(InvalidArgument) as missing:
        ParquetRows.open(file, VIEW, {})
    file.write_bytes(content)
    with pytest.raises(InvalidArgument) as broken:
        ParquetRows.open(file, VIEW, {})
    assert missing.value.reason == broken.value.reason == "PARQUET_UNREADABLE"


SMALL = FeatureView(name="small", entity=Entity(type="item", key="int64"), features=(Feature(name="a"),))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(1, 25), st.integers(1, 9), st.integers(0, 60))
def test_reading_goes_on_from_any_position(tmp_path: Path, rows: int, group: int, batch_rows: int, killed_after: int) -> None:
    file = tmp_path / "small.parquet"
    pq.write_table(pa.table({"_id": range(rows), "_event_time": [10**15] * rows, "a": [0.0] * rows}), file, row_group_size=group)
    source = ParquetRows.open(file, SMALL, {})
    source.batch_rows = batch_rows
    seen: list[int] = []
    position = Position()
    for position, batch in source.batches(Position()):
        seen.extend(batch.ids.int64_ids)
        assert len(batch.ids.int64_ids) <= batch_rows
        assert source.rows_before(position) == len(seen)
        if len(seen) >= killed_after:
            break
    again = ParquetRows.open(file, SMALL, {})
    assert again.fingerprint() == source.fingerprint()
    for _, batch in again.batches(position):
        seen.extend(batch.ids.int64_ids)
    assert seen == list(range(rows))


def test_a_batch_that_no_message_holds_is_split(tmp_path: Path) -> None:
    view = FeatureView(name="wide", entity=Entity(type="item", key="int64"), features=(Feature(name="t", dtype="string", hash_buckets=9),))
    file = tmp_path / "wide.parquet"
    text = "x" * 1_000_000
    pq.write_table(pa.table({"_id": range(40), "_event_time": [10**15] * 40, "t": [text] * 40}), file)
    batches = list(ParquetRows.open(file, view, {}).batches(Position()))
    assert [i for _, batch in batches for i in batch.ids.int64_ids] == list(range(40))
    assert max(batch.ByteSize() for _, batch in batches) < 14 << 20
    assert batches[-1][0] == Position(0, 40)


def test_another_file_has_another_fingerprint(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    before = ParquetRows.open(file, VIEW, {}).fingerprint()
    pq.write_table(pa.table(GOOD | {"price": pa.array([2.5, None], pa.float64())}), file)
    assert ParquetRows.open(file, VIEW, {}).fingerprint() != before
