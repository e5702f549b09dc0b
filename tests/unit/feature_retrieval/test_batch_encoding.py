"""From a columnar batch to packed rows and back: everything that is wrong is said, equal rows have equal bytes, and all comes back as it went in."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.feature_world import make_batch

from feature_retrieval.batch_encoding import MAX_ROW_BYTES, Encoded, Encoder
from feature_retrieval.row_codec import FLAG_BACKFILL, RowCodec, header
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.dtypes import BY_NAME
from plait.errors import InvalidArgument
from plait.registry.records import Entity, Feature, FeatureSchema, FeatureView
from plait.registry.shapes import code_of, wire_type

NOW_S = 1_700_000_000.0
VIEW = FeatureView(
    name="stats",
    entity=Entity(type="item"),
    features=(Feature(name="a"), Feature(name="b"), Feature(name="n", dtype="int64"), Feature(name="flag", dtype="bool")),
)
CODEC = RowCodec(FeatureSchema(id=1, features=VIEW.features))
DTYPES = ("bool", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


def encode(batch: Any, codec: RowCodec, ids: Sequence[Any], view: FeatureView) -> Any:
    encoded = Encoder(view, codec).encode(batch, ids)
    assert encoded.tails is None
    assert not encoded.refused
    return encoded.block


def batch_of(ids: list[str], **more: Any) -> Any:
    return make_batch("stats", ids, {}, at_s=NOW_S, **more)


def add(batch: Any, names: list[str], values: Any, dtype: str = "float32", null_bits: bytes = b"") -> Any:
    known = BY_NAME[dtype]
    batch.columns.add(features=names, dtype=known.number, data=np.asarray(values, known.numpy).tobytes(), null_bits=null_bits)
    return batch


def column(block: Any, name: str) -> list[Any]:
    place = CODEC.columns[name]
    values: list[Any] = block[:, place.offset : place.end].copy().view(place.dtype)[:, 0].tolist()
    return values


def violations(batch: Any, ids: int = 2) -> list[tuple[str, str]]:
    with pytest.raises(InvalidArgument) as caught:
        encode(batch, CODEC, [f"i{n}" for n in range(ids)], VIEW)
    return [(v.field, v.description) for v in caught.value.violations]


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


# --- every type ---------------------------------------------------------------------------------------------------------------------------

TEXTS = st.text("aü漢\0|", max_size=5)
LIMITS = {"int8": 7, "int16": 15, "int32": 31, "int64": 63, "timestamp": 63}


def numbers(dtype: str) -> st.SearchStrategy[Any]:
    if dtype == "bool":
        return st.booleans()
    if dtype in LIMITS:
        return st.integers(-(1 << LIMITS[dtype]), (1 << LIMITS[dtype]) - 1)
    return st.floats(width=int(dtype.removeprefix("float")), allow_nan=False)  # type: ignore[arg-type]


@st.composite
def features(draw: st.DrawFn) -> tuple[Feature, st.SearchStrategy[Any]]:
    """A feature of any type (its name still to be given), and what its values may be."""
    kind = draw(st.sampled_from(["number", "embedding", "list", "words", "hashed"]))
    if kind == "words":
        words = draw(st.lists(TEXTS, min_size=1, max_size=4, unique=True))
        return Feature(name="", dtype="string", vocabulary=tuple(words)), TEXTS | st.sampled_from(words)
    if kind == "hashed":
        return Feature(name="", dtype="string", hash_buckets=draw(st.integers(1, 2**31 - 1))), TEXTS
    if kind == "embedding":
        dtype, width = draw(st.sampled_from(["float16", "float32", "int8"])), draw(st.integers(1, 9))
        return Feature(name="", dtype=dtype, width=width), st.lists(numbers(dtype), min_size=width, max_size=width)
    dtype = draw(st.sampled_from([*DTYPES, "timestamp"]))
    if kind == "list":
        longest = draw(st.integers(1, 5))
        return Feature(name="", dtype=dtype, max_length=longest, pad=draw(st.integers(0, 1))), st.lists(numbers(dtype), max_size=longest)
    return Feature(name="", dtype=dtype), numbers(dtype)


@st.composite
def tables(draw: st.DrawFn) -> tuple[FeatureView, list[list[Any]]]:
    """A view and rows of values, None where one is null."""
    made = draw(st.lists(features(), min_size=1, max_size=8))
    named = tuple(Feature(**{**_fields(f), "name": f"f{n}"}) for n, (f, _) in enumerate(made))
    rows = draw(st.lists(st.tuples(*(st.none() | values for _, values in made)).map(list), min_size=1, max_size=4))
    return FeatureView(name="any", entity=Entity(type="item"), features=named), rows


def _fields(feature: Feature) -> dict[str, Any]:
    return {name: getattr(feature, name) for name in ("dtype", "width", "vocabulary", "hash_buckets", "max_length", "pad")}


def send(batch: Any, feature: Feature, values: list[Any], rubbish: bytes = b"") -> None:
    """Add one feature's column; `rubbish` is what lies under a null that has a length of its own."""
    dtype = wire_type(feature)
    pieces = []
    for value in values:
        if feature.dtype == "string":
            pieces.append(rubbish if value is None else value.encode())
        elif feature.max_length:
            pieces.append(np.array([] if value is None else value, dtype.numpy).tobytes())
        else:
            pieces.append(np.array([0] * (feature.width or 1) if value is None else value, dtype.numpy).tobytes())
    offsets = b""
    if feature.dtype == "string" or feature.max_length:
        offsets = np.cumsum([0, *map(len, pieces)]).astype("<u4").tobytes()
    bits = np.packbits([value is None for value in values], bitorder="little").tobytes()
    batch.columns.add(features=[feature.name], dtype=dtype.number, data=b"".join(pieces), offsets=offsets, null_bits=bits)


