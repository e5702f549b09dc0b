"""Parquet files as batches of features, and back: the only module that knows `pyarrow`.

Columns are moved as whole buffers; the only Python objects made per row are ids and event times, because the message holds those one by
one. All that does not fit is said at once, before anything is sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import InvalidArgument, Violation
from plait.registry.explain import suggestion
from plait.registry.records import Feature, FeatureView
from plait.registry.shapes import wire_type

ID: Final = "_id"  # no feature's name begins with an underscore, so ours collide with none
EVENT_TIME: Final = "_event_time"
SEQUENCE: Final = "_sequence"
DELETED: Final = "_deleted"
EXPIRES_AT: Final = "_expires_at"
MAX_BATCH_ROWS: Final = 5000
_BATCH_BYTES: Final = 4 * 1024 * 1024
_MAX_MESSAGE_BYTES: Final = 14 * 1024 * 1024  # of the 16 MiB that fit
_EARLIEST_US: Final = 10**14  # what is less, as a number, is a time in seconds or milliseconds up to the year 5138
_TEXT_BYTES: Final = 64  # of a string or list value, until the batch shows how much it is


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place between two rows of a file: so many rows of that row group lie before it."""

    row_group: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column of the file is what. `ids`: one, or one per part of a composite key; empty names are columns the file does not have."""

    ids: tuple[str, ...]
    event_time: str
    sequence: str
    deleted: str
    expires_at: str
    features: Mapping[str, str]

    def all(self) -> list[str]:
        """Return every column that is read."""
        named = [*self.ids, self.event_time, self.sequence, self.deleted, self.expires_at, *self.features.values()]
        return [name for name in dict.fromkeys(named) if name]


class ParquetRows:
    """The rows of a file as FeatureBatches of one view. Make it with `open`."""

    def __init__(self, path: Path, file: pq.ParquetFile, view: FeatureView, columns: Columns) -> None:
        self._path = path
        self._file = file
        self._view = view
        self.columns = columns
        self._features = {feature.name: feature for feature in view.features}
        self.rows: int = file.metadata.num_rows
        self.ignored = sorted(set(file.schema_arrow.names) - set(columns.all()))
        self.batch_rows = min(MAX_BATCH_ROWS, max(1, _BATCH_BYTES // sum(map(_row_bytes, view.features))))

    @classmethod
    def open(cls, path: Path, view: FeatureView, names: Mapping[str, str]) -> Self:
        """Open a file and find its columns; `names` says which column a feature, an id or `_event_time` is in, where it is named otherwise.

        Raises InvalidArgument (PARQUET_UNREADABLE; PARQUET_MISFIT with everything that does not fit).
        """
        try:
            file = pq.ParquetFile(path, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no Parquet file"
            raise InvalidArgument(f"{path} cannot be read: {reason}", reason="PARQUET_UNREADABLE") from error
        problems: list[Violation] = []
        columns = _find_columns(file.schema_arrow, view, names, problems)
        if problems:
            raise InvalidArgument(
                f"{path} does not fit feature view {view.name} version {view.version}", reason="PARQUET_MISFIT", violations=problems
            )
        return cls(path, file, view, columns)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this file from another, or from itself after a change: size, time of change, digest of its footer."""
        status = self._path.stat()
        footer = repr((self._file.schema_arrow, [self._file.metadata.row_group(n).to_dict() for n in range(self._file.num_row_groups)]))
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "footer": hashlib.sha256(footer.encode()).hexdigest()}

    def rows_before(self, position: Position) -> int:
        """Return how many rows lie before a position."""
        groups = (self._file.metadata.row_group(n) for n in range(position.row_group))
        return sum(int(group.num_rows) for group in groups) + position.row

    def batches(self, start: Position) -> Iterator[tuple[Position, pb.FeatureBatch]]:
        """Yield batches from a position on, each with the position after it.

        Raises InvalidArgument (PARQUET_MISFIT, naming column and row of the file) for a value that fits no cell, PARQUET_UNREADABLE.
        """
        for group in range(start.row_group, self._file.num_row_groups):
            at = 0
            skip = start.row if group == start.row_group else 0
            try:
                for table in self._file.iter_batches(self.batch_rows, row_groups=[group], columns=self.columns.all()):
                    rows = table.slice(max(0, skip - at))
                    at += table.num_rows
                    if rows.num_rows:
                        yield from self._sized(rows, group, at - rows.num_rows)
            except (OSError, pa.ArrowException) as error:
                raise InvalidArgument(
                    f"{self._path} cannot be read to its end: {type(error).__name__}", reason="PARQUET_UNREADABLE"
                ) from error

    def _sized(self, rows: pa.RecordBatch, group: int, at: int) -> Iterator[tuple[Position, pb.FeatureBatch]]:
        batch = self._batch(rows, self.rows_before(Position(group, at)))
        if batch.ByteSize() <= _MAX_MESSAGE_BYTES or rows.num_rows == 1:
            yield Position(group, at + rows.num_rows), batch
            return
        half = rows.num_rows // 2
        yield from self._sized(rows.slice(0, half), group, at)
        yield from self._sized(rows.slice(half), group, at + half)

    def _batch(self, rows: pa.RecordBatch, first_row: int) -> pb.FeatureBatch:
        cells = _Cells(rows, first_row)
        batch = pb.FeatureBatch(feature_view=self._view.name, view_version=self._view.version)
        self._put_ids(batch, cells)
        batch.event_times_us.extend(cells.times(self.columns.event_time).tolist())
        if self.columns.sequence:
            batch.sequences.extend(cells.numbers(self.columns.sequence, pa.uint64()).tolist())
        if self.columns.deleted:
            batch.deleted.extend(cells.numbers(self.columns.deleted, pa.bool_()).tolist())
        if self.columns.expires_at:
            batch.expires_at_us.extend(cells.times(self.columns.expires_at, missing=0).tolist())
        for group in _groups(self._view.features):
            cells.put(batch, group, [self.columns.features[feature.name] for feature in group])
        return batch

    def _put_ids(self, batch: pb.FeatureBatch, cells: _Cells) -> None:
        entity = self._view.entity
        if entity.key == "string":
            batch.ids.string_ids.extend(cells.ids(self.columns.ids[0], "string"))
        elif entity.key == "int64":
            batch.ids.int64_ids.extend(cells.ids(self.columns.ids[0], "int64"))
        else:
            parts = [cells.ids(name, part.type) for name, part in zip(self.columns.ids, entity.parts, strict=True)]
            kinds = [f"{part.type}_part" for part in entity.parts]
            for values in zip(*parts, strict=True):
                key = batch.ids.composite_ids.add()
                for kind, value in zip(kinds, values, strict=True):
                    key.parts.add(**{kind: value})


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of any file as Python values by column, times in microseconds. Raises InvalidArgument (PARQUET_UNREADABLE)."""
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(MAX_BATCH_ROWS):
                yield from pa.RecordBatch.from_arrays([_micros(column) for column in batch.columns], batch.schema.names).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InvalidArgument(f"{path} cannot be read: it is no whole Parquet file", reason="PARQUET_UNREADABLE") from error


def _micros(column: pa.Array) -> pa.Array:
    if not pa.types.is_timestamp(column.type):
        return column
    return pc.cast(column, pa.timestamp("us", "UTC" if column.type.tz is None else column.type.tz), safe=False)


# --- which column is what -----------------------------------------------------------------------------------------------------------------


def _find_columns(schema: pa.Schema, view: FeatureView, names: Mapping[str, str], problems: list[Violation]) -> Columns:
    known = {*(f.name for f in view.features), *_id_names(view), EVENT_TIME, SEQUENCE, DELETED, EXPIRES_AT, "id", "event_time"}
    problems.extend(
        Violation(f"--map {name}", f"feature view {view.name} has no such feature or part of its key")
        for name in sorted(set(names) - known)
    )

    def find(name: str, candidates: Sequence[str], what: str) -> str:
        wanted = names.get(name) or names.get(name.removeprefix("_"))
        found = next((c for c in ([wanted] if wanted else candidates) if c in schema.names), "")
        if not found and what:
            there = suggestion(wanted or candidates[0], schema.names)
            problems.append(
                Violation(
                    wanted or candidates[0], f"the file has no column for {what}{there}: name it with --map {name.removeprefix('_')}=COLUMN"
                )
            )
        return found

    columns = Columns(
        ids=tuple(find(name, candidates, "the entity's id") for name, candidates in _id_names(view).items()),
        event_time=find(EVENT_TIME, (EVENT_TIME, "event_time", "event_timestamp"), "the event time"),
        sequence=find(SEQUENCE, (SEQUENCE,), ""),
        deleted=find(DELETED, (DELETED,), ""),
        expires_at=find(EXPIRES_AT, (EXPIRES_AT,), ""),
        features={feature.name: find(feature.name, (feature.name,), f"feature {feature.name}") for feature in view.features},
    )
    for name, part in zip(columns.ids, view.entity.parts or (None,), strict=False):
        kind = part.type if part else view.entity.key
        _check(schema, name, "the entity's id", _is_text if kind == "string" else pa.types.is_integer, kind, problems)
    _check(schema, columns.event_time, "the event time", _is_time, "a timestamp, or int64 microseconds since the epoch", problems)
    _check(schema, columns.expires_at, "the expiry", _is_time, "a timestamp, or int64 microseconds since the epoch", problems)
    _check(schema, columns.sequence, "the sequence", pa.types.is_integer, "an integer", problems)
    _check(schema, columns.deleted, "deletions", pa.types.is_boolean, "a bool", problems)
    for feature in view.features:
        _check_feature(schema, columns.features[feature.name], feature, problems)
    return columns


def _id_names(view: FeatureView) -> dict[str, tuple[str, ...]]:
    """Return what ids are called, and under which names they are looked for."""
    kind = view.entity.type
    if view.entity.parts:
        return {f"{ID}.{part.name}": (f"{ID}.{part.name}", part.name) for part in view.entity.parts}
    return {ID: (ID, f"{kind}_id", kind, "id", "entity_id")}


def _check(schema: pa.Schema, name: str, what: str, fits: Any, wanted: str, problems: list[Violation]) -> None:
    if name and not fits(_plain_type(schema.field(name).type)):
        problems.append(Violation(name, f"{what} must be {wanted}, and the column is {schema.field(name).type}"))


def _check_feature(schema: pa.Schema, name: str, feature: Feature, problems: list[Violation]) -> None:
    if not name:
        return
    given = _plain_type(schema.field(name).type)
    element = given
    if feature.width or feature.max_length:
        if not (pa.types.is_list(given) or pa.types.is_large_list(given) or pa.types.is_fixed_size_list(given)):
            problems.append(Violation(name, f"feature {feature.name} takes a list in each row, and the column is {given}"))
            return
        if pa.types.is_fixed_size_list(given) and feature.width and given.list_size != feature.width:
            problems.append(
                Violation(name, f"feature {feature.name} takes {feature.width} values in each row, and the column has {given.list_size}")
            )
            return
        element = given.value_type
    if not _element_fits(feature, element):
        problems.append(Violation(name, f"feature {feature.name} is {feature.dtype}, and the column is {given}"))


def _element_fits(feature: Feature, given: pa.DataType) -> bool:
    match feature.dtype:
        case "string":
            return _is_text(given)
        case "bool":
            return bool(pa.types.is_boolean(given))
        case "timestamp":
            return _is_time(given)
        case dtype if dtype.startswith("int"):
            return bool(pa.types.is_integer(given))
        case _:
            return bool(pa.types.is_floating(given) or pa.types.is_integer(given))


def _is_text(given: pa.DataType) -> bool:
    return bool(pa.types.is_string(given) or pa.types.is_large_string(given))


def _is_time(given: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(given) or given == pa.int64())


def _plain_type(given: pa.DataType) -> pa.DataType:
    return given.value_type if pa.types.is_dictionary(given) else given


def _row_bytes(feature: Feature) -> int:
    size = wire_type(feature).size_bytes or _TEXT_BYTES
    return size * (feature.width or feature.max_length or 1)


def _groups(features: Sequence[Feature]) -> Iterator[list[Feature]]:
    """Yield neighbouring numbers of one type together, which then travel as one matrix, and everything else alone."""
    group: list[Feature] = []
    for feature in features:
        if group and not (_is_number(group[0]) and _is_number(feature) and wire_type(group[0]) == wire_type(feature)):
            yield group
            group = []
        group.append(feature)
    if group:
        yield group


def _is_number(feature: Feature) -> bool:
    return not (feature.width or feature.max_length or feature.dtype == "string")


# --- from Arrow to the wire ---------------------------------------------------------------------------------------------------------------


class _Cells:
    """Some rows of the file; errors name the row of the whole file."""

    def __init__(self, rows: pa.RecordBatch, first_row: int) -> None:
        self._rows = rows
        self._first_row = first_row

    def ids(self, name: str, kind: str) -> list[Any]:
        column = self._present(name)
        values: list[Any] = self._cast(name, column, pa.string() if kind == "string" else pa.int64()).to_pylist()
        return values

    def times(self, name: str, missing: int | None = None) -> npt.NDArray[np.int64]:
        """Microseconds since the epoch; a time without a zone is UTC."""
        column = self._column(name) if missing is not None else self._present(name)
        values = _times(column, missing or 0)
        if pa.types.is_integer(column.type):
            small = (values > 0) & (values < _EARLIEST_US)
            if small.any():
                self._refuse(name, "a time is before 1973: give microseconds since the epoch, not seconds or milliseconds", small)
        return values

    def numbers(self, name: str, wanted: pa.DataType) -> npt.NDArray[Any]:
        return _numpy(self._cast(name, self._present(name), wanted))

    def put(self, batch: pb.FeatureBatch, features: Sequence[Feature], names: Sequence[str]) -> None:
        """Add a FeatureColumn with these features, which are of one type."""
        first = features[0]
        column = batch.columns.add(features=[feature.name for feature in features], dtype=wire_type(first).number)
        given = [self._column(name) for name in names]
        if any(each.null_count for each in given):
            flags = np.stack([_numpy(each.is_null()) for each in given], axis=1)
            column.null_bits = np.packbits(flags, bitorder="little").tobytes()
        if first.dtype == "string":
            column.data, column.offsets = _texts(self._cast(names[0], given[0], pa.string()))
        elif first.width or first.max_length:
            column.data, column.offsets = self._lists(names[0], given[0], first)
        else:
            dtype = np.dtype(wire_type(first).numpy)
            block = np.empty((self._rows.num_rows, len(features)), dtype)
            for at, (name, each) in enumerate(zip(names, given, strict=True)):
                block[:, at] = self._values(name, each, first)
            column.data = block.tobytes()

    def _values(self, name: str, column: pa.Array, feature: Feature) -> npt.NDArray[Any]:
        if feature.dtype == "timestamp":
            return _times(column, 0)
        return _numpy(self._cast(name, column, _arrow_type(feature)))

    def _lists(self, name: str, column: pa.Array, feature: Feature) -> tuple[bytes, bytes]:
        lengths = _numpy(pc.list_value_length(column)).astype(np.int64)
        flat = column.flatten()  # what lies under a null is left out
        if flat.null_count:
            self._refuse(name, "a list holds a null", ~_lists_without_null(column))
        values = self._values(name, flat, feature).astype(np.dtype(wire_type(feature).numpy), copy=False)
        if not feature.width:
            return values.tobytes(), _offsets(lengths * values.dtype.itemsize)
        present = ~_numpy(column.is_null())
        if (lengths[present] != feature.width).any():
            self._refuse(name, f"feature {feature.name} takes {feature.width} values in each row", present & (lengths != feature.width))
        block = np.zeros((len(column), feature.width), values.dtype)
        block[present] = values.reshape(-1, feature.width)
        return block.tobytes(), b""

    def _column(self, name: str) -> pa.Array:
        column = self._rows.column(name)
        return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column

    def _present(self, name: str) -> pa.Array:
        column = self._column(name)
        if column.null_count:
            self._refuse(name, "a value is missing", _numpy(column.is_null()))
        return column

    def _cast(self, name: str, column: pa.Array, wanted: pa.DataType) -> pa.Array:
        """Cast where every value fits; a float may lose digits, as it does wherever it is stored in fewer bits."""
        if column.type == wanted:
            return column
        try:
            return pc.cast(column, wanted, safe=not pa.types.is_floating(wanted))
        except pa.ArrowInvalid:
            raise self._error(name, f"a value does not fit {wanted}") from None

    def _refuse(self, name: str, problem: str, where: npt.NDArray[np.bool_]) -> None:
        raise self._error(name, f"{problem} (row {self._first_row + int(np.flatnonzero(where)[0])} of the file, counted from 0)")

    def _error(self, name: str, problem: str) -> InvalidArgument:
        last = self._first_row + self._rows.num_rows - 1
        message = f"column {name}: {problem}; found among rows {self._first_row} to {last}"
        return InvalidArgument("the file holds what cannot be written", reason="PARQUET_MISFIT", violations=[Violation(name, message)])


def _arrow_type(feature: Feature) -> pa.DataType:
    return pa.from_numpy_dtype(np.dtype(wire_type(feature).numpy))


def _numpy(column: pa.Array) -> npt.NDArray[Any]:
    """Return values as numpy, zeros where there is none."""
    if column.null_count:
        column = pc.fill_null(column, pa.scalar(np.zeros((), column.type.to_pandas_dtype())[()], column.type))
    values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _times(column: pa.Array, missing: int) -> npt.NDArray[np.int64]:
    if pa.types.is_timestamp(column.type):
        column = pc.cast(column, pa.timestamp("us", column.type.tz), safe=False).view(pa.int64())
    values: npt.NDArray[np.int64] = pc.fill_null(column, missing).to_numpy(zero_copy_only=False)
    return values


def _texts(column: pa.Array) -> tuple[bytes, bytes]:
    """Return a string column's bytes, and where each begins and ends."""
    filled = pc.fill_null(column, "") if column.null_count else column
    _, offsets, data = filled.buffers()
    bounds = np.frombuffer(offsets, np.int32)[filled.offset : filled.offset + len(filled) + 1].astype(np.int64)
    text = b"" if data is None else data[int(bounds[0]) : int(bounds[-1])].to_pybytes()
    return text, (bounds - bounds[0]).astype("<u4").tobytes()


