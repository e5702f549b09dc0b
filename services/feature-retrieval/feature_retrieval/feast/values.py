"""Feast's cells, one serialized `feast.types.Value` each, as the columns of a FeatureBatch.

Numbers of fixed size are taken apart all at once; whatever has no fixed size is parsed cell by cell, which is what makes Feast's layout
slow to read. A cell of another type than the view declares is not guessed at: its row cannot be read. Wire format:
https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from plait.dtypes import BY_NAME
from plait.registry.records import Feature
from plait.registry.shapes import wire_type

Cell = bytes | None  # None: the hash has no such field
Flags = npt.NDArray[np.bool_]

_NULL: Final = b"\x98\x01\x00"  # null_val = NULL
_FLOAT, _DOUBLE = 0x35, 0x29  # tags: field number and wire type
_VARINTS: Final = {"int32": 0x18, "int64": 0x20, "bool": 0x38, "timestamp": 0x40}
_STRING: Final = b"\x12"
_LISTS: Final = {"int32": b"\x6a", "int64": b"\x72", "float64": b"\x7a", "float32": b"\x82\x01", "bool": b"\x8a\x01"}
_PACKED: Final = b"\x0a"  # field 1 of each list message
_US_PER_S: Final = 1_000_000


class Unreadable(ValueError):
    """A cell that is not what the view declares."""


@dataclass(frozen=True, slots=True)
class Values:
    """One feature of some rows: what a FeatureColumn holds. `bad`: rows whose cell is not of the declared type, zeros in `data`."""

    data: bytes
    nulls: Flags
    offsets: npt.NDArray[np.uint32] | None
    bad: Flags


def decode(feature: Feature, cells: Sequence[Cell]) -> Values:
    """Return the cells of one feature."""
    if feature.width or feature.max_length:
        return _lists(feature, cells)
    if feature.dtype == "string":
        return _variable(cells, _text)
    if feature.dtype in {"float32", "float64"}:
        return _fixed(cells, *((_FLOAT, 4) if feature.dtype == "float32" else (_DOUBLE, 8)))
    return _integers(feature, cells)


def fill(column: Any, feature: Feature, values: Values) -> None:
    """Put them into a FeatureColumn."""
    column.features.append(feature.name)
    column.dtype = wire_type(feature).number
    column.data = values.data
    absent = values.nulls | values.bad
    if absent.any():
        column.null_bits = np.packbits(absent, bitorder="little").tobytes()
    if values.offsets is not None:
        column.offsets = values.offsets.astype("<u4").tobytes()


def time_us(cell: Cell) -> int | None:
    """Return a serialized Timestamp as µs since the epoch, None where there is none. Raises Unreadable."""
    if cell is None:
        return None
    seconds = nanos = at = 0
    while at < len(cell):
        tag = cell[at]
        value, at = _varint(cell, at + 1)
        if tag == 0x08:
            seconds = value
        elif tag == 0x10:
            nanos = value
        else:
            raise Unreadable("not a time")
    return seconds * _US_PER_S + nanos // 1000


def _absent(cell: Cell) -> bool:
    """Return whether a cell holds no value: there is no field, or a Value with nothing set, or its null."""
    return not cell or cell == _NULL


def _fixed(cells: Sequence[Cell], tag: int, size: int) -> Values:
    """Take apart cells of one tag byte and `size` bytes each."""
    nothing = bytes([tag]) + bytes(size)
    nulls = np.fromiter(map(_absent, cells), np.bool_, len(cells))
    bad = np.zeros(len(cells), np.bool_)
    whole: Sequence[Cell] = cells
    if nulls.any():
        whole = [nothing if null else cell for cell, null in zip(cells, nulls.tolist(), strict=True)]
    if any(len(cell or b"") != size + 1 or (cell or b"")[0] != tag for cell in whole):
        bad = np.array([len(cell or b"") != size + 1 or (cell or b"")[0] != tag for cell in whole])
        whole = [nothing if wrong else cell for cell, wrong in zip(whole, bad.tolist(), strict=True)]
    block = np.frombuffer(b"".join([cell or b"" for cell in whole]), np.uint8).reshape(len(cells), size + 1)
    return Values(block[:, 1:].tobytes(), nulls, None, bad)


def _integers(feature: Feature, cells: Sequence[Cell]) -> Values:
    """Parse cells of one varint each: integers, bools, and times in seconds, which become µs."""
    dtype = np.dtype(BY_NAME["int64"].numpy if feature.dtype == "timestamp" else BY_NAME[feature.dtype].numpy)
    tag = _VARINTS.get(feature.dtype, -1)  # Feast has no int8, int16 or float16
    low, high = (0, 1) if feature.dtype == "bool" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    factor = _US_PER_S if feature.dtype == "timestamp" else 1
    values = np.zeros(len(cells), dtype)
    nulls, bad = np.zeros((2, len(cells)), np.bool_)
    for at, cell in enumerate(cells):
        if cell is None or _absent(cell):
            nulls[at] = True
            continue
        try:
            value = factor * _only_varint(cell, tag)
        except Unreadable:
            bad[at] = True
            continue
        if low <= value <= high:
            values[at] = value
        else:
            bad[at] = True
    return Values(values.tobytes(), nulls, None, bad)


def _lists(feature: Feature, cells: Sequence[Cell]) -> Values:
    """Parse cells of one list each; a vector's must have its width."""
    tag = _LISTS.get(feature.dtype, b"")
    dtype = np.dtype(BY_NAME[feature.dtype].numpy)
    size = feature.width * dtype.itemsize

    def one(cell: bytes) -> bytes:
        data = _numbers(_inside(cell, tag), dtype)
        if len(data) > feature.max_length * dtype.itemsize if not size else len(data) != size:
            raise Unreadable("a list of another length")
        return data

    values = _variable(cells, one)
    if not size:
        return values
    absent = values.nulls | values.bad  # every vector has its place in the block
    parts = np.zeros((len(cells), size), np.uint8)
    parts[~absent] = np.frombuffer(values.data, np.uint8).reshape(-1, size)
    return Values(parts.tobytes(), values.nulls, None, values.bad)


