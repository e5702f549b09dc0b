"""Cells that protobuf itself serialized, of every type; and bytes that are anything else."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from feature_retrieval.feast.values import Unreadable, decode, fill, time_us
from plait.api.feast.types import value_pb2 as feast
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.dtypes import BY_NAME
from plait.registry.records import Feature

KINDS = {
    "bool": ("bool_val", st.booleans()),
    "int32": ("int32_val", st.integers(-(2**31), 2**31 - 1)),
    "int64": ("int64_val", st.integers(-(2**63), 2**63 - 1)),
    "float32": ("float_val", st.floats(width=32, allow_nan=False)),
    "float64": ("double_val", st.floats(allow_nan=False)),
    "timestamp": ("unix_timestamp_val", st.integers(-(2**40), 2**40)),
}
LISTS = {name: (kind.replace("_val", "_list_val"), values) for name, (kind, values) in KINDS.items() if name != "timestamp"}


def cell(kind: str, value: Any) -> bytes | None:
    """A cell with this value; None gives one of the three ways in which Feast says nothing."""
    if value is None:
        return None
    if kind.endswith("_list_val"):
        made = feast.Value()
        getattr(made, kind).SetInParent()
        getattr(made, kind).val.extend(value)
        return made.SerializeToString()
    return feast.Value(**{kind: value}).SerializeToString()


NOTHING = st.sampled_from([None, b"", feast.Value(null_val=feast.NULL).SerializeToString()])


def numbers(data: bytes, name: str) -> list[Any]:
    return np.frombuffer(data, BY_NAME["int64" if name == "timestamp" else name].numpy).tolist()


@pytest.mark.parametrize("name", list(KINDS))
@given(data=st.data())
def test_single_numbers(name: str, data: st.DataObject) -> None:
    kind, values = KINDS[name]
    wanted = data.draw(st.lists(st.none() | values, max_size=12))
    cells = [data.draw(NOTHING) if value is None else cell(kind, value) for value in wanted]
    found = decode(Feature(name="f", dtype=name), cells)  # type: ignore[arg-type]
    assert found.nulls.tolist() == [value is None for value in wanted]
    assert not found.bad.any()
    factor = 1_000_000 if name == "timestamp" else 1
    assert numbers(found.data, name) == [0 if value is None else value * factor if factor > 1 else value for value in wanted]


@given(st.lists(st.none() | st.text(max_size=6), max_size=8))
def test_texts(wanted: list[str | None]) -> None:
    found = decode(Feature(name="f", dtype="string", hash_buckets=8), [cell("string_val", value) for value in wanted])
    assert found.offsets is not None
    bounds = found.offsets.tolist()
    assert [found.data[a:b].decode() for a, b in itertools.pairwise(bounds)] == [value or "" for value in wanted]
    assert found.nulls.tolist() == [value is None for value in wanted]
    assert not found.bad.any()


@pytest.mark.parametrize("name", list(LISTS))
@given(data=st.data())
def test_lists(name: str, data: st.DataObject) -> None:
    kind, values = LISTS[name]
    wanted = data.draw(st.lists(st.none() | st.lists(values, max_size=7), max_size=8))
    found = decode(Feature(name="f", dtype=name, max_length=5), [cell(kind, value) for value in wanted])  # type: ignore[arg-type]
    assert found.offsets is not None
    bounds = found.offsets.tolist()
    told = [numbers(found.data[a:b], name) for a, b in itertools.pairwise(bounds)]
    long = [value is not None and len(value) > 5 for value in wanted]
    assert told == [[] if value is None or too else value for value, too in zip(wanted, long, strict=True)]
    assert (found.nulls.tolist(), found.bad.tolist()) == ([value is None for value in wanted], long)


def test_vectors_have_their_width() -> None:
    cells = [cell("float_list_val", [1, 2]), None, cell("float_list_val", [3]), cell("float_list_val", []), cell("float_list_val", [4, 5])]
    found = decode(Feature(name="f", width=2), cells)
    assert numbers(found.data, "float32") == [1, 2, 0, 0, 0, 0, 0, 0, 4, 5]
    assert found.nulls.tolist() == [False, True, False, False, False]
    assert found.bad.tolist() == [False, False, True, True, False]


FEATURES = [
    *(Feature(name="f", dtype=name) for name in KINDS),  # type: ignore[arg-type]
    Feature(name="f", dtype="string", hash_buckets=8),
    *(Feature(name="f", dtype=name, max_length=3) for name in LISTS),  # type: ignore[arg-type]
    Feature(name="f", width=2),
]
EVERY = [cell(kind, value) for kind, value in {
    "bool_val": True, "int32_val": 3, "int64_val": 4, "float_val": 1.5, "double_val": 2.5, "unix_timestamp_val": 9, "string_val": "abcd",
    "bool_list_val": [True], "int32_list_val": [3, 4], "int64_list_val": [3], "float_list_val": [1.5, 2], "double_list_val": [2.5],
    "string_list_val": ["a"], "bytes_val": b"1234",
}.items()]  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES, ids=repr)
def test_a_cell_of_another_type_is_not_guessed_at(feature: Feature) -> None:
    good = [at for at, one in enumerate(EVERY) if not decode(feature, [one]).bad[0]]
    assert len(good) == 1
    found = decode(feature, EVERY)
    assert np.flatnonzero(~found.bad).tolist() == good


@pytest.mark.parametrize("feature", FEATURES, ids=repr)
@given(st.lists(st.binary(max_size=14) | st.sampled_from(EVERY), max_size=5))
def test_any_bytes_are_read_or_refused_and_harm_no_other_row(feature: Feature, cells: list[bytes]) -> None:
    found = decode(feature, cells)
    for at, one in enumerate(cells):
        alone = decode(feature, [one])
        assert (found.nulls[at], found.bad[at]) == (alone.nulls[0], alone.bad[0])
    column = pb.FeatureColumn()
    fill(column, feature, found)
    assert column.features == ["f"]


@given(st.datetimes().map(lambda moment: moment.replace(tzinfo=None)))
def test_times(moment: Any) -> None:
    made = Timestamp()
    made.FromDatetime(moment)
    assert time_us(made.SerializeToString()) == made.ToMicroseconds()


def test_no_time_and_no_sense() -> None:
    assert time_us(None) is None
    for wrong in (b"\x08", b"\x18\x01", b"\xff" * 20):
        with pytest.raises(Unreadable):
            time_us(wrong)
