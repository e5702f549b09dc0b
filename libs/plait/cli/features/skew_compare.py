"""What was served against what was recomputed offline, feature by feature.

The join is exact: a served row names the event time of the row it was made from, and is compared with the offline row of the same entity and
event time. Where offline has none, or a newer one that was there before the answer, that is told apart from values that differ.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from plait.api.types.v1 import types_pb2
from plait.dtypes import BY_NAME
from plait.registry.entity_ids import Id, composites
from plait.registry.records import Feature, FeatureSet, FeatureView
from plait.registry.references import parse, width_of
from plait.registry.shapes import code_of, stand_in, view_of, width, wire_type

Array = npt.NDArray[Any]
_WITH_A_ROW: Final = (types_pb2.ROW_STATUS_PRESENT, types_pb2.ROW_STATUS_NULL, types_pb2.ROW_STATUS_STALE)
_WITHOUT_A_ROW: Final = (types_pb2.ROW_STATUS_DEFAULTED, types_pb2.ROW_STATUS_NOT_FOUND)


@dataclass(slots=True)
class FeatureSkew:
    """How one feature compares: how many cells were compared, how many differ, and by how much at most (absolute)."""

    compared: int = 0
    mismatched: int = 0
    largest: float = 0.0

    @property
    def rate(self) -> float:
        """Share of cells that differ."""
        return self.mismatched / self.compared if self.compared else 0.0


@dataclass(slots=True)
class ViewSkew:
    """How the rows of one view were found: `matched` in both; `unmatched` served from a row that offline does not have; `behind` of these or
    the matched, offline has a newer row from before the answer; `absent`: no row was served, and offline had one."""

    matched: int = 0
    unmatched: int = 0
    behind: int = 0
    absent: int = 0


@dataclass(slots=True)
class Skew:
    """The whole comparison. `rows`: served rows looked at; `misfits` of them are of another shape or view version than the set has now;
    `left_out`: references that have no stored value to compare with."""

    features: dict[str, FeatureSkew] = field(default_factory=dict)
    views: dict[str, ViewSkew] = field(default_factory=dict)
    rows: int = 0
    misfits: int = 0
    left_out: tuple[str, ...] = ()


class Offline:
    """Recomputed rows of one view, from FeatureBatches."""

    def __init__(self, view: FeatureView) -> None:
        self.view = view
        self._rows: dict[Id, list[tuple[int, int]]] = {}  # event time, place in the columns
        self._count = 0
        self._pieces: dict[str, list[tuple[Array, Array]]] = {feature.name: [] for feature in view.features}
        self._columns: dict[str, tuple[Array, Array]] = {}

    def add(self, batch: Any) -> None:
        """Take the rows of a FeatureBatch of this view."""
        ids: Any = batch.ids.string_ids[:] or batch.ids.int64_ids[:] or composites(batch.ids)
        deleted = list(batch.deleted) or [False] * len(ids)
        times = list(batch.event_times_us) if len(batch.event_times_us) == len(ids) else [batch.event_times_us[0]] * len(ids)
        for at, (entity_id, time_us) in enumerate(zip(ids, times, strict=True)):
            self._rows.setdefault(entity_id, []).append((time_us, -1 if deleted[at] else self._count + at))
        given = {name: (column, place) for column in batch.columns for place, name in enumerate(column.features)}
        for feature in self.view.features:
            column = given.get(feature.name)
            size = (len(ids), width_of(feature))
            blank = (np.zeros(size, _stored(feature)), np.ones(size[0], np.bool_))
            self._pieces[feature.name].append(blank if column is None else _decoded(feature, *column, size[0]))
        self._count += len(ids)

    def finish(self) -> None:
        """Make ready to be asked."""
        for rows in self._rows.values():
            rows.sort()
        for feature in self.view.features:
            pieces = self._pieces.pop(feature.name) or [(np.zeros((0, width_of(feature)), _stored(feature)), np.zeros(0, np.bool_))]
            values, nulls = (np.concatenate(part) for part in zip(*pieces, strict=True))
            self._columns[feature.name] = values, nulls

    def at(self, entity_id: Id, time_us: int) -> int | None:
        """Return the place of the row with exactly this event time, None where there is none or it is a deletion."""
        rows = self._rows.get(entity_id, [])
        found = bisect_right(rows, (time_us, self._count))
        place = rows[found - 1][1] if found and rows[found - 1][0] == time_us else -1
        return place if place >= 0 else None

    def newest(self, entity_id: Id, until_us: int) -> tuple[int, int] | None:
        """Return event time and place of the newest row up to a time, place -1 for a deletion; None where there is none."""
        rows = self._rows.get(entity_id, [])
        found = bisect_right(rows, (until_us, self._count))
        return rows[found - 1] if found else None

    def expected(self, feature: Feature, places: npt.NDArray[np.intp], dtype: np.dtype[Any]) -> Array:
        """Return what a tensor of that dtype holds for some rows: [rows, columns]."""
        values, nulls = (part[places] for part in self._columns[feature.name])
        if feature.scale:
            values = values * np.float32(feature.scale)
        with np.errstate(all="ignore"):
            cast = values.astype(dtype)
        beyond = np.isinf(cast) & np.isfinite(values)  # of a tensor that cannot hold it: counts as null
        cast[nulls | beyond.any(axis=1)] = np.array(stand_in(feature)).astype(dtype)
        return cast


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a stored feature is in the set's tensors."""

    reference: str
    feature: Feature
    tensor: str
    first: int
    dtype: np.dtype[Any]


