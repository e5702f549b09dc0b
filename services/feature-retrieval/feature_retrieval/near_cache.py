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
from feature_retrieval.store.tracking import Listener

UNKNOWN: Final = -2  # nothing is known of the id
MISS: Final = -1  # the id is known to have no row
_CLEAN_FOR_EVER: Final = np.iinfo(np.int64).max
_GROWTH: Final = 1024  # slots
_INDEX_BYTES: Final = 150  # of an id in the index, roughly
_SWEEP_S: Final = 1.0  # rows leave this much before they are too old, so that looking for such costs nothing per read

Slots = npt.NDArray[np.intp]
Codes = npt.NDArray[np.int64]


class ViewCache:
    """The rows of one key space and schema, by slot.

    `codes` [slots] is UNKNOWN, MISS, 0 for a row to be looked at, or until when (µs since the epoch) a row is simply good: every column is
    there and it has not expired.
    """

    def __init__(self, space: KeySpace, codec: RowCodec) -> None:
        self.space = space
        self.codec = codec
        self.rows: Bytes2D = np.empty((0, codec.row_bytes), np.uint8)
        self.codes: Codes = np.empty(0, np.int64)
        self.read_at: npt.NDArray[np.float64] = np.empty(0, np.float64)  # clock seconds
        self.readings = 0
        self.changed_at: dict[Id, int] = {}  # numbers of changes, kept only while reads are under way
        self._oldest = np.inf

    @property
    def size_bytes(self) -> int:
        """Memory held, roughly."""
        return self.rows.nbytes + self.codes.nbytes + self.read_at.nbytes + _INDEX_BYTES * len(self.changed_at)

    def put(self, slots: Slots, block: Bytes2D, now: float) -> None:
        """Keep rows [slots, row_bytes]."""
        self.rows[slots] = block
        self.codes[slots] = self.codec.clean_until_us(block, _CLEAN_FOR_EVER)
        self._read(slots, now)

    def put_misses(self, slots: Slots, now: float) -> None:
        """Keep that there are no rows."""
        self.codes[slots] = MISS
        self._read(slots, now)

    def reserve(self, count: int) -> None:
        """Have room for that many slots."""
        before = len(self.codes)
        if count <= before:
            return
        after = max(_GROWTH, before * 2, -(-count // _GROWTH) * _GROWTH)
        rows = np.empty((after, self.rows.shape[1]), np.uint8)
        rows[:before] = self.rows
        codes = np.full(after, UNKNOWN, np.int64)
        codes[:before] = self.codes
        read_at = np.zeros(after, np.float64)
        read_at[:before] = self.read_at
        self.rows, self.codes, self.read_at = rows, codes, read_at

    def sweep(self, oldest: float) -> None:
        """Forget what was read before `oldest`, and a little more."""
        if self._oldest >= oldest:
            return
        self.codes[self.read_at < oldest + _SWEEP_S] = UNKNOWN
        held = self.read_at[self.codes != UNKNOWN]
        self._oldest = float(held.min()) if held.size else np.inf

    def _read(self, slots: Slots, now: float) -> None:
        self.read_at[slots] = now
        self._oldest = min(self._oldest, now)


class EntityCache:
    """What is held of one tenant's entity type: an id has the same slot in all its views, so it is looked up once for all of them."""

    def __init__(self) -> None:
        self.index: dict[Id, int] = {}
        self.views: dict[tuple[KeySpace, bytes, int], ViewCache] = {}

    @property
    def size_bytes(self) -> int:
        """Memory held, roughly."""
        return _INDEX_BYTES * len(self.index) + sum(view.size_bytes for view in self.views.values())

    def slots(self, ids: Sequence[Id]) -> Slots:
        """Return the slot of each id, a new one where it has none."""
        index = self.index
        return np.fromiter((index.setdefault(entity_id, len(index)) for entity_id in ids), np.intp, len(ids))


@dataclass(frozen=True, slots=True)
class Places:
    """Where ids stand: one slot per id, -1 where the cache has never heard of it."""

    entity: EntityCache
    slots: Slots
    complete: bool  # no -1


@dataclass(frozen=True, slots=True)
class Found:
    """What is held of some ids. `rows` [hits, row_bytes] are a copy: the caller may wait for others, and meanwhile rows change.

    `codes` [ids]: UNKNOWN, MISS, or a hit (0 or more). `clean`: every id is a hit and every row is simply good until `until_us`.
    """

    rows: Bytes2D
    codes: Codes
    clean: bool
    until_us: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A read under way: what it brings is kept unless its key changed after `since`, or everything was forgotten after `era`."""

    entity: EntityCache
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
        self._entities: dict[bytes, EntityCache] = {}  # by key prefix
        self._tracked: frozenset[bytes] = frozenset()
        self._on = False
        self._changes = 0
        self._era = 0

    def __repr__(self) -> str:
        ids = sum(len(entity.index) for entity in self._entities.values())
        state = "on" if self.on else "off"
        return f"<NearCache {state} entity_types={len(self._entities)} ids={ids} bytes={self.size_bytes}/{self._max_bytes}>"

    @property
    def on(self) -> bool:
        """Whether it may answer and keep rows."""
        return self._on and self._max_bytes > 0

    @property
    def size_bytes(self) -> int:
        """Memory held by rows and their indexes, roughly."""
        return sum(entity.size_bytes for entity in self._entities.values())

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
        for entity in self._entities.values():
            for view in entity.views.values():
                for entity_id in map(view.space.id_of, keys):
                    if entity_id is not None:
                        self._change(entity, view, entity_id)

    def places(self, prefix: bytes, ids: Sequence[Id]) -> Places | None:
        """Return where ids stand in every view whose keys begin with `prefix`; None when none of the kind is held."""
        entity = self._entities.get(prefix) if self.on else None
        if entity is None or not entity.index:
            return None
        index = entity.index
        try:
            return Places(entity, np.fromiter(map(index.__getitem__, ids), np.intp, len(ids)), complete=True)
        except KeyError:
            return Places(entity, np.fromiter((index.get(i, -1) for i in ids), np.intp, len(ids)), complete=False)

    def find(self, space: KeySpace, codec: RowCodec, places: Places, now_us: int) -> Found | None:
        """Return what is held of one view; None when nothing is. `now_us`: microseconds since the epoch, for expiry."""
        view = places.entity.views.get((space, codec.head, codec.row_bytes))
        if view is None:
            return None
        view.sweep(self._clock() - self._max_age_s)
        view.reserve(len(places.entity.index))
        slots = places.slots
        codes = view.codes[slots]
        until_us = int(codes.min(initial=_CLEAN_FOR_EVER))
        if places.complete and until_us > now_us:
            return Found(view.rows[slots], codes, clean=True, until_us=until_us)
        if not places.complete:
            codes[slots < 0] = UNKNOWN
        return Found(view.rows[slots[codes >= 0]], codes, clean=False, until_us=0)

    def begin(self, space: KeySpace, codec: RowCodec) -> Reading | None:
        """Note that a read begins, to be ended by `end`; None while nothing may be kept."""
        if not self.on or space.prefix not in self._tracked:
            return None
        entity = self._entities.setdefault(space.prefix, EntityCache())
        key = (space, codec.head, codec.row_bytes)
        view = entity.views.get(key)
        if view is None:
            view = entity.views[key] = ViewCache(space, codec)
        view.readings += 1
        return Reading(entity, view, self._changes, self._era)

    def end(self, reading: Reading, ids: Sequence[Id], rows: Sequence[bytes | None]) -> None:
        """Keep what a read brought (`rows` parallel to `ids`; both empty where it failed), as far as it is still true."""
        view = reading.view
        if reading.era == self._era and self.on:
            self._keep(reading, ids, rows)
        view.readings -= 1
        if not view.readings:
            view.changed_at.clear()
        if self.size_bytes > self._max_bytes:
            self._forget_all()

    def _keep(self, reading: Reading, ids: Sequence[Id], rows: Sequence[bytes | None]) -> None:
        view, now = reading.view, self._clock()
        changed_at, codec = view.changed_at, view.codec
        unchanged = [at for at, entity_id in enumerate(ids) if changed_at.get(entity_id, 0) <= reading.since]
        good = [at for at in unchanged if codec.is_current(rows[at])]
        misses = [at for at in unchanged if rows[at] is None]
        for chosen in (good, misses):
            if not chosen:
                continue
            slots = reading.entity.slots([ids[at] for at in chosen])
            view.reserve(len(reading.entity.index))
            if chosen is good:
                block = codec.widen([rows[at] or b"" for at in good])
                assert block is not None  # noqa: S101  (each row is a current one)
                view.put(slots, block, now)
            else:
                view.put_misses(slots, now)

    def _change(self, entity: EntityCache, view: ViewCache, entity_id: Id) -> None:
        slot = entity.index.get(entity_id)
        if slot is not None and slot < len(view.codes):
            view.codes[slot] = UNKNOWN
        if view.readings:
            view.changed_at[entity_id] = self._changes

    def _forget_all(self) -> None:
        self._entities.clear()
        self._era += 1
