"""Rows that Redis does not have, or cannot give, from the durable copy: so many a second, for Postgres is the registry's, too.

A key that Redis has no row for may never have had one; only Postgres knows. Where it was not asked, because the budget is spent or it is
away, nothing is known of the key, and that is what the answer says. What is found is also put back into Redis, in the background.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from feature_retrieval.epochs import event_time_us
from feature_retrieval.ingestion import MAX_FUTURE_S
from feature_retrieval.store.postgres import DurableRows, Place
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.store.rows import Read
from plait.errors import PlaitError, Unavailable
from plait.registry.records import FeatureView, Snapshot
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

FOUND: Final = "found"
ABSENT: Final = "absent"
OVER_BUDGET: Final = "over_budget"
FAILED: Final = "failed"

_Wanted = Mapping[int, tuple[Place, FeatureView]]  # by position


@dataclass(slots=True)
class Budget:
    """Rows that may be asked for; a second's worth at once after a pause."""

    rows_per_s: float
    clock: Callable[[], float] = time.monotonic
    _left: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._left, self._at = self.rows_per_s, self.clock()

    def take(self, rows: int) -> int:
        """Take up to so many; return how many there were."""
        now = self.clock()
        self._left = min(self.rows_per_s, self._left + (now - self._at) * self.rows_per_s)
        self._at = now
        taken = min(rows, int(self._left))
        self._left -= taken
        return taken


class ReadThrough:
    """Rows of Redis, and of the durable copy where those are missing. `count` hears what became of how many rows."""

    def __init__(
        self,
        store: RedisStore,
        rows: DurableRows,
        snapshot: Callable[[], Snapshot],
        erasures_loaded: Callable[[], Awaitable[None]],
        count: Callable[[str, int], None],
        *,
        budget: Budget,
        clock: Callable[[], float] = time.time,
        max_future_s: float = MAX_FUTURE_S,
    ) -> None:
        self._store = store
        self._rows = rows
        self._snapshot = snapshot
        self._erasures_loaded = erasures_loaded
        self._count = count
        self._budget = budget
        self._clock = clock
        self._max_future_s = max_future_s
        self._tasks: set[asyncio.Task[None]] = set()

    async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        """Return the rows of `keys`; see `Rows.read`."""
        began = time.monotonic()
        try:
            found = await self._store.read(keys, timeout_s)
        except Unavailable:
            found = Read([None] * len(keys), failed=np.arange(len(keys)))
            wanted = self._wanted(keys, found)
            if not wanted:
                raise
        else:
            wanted = self._wanted(keys, found)
        if not wanted:
            return found
        asked = dict(list(wanted.items())[: self._budget.take(len(wanted))])
        self._count(OVER_BUDGET, len(wanted) - len(asked))
        known = await self._ask(keys, asked, timeout_s - (time.monotonic() - began))
        unknown = [at for at in wanted if at not in known]
        failed = np.union1d(np.setdiff1d(found.failed, list(known)), unknown).astype(np.intp)
        if len(failed) == len(keys):
            raise Unavailable(
                "neither Redis nor the durable copy could be asked for these rows: retry", reason="STORE_UNAVAILABLE", retry_after_s=1.0
            )
        rows = list(found.rows)
        for at, row in known.items():
            rows[at] = row
        self._put_back({at: (asked[at], row) for at, row in known.items() if row is not None})
        return Read(rows, late=found.late, failed=failed)

    async def close(self) -> None:
        """Stop putting rows back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _wanted(self, keys: Sequence[bytes], found: Read) -> _Wanted:
        """Return which keys the durable copy may have a row for that Redis did not give."""
        late = set(found.late.tolist())
        views = self._snapshot().feature_views
        wanted: dict[int, tuple[Place, FeatureView]] = {}
        for at in [at for at, row in enumerate(found.rows) if row is None and at not in late]:
            place = Place.of(keys[at])
            view = views.get(place.view)
            if view is not None and view.durable != "off" and (version := view.at(place.version)) is not None:
                wanted[at] = place, version
        return wanted

    async def _ask(self, keys: Sequence[bytes], asked: _Wanted, timeout_s: float) -> dict[int, bytes | None]:
        """Return what Postgres knows, by position; nothing where it cannot be asked in time."""
        if not asked:
            return {}
        try:
            async with asyncio.timeout(timeout_s):
                rows = await self._rows.read([keys[at] for at in asked])
        except (PlaitError, TimeoutError):
            self._count(FAILED, len(asked))
            return {}
        now = self._clock()
        known = {
            at: None if row is None or _is_past(row, view, now) else row for (at, (_, view)), row in zip(asked.items(), rows, strict=True)
        }
        there = sum(row is not None for row in known.values())
        self._count(FOUND, there)
        self._count(ABSENT, len(known) - there)
        return known

    def _put_back(self, rows: Mapping[int, tuple[tuple[Place, FeatureView], bytes]]) -> None:
        if rows and len(self._tasks) < 8:  # whoever asks next may put them back
            task = asyncio.create_task(self._write([(*where, row) for where, row in rows.values()]), name="put rows back")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _write(self, rows: Sequence[tuple[Place, FeatureView, bytes]]) -> None:
        by_ttl: dict[int, list[tuple[Place, bytes]]] = {}
        for place, view, row in rows:
            ttl_ms = int((view.retention_s + self._max_future_s) * 1000) if view.retention_s else 0
            by_ttl.setdefault(ttl_ms, []).append((place, row))
        try:
            await self._erasures_loaded()
            for ttl_ms, chosen in by_ttl.items():
                places = [place for place, _ in chosen]
                await self._store.write([p.key for p in places], [p.mark for p in places], [row for _, row in chosen], ttl_ms)
        except PlaitError as error:
            log.info("rows of the durable copy cannot be put back into redis", reason=error.reason)


def _is_past(row: bytes, view: FeatureView, now_s: float) -> bool:
    """Return whether a row is past its view's retention: Redis would not have it either."""
    return bool(view.retention_s) and event_time_us(row) < (now_s - view.retention_s) * 1e6
