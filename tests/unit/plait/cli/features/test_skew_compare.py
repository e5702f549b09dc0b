"""The comparer finds the mismatches there are and no others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import served_row_pb2
from plait.api.types.v1 import types_pb2
from plait.cli.features.skew_compare import Offline, compare
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput, RequestFeature

VIEW = FeatureView(
    name="stats",
    entity=Entity(type="item"),
    version=2,
    features=(
        Feature(name="a", default=1.5),
        Feature(name="b"),
        Feature(name="word", dtype="string", vocabulary=("red", "green")),
        Feature(name="sizes", dtype="int16", max_length=2, pad=-1),
        Feature(name="text", dtype="int8", width=2, scale=0.5),
    ),
)
OTHER = FeatureView(name="other", entity=Entity(type="item"), features=(Feature(name="x"),))
VIEWS = {"stats": VIEW, "other": OTHER}
SET = FeatureSet(
    name="home",
    request=(RequestFeature(name="hour", default=1),),
    inputs=(
        ModelInput(name="item", entity="item", features=("stats:b", "$request:hour", "stats:sizes", "stats:word", "stats:a", "other:x")),
        ModelInput(name="text", entity="item", features=("stats:text",), dtype="float16"),
    ),
)
WORDS = {"red": 1, "green": 2, "blue": 0}
Row = tuple[float | None, float | None, str | None, list[int], tuple[int, int]]


def batch_of(rows: dict[tuple[str, int], Row], deleted: set[tuple[str, int]] = frozenset()) -> pb.FeatureBatch:  # type: ignore[assignment]
    batch = pb.FeatureBatch(feature_view="stats")
    batch.ids.string_ids.extend(entity_id for entity_id, _ in rows)
    batch.event_times_us.extend(at for _, at in rows)
    batch.deleted.extend(key in deleted for key in rows)
    values = list(rows.values())

    def bits(flags: list[bool]) -> bytes:
        return np.packbits(flags, bitorder="little").tobytes()

    two = [cell for row in values for cell in row[:2]]
    batch.columns.add(
        features=["a", "b"],
        dtype=types_pb2.DATA_TYPE_FLOAT32,
        data=np.array([cell or 0 for cell in two], "<f4").tobytes(),
        null_bits=bits([cell is None for cell in two]),
    )
    words = [(row[2] or "").encode() for row in values]
    batch.columns.add(
        features=["word"], dtype=types_pb2.DATA_TYPE_BYTES, data=b"".join(words), offsets=bounds([len(word) for word in words]),
        null_bits=bits([row[2] is None for row in values]),
    )  # fmt: skip
    lists = [np.array(row[3], "<i2").tobytes() for row in values]
    batch.columns.add(
        features=["sizes"], dtype=types_pb2.DATA_TYPE_INT16, data=b"".join(lists), offsets=bounds([len(piece) for piece in lists])
    )
    batch.columns.add(features=["text"], dtype=types_pb2.DATA_TYPE_INT8, data=np.array([row[4] for row in values], "i1").tobytes())
    return batch


def bounds(sizes: list[int]) -> bytes:
    return np.concatenate(([0], np.cumsum(sizes))).astype("<u4").tobytes()


def cells_of(row: Row) -> list[float]:
    """What the tensor "item" holds of a row."""
    a, b, word, sizes, _ = row
    return [
        math.nan if b is None else b, 9, *[*sizes, -1, -1][:2], 0 if word is None else WORDS[word], 1.5 if a is None else a, 77,
    ]  # fmt: skip


def served(entity_id: str, at_us: int, cells: list[float], text: tuple[float, float], *, status: Any = None, **more: Any) -> Any:
    row = served_row_pb2.ServedRow(**{"feature_set": "home", "served_at_us": 1000, "entity_type": "item", **more})
    row.id.string_ids.append(entity_id)
    item, half = np.array([cells], "<f4"), np.array([text], "<f2")
    row.tensors.add(name="item", dtype=types_pb2.DATA_TYPE_FLOAT32, shape=item.shape, data=item.tobytes())
    row.tensors.add(name="text", dtype=types_pb2.DATA_TYPE_FLOAT16, shape=half.shape, data=half.tobytes())
    row.views.add(feature_view="stats", view_version=2, status=status or types_pb2.ROW_STATUS_PRESENT, event_time_us=at_us)
    return row


def offline_of(*batches: pb.FeatureBatch) -> Offline:
    made = Offline(VIEW)
    for batch in batches:
        made.add(batch)
    made.finish()
    return made


_NUMBER = st.none() | st.integers(-5, 5)
_ROWS = st.dictionaries(
    st.tuples(st.sampled_from("abcde"), st.integers(1, 999)),
    st.tuples(
        _NUMBER, _NUMBER, st.sampled_from([None, *WORDS]), st.lists(st.integers(-3, 3), max_size=2),
        st.tuples(st.integers(-128, 127), st.integers(-128, 127)),
    ),
    min_size=1,
)  # fmt: skip
_COLUMNS = {"stats:b": [0], "stats:sizes": [2, 3], "stats:word": [4], "stats:a": [5]}


@settings(max_examples=100, deadline=None)
@given(rows=_ROWS, data=st.data())
def test_exactly_the_injected_mismatches_are_found(rows: dict[tuple[str, int], Row], data: st.DataObject) -> None:
    expected = dict.fromkeys((*_COLUMNS, "stats:text"), 0)
    log = []
    for (entity_id, at_us), row in rows.items():
        cells, text = cells_of(row), [row[4][0] / 2, row[4][1] / 2]
        for reference, columns in _COLUMNS.items():
            for column in data.draw(st.sets(st.sampled_from(columns))):
                cells[column] = 1000 if math.isnan(cells[column]) else cells[column] + 1000
                expected[reference] += 1
        if data.draw(st.booleans()):
            text[1] += 0.5
            expected["stats:text"] += 1
        log.append(served(entity_id, at_us, cells, (text[0], text[1])))
    keys = list(rows)
    cut = data.draw(st.integers(0, len(keys)))
    parts = [{key: rows[key] for key in part} for part in (keys[:cut], keys[cut:]) if part]
    found = compare(log, SET, VIEWS, [offline_of(*map(batch_of, parts))], 0)
    assert {name: skew.mismatched for name, skew in found.features.items()} == expected
    assert found.features["stats:sizes"].compared == 2 * len(rows)
    assert found.views["stats"].matched == found.rows == len(rows)
    assert found.left_out == ("$request:hour", "other:x")


ROW: Row = (1, 2, "red", [3], (2, 4))
GOOD = cells_of(ROW)


@pytest.mark.parametrize(
    ("at_us", "status", "matched", "unmatched", "behind", "absent"),
    [
        (20, types_pb2.ROW_STATUS_PRESENT, 1, 0, 0, 0),
        (10, types_pb2.ROW_STATUS_STALE, 1, 0, 1, 0),  # a newer one was there
        (15, types_pb2.ROW_STATUS_PRESENT, 0, 1, 1, 0),
        (30, types_pb2.ROW_STATUS_PRESENT, 0, 1, 0, 0),  # deleted then
        (0, types_pb2.ROW_STATUS_NOT_FOUND, 0, 0, 0, 1),
        (0, types_pb2.ROW_STATUS_TIMED_OUT, 0, 0, 0, 0),
    ],
)
def test_times_that_differ_are_told_apart_from_values(
    at_us: int, status: int, matched: int, unmatched: int, behind: int, absent: int
) -> None:
    rows = {("a", 10): ROW, ("a", 20): ROW, ("a", 2000): ROW, ("b", 30): ROW}
    entity = "b" if at_us == 30 else "a"
    found = compare([served(entity, at_us, GOOD, (1, 2), status=status)], SET, VIEWS, [offline_of(batch_of(rows, {("b", 30)}))], 0).views[
        "stats"
    ]
    assert (found.matched, found.unmatched, found.behind, found.absent) == (matched, unmatched, behind, absent)


def test_what_offline_deleted_is_not_missed() -> None:
    rows = {("a", 10): ROW, ("a", 20): ROW}
    log = [served("a", 0, GOOD, (1, 2), status=types_pb2.ROW_STATUS_DEFAULTED)]
    assert compare(log, SET, VIEWS, [offline_of(batch_of(rows, {("a", 20)}))], 0).views["stats"].absent == 0


@pytest.mark.parametrize(("tolerance", "mismatched"), [(0, 1), (0.24, 1), (0.25, 0)])
def test_within_the_tolerance_cells_are_the_same(tolerance: float, mismatched: int) -> None:
    cells = [*GOOD]
    cells[0] += 0.25
    found = compare([served("a", 10, cells, (1, 2))], SET, VIEWS, [offline_of(batch_of({("a", 10): ROW}))], tolerance)
    assert found.features["stats:b"].mismatched == mismatched
    assert found.features["stats:b"].largest == (0.25 if mismatched else 0)
    assert found.features["stats:b"].rate == mismatched


def test_rows_of_another_shape_version_or_set_are_not_compared() -> None:
    older = served("a", 10, GOOD, (1, 2))
    older.views[0].view_version = 1
    short = served("a", 10, GOOD[:-1], (1, 2))
    other = served("a", 10, GOOD, (1, 2), feature_set="away")
    found = compare([older, short, other], SET, VIEWS, [offline_of(batch_of({("a", 10): ROW}))], 0)
    assert (found.rows, found.misfits, found.views) == (2, 2, {})


def test_a_number_beyond_its_tensor_is_expected_to_be_a_default_as_it_is_served() -> None:
    price = Feature(name="price", dtype="float64", default=-1)
    made = Offline(FeatureView(name="large", entity=Entity(type="item"), features=(price,)))
    batch = pb.FeatureBatch(feature_view="large", event_times_us=[1, 2, 3], ids={"string_ids": ["a", "b", "c"]})
    batch.columns.add(features=["price"], dtype=types_pb2.DATA_TYPE_FLOAT64, data=np.array([1e39, 2.5, math.inf], "<f8").tobytes())
    made.add(batch)
    made.finish()
    places = np.arange(3, dtype=np.intp)
    assert made.expected(price, places, np.dtype(np.float32)).tolist() == [[-1], [2.5], [math.inf]]
    assert made.expected(price, places, np.dtype(np.float64)).tolist() == [[1e39], [2.5], [math.inf]]