@dataclass(slots=True)
class _Gathered:
    """Served cells of one view, and the offline rows they belong to."""

    places: list[int] = field(default_factory=list)
    rows: dict[str, list[bytes]] = field(default_factory=dict)  # by tensor


def compare(
    rows: Iterable[Any], feature_set: FeatureSet, views: Mapping[str, FeatureView], offline: list[Offline], tolerance: float
) -> Skew:
    """Compare ServedRows with offline rows. Cells differ where they are further apart than `tolerance` (absolute); NaN equals NaN."""
    skew = Skew(left_out=_left_out(feature_set, offline, views))
    by_view = {(o.view.name, o.view.version): o for o in offline}
    placed = {key: _places(feature_set, views, o.view) for key, o in by_view.items()}
    widths = {item.name: sum(width(text, feature_set, views) or 0 for text in item.features) for item in feature_set.inputs}
    gathered = {key: _Gathered() for key in by_view}
    for row in rows:
        if row.feature_set != feature_set.name:
            continue
        skew.rows += 1
        if not _fits(row, widths, by_view):
            skew.misfits += 1
            continue
        for served in row.views:
            key = (served.feature_view, served.view_version)
            if key in by_view:
                _gather(row, served, by_view[key], skew.views.setdefault(served.feature_view, ViewSkew()), gathered[key])
    for key, found in gathered.items():
        for place in placed[key]:
            _count(place, by_view[key], found, tolerance, skew.features.setdefault(place.reference, FeatureSkew()))
    return skew


def _left_out(feature_set: FeatureSet, offline: list[Offline], views: Mapping[str, FeatureView]) -> tuple[str, ...]:
    known = {(o.view.name, o.view.version) for o in offline}
    left: dict[str, None] = {}
    for item in feature_set.inputs:
        for text in item.features:
            reference = parse(text)
            view = view_of(reference, views) if reference is not None and reference.kind == "stored" else None
            if view is None or (view.name, view.version) not in known:
                left[text] = None
    return tuple(left)


def _places(feature_set: FeatureSet, views: Mapping[str, FeatureView], view: FeatureView) -> list[_Place]:
    places: list[_Place] = []
    for item in feature_set.inputs:
        column = 0
        for text in item.features:
            reference = parse(text)
            if reference is not None and reference.kind == "stored" and view_of(reference, views) == view:
                feature = next(f for f in view.features if f.name == reference.feature)
                places.append(_Place(text, feature, item.name, column, np.dtype(BY_NAME[item.dtype].numpy)))
            column += width(text, feature_set, views) or 0
    return places


