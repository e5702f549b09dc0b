"""The state of one aggregated feature in a row, by function: how events change it, and what it is worth at a moment.

A state is a fixed number of bytes, and every merge is exact and commutative (int64 fixed point, minimum, maximum), so that any order, batching
and repetition of the same merges ends in the same bytes. What a window is worth is computed when it is read: it is right although no event
comes. A window of n tiles spans the last n tiles, the one under way included: between n - 1 and n tiles of time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from feature_retrieval.aggregation.distinct import Hashes, estimate, registers_of
from feature_retrieval.aggregation.rings import NEVER, Bools, Index, Ints, Landing, Ring
from plait.registry.records import Aggregate

MICRO: Final = 1_000_000  # sums are whole millionths
MAX_VALUE: Final = (1 << 53) / MICRO  # of an event in a sum, a mean or a decayed sum: what a double holds to the millionth
OVERFLOW: Final = -(1 << 63)  # a tile whose sum left int64; it stays so, and its feature is null while it is in the window

_FULL: Final = 2.0**63 - 2.0**40  # where a sum counts as having left int64, with room for the rounding of the check
_DECAY_TILES: Final = 64
_DECAY_TILES_PER_HALF_LIFE: Final = 8
_PHASES: Final = 256
# 2 ** (part of a tile) in steps of 1/256, as whole 2 ** -20: the same numbers on every machine, whatever its libm rounds.
_PHASE_WEIGHTS: Final = np.array([round(2 ** ((n + 0.5) / _PHASES / _DECAY_TILES_PER_HALF_LIFE) * (1 << 20)) for n in range(_PHASES)]) / (
    1 << 20
)

Bytes2D = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Taken:
    """Events as one feature takes them, parallel arrays: the row they change, their time, what they count for and what tells them apart.

    `values` [events] float64; `hashes` [events] uint64, for `distinct` only, else empty.
    """

    rows: Index
    times_us: Ints
    values: Floats
    hashes: Hashes
    fingerprints: Ints


class Window(Protocol):
    """The state of one feature; `state` is [rows, size_bytes], a part of a block of rows."""

    size_bytes: int

    def blank(self) -> bytes:
        """Return the state before any event."""
        ...

    def merge(self, state: Bytes2D, events: Taken) -> None:
        """Let events change the state in place."""
        ...

    def evaluate(self, state: Bytes2D, now_us: int) -> tuple[Floats, Bools | None]:
        """Return [rows] values now, and where there is one (None = everywhere)."""
        ...


def window_of(aggregate: Aggregate) -> Window:
    """Return how the state of an aggregate is kept."""
    if aggregate.half_life_s > 0:
        return Decayed(aggregate.half_life_s)
    ring = _ring(aggregate)
    if aggregate.function == "mean":
        return Means(ring)
    if aggregate.function in {"min", "max"}:
        return Extremes(ring, largest=aggregate.function == "max")
    if aggregate.function == "last":
        return Last(round(aggregate.window_s * MICRO))
    if aggregate.function == "distinct":
        return Distinct(ring, aggregate.precision)
    return Totals(ring)


def _ring(aggregate: Aggregate) -> Ring:
    if not aggregate.window_s:
        return Ring(1, 0)
    tile_s = aggregate.tile_s or aggregate.window_s
    return Ring(max(1, round(aggregate.window_s / tile_s)), max(1, round(tile_s * MICRO)))


class Totals:
    """count, sum: {newest tile i64, T x sum i64, in millionths}."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self.size_bytes = 8 + 8 * ring.tiles

    def blank(self) -> bytes:
        """Return the state before any event."""
        return struct.pack("<q", NEVER) + bytes(8 * self._ring.tiles)

    def merge(self, state: Bytes2D, events: Taken) -> None:
        """Add the events' values to their tiles."""
        landing = _advance(self._ring, state, events, (_cells(state, 8, self._ring.tiles, "<i8"),), 0)
        _add(_cells(state, 8, self._ring.tiles, "<i8"), landing.cells, _millionths(events.values[landing.kept]))

    def evaluate(self, state: Bytes2D, now_us: int) -> tuple[Floats, Bools | None]:
        """Return the sum of the live tiles; null where one overflowed."""
        return _sum(_cells(state, 8, self._ring.tiles, "<i8"), self._ring.live(_newest(state), now_us))