def encode_rows(view: FeatureView, rows: list[list[Any]], rubbish: bytes = b"") -> tuple[RowCodec, Encoded]:
    codec = RowCodec(FeatureSchema(id=3, features=view.features))
    batch = pb.FeatureBatch(feature_view="any", event_times_us=[7])
    for at, feature in enumerate(view.features):
        send(batch, feature, [row[at] for row in rows], rubbish)
    return codec, Encoder(view, codec).encode(batch, [f"i{n}" for n in range(len(rows))])


def expected(feature: Feature, value: Any) -> list[Any]:
    """The columns of one cell that is not null, as plain Python says them."""
    if feature.dtype == "string":
        return [code_of(feature, value.encode())]
    if feature.max_length:
        return [*value, *[feature.pad] * (feature.max_length - len(value))]
    return value if feature.width else [value]


@settings(max_examples=150, deadline=None)
@given(tables())
def test_every_type_comes_back_as_it_went_in(made: tuple[FeatureView, list[list[Any]]]) -> None:
    view, rows = made
    codec, encoded = encode_rows(view, rows)
    assert not encoded.refused
    stored = codec.pack(encoded.block, encoded.tails)
    assert all(codec.is_current(row) and len(row) <= MAX_ROW_BYTES for row in stored)
    wide = codec.widen(stored)
    assert wide is not None
    assert wide.shape == (len(rows), codec.row_bytes)
    nulls = codec.nulls(wide)
    for at, feature in enumerate(view.features):
        place = codec.columns[feature.name]
        found = wide[:, place.offset : place.end].copy().view(place.dtype)
        for row, values in enumerate(rows):
            assert nulls[row, place.index] == (values[at] is None)
            if values[at] is None:
                assert not wide[row, place.offset : place.end].any()
                continue
            wanted = np.array(expected(feature, values[at]), place.dtype)
            assert found[row].tobytes() == wanted.tobytes()
            if feature.max_length:
                assert codec.counts(wide, feature.name)[row] == len(values[at])
    for row, values in zip(stored, rows, strict=True):
        words = {f.name: v.encode() for f, v in zip(view.features, values, strict=True) if f.dtype == "string" and v is not None}
        assert codec.texts(row) == words


@settings(max_examples=80, deadline=None)
@given(tables(), st.randoms())
def test_equal_rows_have_equal_bytes_in_any_order(made: tuple[FeatureView, list[list[Any]]], random: Any) -> None:
    view, rows = made
    codec, encoded = encode_rows(view, rows)
    stored = codec.pack(encoded.block, encoded.tails)
    order = list(range(len(rows)))
    random.shuffle(order)
    _, again = encode_rows(view, [rows[at] for at in order], rubbish=b"under a null")
    assert codec.pack(again.block, again.tails) == [stored[at] for at in order]


def test_golden_bytes_of_text_lists_and_embeddings() -> None:
    view = FeatureView(
        name="any",
        entity=Entity(type="item"),
        features=(
            Feature(name="colour", dtype="string", vocabulary=("red", "ü")),
            Feature(name="sizes", dtype="int16", max_length=3, pad=-1),
            Feature(name="brand", dtype="string", hash_buckets=1000),
            Feature(name="at", dtype="timestamp"),
        ),
    )
    codec, encoded = encode_rows(view, [["ü", [7], "acme", 5], [None, None, "", None]])
    one, other = codec.pack(encoded.block, encoded.tails)
    head = "0200 0300 00000000 0700000000000000 0000000000000000 0000000000000000"
    acme = struct.pack("<i", code_of(view.features[2], b"acme")).hex()
    empty = struct.pack("<i", code_of(view.features[2], b"")).hex()
    fixed = f"{head} 0000000000000000 02000000 0100 0700ffffffff {acme} 0500000000000000"
    assert one == bytes.fromhex(f"{fixed} 02000000 c3bc 04000000 61636d65")
    assert other == bytes.fromhex(f"{head} 0b00000000000000 00000000 0000 000000000000 {empty} 0000000000000000 00000000 00000000")
    assert codec.texts(one) == {"colour": "ü".encode(), "brand": b"acme"}
    assert codec.texts(other) == {"brand": b""}


