"""The bytes in the store: keys that never collide, and one packed binary row per (tenant, view, entity).

Row (layout 1, little-endian): a 32-byte header {layout u16, schema id u16, flags u32, event time µs i64, expires µs i64, sequence u64}, a null
bitmap (one bit per column, least significant first, padded to 8 bytes), then the columns in view order. Many rows of one schema are encoded
and decoded as one numpy block: there is never a Python object per cell.

Key: `p1{` tenant, entity type, typed id `}` view, view version, epoch. Every part is length-prefixed, so no two different tuples give the same
bytes, whatever characters they hold; the braces are a hash tag, so Redis Cluster keeps all views of one entity in one slot. In the same slot
lie the entity's erasure mark, `p1{` … `}` and a NUL where a view's name would begin (no view has an empty name), and which events its
aggregates have taken, `s1{` … `}` view, view version, epoch, `a`, bucket: another prefix, so that nobody who tracks rows hears of it.
Streams are per tenant: `e1{` tenant `}` of events, `d1{` tenant `}` of dead letters.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from feature_retrieval.aggregation.windows import window_of
from plait.errors import InvalidArgument
from plait.registry import entity_ids
from plait.registry.records import Feature, FeatureSchema
from plait.registry.references import width_of
from plait.registry.shapes import stored_type

LAYOUT: Final = 1
LAYOUT_WITH_TAIL: Final = 2
HEADER_BYTES: Final = 32
FLAG_TOMBSTONE: Final = 1
FLAG_BACKFILL: Final = 2
FOREIGN: Final = b"f1{"  # what keys begin with that stand for rows in somebody else's store
MAX_ID_BYTES: Final = 256
MAX_PARTS: Final = 8
HEADER: Final = np.dtype(
    [("layout", "<u2"), ("schema", "<u2"), ("flags", "<u4"), ("event_time_us", "<i8"), ("expires_us", "<i8"), ("sequence", "<u8")]
)

Bytes2D = npt.NDArray[np.uint8]
Kind = Literal["plain", "code", "list", "window"]
IdPart = entity_ids.IdPart
Id = entity_ids.Id

_MARK: Final = b"}\0"
_COUNT_BYTES: Final = 2
_LENGTH_BYTES: Final = 4
_WORD_BYTES: Final = 4  # of a row's layout and schema together
_LENGTHS: Final = tuple(struct.pack(">H", n) for n in range(MAX_ID_BYTES + 1))


# --- keys ---------------------------------------------------------------------------------------------------------------------------------


def encode_id(entity_id: Id) -> bytes:
    """Return the typed, length-prefixed form of an id: the string "1", the int 1 and the composite ("1",) all differ.

    Raises InvalidArgument (ID_INVALID) for a string part over 256 bytes of UTF-8, an int outside int64, or more than 8 parts.
    """
    if isinstance(entity_id, str):
        data = _utf8(entity_id)
        return b"s" + _LENGTHS[len(data)] + data
    if isinstance(entity_id, int):
        if not -(1 << 63) <= entity_id < 1 << 63:
            raise InvalidArgument("an id does not fit int64", reason="ID_INVALID")
        return b"i" + entity_id.to_bytes(8, "big", signed=True)
    if not 1 <= len(entity_id) <= MAX_PARTS:
        raise InvalidArgument(f"a composite id has 1 to {MAX_PARTS} parts", reason="ID_INVALID")
    return b"c" + bytes([len(entity_id)]) + b"".join(map(encode_id, entity_id))


def decode_id(data: bytes) -> tuple[Id, int]:
    """Return the id at the start of `data` and how many bytes it took. Raises ValueError where there is no whole id."""
    if data[:1] != b"c":
        return _decode_part(data, 0)
    if not 1 <= int.from_bytes(data[1:2]) <= MAX_PARTS:
        raise ValueError("not a composite id")
    parts: list[IdPart] = []
    at = 2
    for _ in range(data[1]):
        part, at = _decode_part(data, at)
        parts.append(part)
    return tuple(parts), at


def _decode_part(data: bytes, at: int) -> tuple[IdPart, int]:
    kind = data[at : at + 1]
    if kind == b"s":
        start = at + 3
        end = start + int.from_bytes(data[at + 1 : start], "big")
        if start <= len(data) and end <= len(data):
            return data[start:end].decode(), end
    elif kind == b"i" and len(data) >= at + 9:
        return int.from_bytes(data[at + 1 : at + 9], "big", signed=True), at + 9
    raise ValueError("not a typed id")


@dataclass(frozen=True, slots=True)
class KeySpace:
    """Makes the keys of one view for one tenant. `prefix` and `suffix` are what its keys share."""

    prefix: bytes
    suffix: bytes

    @classmethod
    def of(cls, tenant: str, entity_type: str, view: str, version: int, epoch: int = 0) -> KeySpace:
        """Return the key space of a view's version and epoch."""
        return cls(entity_prefix(tenant, entity_type), b"}" + _short(view) + struct.pack(">HI", version, epoch))

    def keys(self, ids: Sequence[Id]) -> list[bytes]:
        """Return one key per id; all ids are of one kind. Raises InvalidArgument (ID_INVALID) as `encode_id` does."""
        suffix, join = self.suffix, b"".join
        if ids and isinstance(ids[0], str):
            prefix = self.prefix + b"s"
            try:
                return [join((prefix, _LENGTHS[len(e)], e, suffix)) for e in map(str.encode, ids)]  # type: ignore[arg-type]
            except IndexError:
                raise InvalidArgument(f"an id is longer than {MAX_ID_BYTES} bytes of UTF-8", reason="ID_INVALID") from None
            except UnicodeEncodeError:
                raise InvalidArgument("an id is not valid UTF-8", reason="ID_INVALID") from None
        return [self.prefix + encode_id(i) + suffix for i in ids]

    def mark_keys(self, ids: Sequence[Id]) -> list[bytes]:
        """Return the key of each entity's erasure mark, the same for every view, version and epoch. Raises as `keys` does."""
        return KeySpace(self.prefix, _MARK).keys(ids)

    def applied_key(self, entity_id: Id, bucket: int) -> bytes:
        """Return the key of the set of events of one bucket of time (an int64) that are in an entity's aggregates. Raises as `keys` does."""
        return b"s1" + self.prefix[2:] + encode_id(entity_id) + self.suffix + b"a" + struct.pack(">q", bucket)

    def foreign(self) -> KeySpace:
        """Return the same space for rows that lie in somebody else's store: its keys name them here, and are in no Redis of ours."""
        return KeySpace(FOREIGN + self.prefix[len(FOREIGN) :], self.suffix)

    def id_of(self, key: bytes) -> Id | None:
        """Return the id a key of this space stands for, or None for a key of another space."""
        if not (key.startswith(self.prefix) and key.endswith(self.suffix)):
            return None
        try:
            entity_id, size = decode_id(key[len(self.prefix) :])
        except ValueError:  # not a key of ours, whoever wrote it
            return None
        return entity_id if len(self.prefix) + size + len(self.suffix) == len(key) else None


