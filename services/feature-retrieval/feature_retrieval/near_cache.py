"""Rows of hot entities, in this process: one contiguous array per view, gathered by index, true as long as Redis tells us of changes.

It holds rows only while client-side tracking is on: every change of a tracked key is pushed to us and removes the row. When the tracking
connection drops, everything is forgotten and nothing is kept until it is back. A read and a change that cross are told apart: changes are
numbered, a read remembers the number it began at, and a row whose key changed since is not kept. Misses are kept too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.row_codec import Bytes2D, Id, KeySpace, RowCodec
from feature_retrieval.store.redis import Listener

MISS: Final = -1  # slot of an id known to have no row
UNKNOWN: Final = -2  # slot of an id nothing is known of
_GROWTH: Final = 1024  # rows
_INDEX_BYTES: Final = 150  # of an id in the index, roughly

Slots = npt.NDArray[np.intp]


class ViewCache:
    """The rows of one key space and schema: `index` maps an id to a slot of `rows` [capacity, row_bytes], or to MISS."""

    def __init__(self, space: KeySpace, codec: RowCodec) -> None:
        self.space = space
        self.head = codec.head
        self.index: dict[Id, int] = {}
        self.rows: Bytes2D = np.empty((0, codec.row_bytes), np.uint8)
        self.read_at: npt.NDArray[np.float64] = np.empty(0, np.float64)  # clock seconds, by slot
        self.misses_at: dict[Id, float] = {}
        self.readings = 0
        self.changed_at: dict[Id, int] = {}  # numbers of changes, kept only while reads are under way
        self._free: list[int] = []

    @property
    def size_bytes(self) -> int:
        """Memory held, roughly."""
        return self.rows.nbytes + _INDEX_BYTES * (len(self.index) + len(self.changed_at))

    def fits(self, row: bytes) -> bool:
        """Whether the row is of this schema."""
        return len(row) == self.rows.shape[1] and row.startswith(self.head)

    def put(self, entity_id: Id, row: bytes | None, now: float) -> None:
        """Keep one row, or the fact that there is none."""
        self.drop(entity_id)
        if row is None:
            self.index[entity_id] = MISS
            self.misses_at[entity_id] = now
            return
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.rows[slot] = np.frombuffer(row, np.uint8)
        self.read_at[slot] = now
        self.index[entity_id] = slot

    def drop(self, entity_id: Id) -> None:
        """Forget one id."""
        slot = self.index.pop(entity_id, None)
        if slot == MISS:
            del self.misses_at[entity_id]
        elif slot is not None:
            self._free.append(slot)

    def _grow(self) -> None:
        before = len(self.rows)
        after = max(_GROWTH, before * 2)
        rows = np.empty((after, self.rows.shape[1]), np.uint8)
        rows[:before] = self.rows
        read_at = np.zeros(after, np.float64)
        read_at[:before] = self.read_at
        self.rows, self.read_at = rows, read_at
        self._free.extend(range(after - 1, before - 1, -1))


@dataclass(frozen=True, slots=True)
class Reading:
    """A read under way: what it brings is kept unless its key changed after `since`, or everything was forgotten after `era`."""

    view: ViewCache
    since: int
    era: int


class NearCache(Listener):
    """Bounded in bytes over all views; when full it starts anew, which costs one read per hot entity and nothing per hit.

    `max_age_s` is a backstop only: rows are kept true by `changed`, not by their age. `max_bytes` 0 turns it off.
    """

    def __init__(self, max_bytes: int, max_age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._views: dict[tuple[KeySpace, bytes, int], ViewCache] = {}
        self._tracked: frozenset[bytes] = frozenset()
        self._on = False
        self._changes = 0
        self._era = 0

    def __repr__(self) -> str:
        rows = sum(len(view.index) for view in self._views.values())
        state = "on" if self.on else "off"
        return f"<NearCache {state} views={len(self._views)} rows={rows} bytes={self.size_bytes}/{self._max_bytes}>"

    @property
    def on(self) -> bool:
        """Whether it may answer and keep rows."""
        return self._on and self._max_bytes > 0

    @property
    def size_bytes(self) -> int:
        """Memory held by rows and their indexes, roughly."""
        return sum(view.size_bytes for view in self._views.values())

    def connected(self, prefixes: Sequence[bytes]) -> None:
        """Begin to keep rows of these prefixes: from now on every change of their keys is told."""
        self._forget_all()
        self._tracked = frozenset(prefixes)
        self._on = True

    def disconnected(self) -> None:
        """Forget everything: changes are missed from now on."""
        self._on = False
        self._forget_all()

    def changed(self, keys: Sequence[bytes] | None) -> None:
        """Forget the rows of these keys (None = all), and do not keep what reads under way bring for them."""
        if keys is None:
            self._forget_all()
            return
        self._changes += 1
        for view in self._views.values():
            for entity_id in map(view.space.id_of, keys):
                if entity_id is None:
                    continue
                view.drop(entity_id)
                if view.readings:
                    view.changed_at[entity_id] = self._changes

    def find(self, space: KeySpace, codec: RowCodec, ids: Sequence[Id]) -> tuple[Bytes2D, Slots] | None:
        """Return the rows held [hits, row_bytes] and, per id, a number >= 0 for a hit, MISS or UNKNOWN; None when nothing is known at all.

        The rows are a copy: the caller may wait for others, and meanwhile a slot may come to hold another id's row.
        """
        view = self._views.get((space, codec.head, codec.row_bytes)) if self.on else None
        if view is None or not view.index:
            return None
        index = view.index
        try:
            slots = np.fromiter(map(index.__getitem__, ids), np.intp, len(ids))
        except KeyError:
            slots = np.fromiter((index.get(i, UNKNOWN) for i in ids), np.intp, len(ids))
        oldest = self._clock() - self._max_age_s
        if view.misses_at:
            for at in np.flatnonzero(slots == MISS).tolist():
                if view.misses_at[ids[at]] < oldest:
                    slots[at] = UNKNOWN
        if len(view.read_at):
            slots[(slots >= 0) & (view.read_at[slots] < oldest)] = UNKNOWN
        return view.rows[slots[slots >= 0]], slots

    def begin(self, space: KeySpace, codec: RowCodec) -> Reading | None:
        """Note that a read begins, to be ended by `end`; None while nothing may be kept."""
        if not self.on or space.prefix not in self._tracked:
            return None
        key = (space, codec.head, codec.row_bytes)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = ViewCache(space, codec)
        view.readings += 1
        return Reading(view, self._changes, self._era)

    def end(self, reading: Reading, ids: Sequence[Id], rows: Sequence[bytes | None]) -> None:
        """Keep what a read brought (`rows` parallel to `ids`; both empty where it failed), as far as it is still true."""
        view = reading.view
        if reading.era == self._era and self.on:
            now, changed_at = self._clock(), view.changed_at
            for entity_id, row in zip(ids, rows, strict=True):
                if (row is None or view.fits(row)) and changed_at.get(entity_id, 0) <= reading.since:
                    view.put(entity_id, row, now)
        view.readings -= 1
        if not view.readings:
            view.changed_at.clear()
        if self.size_bytes > self._max_bytes:
            self._forget_all()

    def _forget_all(self) -> None:
        self._views.clear()
        self._era += 1
