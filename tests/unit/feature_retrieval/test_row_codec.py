"""The bytes in the store: keys that never collide, rows that come back as they went in."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from feature_retrieval.row_codec import (
    HEADER_BYTES,
    LAYOUT,
    Id,
    KeySpace,
    RowCodec,
    decode_id,
    encode_id,
    entity_prefix,
    header,
    join,
    split,
)
from plait.dtypes import BY_NAME
from plait.errors import InvalidArgument
from plait.registry.records import Feature, FeatureSchema

DTYPES = ("bool", "int8", "int16", "int32", "int64", "float16", "float32", "float64")

# Few letters, so that collisions would be found: the separators of other schemes, our own type letters, NUL and lengths as bytes.
TEXTS = st.text("a1|:{}s\0\x01ü漢", max_size=6)
NAMES = st.text("ab:}\0", min_size=0, max_size=3)
INTS = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-2, 130)
IDS: st.SearchStrategy[Id] = st.one_of(TEXTS, INTS, st.lists(TEXTS | INTS, min_size=1, max_size=8).map(tuple))
SPACES = st.tuples(NAMES, NAMES, NAMES, st.integers(0, 65535), st.integers(0, 3))


def key_of(space: tuple[str, str, str, int, int], entity_id: Id) -> bytes:
    [key] = KeySpace.of(*space).keys([entity_id])
    return key


@settings(max_examples=100, deadline=None)
@given(st.tuples(SPACES, IDS), st.tuples(SPACES, IDS))
@example((("t", "u", "v", 1, 0), "1"), (("t", "u", "v", 1, 0), 1))
@example((("t", "u", "v", 1, 0), "1"), (("t", "u", "v", 1, 0), ("1",)))
@example((("t", "u", "v", 1, 0), ("a|b", "c")), (("t", "u", "v", 1, 0), ("a", "b|c")))
@example((("t", "uv", "v", 1, 0), "a"), (("tu", "v", "v", 1, 0), "a"))
@example((("t", "u", "v", 1, 2), "a"), (("t", "u", "v", 2, 1), "a"))
@example((("t", "u", "v", 1, 0), "a}"), (("t", "u", "}v", 1, 0), "a"))
def test_different_entities_never_share_a_key(one: tuple[Any, Id], other: tuple[Any, Id]) -> None:
    assert (key_of(*one) == key_of(*other)) == (one == other)


@settings(max_examples=100, deadline=None)
@given(st.lists(IDS, unique=True, max_size=8), st.binary(max_size=12))
def test_typed_ids_are_prefix_free_and_decode(ids: list[Id], rest: bytes) -> None:
    encoded = [encode_id(i) for i in ids]
    for entity_id, data in zip(ids, encoded, strict=True):
        assert decode_id(data + rest) == (entity_id, len(data))
        assert not any(other.startswith(data) for other in encoded if other != data)


@settings(max_examples=100, deadline=None)
@given(SPACES, SPACES, IDS)
def test_a_space_knows_its_own_keys_only(space: Any, other: Any, entity_id: Id) -> None:
    key = key_of(space, entity_id)
    assert KeySpace.of(*space).id_of(key) == entity_id
    assert KeySpace.of(*other).id_of(key) == (entity_id if other == space else None)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=20) | st.builds(lambda i, cut: encode_id(i)[:cut], IDS, st.integers(0, 20)))
@example(b"")
@example(b"s\0\x02\xff\xfe")
@example(b"i123")
@example(b"c\x01c\x01i12345678")
@example(b"c\0")
def test_keys_that_somebody_else_wrote_are_nobodys(middle: bytes) -> None:
    space = KeySpace.of("t", "item", "v", 1)
    found = space.id_of(space.prefix + middle + space.suffix)
    assert found is None or encode_id(found) == middle
    assert space.id_of(middle) is None
    with contextlib.suppress(ValueError):
        decode_id(middle)


def test_all_views_of_an_entity_share_a_hash_slot() -> None:
    def tag(key: bytes) -> bytes:  # what Redis Cluster hashes: https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
        start = key.index(b"{") + 1
        return key[start : key.index(b"}", start)]

    for entity_id in ("plain", "a{b}c", "}", 125, ("}", 1)):
        tags = {tag(key_of(("shop", "item", view, version, epoch), entity_id)) for view in "ab" for version in (1, 2) for epoch in (0, 1)}
        assert len(tags) == 1
        assert tags != {b""}  # an empty tag would hash the whole key


@settings(max_examples=100, deadline=None)
@given(st.tuples(SPACES, IDS, st.integers(-(1 << 63), (1 << 63) - 1)), st.tuples(SPACES, IDS, st.integers(-3, 3)))
@example((("t", "u", "v", 1, 0), "a", 1), (("t", "u", "v", 1, 1), "a", 1))
@example((("t", "u", "v", 1, 0), "a", 1), (("t", "u", "v", 1, 0), "a", 256))
@example((("t", "u", "", 1, 0), "a", 0), (("t", "u", "", 1, 0), "a", 0))
def test_marks_and_applied_sets_share_no_key_with_anything(one: tuple[Any, Id, int], other: tuple[Any, Id, int]) -> None:
    found = []
    for space, entity_id, bucket in (one, other):
        keys = KeySpace.of(*space)
        [mark] = keys.mark_keys([entity_id])
        found.append((key_of(space, entity_id), mark, keys.applied_key(entity_id, bucket)))
        assert keys.id_of(mark) is None
        assert keys.id_of(found[-1][2]) is None
    (row, mark, applied), (other_row, other_mark, other_applied) = found
    assert len({row, mark, applied}) == 3
    assert not {row, mark, applied} & ({other_row, other_mark, other_applied} - {row, mark, applied})
    assert mark not in (other_row, other_applied)
    assert applied not in (other_row, other_mark)
    assert (mark == other_mark) == ((one[0][:2], one[1]) == (other[0][:2], other[1]))  # whatever the view, version and epoch
    assert (applied == other_applied) == (one == other)


def test_marks_and_applied_sets_lie_in_the_entitys_slot_and_are_not_tracked_as_rows() -> None:
    space = KeySpace.of("shop", "item", "stats", 2, 1)
    for entity_id in ("plain", "a{b}c", "}", 125, ("}", 1)):
        [row], [mark], applied = space.keys([entity_id]), space.mark_keys([entity_id]), space.applied_key(entity_id, -1)
        assert len({key[key.index(b"{") : key.index(b"}")] for key in (row, mark, applied)}) == 1
        assert mark.startswith(entity_prefix("shop", "item"))
        assert not applied.startswith(b"p1")
    assert KeySpace.of("shop", "item", "other", 1).mark_keys(["a", "b"]) == space.mark_keys(["a", "b"])


@pytest.mark.parametrize("bucket", [1 << 63, -(1 << 63) - 1])
def test_a_bucket_is_an_int64(bucket: int) -> None:
    with pytest.raises(struct.error):
        KeySpace.of("t", "u", "v", 1).applied_key("a", bucket)


def test_many_keys_at_once_are_the_same_as_one_by_one() -> None:
    space = KeySpace.of("t", "item", "v", 3, 1)
    for ids in (["a", "", "x" * 256, "ü{}\0"], [1, -1, 1 << 62], [("a", 1), ("b",)]):
        keys = space.keys(ids)
        assert keys == [space.prefix + encode_id(i) + space.suffix for i in ids]
        assert [space.id_of(key) for key in keys] == ids
    assert space.keys([]) == []
    assert space.prefix == entity_prefix("t", "item")


@pytest.mark.parametrize(
    ("entity_id", "words"),
    [
        ("x" * 257, "256 bytes"),
        ("漢" * 86, "256 bytes"),
        ("\ud800", "UTF-8"),
        (1 << 63, "int64"),
        (-(1 << 63) - 1, "int64"),
        ((), "1 to 8 parts"),
        (("a",) * 9, "1 to 8 parts"),
        (("a", "x" * 257), "256 bytes"),
    ],
)
def test_impossible_ids_are_refused(entity_id: Id, words: str) -> None:
    space = KeySpace.of("t", "item", "v", 1)
    for refuse in (lambda: encode_id(entity_id), lambda: space.keys([entity_id])):
        with pytest.raises(InvalidArgument, match=words) as caught:
            refuse()
        assert caught.value.reason == "ID_INVALID"


def test_a_name_that_cannot_be_in_a_key_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="255 bytes"):
        entity_prefix("x" * 256, "item")


# --- rows ---------------------------------------------------------------------------------------------------------------------------------


def codec_of(*dtypes: str, schema_id: int = 1) -> RowCodec:
    return RowCodec(FeatureSchema(id=schema_id, features=tuple(Feature(name=f"f{n}", dtype=d) for n, d in enumerate(dtypes))))  # type: ignore[arg-type]


@st.composite
def blocks(draw: st.DrawFn) -> tuple[RowCodec, list[Any], Any]:
    """A codec, [rows] values of each of its columns as they are in memory, and [rows, columns] nulls."""
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=70))
    rows = draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    columns: list[Any] = []
    for name in dtypes:
        dtype = np.dtype(BY_NAME[name].numpy)
        data = random.integers(0, 256, (rows, dtype.itemsize), np.uint8)
        columns.append((data & 1 if name == "bool" else data).view(dtype)[:, 0])
    return codec_of(*dtypes, schema_id=draw(st.integers(1, 65535))), columns, random.random((rows, len(dtypes))) < 0.3


@settings(max_examples=100, deadline=None)
@given(blocks())
def test_rows_come_back_as_they_went_in(made: tuple[RowCodec, list[Any], Any]) -> None:
    codec, values, nulls = made
    block = codec.blank(len(nulls))
    assert codec.nulls(block).all()
    for column, given_values in zip(codec.columns.values(), values, strict=True):
        end = column.offset + column.dtype.itemsize
        block[:, column.offset : end] = np.ascontiguousarray(given_values).view(np.uint8).reshape(len(nulls), -1)
    codec.set_nulls(block, nulls)
    header(block)["event_time_us"] = np.arange(len(nulls)) - 1
    header(block)["sequence"] = (1 << 64) - 1

    rows = split(block)
    assert {len(row) for row in rows} == {codec.row_bytes}
    back = join(rows, codec.row_bytes)
    assert back is not None
    assert codec.fits(back)
    assert header(back)["layout"].tolist() == [LAYOUT] * len(rows)
    assert header(back)["schema"].tolist() == [codec.schema_id] * len(rows)
    assert header(back)["event_time_us"].tolist() == list(range(-1, len(rows) - 1))
    assert set(header(back)["sequence"].tolist()) == {(1 << 64) - 1}
    np.testing.assert_array_equal(codec.nulls(back), nulls)
    for column, given_values in zip(codec.columns.values(), values, strict=True):
        found = back[:, column.offset : column.offset + column.dtype.itemsize]
        assert found.tobytes() == given_values.tobytes()  # NaN's bits included
    for name, column in codec.columns.items():
        np.testing.assert_array_equal(codec.has_null(back, codec.null_mask([name])), nulls[:, column.index])
    np.testing.assert_array_equal(codec.has_null(back, codec.null_mask(list(codec.columns))), nulls.any(axis=1))
    assert not codec.has_null(back, codec.null_mask([])).any()


def test_the_layout_is_what_is_documented() -> None:
    codec = codec_of("float32", "bool", "int64", schema_id=0x1234)
    block = codec.blank(1)
    head = header(block)
    head["flags"], head["event_time_us"], head["expires_us"], head["sequence"] = 1, -2, 3, 4
    codec.set_nulls(block, np.array([[True, False, True]]))
    block[0, codec.columns["f2"].offset :] = np.frombuffer((7).to_bytes(8, "little"), np.uint8)
    head_hex = "0100 3412 01000000 feffffffffffffff 0300000000000000 0400000000000000"
    assert split(block) == [bytes.fromhex(f"{head_hex} 0500000000000000 00000000 00 0700000000000000")]
    assert [(c.index, c.offset) for c in codec.columns.values()] == [(0, 40), (1, 44), (2, 45)]
    assert repr(codec) == f"<RowCodec schema={0x1234} columns=3 row_bytes=53>"


@pytest.mark.parametrize(("columns", "bitmap"), [(1, 8), (64, 8), (65, 16), (128, 16)])
def test_the_null_bitmap_is_padded_to_words(columns: int, bitmap: int) -> None:
    codec = codec_of(*["bool"] * columns)
    assert codec.row_bytes == HEADER_BYTES + bitmap + columns
    last = f"f{columns - 1}"
    block = codec.blank(2)
    nulls = np.zeros((2, columns), np.bool_)
    nulls[1, -1] = True
    codec.set_nulls(block, nulls)
    assert codec.has_null(block, codec.null_mask([last])).tolist() == [False, True]
    assert not codec.has_null(block, codec.null_mask(["f0"]) if columns > 1 else codec.null_mask([])).any()


def test_appended_columns_leave_the_others_where_they_are() -> None:
    old, new = codec_of("float32", "int8"), codec_of("float32", "int8", "float64", schema_id=2)
    assert new.row_bytes > old.row_bytes
    for name, column in old.columns.items():
        assert new.columns[name] == column


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=6))
def test_only_rows_of_one_length_are_joined(rows: list[bytes]) -> None:
    size = len(rows[0])
    block = join(rows, size) if size else None
    if size and all(len(row) == size for row in rows):
        assert block is not None
        assert split(block) == rows
    else:
        assert block is None
    # As many bytes as three rows of 4 have, but not as three rows of 4.
    assert join([b"123", b"12345", b"1234"], 4) is None


@pytest.mark.parametrize("at", range(4))
def test_a_row_of_another_layout_or_schema_does_not_fit(at: int) -> None:
    codec = codec_of("float32", schema_id=0x0101)
    block = codec.blank(3)
    assert codec.fits(block)
    assert codec.fits(block[:0])
    block[1, at] ^= 0x10
    assert not codec.fits(block)
    assert codec.fits(block[[0, 2]])