class Means:
    """mean: {newest tile i64, T x sum i64 in millionths, T x count i64}."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self.size_bytes = 8 + 16 * ring.tiles

    def blank(self) -> bytes:
        """Return the state before any event."""
        return struct.pack("<q", NEVER) + bytes(16 * self._ring.tiles)

    def merge(self, state: Bytes2D, events: Taken) -> None:
        """Add the events' values and how many they are to their tiles."""
        tiles = self._ring.tiles
        sums, counts = _cells(state, 8, tiles, "<i8"), _cells(state, 8 + 8 * tiles, tiles, "<i8")
        landing = _advance(self._ring, state, events, (sums, counts), 0)
        _add(sums, landing.cells, _millionths(events.values[landing.kept]))
        _add(counts, landing.cells, np.ones(len(landing.cells), np.int64))

    def evaluate(self, state: Bytes2D, now_us: int) -> tuple[Floats, Bools | None]:
        """Return the mean over the live tiles; null where no event is in them or a sum overflowed."""
        tiles = self._ring.tiles
        live = self._ring.live(_newest(state), now_us)
        total, known = _sum(_cells(state, 8, tiles, "<i8"), live)
        count = np.where(live, _cells(state, 8 + 8 * tiles, tiles, "<i8"), 0).sum(axis=1)
        some = count > 0
        return total / np.maximum(count, 1), some if known is None else some & known


class Decayed:
    """Decayed count or sum: {newest tile i64, 64 x sum i64}: each tile an eighth of the half-life, weighed as of the tile's start.

    The forward decay of G. Cormode, V. Shkapenyuk, D. Srivastava, B. Xu (Forward decay: a practical time decay model for streaming systems,
    ICDE 2009), kept exact by whole millionths and by weights of 256 steps per tile: each event's weight is within 0.02 % of true, and what is
    older than 8 half-lives (less than 0.4 % of its weight) is dropped.
    """

    def __init__(self, half_life_s: float) -> None:
        self._half_life_us = half_life_s * MICRO
        self._ring = Ring(_DECAY_TILES, max(1, round(self._half_life_us / _DECAY_TILES_PER_HALF_LIFE)))
        self._totals = Totals(self._ring)
        self.size_bytes = self._totals.size_bytes

    def blank(self) -> bytes:
        """Return the state before any event."""
        return self._totals.blank()

    def merge(self, state: Bytes2D, events: Taken) -> None:
        """Add the events' values, weighed up by how far into its tile each is."""
        phase = (events.times_us % self._ring.tile_us) * _PHASES // self._ring.tile_us
        weighed = events.values * _PHASE_WEIGHTS[phase]
        self._totals.merge(state, Taken(events.rows, events.times_us, weighed, events.hashes, events.fingerprints))

    def evaluate(self, state: Bytes2D, now_us: int) -> tuple[Floats, Bools | None]:
        """Return the sum of the tiles, each halved once per half-life since it began; null where one overflowed."""
        tiles, newest = _cells(state, 8, _DECAY_TILES, "<i8"), _newest(state)
        live = self._ring.live(newest, now_us)
        began = np.where(live, newest[:, None] - self._ring.age(newest), 0) * self._ring.tile_us
        age_us = np.where(live, np.maximum(now_us - began, 0), 0)  # a clock that is ahead makes an event no heavier
        weighed = np.where(live, tiles, 0) * np.exp2(-age_us / self._half_life_us)
        _, known = _sum(tiles, live)
        return weighed.sum(axis=1) / MICRO, known


class Extremes:
    """min, max: {newest tile i64, T x f64}, an infinity where a tile has no event."""

    def __init__(self, ring: Ring, *, largest: bool) -> None:
        self._ring = ring
        self._better = np.maximum if largest else np.minimum
        self._none = -np.inf if largest else np.inf
        self.size_bytes = 8 + 8 * ring.tiles

    def blank(self) -> bytes:
        """Return the state before any event."""
        return struct.pack("<q", NEVER) + struct.pack("<d", self._none) * self._ring.tiles

    def merge(self, state: Bytes2D, events: Taken) -> None:
        """Keep each tile's extreme."""
        cells = _cells(state, 8, self._ring.tiles, "<f8")
        landing = _advance(self._ring, state, events, (cells,), self._none)
        touched, inverse = np.unique(landing.cells, return_inverse=True)
        best = np.full(len(touched), self._none)
        self._better.at(best, inverse, events.values[landing.kept] + 0.0)  # -0.0 + 0.0 is 0.0: equal values have equal bytes
        where = np.divmod(touched, self._ring.tiles)
        cells[where] = self._better(cells[where], best)

    def evaluate(self, state: Bytes2D, now_us: int) -> tuple[Floats, Bools | None]:
        """Return the extreme of the live tiles; null where no event is in them."""
        live = self._ring.live(_newest(state), now_us)
        found: Floats = self._better.reduce(np.where(live, _cells(state, 8, self._ring.tiles, "<f8"), self._none), axis=1)
        known = np.isfinite(found)
        return np.where(known, found, 0.0), known