def _fits(row: Any, widths: Mapping[str, int], by_view: Mapping[tuple[str, int], Offline]) -> bool:
    """Whether a served row has the columns the set has now, and names no other version of a view."""
    names = {name for name, _ in by_view}
    current = all(v.feature_view not in names or (v.feature_view, v.view_version) in by_view for v in row.views)
    return current and all(widths.get(t.name) == t.shape[1] for t in row.tensors)


def _gather(row: Any, served: Any, offline: Offline, found: ViewSkew, gathered: _Gathered) -> None:
    [entity_id] = row.id.string_ids[:] or row.id.int64_ids[:] or composites(row.id)
    newest = offline.newest(entity_id, row.served_at_us)
    if served.status in _WITHOUT_A_ROW:
        found.absent += newest is not None and newest[1] >= 0
        return
    if served.status not in _WITH_A_ROW:
        return
    found.behind += newest is not None and newest[0] > served.event_time_us
    place = offline.at(entity_id, served.event_time_us)
    if place is None:
        found.unmatched += 1
        return
    found.matched += 1
    gathered.places.append(place)
    for tensor in row.tensors:
        gathered.rows.setdefault(tensor.name, []).append(tensor.data)


def _count(place: _Place, offline: Offline, gathered: _Gathered, tolerance: float, found: FeatureSkew) -> None:
    data = gathered.rows.get(place.tensor)
    if not data:
        return
    columns = slice(place.first, place.first + width_of(place.feature))
    served = np.frombuffer(b"".join(data), place.dtype).reshape(len(data), -1)[:, columns]
    expected = offline.expected(place.feature, np.array(gathered.places, np.intp), place.dtype)
    with np.errstate(all="ignore"):
        apart = np.abs(served.astype(np.float64) - expected.astype(np.float64))
    same = (served == expected) | (apart <= tolerance) | ((served != served) & (expected != expected))  # noqa: PLR0124  (NaN)
    found.compared += same.size
    found.mismatched += int(np.count_nonzero(~same))
    finite = apart[~same & np.isfinite(apart)]
    found.largest = max(found.largest, float(finite.max(initial=0.0)))


# --- columns of a FeatureBatch ------------------------------------------------------------------------------------------------------------


def _stored(feature: Feature) -> np.dtype[Any]:
    return np.dtype(np.int32) if feature.dtype == "string" else np.dtype(wire_type(feature).numpy)


def _decoded(feature: Feature, column: Any, at: int, rows: int) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return one feature of a FeatureColumn as [rows, columns of a tensor], text as codes and lists padded, and which rows are null."""
    count = len(column.features)
    nulls = np.zeros((rows, count), np.bool_)
    if column.null_bits:
        bits = np.unpackbits(np.frombuffer(column.null_bits, np.uint8), bitorder="little", count=rows * count)
        nulls = bits.reshape(rows, count).view(np.bool_)
    if not column.offsets:
        values = np.frombuffer(column.data, _stored(feature)).reshape(rows, count, -1)
        return values[:, at], nulls[:, at]
    bounds = np.frombuffer(column.offsets, "<u4").reshape(-1)
    pieces = [column.data[bounds[n] : bounds[n + 1]] for n in range(at, rows * count, count)]
    if feature.dtype == "string":
        codes = {text: code_of(feature, text) for text in set(pieces)}
        return np.array([[codes[text]] for text in pieces], np.int32).reshape(rows, 1), nulls[:, at]
    padded = np.full((rows, feature.max_length), feature.pad).astype(_stored(feature))
    for row, piece in enumerate(pieces):
        given = np.frombuffer(piece, _stored(feature))
        padded[row, : len(given)] = given
    return padded, nulls[:, at]