def test_a_row_that_is_cut_off_is_none_of_ours() -> None:
    view = FeatureView(name="any", entity=Entity(type="item"), features=(Feature(name="c", dtype="string", vocabulary=("red",)),))
    codec, encoded = encode_rows(view, [["red"]])
    [row] = codec.pack(encoded.block, encoded.tails)
    for cut in range(len(row)):
        whole = cut >= codec.row_bytes + 4
        assert codec.is_current(row[:cut]) == whole
        assert (codec.widen([row, row[:cut]]) is not None) == whole
        with pytest.raises(ValueError, match="cut off"):
            codec.texts(row[:cut])
    assert codec.widen([]) is not None
    other = RowCodec(FeatureSchema(id=4, features=view.features))
    assert other.widen([row]) is None
    assert not other.is_current(row)


def test_what_is_wrong_with_one_row_costs_only_that_row() -> None:
    view = FeatureView(
        name="any",
        entity=Entity(type="item"),
        features=(Feature(name="c", dtype="string", hash_buckets=5), Feature(name="l", dtype="int8", max_length=2)),
    )
    codec, encoded = encode_rows(view, [["ok", [1, 2]], ["x" * MAX_ROW_BYTES, [1]], ["ok", [1, 2, 3]], [None, None]])
    assert {row: reason for row, (reason, _) in encoded.refused.items()} == {1: "VALUE_INVALID", 2: "VALUE_INVALID"}
    assert "65536 bytes" in encoded.refused[1][1]
    assert "max_length, 2" in encoded.refused[2][1]
    assert codec.counts(encoded.block, "l").tolist() == [2, 1, 2, 0]


@pytest.mark.parametrize(
    ("pieces", "bad"),
    [
        ([b"\xff", b"ok"], [0]),
        (["ü".encode()[:1], "ü".encode()[1:]], [0, 1]),  # valid together, neither alone
        (["ü".encode(), b"", "漢".encode()], []),
        ([b"\xff", None], [0]),
        ([None, b"ok"], []),
    ],
)
def test_text_is_utf8(pieces: list[bytes | None], bad: list[int]) -> None:
    view = FeatureView(name="any", entity=Entity(type="item"), features=(Feature(name="c", dtype="string", hash_buckets=5),))
    codec = RowCodec(FeatureSchema(id=1, features=view.features))
    given_bytes = [b"\xfe" if piece is None else piece for piece in pieces]
    batch = pb.FeatureBatch(feature_view="any", event_times_us=[7])
    batch.columns.add(
        features=["c"],
        dtype=types_pb2.DATA_TYPE_BYTES,
        data=b"".join(given_bytes),
        offsets=np.cumsum([0, *map(len, given_bytes)]).astype("<u4").tobytes(),
        null_bits=np.packbits([piece is None for piece in pieces], bitorder="little").tobytes(),
    )
    refused = Encoder(view, codec).encode(batch, ["i"] * len(pieces)).refused
    assert sorted(refused) == bad
    assert all(found == ("VALUE_INVALID", "a text is not valid UTF-8") for found in refused.values())


MIXED = FeatureView(
    name="mixed",
    entity=Entity(type="item"),
    features=(
        Feature(name="word", dtype="string", hash_buckets=5),
        Feature(name="list", dtype="int16", max_length=2),
        Feature(name="one", dtype="int16"),
        Feature(name="four", dtype="float32", width=4),
        Feature(name="two", dtype="float32", width=2),
        Feature(name="flags", dtype="bool", max_length=2),
    ),
)