def _offsets(sizes: npt.NDArray[np.int64]) -> bytes:
    return np.concatenate(([0], np.cumsum(sizes))).astype("<u4").tobytes()


def _lists_without_null(column: pa.Array) -> npt.NDArray[np.bool_]:
    """Say for each row whether its list holds no null."""
    flags = np.ones(len(column), np.bool_)
    parents = pc.list_parent_indices(column)
    flags[_numpy(parents.filter(column.flatten().is_null()))] = False
    return flags


# --- from the wire to Arrow ---------------------------------------------------------------------------------------------------------------


class ParquetWriter:
    """Writes batches of one view to a file, which `ParquetRows` reads back as they were. Rows of features that a batch lacks are null."""

    def __init__(self, path: Path, view: FeatureView) -> None:
        self._view = view
        self._schema = _schema_of(view)
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_rows = 0
        self.rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, batch: pb.FeatureBatch) -> None:
        """Add the rows of a batch; row groups are made of many."""
        arrays = [*_id_arrays(batch, self._view), *_header_arrays(batch)]
        columns = {name: (column, at) for column in batch.columns for at, name in enumerate(column.features)}
        rows = len(arrays[0])
        for feature in self._view.features:
            place = columns.get(feature.name)
            arrays.append(pa.nulls(rows, _column_type(feature)) if place is None else _array(feature, *place, rows))
        self._waiting.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._waiting_rows += rows
        self.rows += rows
        if self._waiting_rows >= 100_000:
            self._flush()

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting).combine_chunks(), row_group_size=self._waiting_rows)
        self._waiting, self._waiting_rows = [], 0


