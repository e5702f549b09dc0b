"""From rows to tensors: runs of columns, defaults where there is no value, and what is true of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.row_codec import FLAG_TOMBSTONE, Bytes2D, header
from feature_retrieval.view_read import ViewRead
from feature_retrieval.views import Picture, ViewPlan
from plait.api.types.v1 import types_pb2

_PRESENT: Final = types_pb2.ROW_STATUS_PRESENT
_NULL: Final = types_pb2.ROW_STATUS_NULL
_DEFAULTED: Final = types_pb2.ROW_STATUS_DEFAULTED
_NOT_FOUND: Final = types_pb2.ROW_STATUS_NOT_FOUND
_STALE: Final = types_pb2.ROW_STATUS_STALE
_TIMED_OUT: Final = types_pb2.ROW_STATUS_TIMED_OUT
_UNAVAILABLE: Final = types_pb2.ROW_STATUS_UNAVAILABLE

Tensor = npt.NDArray[np.generic]
Index = npt.NDArray[np.intp]
Valueless = tuple[int, npt.NDArray[np.bool_]]  # a column of the codec, and in which rows it has no value


@dataclass(slots=True)
class Placed:
    """What is true of the rows of one view.

    `statuses` uint8 [rows], None = all PRESENT. `times` int64 [rows], event times in µs since the epoch, 0 where there is no row.
    `defaulted` int64 [rows], how many answered cells of the view hold a default, None = none.
    """

    statuses: npt.NDArray[np.uint8] | None
    times: npt.NDArray[np.int64]
    defaulted: npt.NDArray[np.int64] | None

    def expanded(self, inverse: Index | None) -> Placed:
        """Return the same by the caller's rows."""
        if inverse is None:
            return self
        statuses = None if self.statuses is None else self.statuses[inverse]
        return Placed(statuses, self.times[inverse], None if self.defaulted is None else self.defaulted[inverse])


def place(read: ViewRead, tensors: Sequence[Tensor], now_us: int) -> Placed:
    """Fill one view's cells of the tensors [rows, columns]; return what is true of each row at `now_us` (µs since the epoch)."""
    return _place_clean(read, tensors, now_us) or _place_all(read, tensors, now_us)


def _place_clean(read: ViewRead, tensors: Sequence[Tensor], now_us: int) -> Placed | None:
    """The common case: every row came from the near cache and is simply good. Copy them; None where it is not so."""
    found, view = read.found, read.view
    if found is None or not found.clean or now_us >= found.until_us or view.current.computed:
        return None
    times = header(found.rows)["event_time_us"]
    if view.view.max_age_s > 0 and times.min(initial=now_us) < now_us - int(view.view.max_age_s * 1e6):
        return None
    if copy_runs(view, view.current, found.rows, slice(None), tensors):
        return None
    return Placed(None, times, None)


def _place_all(read: ViewRead, tensors: Sequence[Tensor], now_us: int) -> Placed:
    """Copy one view's rows into the tensors, defaults where there are none."""
    count, view = len(read.ids), read.view
    placed = Placed(np.zeros(count, np.uint8), np.zeros(count, np.int64), None)
    statuses = placed.statuses
    assert statuses is not None  # noqa: S101
    for picture, block, index in read.blocks():
        _place_block(view, picture, block, index, tensors, placed, now_us)
    for unknown, status in ((read.late, _TIMED_OUT), (read.failed, _UNAVAILABLE)):
        if unknown.size:
            statuses[read.at(unknown)] = status
    absent = np.flatnonzero(statuses == 0)
    if absent.size:
        statuses[absent] = _DEFAULTED if view.has_all_defaults else _NOT_FOUND
    if absent.size or read.late.size or read.failed.size:
        empty = np.flatnonzero((statuses >= _DEFAULTED) & (statuses != _STALE))
        for at, cells in view.cells.items():
            tensors[at][np.ix_(empty, cells)] = view.defaults[at]
        _count(placed, empty, view.answered_cells)
    return placed