def entity_prefix(tenant: str, entity_type: str) -> bytes:
    """Return what all keys of one tenant's entity type begin with."""
    return b"p1{" + _short(tenant) + _short(entity_type)


def tenant_key(kind: bytes, tenant: str) -> bytes:
    """Return the key of what there is once per tenant: `kind` is `e1` (events) or `d1` (dead letters); all of a tenant's lie in one slot."""
    return kind + b"{" + _short(tenant) + b"}"


def _short(name: str) -> bytes:
    data = name.encode()
    if len(data) > 255:
        raise InvalidArgument("a name is longer than 255 bytes of UTF-8", reason="NAME_INVALID")
    return bytes([len(data)]) + data


def _utf8(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument("an id is not valid UTF-8", reason="ID_INVALID") from None
    if len(data) > MAX_ID_BYTES:
        raise InvalidArgument(f"an id is longer than {MAX_ID_BYTES} bytes of UTF-8", reason="ID_INVALID")
    return data


# --- rows ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """Where one feature lies in a row. `index` is its bit in the null bitmap, `offset` of its `width` values counts from the row's start; the
    u16 before those of a `list` says how many are given. `scale`: what an int8 embedding's values are multiplied by (0 = nothing).
    A `window` is the state of an aggregated feature: `width` bytes."""

    index: int
    offset: int
    dtype: np.dtype[np.generic]
    kind: Kind = "plain"
    width: int = 1
    scale: float = 0.0

    @property
    def end(self) -> int:
        """Where its values end."""
        return self.offset + self.width * self.dtype.itemsize


class RowCodec:
    """Encodes and decodes rows of one schema, many at a time. `row_bytes` is what a row takes without its tail."""

    def __init__(self, schema: FeatureSchema) -> None:
        self.schema_id = schema.id
        self.columns: dict[str, Column] = {}
        self._bitmap_bytes = -(-len(schema.features) // 64) * 8
        end = HEADER_BYTES + self._bitmap_bytes
        for index, feature in enumerate(schema.features):
            self.columns[feature.name] = column = _column(index, end, feature)
            end = column.end
        self.row_bytes = end
        self.text_names = tuple(feature.name for feature in schema.features if feature.dtype == "string")
        self.layout = LAYOUT_WITH_TAIL if self.text_names else LAYOUT
        self.head = struct.pack("<HH", self.layout, schema.id)  # what every row of this schema begins with
        self._head_word = np.frombuffer(self.head, "<u4")[0]
        self._least_bytes = end + _LENGTH_BYTES * len(self.text_names)

    def __repr__(self) -> str:
        return f"<RowCodec schema={self.schema_id} columns={len(self.columns)} row_bytes={self.row_bytes}>"

    def fits(self, block: Bytes2D) -> bool:
        """Return whether all of [rows, row_bytes] are rows of this layout and schema."""
        return bool((block[:, :_WORD_BYTES].view("<u4") == self._head_word).all())

    def is_current(self, row: bytes | None) -> bool:
        """Return whether it is a row of this layout and schema, and whole."""
        if row is None or not row.startswith(self.head):
            return False
        return len(row) >= self._least_bytes if self.text_names else len(row) == self.row_bytes

    def widen(self, rows: Sequence[bytes]) -> Bytes2D | None:
        """Return stored rows as one block [rows, row_bytes] without their tails, None where one is of another layout or schema, or not whole."""
        if self.text_names:
            if rows and min(map(len, rows)) < self._least_bytes:
                return None
            rows = [row[: self.row_bytes] for row in rows]
        block = join(rows, self.row_bytes)
        return block if block is not None and self.fits(block) else None

    def pack(self, block: Bytes2D, tails: Sequence[bytes] | None = None) -> list[bytes]:
        """Return each row of [rows, row_bytes] as bytes, ready for the store; `tails` are those of `tail`, None in layout 1."""
        rows = split(block)
        return rows if tails is None else [row + tail for row, tail in zip(rows, tails, strict=True)]

    def texts(self, row: bytes) -> dict[str, bytes]:
        """Return the texts of one stored row by feature, those that are null left out. Raises ValueError for a row that is not whole."""
        if len(row) < self._least_bytes:
            raise ValueError("the row is cut off")
        nulls = int.from_bytes(row[HEADER_BYTES : HEADER_BYTES + self._bitmap_bytes], "little")
        found: dict[str, bytes] = {}
        at = self.row_bytes
        for name in self.text_names:
            start = at + _LENGTH_BYTES
            at = start + int.from_bytes(row[at:start], "little")
            if at > len(row):
                raise ValueError("the row is cut off")
            if not nulls >> self.columns[name].index & 1:
                found[name] = row[start:at]
        return found

    def counts(self, block: Bytes2D, name: str) -> npt.NDArray[np.uint16]:
        """Return how many values each row's list has, the others of its columns being padding: [rows]. Writable where the block is."""
        offset = self.columns[name].offset
        return block[:, offset - _COUNT_BYTES : offset].view("<u2")[:, 0]

    def clean_until_us(self, block: Bytes2D, for_ever: int) -> npt.NDArray[np.int64]:
        """Return [rows]: until when (µs since the epoch) a row is simply good, `for_ever` without an expiry; 0 for a tombstone and where
        any column is null."""
        head = header(block)
        until = np.where(head["expires_us"] > 0, head["expires_us"], for_ever)
        nulls = block[:, HEADER_BYTES : HEADER_BYTES + self._bitmap_bytes].any(axis=1)
        until[nulls | ((head["flags"] & FLAG_TOMBSTONE) != 0)] = 0
        return until

    def blank(self, rows: int) -> Bytes2D:
        """Return [rows, row_bytes] rows with a header of this schema, every column null."""
        block = np.zeros((rows, self.row_bytes), np.uint8)
        head = header(block)
        head["layout"] = self.layout
        head["schema"] = self.schema_id
        bits = np.zeros(self._bitmap_bytes * 8, np.uint8)
        bits[: len(self.columns)] = 1
        block[:, HEADER_BYTES : HEADER_BYTES + self._bitmap_bytes] = np.packbits(bits, bitorder="little")
        return block

    def nulls(self, block: Bytes2D) -> npt.NDArray[np.bool_]:
        """Return [rows, columns]: True where a column is null."""
        bitmap = block[:, HEADER_BYTES : HEADER_BYTES + self._bitmap_bytes]
        return np.unpackbits(bitmap, axis=1, bitorder="little", count=len(self.columns)).view(np.bool_)

    def set_nulls(self, block: Bytes2D, nulls: npt.NDArray[np.bool_]) -> None:
        """Write [rows, columns] null bits."""
        padded = np.zeros((len(block), self._bitmap_bytes * 8), np.bool_)
        padded[:, : nulls.shape[1]] = nulls
        block[:, HEADER_BYTES : HEADER_BYTES + self._bitmap_bytes] = np.packbits(padded, axis=1, bitorder="little")

    def null_mask(self, names: Sequence[str]) -> Bytes2D:
        """Return the bitmap with exactly these columns' bits set, to be and-ed with rows' bitmaps."""
        bits = np.zeros(self._bitmap_bytes * 8, np.uint8)
        bits[[self.columns[name].index for name in names]] = 1
        return np.packbits(bits, bitorder="little")

    def has_null(self, block: Bytes2D, mask: Bytes2D) -> npt.NDArray[np.bool_]:
        """Return [rows]: True where any column of `mask` is null."""
        words = block[:, HEADER_BYTES : HEADER_BYTES + self._bitmap_bytes].view("<u8")
        found: npt.NDArray[np.bool_] = (words & mask.view("<u8")).any(axis=1)
        return found


def _column(index: int, start: int, feature: Feature) -> Column:
    """Return the column of a feature whose bytes begin at `start`."""
    if feature.aggregate is not None:
        return Column(index, start, np.dtype(np.uint8), "window", window_of(feature.aggregate).size_bytes)
    dtype = np.dtype(stored_type(feature).numpy)
    if feature.max_length:
        return Column(index, start + _COUNT_BYTES, dtype, "list", feature.max_length)
    return Column(index, start, dtype, "code" if feature.dtype == "string" else "plain", width_of(feature), feature.scale)


def tail(texts: Sequence[bytes]) -> bytes:
    """Return the tail of one row: its texts in view order, empty where one is null."""
    return b"".join([piece for text in texts for piece in (len(text).to_bytes(_LENGTH_BYTES, "little"), text)])


def header(block: Bytes2D) -> npt.NDArray[np.void]:
    """Return the headers of [rows, row_bytes] as a structured view, one record per row (writable where the block is)."""
    return block[:, :HEADER_BYTES].view(HEADER)[:, 0]


def split(block: Bytes2D) -> list[bytes]:
    """Return each row of the block as bytes, ready for the store."""
    data, size = block.tobytes(), block.shape[1]
    return [data[at : at + size] for at in range(0, len(data), size)]


def join(rows: Sequence[bytes], row_bytes: int) -> Bytes2D | None:
    """Return rows as one [rows, row_bytes] block, or None when they are not all of that length (another schema is among them)."""
    if rows and set(map(len, rows)) != {row_bytes}:
        return None
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), row_bytes)
