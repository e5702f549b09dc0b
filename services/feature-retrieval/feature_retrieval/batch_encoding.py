"""From a columnar FeatureBatch to packed rows: checked whole, encoded as one block, without a Python object per number.

Rows that are equal have equal bytes (nulls are zeros, lists are padded), because the order of rows of one time is that of their bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.row_codec import FLAG_BACKFILL, FLAG_TOMBSTONE, Bytes2D, Column, Id, RowCodec, header, tail
from feature_retrieval.text_codes import Coder
from plait.dtypes import BY_NUMBER
from plait.errors import InvalidArgument, Violation
from plait.registry.records import Feature, FeatureView
from plait.registry.shapes import wire_type

MAX_ROW_BYTES: Final = 64 * 1024  # of a stored row, its texts included

Flags = npt.NDArray[np.bool_]
Refused = tuple[str, str]  # reason, message


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows ready to be packed. `block`: [rows, row_bytes]; `tails`: one per row, None in layout 1; `refused`: rows that hold an impossible
    value, by position, whose bytes mean nothing."""

    block: Bytes2D
    tails: Sequence[bytes] | None
    refused: Mapping[int, Refused]


class Encoder:
    """Encodes batches of one view. Made once per schema: a vocabulary may be large."""

    def __init__(self, view: FeatureView, codec: RowCodec) -> None:
        self.codec = codec
        self._view = view.name
        self._features = {feature.name: feature for feature in view.features}
        self._coders = {name: Coder.of(self._features[name]) for name in codec.text_names}

    def encode(self, batch: Any, ids: Sequence[Id]) -> Encoded:
        """Return a FeatureBatch with these ids as rows. Raises InvalidArgument with every violation that is not one row's alone."""
        work = _Work(self.codec, self._features, self._coders, len(ids))
        problems = _encode_header(batch, work.block)
        for at, column in enumerate(batch.columns):
            if problem := work.add(column):
                problems.append(Violation(f"columns[{at}]", f"{problem} (view {self._view!r})"))
        if problems:
            raise InvalidArgument("the batch does not fit the view", violations=problems)
        return work.done()


def _encode_header(batch: Any, block: Bytes2D) -> list[Violation]:
    head, rows = header(block), len(block)
    problems: list[Violation] = []
    for name, dtype, sizes, allowed in (
        ("event_times_us", np.int64, (1, rows), "one per row, or one for all"),
        ("sequences", np.uint64, (0, rows), "one per row, or none"),
        ("deleted", np.bool_, (0, rows), "one per row, or none"),
        ("expires_at_us", np.int64, (0, 1, rows), "one per row, one for all, or none"),
    ):
        given = getattr(batch, name)
        values: npt.NDArray[Any] = np.fromiter(given, dtype, len(given))
        if values.size not in sizes:
            what = name.removesuffix("_us").replace("_", " ") if name != "deleted" else "values"
            problems.append(Violation(name, f"{values.size} {what} for {rows} rows: give {allowed}"))
        elif name == "expires_at_us" and (values < 0).any():
            problems.append(Violation(name, "an expiry is in microseconds since the epoch, 0 = never, and one is below 0"))
        elif values.size:
            _set_header(head, name, values)
    if batch.backfill:
        head["flags"] |= FLAG_BACKFILL
    return problems


def _set_header(head: npt.NDArray[np.void], name: str, values: npt.NDArray[Any]) -> None:
    match name:
        case "event_times_us":
            head["event_time_us"] = values
        case "sequences":
            head["sequence"] = values
        case "deleted":
            head["flags"] = np.where(values, FLAG_TOMBSTONE, 0)
        case _:
            head["expires_us"] = values