class Last:
    """last: {event time µs i64, fingerprint i64, value f64} of the newest event; of several at one time, the one of the largest fingerprint."""

    size_bytes = 24

    def __init__(self, window_us: int) -> None:
        self._window_us = window_us

    def blank(self) -> bytes:
        """Return the state before any event."""
        return struct.pack("<qqd", NEVER, 0, 0.0)

    def merge(self, state: Bytes2D, events: Taken) -> None:
        """Keep the newest event's value."""
        order = np.lexsort((events.fingerprints, events.times_us, events.rows))
        rows = events.rows[order]
        final = order[np.flatnonzero(np.append(rows[1:] != rows[:-1], [True]))] if len(order) else order
        rows, times, marks = events.rows[final], events.times_us[final], events.fingerprints[final]
        held, held_marks = _newest(state)[rows], _cells(state, 8, 1, "<i8")[rows, 0]
        newer = (times > held) | ((times == held) & (marks > held_marks))
        rows, final = rows[newer], final[newer]
        _cells(state, 0, 1, "<i8")[rows, 0] = times[newer]
        _cells(state, 8, 1, "<i8")[rows, 0] = marks[newer]
        _cells(state, 16, 1, "<f8")[rows, 0] = events.values[final] + 0.0

    def evaluate(self, state: Bytes2D, now_us: int) -> tuple[Floats, Bools | None]:
        """Return the value; null where there was no event, or none in the window."""
        times = _newest(state)
        known = times != NEVER
        if self._window_us:
            known &= times > now_us - self._window_us
        return np.where(known, _cells(state, 16, 1, "<f8")[:, 0], 0.0), known


class Distinct:
    """distinct: {newest tile i64, T x 2 ** precision registers u8}."""

    def __init__(self, ring: Ring, precision: int) -> None:
        self._ring = ring
        self._precision = precision
        self._registers = 1 << precision
        self.size_bytes = 8 + ring.tiles * self._registers

    def blank(self) -> bytes:
        """Return the state before any event."""
        return struct.pack("<q", NEVER) + bytes(self.size_bytes - 8)

    def merge(self, state: Bytes2D, events: Taken) -> None:
        """Raise the registers of the events' hashes."""
        tiles, registers = self._ring.tiles, self._registers
        cells = _split(state[:, 8:], tiles, registers)
        landing = _advance(self._ring, state, events, (cells,), 0)
        index, rank = registers_of(events.hashes[landing.kept], self._precision)
        touched, inverse = np.unique(landing.cells * registers + index, return_inverse=True)
        best = np.zeros(len(touched), np.uint8)
        np.maximum.at(best, inverse, rank)
        cell, at = np.divmod(touched, registers)
        row, slot = np.divmod(cell, tiles)
        cells[row, slot, at] = np.maximum(cells[row, slot, at], best)

    def evaluate(self, state: Bytes2D, now_us: int) -> tuple[Floats, Bools | None]:
        """Return the estimate over the union of the live tiles."""
        cells = _split(state[:, 8:], self._ring.tiles, self._registers)
        live = self._ring.live(_newest(state), now_us)
        return estimate(np.where(live[:, :, None], cells, np.uint8(0)).max(axis=1)), None


def _split(cells: Bytes2D, tiles: int, registers: int) -> npt.NDArray[np.uint8]:
    """Return [rows, tiles * registers] bytes as [rows, tiles, registers], the same memory."""
    row_stride, stride = cells.strides
    return np.lib.stride_tricks.as_strided(cells, (len(cells), tiles, registers), (row_stride, registers * stride, stride))


def _newest(state: Bytes2D) -> Ints:
    return _cells(state, 0, 1, "<i8")[:, 0]


def _cells(state: Bytes2D, offset: int, count: int, dtype: str) -> npt.NDArray[Any]:
    """Return `count` neighbouring 8-byte cells of each row as numbers, the same memory."""
    return state[:, offset : offset + 8 * count].view(dtype)


def _advance(ring: Ring, state: Bytes2D, events: Taken, parts: tuple[npt.NDArray[Any], ...], blank: float) -> Landing:
    """Move the ring of each row on to its newest event, blank the tiles that leave, and return where the events land."""
    newest = _newest(state)
    later, moved, left, landing = ring.advance(newest, events.rows, events.times_us)
    newest[:] = later
    for part in parts if moved.size else ():
        cells = part[moved]
        cells[left] = blank
        part[moved] = cells
    return landing


def _millionths(values: Floats) -> Ints:
    return np.rint(values * MICRO).astype(np.int64)


def _add(cells: npt.NDArray[Any], where: Ints, amounts: Ints) -> None:
    """Add whole numbers to cells, several to one where they fall together; a sum that leaves int64 makes its cell OVERFLOW for good."""
    touched, inverse = np.unique(where, return_inverse=True)
    at = np.divmod(touched, cells.shape[1])
    held = cells[at]
    added = np.zeros(len(touched), np.int64)
    np.add.at(added, inverse, amounts)
    size = np.abs(held.astype(np.float64) + np.bincount(inverse, amounts, len(touched)))
    cells[at] = np.where((held == OVERFLOW) | (size >= _FULL), OVERFLOW, held + added)


def _sum(tiles: npt.NDArray[Any], live: Bools) -> tuple[Floats, Bools | None]:
    found = np.where(live, tiles, 0)
    total: Floats = found.sum(axis=1, dtype=np.float64) / MICRO
    if found.size == 0 or found.min() != OVERFLOW:
        return total, None
    return total, found.min(axis=1) != OVERFLOW
