"""From a columnar FeatureBatch to packed rows in the store: checked whole, encoded as one block, written where newer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.retrieval import MAX_ROWS, ids_of
from feature_retrieval.row_codec import FLAG_TOMBSTONE, MAX_ID_BYTES, Bytes2D, Id, KeySpace, RowCodec, header, split
from feature_retrieval.store.redis import APPLIED, RedisStore
from feature_retrieval.views import schemas_of
from plait.dtypes import BY_NUMBER
from plait.errors import InvalidArgument, NotFound, Violation
from plait.registry.explain import suggestion
from plait.registry.records import FeatureSchema, FeatureView, Snapshot

MAX_FUTURE_S: Final = 300.0  # an event time further ahead would block every true update until then


class Ingestion:
    """Answers WriteFeatures. `snapshot` gives the newest registry snapshot."""

    def __init__(self, store: RedisStore, snapshot: Callable[[], Snapshot], clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._snapshot = snapshot
        self._clock = clock
        self._codecs: dict[tuple[str, int], tuple[FeatureSchema, RowCodec]] = {}

    async def write(self, batch: Any, result: Any, tenant: str) -> None:
        """Write a FeatureBatch; fill a WriteFeaturesResponse. Raises NotFound, InvalidArgument, Unavailable as the contract says."""
        view = self._snapshot().feature_views.get(batch.feature_view)
        if view is None:
            hint = suggestion(batch.feature_view, list(self._snapshot().feature_views))
            raise NotFound(
                f"no feature view {batch.feature_view!r}{hint}: see 'plait get featureview' for what there is",
                reason="FEATURE_VIEW_NOT_FOUND",
            )
        codec = self._codec(view)
        ids = _checked_ids(batch, view)
        block = encode(batch, codec, ids, view)
        good = self._refuse_bad_rows(block, ids, result)
        if good is not None:
            ids, block = [ids[at] for at in good.tolist()], block[good]
        if not ids:
            return
        space = KeySpace.of(tenant, view.entity.type, view.name, view.version)
        verdicts = await self._store.write(space.keys(ids), space.mark_keys(ids), split(block), int(view.retention_s * 1000))
        result.applied = verdicts.count(APPLIED)
        result.ignored = len(ids) - result.applied

    def _codec(self, view: FeatureView) -> RowCodec:
        schema = schemas_of(view)[-1]
        known = self._codecs.get((view.name, view.version))
        if known is None or known[0] is not schema:  # every snapshot has schemas of its own
            known = self._codecs[(view.name, view.version)] = (schema, RowCodec(schema))
        return known[1]

    def _refuse_bad_rows(self, block: Bytes2D, ids: Sequence[Id], result: Any) -> npt.NDArray[np.intp] | None:
        """Report rows whose time or id is impossible; return the positions of the others, None when all are good."""
        times = header(block)["event_time_us"]
        bad: dict[int, tuple[str, str]] = {}
        limit = int((self._clock() + MAX_FUTURE_S) * 1e6)
        for at in np.flatnonzero(times > limit).tolist():
            bad[at] = (
                "EVENT_TIME_IN_FUTURE",
                f"the event time is more than {MAX_FUTURE_S:.0f} s ahead of this service's clock: is it in microseconds?",
            )
        for at in np.flatnonzero(times <= 0).tolist():
            bad[at] = ("EVENT_TIME_INVALID", "the event time must be after 1970, in microseconds since the epoch")
        for at, entity_id in enumerate(ids):
            if isinstance(entity_id, str) and (
                not entity_id or (len(entity_id) > MAX_ID_BYTES // 4 and len(entity_id.encode()) > MAX_ID_BYTES)
            ):
                bad[at] = ("ID_INVALID", f"an id has 1 to {MAX_ID_BYTES} bytes of UTF-8")
        for at in sorted(bad):
            result.errors.add(row=at, reason=bad[at][0], message=bad[at][1])
        return np.delete(np.arange(len(ids)), list(bad)) if bad else None


def encode(batch: Any, codec: RowCodec, ids: Sequence[Id], view: FeatureView) -> Bytes2D:
    """Return [rows, row_bytes] rows of the batch. Raises InvalidArgument with every violation."""
    rows = len(ids)
    problems: list[Violation] = []
    block = codec.blank(rows)
    _encode_header(batch, block, rows, problems)
    nulls = np.ones((rows, len(codec.columns)), np.bool_)
    seen: set[str] = set()
    for at, column in enumerate(batch.columns):
        problem = _encode_column(column, codec, block, nulls, seen)
        if problem:
            problems.append(Violation(f"columns[{at}]", f"{problem} (view {view.name!r})"))
    if problems:
        raise InvalidArgument("the batch does not fit the view", violations=problems)
    codec.set_nulls(block, nulls)
    return block


def _checked_ids(batch: Any, view: FeatureView) -> Sequence[Id]:
    ids, problem = ids_of(batch.ids, view.entity.key)
    if len(ids) > MAX_ROWS:
        problem = f"{len(ids)} rows are given, at most {MAX_ROWS} are allowed in a batch"
    if problem and problem != "an id is empty":  # an empty id is that row's error only
        raise InvalidArgument("the batch's ids cannot be used", violations=[Violation("ids", problem)])
    return ids


def _encode_header(batch: Any, block: Bytes2D, rows: int, problems: list[Violation]) -> None:
    head = header(block)
    times = np.fromiter(batch.event_times_us, np.int64, len(batch.event_times_us))
    if times.size in (1, rows):
        head["event_time_us"] = times
    else:
        problems.append(Violation("event_times_us", f"{times.size} event times for {rows} rows: give one per row, or one for all"))
    sequences = np.fromiter(batch.sequences, np.uint64, len(batch.sequences))
    if sequences.size in (0, rows):
        head["sequence"] = sequences if sequences.size else 0
    else:
        problems.append(Violation("sequences", f"{sequences.size} sequences for {rows} rows: give one per row, or none"))
    deleted = np.fromiter(batch.deleted, np.bool_, len(batch.deleted))
    if deleted.size in (0, rows):
        if deleted.size:
            head["flags"] = np.where(deleted, FLAG_TOMBSTONE, 0)
    else:
        problems.append(Violation("deleted", f"{deleted.size} values for {rows} rows: give one per row, or none"))


def _encode_column(column: Any, codec: RowCodec, block: Bytes2D, nulls: npt.NDArray[np.bool_], seen: set[str]) -> str:
    """Copy one FeatureColumn into the block; return what is wrong with it (empty = nothing)."""
    rows, names = len(block), list(column.features)
    unknown = [name for name in names if name not in codec.columns]
    if unknown or not names:
        return f"unknown features {unknown}" if unknown else "no feature is named"
    repeated = [name for name in names if name in seen] or (names if len(set(names)) < len(names) else [])
    if repeated:
        return f"features given twice: {repeated}"
    seen.update(names)
    columns = [codec.columns[name] for name in names]
    given = BY_NUMBER.get(column.dtype)
    wrong = [name for name, c in zip(names, columns, strict=True) if given is None or given.name != c.dtype.name]
    if wrong:
        return f"dtype {given.name if given else 'unspecified'} is not the declared dtype of {wrong}"
    width = columns[0].dtype.itemsize
    if len(column.data) != rows * len(names) * width:
        return (
            f"{len(column.data)} bytes of data, expected {rows} rows x {len(names)} features x {width} bytes = {rows * len(names) * width}"
        )
    if column.null_bits and len(column.null_bits) != -(-rows * len(names) // 8):
        return f"{len(column.null_bits)} bytes of null bits, expected {-(-rows * len(names) // 8)}"
    values = np.frombuffer(column.data, np.uint8).reshape(rows, len(names) * width)
    flags = np.zeros((rows, len(names)), np.bool_)
    if column.null_bits:
        bits = np.unpackbits(np.frombuffer(column.null_bits, np.uint8), bitorder="little", count=rows * len(names))
        flags = bits.reshape(rows, len(names)).view(np.bool_)
    _copy_columns(values, flags, [(c.offset, c.index) for c in columns], width, block, nulls)
    return ""


def _copy_columns(
    values: Bytes2D, flags: npt.NDArray[np.bool_], places: list[tuple[int, int]], width: int, block: Bytes2D, nulls: npt.NDArray[np.bool_]
) -> None:
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
