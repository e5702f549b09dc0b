"""Moving rows between the epochs of a view: what was streamed is carried over to a new one, what is left of an old one is removed.

A backfill writes epoch E+1 beside E. Rows streamed since it began are in both; those from before, and those of a writer that had not heard
of E+1 yet, are only in E. Carrying over begins when every replica has heard and copies them where they are newer, so that nothing streamed
is ever lost. An epoch is removed only when no replica takes it for one in use. Rows that a backfill wrote into E stay behind: the new file is there to replace them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

from feature_retrieval.ingestion import MAX_FUTURE_S, Keep, kept_nowhere, view_of
from feature_retrieval.permissions import check_admin, check_writable
from feature_retrieval.row_codec import FLAG_BACKFILL, HEADER_BYTES, KeySpace
from feature_retrieval.store.redis import APPLIED, RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, NotFound
from plait.redis.dispatch import Receipt
from plait.registry.records import FeatureView, Snapshot
from plait.rpc.call import Call

PAGE_KEYS: Final = 1000
READ_TIMEOUT_S: Final = 10.0
_PAGES_SETTLED_AT_ONCE: Final = 50  # one wait for the disk may take a second


async def heard_by_all(revision: int) -> None:
    """For who has no other replicas."""


class EpochUpkeep:
    """Answers CarryOverEpoch and PurgeEpoch. Parameters as those of `Ingestion`; `heard` returns once no replica writes by less than a
    revision of the registry, or raises."""

    def __init__(
        self,
        store: RedisStore,
        snapshot: Callable[[], Snapshot],
        erasures_loaded: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.time,
        *,
        keep: Keep = kept_nowhere,
        heard: Callable[[int], Awaitable[None]] = heard_by_all,
        max_future_s: float = MAX_FUTURE_S,
    ) -> None:
        self._store = store
        self._keep = keep
        self._heard = heard
        self._snapshot = snapshot
        self._erasures_loaded = erasures_loaded
        self._clock = clock
        self._max_future_s = max_future_s

    async def carry_over(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """Copy what was streamed into one epoch to another, where it is newer; yield how far it is after each page; what is
        before the cursor is durable.

        Raises also Unavailable (REPLICA_BEHIND): a replica may still stream into the one epoch only, behind the walk.
        """
        check_admin(call)
        snapshot = self._snapshot()
        view = view_of(snapshot, request.feature_view, request.view_version)
        check_writable(view, call)
        if view.aggregation is not None:
            message = f"the rows of {view.name!r} are sums of events, not events: replay the events into the new epoch"
            raise FailedPrecondition(message, reason="VIEW_IS_AGGREGATED")
        _check_in_use(snapshot, view, call.tenant, request.from_epoch, request.to_epoch)
        await self._heard(snapshot.revision)
        source, target = (self._space(view, call.tenant, epoch) for epoch in (request.from_epoch, request.to_epoch))
        copied, unsettled, receipt, cursor = 0, 0, Receipt(), request.cursor
        async for page in self._store.scan(source.prefix, source.suffix, cursor=request.cursor, count=PAGE_KEYS):
            copied += await self._copy(view, page.keys, source, target, receipt)
            unsettled += 1
            if unsettled == _PAGES_SETTLED_AT_ONCE or not page.cursor:
                await self._store.settle(receipt)
                unsettled, receipt, cursor = 0, Receipt(), page.cursor
            yield pb.CarryOverEpochResponse(scanned=page.scanned, total=page.total, copied=copied, cursor=cursor)

    async def purge(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """Remove every row of an epoch that is no longer in use, to no replica; yield how far it is. Raises as `carry_over` does."""
        check_admin(call)
        snapshot = self._snapshot()
        view = view_of(snapshot, request.feature_view, request.view_version)
        check_writable(view, call)
        epochs = snapshot.epochs_of(call.tenant, view.name, view.version)
        if request.epoch in epochs.in_use:
            raise FailedPrecondition(f"epoch {request.epoch} of {view.name!r} is in use: retire or abandon it first", reason="EPOCH_IN_USE")
        if request.epoch > epochs.newest:
            raise NotFound(f"there never was an epoch {request.epoch} of {view.name!r}", reason="EPOCH_NOT_FOUND")
        await self._heard(snapshot.revision)
        space = self._space(view, call.tenant, request.epoch)
        removed = 0
        async for page in self._store.scan(space.prefix, space.suffix, count=PAGE_KEYS):
            removed += await self._store.remove([key for key in page.keys if space.id_of(key) is not None])
            yield pb.PurgeEpochResponse(scanned=page.scanned, total=page.total, removed=removed)

    def _space(self, view: FeatureView, tenant: str, epoch: int) -> KeySpace:
        return KeySpace.of(tenant, view.entity.type, view.name, view.version, epoch)

    async def _copy(self, view: FeatureView, keys: Sequence[bytes], source: KeySpace, target: KeySpace, receipt: Receipt) -> int:
        """Copy streamed rows; return how many were newer. Rows past their retention are on their way out and stay."""
        found = {key: entity_id for key in keys if (entity_id := source.id_of(key)) is not None}
        if not found:
            return 0
        read = await self._store.read(list(found), READ_TIMEOUT_S)
        read.check_whole()
        oldest_us = int((self._clock() - view.retention_s) * 1e6) if view.retention_s else None
        chosen = [
            (entity_id, row) for entity_id, row in zip(found.values(), read.rows, strict=True) if row and _is_streamed(row, oldest_us)
        ]
        if not chosen:
            return 0
        ids, rows = [entity_id for entity_id, _ in chosen], [row for _, row in chosen]
        ttl_ms = int((view.retention_s + self._max_future_s) * 1000) if view.retention_s else 0
        await self._erasures_loaded()
        keys = target.keys(ids)
        verdicts = await self._store.write(keys, target.mark_keys(ids), rows, ttl_ms, receipt)
        await self._keep(view, keys, rows)  # refuses erased ones by itself
        return verdicts.count(APPLIED)


def _check_in_use(snapshot: Snapshot, view: FeatureView, tenant: str, *epochs: int) -> None:
    in_use = snapshot.epochs_of(tenant, view.name, view.version).in_use
    missing = sorted(set(epochs) - set(in_use))
    if missing or len(set(epochs)) < len(epochs):
        raise NotFound(
            f"epochs {list(epochs)} of {view.name!r} must be two that are in use here; in use are {list(in_use)}",
            reason="EPOCH_NOT_FOUND",
        )


def event_time_us(row: bytes) -> int:
    """Return the event time in a stored row, microseconds since the epoch."""
    return int.from_bytes(row[8:16], "little", signed=True)


def _is_streamed(row: bytes, oldest_us: int | None) -> bool:
    if len(row) < HEADER_BYTES or row[4] & FLAG_BACKFILL:
        return False
    return oldest_us is None or event_time_us(row) >= oldest_us
