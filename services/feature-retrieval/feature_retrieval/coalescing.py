"""Reads that meet share what they ask: callers of one turn of the loop make one round trip, and a key that is under way is not asked again.

A lone caller is passed straight through. A shared read is a task of its own, so a caller that leaves takes nothing with it. A read that was
already sent may be older than a change its caller knows of: it is joined only while changes are tracked and none of the key was heard of
since, which is what the near cache promises, too; with tracking off only callers of one turn share. Large reads that turn out to have little in common go alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Final

import numpy as np

from feature_retrieval.store.rows import NONE, Positions, Read, Rows
from feature_retrieval.store.tracking import Listener
from plait.errors import Unavailable

MAX_SHARED_KEYS: Final = 1024  # of one caller: a larger read is several round trips, of which a deadline keeps those that arrived
_MAX_GROUP_KEYS: Final = 8192
_ALIKE: Final = 2.0  # times to wait that differ by more than this factor are not shared: the shorter one ends the read for both
_LOOKED_AT: Final = 4  # newest reads under way, whose keys a newcomer is compared with: a hot key is in one of them
_SMALL: Final = 64  # keys: below, a round trip costs more than putting keys together
_LEAST_SHARED: Final = 0.3  # of all keys: where large reads share less than this, putting them together costs more than it saves
_APART_S: Final = 1.0  # for so long, then a few are put together again to see
_WORTH_S: Final = 0.001  # with less time left nothing is asked again


class _Flight:
    """One read under way for several callers, or one that others may join."""

    __slots__ = ("_index", "changed", "ends_at", "keys", "task")

    def __init__(self, keys: Sequence[bytes], task: asyncio.Task[Read], ends_at: float) -> None:
        self.keys = keys
        self.task = task
        self.ends_at = ends_at
        self.changed: set[bytes] = set()  # since it began
        self._index: dict[bytes, int] | None = None

    @property
    def index(self) -> dict[bytes, int]:
        """Where each key is."""
        if self._index is None:
            self._index = dict(zip(self.keys, range(len(self.keys)), strict=True))
        return self._index


class _Group:
    """Callers of one turn of the loop. `flight` is there, or failed, once the turn is over; nobody waits for it but followers."""

    __slots__ = ("flight", "members", "size", "timeout_s")

    def __init__(self, keys: Sequence[bytes], timeout_s: float) -> None:
        self.members = [keys]
        self.size = len(keys)
        self.timeout_s = timeout_s
        self.flight: asyncio.Future[_Flight] | None = None

    def takes(self, keys: Sequence[bytes], timeout_s: float) -> bool:
        """Return whether another caller may come in."""
        alike = self.timeout_s / _ALIKE <= timeout_s <= self.timeout_s * _ALIKE
        return alike and self.size + len(keys) <= _MAX_GROUP_KEYS

    def add(self, keys: Sequence[bytes], timeout_s: float) -> asyncio.Future[_Flight]:
        """Take a caller in."""
        self.members.append(keys)
        self.size += len(keys)
        self.timeout_s = min(self.timeout_s, timeout_s)
        if self.flight is None:
            self.flight = asyncio.get_running_loop().create_future()
        return self.flight


class CoalescedReads(Listener):
    """Rows of a store, each asked for as seldom as its callers allow. Hears of changes to know which reads may still be joined."""

    def __init__(self, store: Rows, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._shared = 1.0  # share of the keys of large groups that were asked by others, too; recent groups weigh more
        self._apart_until = 0.0
        self._group: _Group | None = None
        self._flights: dict[_Flight, None] = {}  # oldest first
        self._tracked: tuple[bytes, ...] = ()
        self.asked_keys = 0  # by callers
        self.shared_keys = 0  # of these, not asked from the store on their own

    def __repr__(self) -> str:
        return f"<CoalescedReads flights={len(self._flights)} shared={self.shared_keys}/{self.asked_keys}>"

    async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        """Return the rows of `keys` (each once), as the store's own `read` does."""
        self.asked_keys += len(keys)
        now = self._clock()
        if len(keys) > MAX_SHARED_KEYS or (len(keys) > _SMALL and now < self._apart_until):
            return await self._store.read(keys, timeout_s)
        ends_at = now + timeout_s
        if self._flights:
            joined, left = self._joinable(keys, timeout_s)
            if joined:
                return await self._join(keys, joined, left, ends_at)
        return await self._meet(keys, timeout_s, ends_at)

    def connected(self, prefixes: Sequence[bytes]) -> None:
        """From now on reads of keys with these prefixes may be joined after they were sent."""
        self._release()
        self._tracked = tuple(prefixes)

    def disconnected(self) -> None:
        """No read that was sent may be joined any more."""
        self._tracked = ()
        self._release()

    def changed(self, keys: Sequence[bytes] | None) -> None:
        """These keys must be read anew; None = all."""
        if keys is None:
            self._release()
        for flight in self._flights:
            flight.changed.update(keys or ())

    async def close(self) -> None:
        """End the reads nobody waits for any more."""
        tasks = [flight.task for flight in self._flights]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _meet(self, keys: Sequence[bytes], timeout_s: float, ends_at: float) -> Read:
        """Read together with whoever else comes in this turn of the loop."""
        group = self._group
        if group is not None:
            if not group.takes(keys, timeout_s):
                return await self._store.read(keys, timeout_s)
            flight = await asyncio.shield(group.add(keys, timeout_s))
            return await self._part(flight, keys, ends_at)
        self._group = group = _Group(keys, timeout_s)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            group.members[0] = ()  # it leaves; those who came in stay
            raise
        finally:
            self._group = None
            if group.flight is not None:
                group.flight.set_result(self._take_off(group))
        if group.flight is not None:
            return await self._part(group.flight.result(), keys, ends_at)
        if self._tracked:
            return await self._part(self._start(keys, timeout_s), keys, ends_at)
        return await self._store.read(keys, timeout_s)

    def _take_off(self, group: _Group) -> _Flight:
        once = list(dict.fromkeys(chain.from_iterable(group.members)))
        self.shared_keys += group.size - len(once)
        if group.size > _SMALL * len(group.members):
            self._learn((group.size - len(once)) / group.size)
        return self._start(once, group.timeout_s)

    def _learn(self, shared: float) -> None:
        """Let large reads go alone for a while where putting them together has not been worth it lately."""
        self._shared += (shared - self._shared) / 8
        if self._shared < _LEAST_SHARED:
            self._apart_until = self._clock() + _APART_S
            self._shared = 2 * _LEAST_SHARED

    def _start(self, keys: Sequence[bytes], timeout_s: float) -> _Flight:
        task = asyncio.create_task(self._store.read(keys, timeout_s), name="shared read")
        flight = _Flight(keys, task, self._clock() + timeout_s)
        self._flights[flight] = None
        task.add_done_callback(lambda _: self._landed(flight))
        return flight

    def _landed(self, flight: _Flight) -> None:
        self._flights.pop(flight, None)
        if not flight.task.cancelled():
            flight.task.exception()  # perhaps nobody is left to look at it

    def _release(self) -> None:
        """Let no read under way be joined any more."""
        for flight in self._flights:
            flight.changed.update(flight.keys)

    def _joinable(self, keys: Sequence[bytes], timeout_s: float) -> tuple[dict[_Flight, list[int]], list[int]]:
        """Return which positions of `keys` are under way in which read that may be joined, and which are in none."""
        joined: dict[_Flight, list[int]] = {}
        left: Sequence[int] = range(len(keys))
        now = self._clock()
        for flight in islice(reversed(self._flights), _LOOKED_AT) if self._tracked else ():
            if not timeout_s / _ALIKE <= flight.ends_at - now <= timeout_s or flight.index.keys().isdisjoint(keys):
                continue
            index, changed = flight.index, flight.changed
            here = [at for at in left if keys[at] in index and keys[at] not in changed and keys[at].startswith(self._tracked)]
            if here:
                joined[flight] = here
                taken = set(here)
                left = [at for at in left if at not in taken]
        return joined, list(left)

    async def _join(self, keys: Sequence[bytes], joined: dict[_Flight, list[int]], left: list[int], ends_at: float) -> Read:
        """Put together what reads under way bring, and what nobody had asked for yet."""
        self.shared_keys += sum(map(len, joined.values()))
        answer = _Answer(len(keys))
        if left:
            asked = [keys[at] for at in left]
            try:
                answer.put(left, await self._meet(asked, ends_at - self._clock(), ends_at))
            except Unavailable:
                answer.put(left, Read([None] * len(left), failed=np.arange(len(left))))
        for flight, here in joined.items():
            wanted = [keys[at] for at in here]
            try:
                answer.put(here, await self._part(flight, wanted, ends_at))
            except Unavailable:  # it began before this caller came, so its failure is not this caller's
                answer.put(here, await self._store.read(wanted, max(ends_at - self._clock(), 0)))
        return answer.read()

    async def _part(self, flight: _Flight, keys: Sequence[bytes], ends_at: float) -> Read:
        """Return one caller's part of a shared read; what was late for all is asked again where this caller has more time."""
        whole = await asyncio.shield(flight.task)
        if keys is flight.keys:
            part = whole
        else:
            places = list(map(flight.index.__getitem__, keys))
            rows = whole.rows
            part = Read([rows[at] for at in places])
            if not whole.whole:
                part = Read(part.rows, late=_among(places, whole.late), failed=_among(places, whole.failed))
        left_s = ends_at - self._clock()
        if not part.late.size or ends_at <= flight.ends_at or left_s < _WORTH_S:
            return part
        again = await self._store.read([keys[at] for at in part.late.tolist()], left_s)
        answer = _Answer(len(keys))
        answer.put(range(len(keys)), Read(part.rows, failed=part.failed))
        answer.put(part.late.tolist(), again)
        return answer.read()


class _Answer:
    """Rows of one caller, from several reads."""

    __slots__ = ("_failed", "_late", "_rows")

    def __init__(self, count: int) -> None:
        self._rows: list[bytes | None] = [None] * count
        self._late: set[int] = set()
        self._failed: set[int] = set()

    def put(self, places: Sequence[int], read: Read) -> None:
        """Put what a read says of some places."""
        for at, row in zip(places, read.rows, strict=True):
            self._rows[at] = row
        self._late.update(places[at] for at in read.late.tolist())
        self._failed.update(places[at] for at in read.failed.tolist())

    def read(self) -> Read:
        """Return the whole."""
        return Read(self._rows, late=_ascending(self._late), failed=_ascending(self._failed))


def _ascending(places: set[int]) -> Positions:
    return np.array(sorted(places), np.intp) if places else NONE


def _among(places: Sequence[int], positions: Positions) -> Positions:
    """Return which of one caller's keys are at some positions of a shared read."""
    return np.flatnonzero(np.isin(places, positions)) if positions.size else NONE