def _place_block(
    view: ViewPlan, picture: Picture, block: Bytes2D, index: Index | None, tensors: Sequence[Tensor], placed: Placed, now_us: int
) -> None:
    """Copy one block of rows of one schema: runs of columns, computed columns, defaults over nulls, then what is true of each row."""
    rows: Index | slice = slice(None) if index is None else index
    valueless = copy_runs(view, picture, block, rows, tensors)
    valueless += _compute(picture, block, rows, tensors, now_us)
    head = header(block)
    status = np.full(len(block), _PRESENT, np.uint8)
    gone = head["flags"] & FLAG_TOMBSTONE != 0
    nulls = picture.codec.has_null(block, picture.null_mask)
    for _, without in valueless:
        nulls |= without
    if picture.absent or nulls.any():
        where = np.flatnonzero(~gone) if picture.absent else np.flatnonzero(nulls & ~gone)
        status[where] = _NULL
        unknown = np.ones((len(where), len(picture.codec.columns) + 1), np.bool_)  # the last: columns the schema does not have
        unknown[:, :-1] = picture.codec.nulls(block[where])
        for source, without in valueless:
            unknown[:, source] |= without[where]
        at = where if index is None else index[where]
        _count(placed, at, _default_nulls(view, picture, unknown, at, tensors))
    times = head["event_time_us"]
    if view.view.max_age_s > 0:
        status[times < now_us - int(view.view.max_age_s * 1e6)] = _STALE
    expires = head["expires_us"]
    if expires.any():
        status[(expires > 0) & (expires < now_us)] = _STALE
    if gone.any():
        status[gone] = 0
        times = np.where(gone, 0, times)
    assert placed.statuses is not None  # noqa: S101
    placed.statuses[rows] = status
    placed.times[rows] = times


def copy_runs(view: ViewPlan, picture: Picture, block: Bytes2D, rows: Index | slice, tensors: Sequence[Tensor]) -> list[Valueless]:
    """Copy columns as they are; return those whose number is beyond the tensor's dtype in some rows: to answer infinity would be a lie."""
    valueless: list[Valueless] = []
    for run in picture.runs:
        values = block[:, run.row_from : run.row_to].view(run.dtype)
        if run.scale:
            values = values * np.float32(run.scale)
        if run.narrows:
            with np.errstate(over="ignore"):
                narrowed = values.astype(tensors[run.tensor].dtype)
            beyond = np.isinf(narrowed) & np.isfinite(values)
            if beyond.any():
                places = np.searchsorted(view.cells[run.tensor], np.arange(run.column_from, run.column_to))
                valueless += zip(picture.sources[run.tensor][places].tolist(), beyond.T, strict=True)
            values = narrowed
        tensors[run.tensor][rows, run.column_from : run.column_to] = values
    return valueless


def _compute(picture: Picture, block: Bytes2D, rows: Index | slice, tensors: Sequence[Tensor], now_us: int) -> list[Valueless]:
    """Fill the computed columns; return those that have no value in some rows, by the codec's column, and in which."""
    valueless: list[Valueless] = []
    for column in picture.computed:
        values, known = column.computed.evaluate(block[:, column.row_from : column.row_to], now_us)
        tensor = tensors[column.tensor]
        values, fitting = _fitted(values, tensor.dtype)
        known = fitting if known is None else known if fitting is None else known & fitting
        tensor[rows, column.column] = values
        if known is not None:
            valueless.append((column.source, ~known))
    return valueless


def _fitted(values: npt.NDArray[np.float64], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Return values as a tensor of `dtype` holds them, whole numbers rounded half to even, and which of them it can hold (None = all)."""
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            cast = values.astype(dtype)
        fits = np.isfinite(cast)
    else:
        cast, bounds = np.rint(values), np.iinfo(dtype)
        fits = (cast >= float(bounds.min)) & (cast < float(bounds.max) + 1)
    if fits.all():
        return cast, None
    return np.where(fits, cast, 0), fits


def _default_nulls(
    view: ViewPlan, picture: Picture, unknown: npt.NDArray[np.bool_], index: Index, tensors: Sequence[Tensor]
) -> npt.NDArray[np.int64]:
    """Put each feature's default where its cell is `unknown` [rows, codec's columns + 1]; return how many answered cells of each row."""
    counts = np.zeros(len(unknown), np.int64)
    for at, cells in view.cells.items():
        here_unknown = unknown[:, picture.sources[at]]
        here = np.ix_(index, cells)
        tensors[at][here] = np.where(here_unknown, view.defaults[at], tensors[at][here])
        if at < view.answered:
            counts += np.count_nonzero(here_unknown, axis=1)
    return counts


def _count(placed: Placed, rows: Index, cells: npt.NDArray[np.int64] | int) -> None:
    if placed.defaulted is None:
        placed.defaulted = np.zeros(len(placed.times), np.int64)
    placed.defaulted[rows] = cells
