"""Rows of hot entities, in this process: one contiguous array per view, gathered by index, true as long as Redis tells us of changes.

It holds rows only while client-side tracking is on: every change of a tracked key is pushed to us and removes the row. When the tracking
connection drops, everything is forgotten and nothing is kept until it is back. A read and a change that cross are told apart: changes are
numbered, a read remembers the number it began at, and a row whose key changed since is not kept. Misses are kept too.

What a read brought is kept a moment later, when its caller has its answer; whoever looks before that sees to it first.

When it is full, ids that were not asked for lately make room, some at a time, so that the others stay and nobody waits for a clean-up.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.row_codec import Bytes2D, Id, KeySpace, RowCodec, decode_id
from feature_retrieval.store.tracking import Listener

UNKNOWN: Final = -2  # nothing is known of the id
MISS: Final = -1  # the id is known to have no row
_CLEAN_FOR_EVER: Final = np.iinfo(np.int64).max
_FREE: Final = np.iinfo(np.int64).max  # when a slot without an id was last used: never the longest ago
_GROWTH: Final = 1024  # slots
_SMALLEST_GROWTH: Final = 64
_ID_BYTES: Final = 166  # of an id in the index and of its slot, roughly
_CHANGE_BYTES: Final = 150  # of an id that changed while reads are under way, roughly
_SLOT_BYTES: Final = 16  # of a slot in a view, besides its row
_EVICTED_SHARE: Final = 32  # of all slots, one in so many makes room at a time
_SAMPLED: Final = 8  # of so many slots, the one not used for the longest makes room
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
    def slot_bytes(self) -> int:
        """Memory a slot takes."""
        return self.codec.row_bytes + _SLOT_BYTES

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
        """Have exactly that many slots, where there are fewer."""
        before = len(self.codes)
        if count <= before:
            return
        rows = np.empty((count, self.rows.shape[1]), np.uint8)
        rows[:before] = self.rows
        codes = np.full(count, UNKNOWN, np.int64)
        codes[:before] = self.codes
        read_at = np.zeros(count, np.float64)
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
        self.by_suffix: dict[bytes, list[ViewCache]] = {}  # of keys
        self._ids: list[Id | None] = []  # by slot
        self._used: npt.NDArray[np.int64] = np.empty(0, np.int64)  # by slot: when it was last asked for, in look-ups
        self._free: list[int] = []
        self._hand = 0

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return len(self._ids)

    @property
    def slot_bytes(self) -> int:
        """Memory a slot takes in all views."""
        return _ID_BYTES + sum(view.slot_bytes for view in self.views.values())

    @property
    def size_bytes(self) -> int:
        """Memory held, roughly."""
        changed = sum(len(view.changed_at) for view in self.views.values())
        return self.capacity * self.slot_bytes + changed * _CHANGE_BYTES

    def view(self, space: KeySpace, codec: RowCodec) -> ViewCache:
        """Return the rows of a key space and schema, none yet where it is new."""
        key = (space, codec.head, codec.row_bytes)
        view = self.views.get(key)
        if view is None:
            view = self.views[key] = ViewCache(space, codec)
            self.by_suffix.setdefault(space.suffix, []).append(view)
        return view

    def touch(self, slots: Slots, now: int) -> None:
        """Note that slots were asked for."""
        self._used[slots] = now

    def find(self, ids: Sequence[Id]) -> Slots:
        """Return the slot of each id, -1 where it has none."""
        return np.fromiter(map(self.index.get, ids, repeat(-1)), np.intp, len(ids))

    def grow(self, count: int) -> None:
        """Add slots."""
        before = self.capacity
        self._ids += [None] * count
        self._free += range(before + count - 1, before - 1, -1)
        self._used = np.concatenate((self._used, np.full(count, _FREE)))

    def lacks(self, count: int) -> int:
        """Return how many free slots are missing to that many."""
        return max(0, count - len(self._free))

    def evict(self, count: int) -> None:
        """Take slots from ids not asked for lately: of so many slots from where it ended last, those least recently used.

        A sampled LRU as in Redis ("Approximated LRU algorithm", https://redis.io/docs/latest/develop/reference/eviction/).
        """
        window = min(self.capacity, count * _SAMPLED)
        slots = np.arange(self._hand, self._hand + window) % self.capacity
        self._hand = (self._hand + window) % self.capacity
        oldest = slots if count >= window else slots[np.argpartition(self._used[slots], count - 1)[:count]]
        victims = oldest[self._used[oldest] != _FREE]
        for slot in victims.tolist():
            entity_id = self._ids[slot]
            assert entity_id is not None  # noqa: S101  (it is used)
            del self.index[entity_id]
            self._ids[slot] = None
            self._free.append(slot)
        self._used[victims] = _FREE
        for view in self.views.values():
            view.codes[victims[victims < len(view.codes)]] = UNKNOWN

    def fill(self, slots: Slots, ids: Sequence[Id], now: int) -> None:
        """Give each id that has no slot among `slots` a free one, as long as there are any."""
        for at in np.flatnonzero(slots < 0).tolist():
            slots[at] = self._slot(ids[at])
        self.touch(slots[slots >= 0], now)

    def _slot(self, entity_id: Id) -> int:
        slot = self.index.get(entity_id, -1)
        if slot < 0 and self._free:
            slot = self._free.pop()
            self.index[entity_id] = slot
            self._ids[slot] = entity_id
        return slot


@dataclass(frozen=True, slots=True)
class Places:
    """Where ids stand: one slot per id, -1 where the cache has never heard of it."""

    entity: EntityCache
    slots: Slots
    complete: bool  # no -1

    def once(self, inverse: Slots) -> Places:
        """Return the same for each id once: `inverse` tells where among those each id is."""
        slots = np.empty(int(inverse.max()) + 1, np.intp)
        slots[inverse] = self.slots  # one id's are all the same
        return Places(self.entity, slots, self.complete)


@dataclass(frozen=True, slots=True)
class Found:
    """What is held of some ids. `rows` [ids, row_bytes] are a copy: the caller may wait for others, and meanwhile rows change.

    `codes` [ids]: UNKNOWN, MISS, or a hit (0 or more); of what is no hit, `rows` holds anything, and the caller may put its own there.
    `clean`: every id is a hit and every row is simply good until `until_us`.
    """

    rows: Bytes2D
    codes: Codes
    clean: bool
    until_us: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A read under way: what it brings is kept unless its key changed after `since`, or `entity` was forgotten."""

    entity: EntityCache
    view: ViewCache
    since: int


@dataclass(frozen=True, slots=True)
class _Brought:
    """What a read brought, yet to be kept; as in `NearCache.end`. `at_s`: clock seconds when it ended."""

    reading: Reading
    ids: Sequence[Id]
    rows: Sequence[bytes | None]
    block: Bytes2D | None
    at_s: float


class NearCache(Listener):
    """Bounded in bytes over all views.

    `max_age_s` is a backstop only: rows are kept true by `changed`, not by their age. `max_bytes` 0 turns it off.
    `lookups` counts what was found of (id, view) pairs: "hit", "miss" (known to have no row) or "unknown"; `invalidations` keys that were told
    to have changed; `resets` how often everything of an entity type, or at all, was forgotten, and why.
    """

    def __init__(self, max_bytes: int, max_age_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._entities: dict[bytes, EntityCache] = {}  # by key prefix
        self._tracked: frozenset[bytes] = frozenset()
        self._on = False
        self._changes = 0
        self._looked_up = 0
        self._brought: deque[_Brought] = deque()
        self.lookups: Counter[str] = Counter()
        self.resets: Counter[str] = Counter()
        self.invalidations = 0

    def __repr__(self) -> str:
        self.settle()
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
        self.settle()
        return self._held_bytes()

    def connected(self, prefixes: Sequence[bytes]) -> None:
        """Begin to keep rows of these prefixes: from now on every change of their keys is told."""
        self._forget_all()
        self._tracked = frozenset(prefixes)
        self._on = True

    def disconnected(self) -> None:
        """Forget everything: changes are missed from now on."""
        if self.on:
            self.resets["disconnected"] += 1
        self._on = False
        self._forget_all()

    def changed(self, keys: Sequence[bytes] | None) -> None:
        """Forget the rows of these keys (None = all), and do not keep what reads under way bring for them."""
        if keys is None:
            self.resets["flushed"] += 1
            self._forget_all()
            return
        self.settle()
        self._changes += 1
        self.invalidations += len(keys)
        for key in keys:
            prefix = _prefix_of(key)
            entity = self._entities.get(prefix)
            if entity is None:
                continue
            try:
                entity_id, size = decode_id(key[len(prefix) :])
            except ValueError:  # not a key of ours, whoever wrote it
                continue
            for view in entity.by_suffix.get(key[len(prefix) + size :], ()):
                self._change(entity, view, entity_id)

    def places(self, prefix: bytes, ids: Sequence[Id]) -> Places | None:
        """Return where ids stand in every view whose keys begin with `prefix`; None when none of the kind is held.

        Slots are good until the caller waits for anything: then they may have been given to others.
        """
        self.settle()
        entity = self._entities.get(prefix) if self.on else None
        if entity is None or not entity.index:
            return None
        self._looked_up += 1
        slots = entity.find(ids)
        complete = int(slots.min(initial=0)) >= 0
        entity.touch(slots if complete else slots[slots >= 0], self._looked_up)
        return Places(entity, slots, complete)

    def find(self, space: KeySpace, codec: RowCodec, places: Places, now_us: int, *, clean: bool = False) -> Found | None:
        """Return what is held of one view; None when nothing is. `now_us`: microseconds since the epoch, for expiry.

        `clean`: also None where not every row is simply good, so that none is copied in vain.
        """
        view = places.entity.views.get((space, codec.head, codec.row_bytes))
        if view is None:
            return None
        view.sweep(self._clock() - self._max_age_s)
        view.reserve(places.entity.capacity)
        slots = places.slots
        codes = view.codes[slots]
        until_us = int(codes.min(initial=_CLEAN_FOR_EVER))
        if places.complete and until_us > now_us:
            return Found(view.rows[slots], codes, clean=True, until_us=until_us)
        if clean:
            return None
        if not places.complete:
            codes[slots < 0] = UNKNOWN
        return Found(view.rows[slots], codes, clean=False, until_us=0)

    def count(self, found: Found | None, ids: int) -> None:
        """Count a look-up of some ids in one view."""
        if not self.on:
            return
        if found is not None and found.clean:
            self.lookups["hit"] += ids
            return
        hits = 0 if found is None else int(np.count_nonzero(found.codes >= 0))
        misses = 0 if found is None else int(np.count_nonzero(found.codes == MISS))
        for word, number in (("hit", hits), ("miss", misses), ("unknown", ids - hits - misses)):
            self.lookups[word] += number

    def begin(self, space: KeySpace, codec: RowCodec) -> Reading | None:
        """Note that a read begins, to be ended by `end`; None while nothing may be kept."""
        if not self.on or space.prefix not in self._tracked:
            return None
        entity = self._entities.setdefault(space.prefix, EntityCache())
        view = entity.view(space, codec)
        view.readings += 1
        return Reading(entity, view, self._changes)

    def end(self, reading: Reading, ids: Sequence[Id], rows: Sequence[bytes | None], block: Bytes2D | None = None) -> None:
        """Keep what a read brought (`rows` parallel to `ids`; both empty where it failed), as far as it is still true.

        `block`: the same rows as `RowCodec.widen` returns them, where the caller has that; else what is no row of the schema is left out.
        It is done at the latest when somebody looks; call `settle` once there is time, so that the memory is not held twice for long.
        """
        self._brought.append(_Brought(reading, ids, rows, block, self._clock()))

    def settle(self) -> None:
        """Keep what reads have brought."""
        while self._brought:
            brought = self._brought.popleft()
            reading, view = brought.reading, brought.reading.view
            if self._entities.get(view.space.prefix) is reading.entity:  # else it was forgotten while the read was under way
                self._keep(brought)
            view.readings -= 1
            if not view.readings:
                view.changed_at.clear()
            if self._held_bytes() > self._max_bytes:  # another view, or many changes while reads are under way
                self.resets["full"] += 1
                self._forget_all()

    def _held_bytes(self) -> int:
        return sum(entity.size_bytes for entity in self._entities.values())

    def _keep(self, brought: _Brought) -> None:
        reading, ids, rows, block, now = brought.reading, brought.ids, brought.rows, brought.block, brought.at_s
        changed_at, codec = reading.view.changed_at, reading.view.codec
        if changed_at:
            unchanged = [at for at, entity_id in enumerate(ids) if changed_at.get(entity_id, 0) <= reading.since]
            ids, rows = [ids[at] for at in unchanged], [rows[at] for at in unchanged]
            block = None if block is None else block[unchanged]
        if block is not None:
            self._put(reading, ids, block, now)
            return
        good = [at for at, row in enumerate(rows) if codec.is_current(row)]
        self._put(reading, [ids[at] for at in good], codec.widen([rows[at] or b"" for at in good]), now)
        self._put(reading, [entity_id for entity_id, row in zip(ids, rows, strict=True) if row is None], None, now)

    def _put(self, reading: Reading, ids: Sequence[Id], block: Bytes2D | None, now: float) -> None:
        """Keep the rows of ids, or, without a block, that they have none."""
        if not ids:
            return
        view = reading.view
        slots = self._slots(reading.entity, ids)
        view.reserve(reading.entity.capacity)
        if int(slots.min()) < 0:
            kept = slots >= 0
            slots, block = slots[kept], None if block is None else block[kept]
        if block is None:
            view.put_misses(slots, now)
        else:
            view.put(slots, block, now)

    def _slots(self, entity: EntityCache, ids: Sequence[Id]) -> Slots:
        """Return a slot for each id, after others made room where that is needed; -1 for those that find none."""
        slots = entity.find(ids)
        lacking = entity.lacks(int(np.count_nonzero(slots < 0)))
        if lacking:
            lacking = max(0, lacking - self._grown(entity, lacking))
        if lacking and entity.capacity:
            self._looked_up += 1
            entity.touch(slots[slots >= 0], self._looked_up)
            entity.evict(min(entity.capacity, max(lacking, entity.capacity // _EVICTED_SHARE)))
            slots = entity.find(ids)
        entity.fill(slots, ids, self._looked_up)
        return slots

    def _grown(self, entity: EntityCache, lacking: int) -> int:
        """Add slots to an entity type as far as there is memory; return how many."""
        wanted = max(entity.capacity, _GROWTH, -(-lacking // _GROWTH) * _GROWTH)
        affordable = (self._max_bytes - self._held_bytes()) // entity.slot_bytes
        if affordable < _SMALLEST_GROWTH:
            largest = max(self._entities, key=lambda prefix: self._entities[prefix].size_bytes)
            fair = self._max_bytes // len(self._entities)
            if self._entities[largest] is not entity and entity.size_bytes < fair // 2:
                del self._entities[largest]  # it has taken what others need
                self.resets["rebalanced"] += 1
                affordable = (self._max_bytes - self._held_bytes()) // entity.slot_bytes
        if affordable < _SMALLEST_GROWTH:
            return 0
        count = int(min(wanted, max(lacking, affordable // 2, _SMALLEST_GROWTH), affordable))  # other types want some, too
        entity.grow(count)
        return count

    def _change(self, entity: EntityCache, view: ViewCache, entity_id: Id) -> None:
        slot = entity.index.get(entity_id)
        if slot is not None and slot < len(view.codes):
            view.codes[slot] = UNKNOWN
        if view.readings:
            view.changed_at[entity_id] = self._changes

    def _forget_all(self) -> None:
        self._entities.clear()


def _prefix_of(key: bytes) -> bytes:
    """Return what the keys of a key's tenant and entity type begin with; of what is no key of ours, something that no key begins with."""
    at = 3
    for _ in range(2):
        at += 1 + (key[at] if at < len(key) else 0)
    return key[:at]