def _variable(cells: Sequence[Cell], parse: Callable[[bytes], bytes]) -> Values:
    nulls, bad = np.zeros((2, len(cells)), np.bool_)
    parts: list[bytes] = []
    for at, cell in enumerate(cells):
        part = b""
        if cell is None or _absent(cell):
            nulls[at] = True
        else:
            try:
                part = parse(cell)
            except Unreadable:
                bad[at] = True
        parts.append(part)
    offsets = np.fromiter(itertools.accumulate(map(len, parts), initial=0), np.uint32, len(parts) + 1)
    return Values(b"".join(parts), nulls, offsets, bad)


def _text(cell: bytes) -> bytes:
    return _inside(cell, _STRING)


def _numbers(message: bytes, dtype: np.dtype[np.generic]) -> bytes:
    """Return the packed numbers of a list message, little-endian."""
    if not message:
        return b""
    packed = _inside(message, _PACKED)
    if dtype.kind == "f":
        if len(packed) % dtype.itemsize:
            raise Unreadable("not a list of numbers")
        return packed
    values: list[int] = []
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        values.append(value)
    try:
        return np.array(values, dtype).tobytes()
    except OverflowError:
        raise Unreadable("a number that is too large") from None


def _inside(data: bytes, tag: bytes) -> bytes:
    """Return what a message holds whose only field, of variable length, is `tag`. Raises Unreadable."""
    if not tag or not data.startswith(tag):
        raise Unreadable("another type")
    size, at = _varint(data, len(tag))
    if size < 0 or at + size != len(data):
        raise Unreadable("not one field")
    return data[at:]


def _only_varint(cell: bytes, tag: int) -> int:
    if cell[0] != tag:
        raise Unreadable("another type")
    value, at = _varint(cell, 1)
    if at != len(cell):
        raise Unreadable("not one field")
    return value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the signed 64-bit number at `at` and where it ends. Raises Unreadable."""
    value = shift = 0
    for end in range(at, min(at + 10, len(data))):
        byte = data[end]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            value &= (1 << 64) - 1
            return (value - (1 << 64) if value >= 1 << 63 else value), end + 1
        shift += 7
    raise Unreadable("a number without an end")