@pytest.mark.parametrize(
    ("names", "dtype", "data", "offsets", "words"),
    [
        (["word"], "bytes", b"ab", [0, 1], "8 bytes of offsets, expected 2 values + 1, 4 bytes each = 12"),
        (["word"], "bytes", b"ab", [1, 1, 2], "ascend from 0 to the 2 bytes"),
        (["word"], "bytes", b"ab", [0, 2, 1], "ascend from 0 to the 2 bytes"),
        (["word"], "bytes", b"ab", [0, 1, 1], "ascend from 0 to the 2 bytes"),
        (["word"], "int32", b"ab", [0, 1, 2], "dtype int32 is not the declared dtype of ['word'] (string)"),
        (["list"], "int16", b"abc", [0, 1, 3], "must be multiples of 2"),
        (["list", "one"], "int16", b"", [], "['list', 'one'] are not of one shape"),
        (["four", "two"], "float32", b"", [], "are not of one shape"),
        (["four"], "float32", b"", [], "0 bytes of data, expected 2 rows x 1 features x 16 bytes = 32"),
        (["flags"], "bool", b"\1\2", [0, 1, 2], "a bool is the byte 0 or 1"),
    ],
)
def test_a_column_of_another_shape_is_refused(names: list[str], dtype: str, data: bytes, offsets: list[int], words: str) -> None:
    batch = pb.FeatureBatch(feature_view="mixed", event_times_us=[7])
    packed = np.array(offsets, "<u4").tobytes()
    batch.columns.add(features=names, dtype=BY_NAME[dtype].number, data=data, offsets=packed)
    with pytest.raises(InvalidArgument) as caught:
        Encoder(MIXED, RowCodec(FeatureSchema(id=1, features=MIXED.features))).encode(batch, ["x", "y"])
    [violation] = caught.value.violations
    assert violation.field == "columns[0]"
    assert words in violation.description


def test_a_bool_is_zero_or_one() -> None:
    batch = batch_of(["x", "y"])
    batch.columns.add(features=["flag"], dtype=types_pb2.DATA_TYPE_BOOL, data=b"\1\2")
    assert [field for field, words in violations(batch) if "a bool is the byte 0 or 1" in words] == ["columns[0]"]


def test_expiry_and_backfill_are_in_the_header() -> None:
    batch = batch_of(["x", "y"], deleted=[True, False], expires_at_us=[9, 0], backfill=True)
    head = header(encode(batch, CODEC, ["x", "y"], VIEW))
    assert head["expires_us"].tolist() == [9, 0]
    assert head["flags"].tolist() == [1 | FLAG_BACKFILL, FLAG_BACKFILL]
    batch = batch_of(["x", "y"], expires_at_us=[9])
    assert header(encode(batch, CODEC, ["x", "y"], VIEW))["expires_us"].tolist() == [9, 9]
    assert violations(batch_of(["x", "y"], expires_at_us=[1, 2, 3])) == [
        ("expires_at_us", "3 expires at for 2 rows: give one per row, one for all, or none")
    ]


def test_nan_in_an_embedding_is_a_value_like_any_other() -> None:
    view = FeatureView(name="any", entity=Entity(type="item"), features=(Feature(name="e", dtype="float16", width=2),))
    codec, encoded = encode_rows(view, [[[math.nan, 1.0]]])
    assert not codec.nulls(encoded.block).any()
    assert codec.row_bytes == 40 + 4


def test_an_expiry_before_the_epoch_is_refused() -> None:
    assert [field for field, _ in violations(batch_of(["x", "y"], expires_at_us=[1, -1]))] == ["expires_at_us"]


SIZES = st.integers(0, 40)
OFFSETS = st.lists(st.integers(0, 20) | st.sampled_from([2**31, 2**32 - 1]), max_size=8).map(lambda o: np.array(o, "<u4").tobytes())
COLUMNS = st.fixed_dictionaries(
    {
        "features": st.lists(st.sampled_from([*(f.name for f in MIXED.features), "nope"]), max_size=3),
        "dtype": st.sampled_from(
            [types_pb2.DATA_TYPE_BYTES, types_pb2.DATA_TYPE_INT16, types_pb2.DATA_TYPE_FLOAT32, types_pb2.DATA_TYPE_BOOL, 0, 99]
        ),
        "data": st.binary(max_size=64) | SIZES.map(bytes),
        "offsets": OFFSETS
        | st.binary(max_size=12)
        | st.lists(SIZES, min_size=3, max_size=3).map(lambda o: np.array([0, *sorted(o)[1:]], "<u4").tobytes()),
        "null_bits": st.binary(max_size=2),
    }
)


@settings(max_examples=400, deadline=None)
@given(st.lists(COLUMNS, max_size=3), st.integers(1, 3), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3))
def test_nonsense_is_refused_or_encoded_and_never_more(columns: list[dict[str, Any]], rows: int, times: list[int]) -> None:
    codec = RowCodec(FeatureSchema(id=1, features=MIXED.features))
    batch = pb.FeatureBatch(feature_view="mixed", event_times_us=times, expires_at_us=times[:1])
    for column in columns:
        batch.columns.add(**column)
    try:
        encoded = Encoder(MIXED, codec).encode(batch, [f"i{n}" for n in range(rows)])
    except InvalidArgument:
        return
    stored = codec.pack(encoded.block, encoded.tails)
    assert all(codec.is_current(row) for row in stored)
    for at, row in enumerate(stored):
        if at not in encoded.refused:
            assert all(text.decode() is not None for text in codec.texts(row).values())
