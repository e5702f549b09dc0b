"""Rows on their way into the durable copy: before a write is acknowledged, or behind it, as the view says.

`behind`: rows wait in this process, newest of each key, and are committed in the order in which their keys came, many at once. What waits is
lost if the process dies, and its age says how much that is; a queue that is full holds writes back, and then refuses them, instead of growing. `before`: a write is
acknowledged once its rows are committed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Final

from feature_retrieval.store.postgres import DurableRows, newer
from plait.errors import PlaitError, Unavailable
from plait.registry.records import FeatureView, Snapshot
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

_RETRY_S: Final = 1.0
_PRUNE_S: Final = 3600.0
_CLOSE_S: Final = 5.0
_PATIENCE_S: Final = 2.0


class DurableCopy:
    """Takes rows by key. `queue_rows`: how many may wait; `batch_rows`: how many are committed at once; `patience_s`: how long a write is held
    back by a full queue of which nothing is committed."""

    def __init__(
        self,
        rows: DurableRows,
        snapshot: Callable[[], Snapshot],
        *,
        queue_rows: int = 100_000,
        batch_rows: int = 1000,
        patience_s: float = _PATIENCE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rows = rows
        self._snapshot = snapshot
        self._queue_rows = queue_rows
        self._batch_rows = batch_rows
        self._patience_s = patience_s
        self._clock = clock
        self._waiting: dict[bytes, tuple[bytes, float]] = {}  # row and since when, by key; the oldest first
        self._under_way: dict[bytes, tuple[bytes, float]] = {}
        self._some = asyncio.Event()
        self._fewer = asyncio.Event()
        self._turn = asyncio.Lock()
        self._moved_at = 0.0  # when rows were committed last, or began to wait; by the loop's clock
        self._flushing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<DurableCopy waiting={self.queued} lag_s={self.lag_s:.1f}>"

    @property
    def queued(self) -> int:
        """How many rows are not committed yet."""
        return len(self._waiting) + len(self._under_way)

    @property
    def lag_s(self) -> float:
        """How long the oldest uncommitted row has waited, seconds; 0 = none waits."""
        oldest = next(iter((self._under_way or self._waiting).values()), None)
        return 0.0 if oldest is None else max(0.0, self._clock() - oldest[1])

    async def keep(self, view: FeatureView, keys: Sequence[bytes], rows: Sequence[bytes]) -> bool:
        """Take rows that were written to Redis; return whether they are committed.

        Raises Unavailable (DURABLE_COPY_BEHIND, or why Postgres did not take them): the write is to be repeated.
        """
        if view.durable == "off" or not keys:
            return False
        if view.durable == "before":
            newest: dict[bytes, bytes] = {}
            for key, row in zip(keys, rows, strict=True):
                if key not in newest or newer(row, newest[key]):
                    newest[key] = row
            await self._commit(newest)
            return True
        if not await self._has_room(len(keys)):
            raise Unavailable(
                "the durable copy in Postgres is too far behind, so nothing more is taken: see that Postgres is up and keeps pace, or raise "
                "PLAIT_FEATURE_RETRIEVAL_DURABLE__QUEUE_ROWS",
                reason="DURABLE_COPY_BEHIND",
                retry_after_s=_RETRY_S,
            )
        if not self.queued:
            self._moved_at = asyncio.get_running_loop().time()
        now = self._clock()
        for key, row in zip(keys, rows, strict=True):
            held = self._waiting.get(key)
            if held is None:
                self._waiting[key] = row, now
            elif newer(row, held[0]):
                self._waiting[key] = row, held[1]
        self._some.set()
        return False

    async def _has_room(self, rows: int) -> bool:
        """Wait until so many more rows may wait, as long as Postgres gets on: who is held back need not send them again. First come, first
        served. An empty queue takes any number, or a batch for many epochs would never be taken."""
        async with self._turn:
            while self.queued and self.queued + rows > self._queue_rows:
                self._fewer.clear()
                try:
                    async with asyncio.timeout_at(self._moved_at + self._patience_s):
                        await self._fewer.wait()
                except TimeoutError:
                    return False
        return True

    async def _commit(self, rows: Mapping[bytes, bytes]) -> None:
        try:
            await self._rows.keep(rows)
        except Unavailable:
            raise
        except PlaitError as error:
            message = f"the rows are not in the durable copy, and the write is to be repeated: {error.message}"
            raise Unavailable(message, reason=error.reason, retry_after_s=_RETRY_S) from error

    async def run(self) -> None:
        """Commit what waits, over every outage of Postgres; now and then drop what is past its view's retention. Runs until cancelled."""
        pruned_at = time.monotonic()
        while True:
            try:
                await self._flush()
                if time.monotonic() - pruned_at > _PRUNE_S:
                    pruned_at = time.monotonic()
                    await self.prune()
            except PlaitError as error:
                log.warning("the durable copy falls behind", reason=error.reason, rows=self.queued)
                await asyncio.sleep(_RETRY_S)
                continue
            if not self._waiting:
                self._some.clear()
                try:
                    await asyncio.wait_for(self._some.wait(), _PRUNE_S)
                except TimeoutError:
                    continue

    async def close(self) -> None:
        """Commit what waits, if that takes only moments; say what is lost otherwise."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._flush()
        except (PlaitError, TimeoutError):
            log.warning("rows were not copied to Postgres before the end", rows=self.queued)

    async def prune(self) -> None:
        """Delete rows that Redis keeps no more either, or nobody reads."""
        await self._rows.drop_unused_epochs()
        for view in self._snapshot().feature_views.values():
            for one in (view, *(past for past in map(view.at, (kept.version for kept in view.versions)) if past is not None)):
                if one.durable != "off" and one.retention_s:
                    await self._rows.drop_before(one.name, one.version, int((self._clock() - one.retention_s) * 1e6))

    async def _flush(self) -> None:
        async with self._flushing:
            while self._under_way or self._waiting:
                if not self._under_way:  # what was not committed comes first
                    for key in list(islice(self._waiting, self._batch_rows)):
                        self._under_way[key] = self._waiting.pop(key)
                await self._rows.keep({key: row for key, (row, _) in self._under_way.items()})
                self._under_way = {}
                self._fewer.set()
                self._moved_at = asyncio.get_running_loop().time()