class _Work:
    """One batch while it is encoded."""

    def __init__(self, codec: RowCodec, features: Mapping[str, Feature], coders: Mapping[str, Coder], rows: int) -> None:
        self.block = codec.blank(rows)
        self._codec = codec
        self._features = features
        self._coders = coders
        self._nulls = np.ones((rows, len(codec.columns)), np.bool_)
        self._seen: set[str] = set()
        self._texts: dict[str, list[bytes]] = {}
        self._refused: dict[int, Refused] = {}

    def add(self, column: Any) -> str:
        """Copy one FeatureColumn into the block; return what is wrong with it (empty = nothing)."""
        rows, names = len(self.block), list(column.features)
        problem = self._misnamed(names) or self._misfit(column, names)
        if problem:
            return problem
        self._seen.update(names)
        if column.null_bits and len(column.null_bits) != -(-rows * len(names) // 8):
            return f"{len(column.null_bits)} bytes of null bits, expected {-(-rows * len(names) // 8)}"
        flags = np.zeros((rows, len(names)), np.bool_)
        if column.null_bits:
            bits = np.unpackbits(np.frombuffer(column.null_bits, np.uint8), bitorder="little", count=rows * len(names))
            flags = bits.reshape(rows, len(names)).view(np.bool_)
        columns = [self._codec.columns[name] for name in names]
        if columns[0].kind == "plain":
            return self._numbers(column.data, columns, flags)
        starts = _starts(column, rows * len(names))
        if isinstance(starts, str):
            return starts
        add = self._words if columns[0].kind == "code" else self._lists
        return add(column.data, names, starts.reshape(2, rows, len(names)), flags)

    def _misnamed(self, names: list[str]) -> str:
        unknown = [name for name in names if name not in self._codec.columns]
        if unknown or not names:
            return f"unknown features {_some(unknown)}" if unknown else "no feature is named"
        repeated = [name for name in names if name in self._seen] or (names if len(set(names)) < len(names) else [])
        return f"features given twice: {_some(repeated)}" if repeated else ""

    def _misfit(self, column: Any, names: list[str]) -> str:
        given = BY_NUMBER.get(column.dtype)
        wrong = [name for name in names if given is None or given != wire_type(self._features[name])]
        if wrong:
            declared = ", ".join(sorted({self._features[name].dtype for name in wrong}))
            return f"dtype {given.name if given else 'unspecified'} is not the declared dtype of {wrong} ({declared})"
        shapes = {(c.kind, c.width if c.kind == "plain" else 0) for c in map(self._codec.columns.__getitem__, names)}
        return (
            ""
            if len(shapes) == 1
            else f"{names} are not of one shape: give numbers, lists and each width of embeddings in blocks of their own"
        )

    def _numbers(self, data: bytes, columns: list[Column], flags: Flags) -> str:
        """Copy rows x columns values, each of `width` numbers."""
        rows, size = len(flags), columns[0].end - columns[0].offset
        if len(data) != rows * len(columns) * size:
            wanted = f"{rows} rows x {len(columns)} features x {size} bytes = {rows * len(columns) * size}"
            return f"{len(data)} bytes of data, expected {wanted}"
        values = np.frombuffer(data, np.uint8).reshape(rows, len(columns) * size)
        if columns[0].dtype == np.bool_ and (values > 1).any():
            return "a bool is the byte 0 or 1, and others are among the data"
        _copy_columns(values, flags, [(c.offset, c.index) for c in columns], size, self.block, self._nulls)
        return ""

    def _words(self, data: bytes, names: list[str], bounds: npt.NDArray[np.intp], flags: Flags) -> str:
        """Store each text's code, and keep the text for the tail."""
        _refuse_broken_utf8(data, bounds, flags, self._refused)
        starts, ends = bounds
        for at, name in enumerate(names):
            column, null = self._codec.columns[name], flags[:, at]
            places = zip(starts[:, at].tolist(), ends[:, at].tolist(), null.tolist(), strict=True)
            texts = self._texts[name] = [b"" if is_null else data[start:end] for start, end, is_null in places]
            codes = np.where(null, 0, self._coders[name].codes(texts)).astype("<i4")
            self.block[:, column.offset : column.end] = codes.view(np.uint8).reshape(-1, 4)
            self._nulls[:, column.index] = null
        return ""

    def _lists(self, data: bytes, names: list[str], bounds: npt.NDArray[np.intp], flags: Flags) -> str:
        """Store each list's count and its numbers, padded to the longest there may be."""
        size = self._codec.columns[names[0]].dtype.itemsize
        if (bounds % size).any():
            return f"offsets are in bytes and must be multiples of {size}"
        for at, name in enumerate(names):
            column, null = self._codec.columns[name], flags[:, at]
            flat = np.frombuffer(data, column.dtype)
            if column.dtype == np.bool_ and (flat.view(np.uint8) > 1).any():
                return "a bool is the byte 0 or 1, and others are among the data"
            starts = bounds[0, :, at] // size
            counts = np.where(null, 0, bounds[1, :, at] // size - starts)
            for row in np.flatnonzero(counts > column.width).tolist():
                self._refused[row] = ("VALUE_INVALID", f"a list of {name!r} is longer than its max_length, {column.width}")
            counts = np.minimum(counts, column.width)
            places = np.arange(column.width)
            values = np.full((len(null), column.width), self._features[name].pad).astype(column.dtype)
            values[null] = np.zeros((), column.dtype)
            given = places < counts[:, None]
            values[given] = flat[(starts[:, None] + places)[given]]
            self.block[:, column.offset : column.end] = values.view(np.uint8).reshape(len(null), -1)
            self._codec.counts(self.block, name)[:] = counts
            self._nulls[:, column.index] = null
        return ""

    def done(self) -> Encoded:
        """Return all of it."""
        self._codec.set_nulls(self.block, self._nulls)
        tails = None
        if self._codec.text_names:
            absent = [b""] * len(self.block)
            tails = [tail(texts) for texts in zip(*(self._texts.get(name, absent) for name in self._codec.text_names), strict=True)]
            for row, end in enumerate(tails):
                if len(end) > MAX_ROW_BYTES - self._codec.row_bytes:
                    self._refused[row] = ("VALUE_INVALID", f"the row's texts make it longer than {MAX_ROW_BYTES} bytes")
        return Encoded(self.block, tails, self._refused)


def _some(names: Sequence[str]) -> str:
    """Return names as a message shows them: whoever sends thousands finds the first of them."""
    return f"{[name[:80] for name in names[:8]]}{' and more' if len(names) > 8 else ''}"


def _starts(column: Any, values: int) -> npt.NDArray[np.intp] | str:
    """Return where each of so many values begins and ends in the data, [2, values], or what is wrong with the offsets."""
    if len(column.offsets) != (values + 1) * 4:
        return f"{len(column.offsets)} bytes of offsets, expected {values} values + 1, 4 bytes each = {(values + 1) * 4}"
    offsets = np.frombuffer(column.offsets, "<u4").astype(np.intp)
    if offsets[0] != 0 or offsets[-1] != len(column.data) or (np.diff(offsets) < 0).any():
        return f"offsets must ascend from 0 to the {len(column.data)} bytes of data"
    return np.stack((offsets[:-1], offsets[1:]))


def _refuse_broken_utf8(data: bytes, bounds: npt.NDArray[np.intp], flags: Flags, refused: dict[int, Refused]) -> None:
    """Refuse rows with a text that is not UTF-8. Where all of the data is, a text is unless it begins inside a character."""
    starts, ends = bounds
    try:
        data.decode()
        raw = np.frombuffer(data + b"\0", np.uint8)
        suspects = ((raw[starts] & 0xC0) == 0x80) | ((raw[ends] & 0xC0) == 0x80)
    except UnicodeDecodeError:
        suspects = np.ones(flags.shape, np.bool_)
    for row, at in np.argwhere(suspects & ~flags & (ends > starts)).tolist():
        try:
            data[starts[row, at] : ends[row, at]].decode()
        except UnicodeDecodeError:
            refused[row] = ("VALUE_INVALID", "a text is not valid UTF-8")


def _copy_columns(values: Bytes2D, flags: Flags, places: list[tuple[int, int]], width: int, block: Bytes2D, nulls: Flags) -> None:
    """Copy [rows, columns x width] bytes to their places, neighbours together; a null cell is stored as zeros, so equal rows have equal bytes."""
    if flags.any():
        values = np.where(np.repeat(flags, width, axis=1), np.uint8(0), values)
    start = 0
    for at in range(1, len(places) + 1):
        if at < len(places) and places[at][0] == places[at - 1][0] + width:
            continue
        offset, index = places[start]
        count = at - start
        block[:, offset : offset + count * width] = values[:, start * width : at * width]
        nulls[:, index : index + count] = flags[:, start:at]
        start = at