def _schema_of(view: FeatureView) -> pa.Schema:
    kinds: list[str] = [part.type for part in view.entity.parts] or [view.entity.key]
    parts = zip(_id_names(view), kinds, strict=True)
    fields = [pa.field(name, pa.string() if kind == "string" else pa.int64(), nullable=False) for name, kind in parts]
    utc = pa.timestamp("us", "UTC")
    fields += [
        pa.field(EVENT_TIME, utc, nullable=False),
        pa.field(SEQUENCE, pa.uint64(), nullable=False),
        pa.field(DELETED, pa.bool_(), nullable=False),
        pa.field(EXPIRES_AT, utc),
    ]
    return pa.schema([*fields, *(pa.field(feature.name, _column_type(feature)) for feature in view.features)])


def _column_type(feature: Feature) -> pa.DataType:
    if feature.dtype == "string":
        return pa.string()
    element = pa.timestamp("us", "UTC") if feature.dtype == "timestamp" else _arrow_type(feature)
    if feature.width:
        return pa.list_(element, feature.width)
    return pa.list_(element) if feature.max_length else element


def _id_arrays(batch: pb.FeatureBatch, view: FeatureView) -> list[pa.Array]:
    if view.entity.key == "string":
        return [pa.array(batch.ids.string_ids, pa.string())]
    if view.entity.key == "int64":
        return [pa.array(batch.ids.int64_ids, pa.int64())]
    kinds = [("string_part", pa.string()) if part.type == "string" else ("int64_part", pa.int64()) for part in view.entity.parts]
    return [pa.array([getattr(key.parts[at], kind) for key in batch.ids.composite_ids], dtype) for at, (kind, dtype) in enumerate(kinds)]


def _header_arrays(batch: pb.FeatureBatch) -> list[pa.Array]:
    utc, rows = pa.timestamp("us", "UTC"), len(batch.event_times_us)
    expires = np.fromiter(batch.expires_at_us, np.int64, len(batch.expires_at_us)) if batch.expires_at_us else np.zeros(rows, np.int64)
    return [
        pa.array(np.fromiter(batch.event_times_us, np.int64, rows)).view(utc),
        pa.array(np.fromiter(batch.sequences, np.uint64, rows) if batch.sequences else np.zeros(rows, np.uint64)),
        pa.array(np.fromiter(batch.deleted, np.bool_, rows) if batch.deleted else np.zeros(rows, np.bool_)),
        pa.array(expires, mask=expires == 0).view(utc),
    ]


def _array(feature: Feature, column: Any, at: int, rows: int) -> pa.Array:
    """Return one feature of a FeatureColumn as Arrow."""
    count = len(column.features)
    nulls = np.zeros((rows, count), np.bool_)
    if column.null_bits:
        bits = np.unpackbits(np.frombuffer(column.null_bits, np.uint8), bitorder="little", count=rows * count)
        nulls = bits.reshape(rows, count).view(np.bool_)
    mask = nulls[:, at]
    if column.offsets:
        offsets = pa.array(np.frombuffer(column.offsets, "<u4").astype(np.int32) // max(1, wire_type(feature).size_bytes))
        if feature.dtype == "string":
            validity = pa.py_buffer(np.packbits(~mask, bitorder="little").tobytes())
            return pa.StringArray.from_buffers(rows, offsets.buffers()[1], pa.py_buffer(column.data), validity, int(mask.sum()))
        return pa.ListArray.from_arrays(offsets, _flat(feature, column.data), type=_column_type(feature), mask=pa.array(mask))
    if feature.width:
        return pa.FixedSizeListArray.from_arrays(_flat(feature, column.data), type=_column_type(feature), mask=pa.array(mask))
    values = np.frombuffer(column.data, wire_type(feature).numpy).reshape(rows, count)[:, at]
    made = pa.array(np.ascontiguousarray(values), mask=mask)
    return made.view(_column_type(feature)) if feature.dtype == "timestamp" else made


def _flat(feature: Feature, data: bytes) -> pa.Array:
    values = pa.array(np.frombuffer(data, wire_type(feature).numpy))
    return values.view(pa.timestamp("us", "UTC")) if feature.dtype == "timestamp" else values
