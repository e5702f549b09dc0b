"""A lost Redis from the durable copy: every erasure first, then the rows, each where it is newer than what is there.

It may run while writers write, stop anywhere and go on from its cursor, or begin again: the store ends the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final

from feature_retrieval.epochs import event_time_us
from feature_retrieval.ingestion import MAX_FUTURE_S, view_of
from feature_retrieval.permissions import check_admin, check_writable
from feature_retrieval.store.postgres import DurableRows, Place
from feature_retrieval.store.redis import APPLIED, RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, InvalidArgument
from plait.redis.dispatch import Receipt
from plait.registry.records import FeatureView, Snapshot
from plait.rpc.call import Call
from plait.rpc.pace import Pace

_PAGE_ROWS: Final = 2000
_PAGES_SETTLED_AT_ONCE: Final = 20  # one wait for the disk may take a second


class Rebuilding:
    """Answers RebuildFeatures. Parameters as those of `Ingestion`; `rows` is the durable copy."""

    def __init__(
        self,
        store: RedisStore,
        rows: DurableRows,
        snapshot: Callable[[], Snapshot],
        erasures_loaded: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.time,
        *,
        max_future_s: float = MAX_FUTURE_S,
    ) -> None:
        self._store = store
        self._rows = rows
        self._snapshot = snapshot
        self._erasures_loaded = erasures_loaded
        self._clock = clock
        self._max_future_s = max_future_s

    async def rebuild(self, request: Any, call: Call) -> AsyncIterator[Any]:
        """Write a tenant's rows back; yield how far it is after each page. What is before a cursor is as safe as the settings ask.

        Raises PermissionDenied, NotFound, FailedPrecondition (DURABLE_COPY_OFF), InvalidArgument (CURSOR_INVALID), Unavailable.
        """
        check_admin(call)
        snapshot = self._snapshot()
        views = _views(snapshot, request.feature_view, call)
        names = sorted({name for name, _ in views})
        after = _place_of(request.cursor, call.tenant)
        await self._erasures_loaded()
        total, erasures = await self._rows.count(call.tenant, names), await self._rows.erasures(call.tenant)
        pace = Pace(request.max_rows_per_s)
        read, applied, unsettled, receipt, cursor = 0, 0, 0, Receipt(), request.cursor
        yield pb.RebuildFeaturesResponse(total=total, erasures=erasures, cursor=cursor)
        async with aclosing(self._pages(call.tenant, names, after)) as pages:
            async for page in pages:
                await pace.take(len(page))
                applied += await self._write(page, views, snapshot, receipt)
                read, unsettled, after = read + len(page), unsettled + 1, page[-1][0]
                if unsettled == _PAGES_SETTLED_AT_ONCE or len(page) < _PAGE_ROWS:
                    await self._store.settle(receipt)
                    unsettled, receipt, cursor = 0, Receipt(), after.key
                yield pb.RebuildFeaturesResponse(read=read, total=total, applied=applied, erasures=erasures, cursor=cursor)
        if unsettled:
            await self._store.settle(receipt)

    async def _pages(self, tenant: str, names: Sequence[str], after: Place | None) -> AsyncGenerator[Sequence[tuple[Place, bytes]], None]:
        """Yield a tenant's rows page by page; Postgres reads the next one while one is written."""
        page = await self._rows.page(tenant, names, after, _PAGE_ROWS)
        while page:
            ahead = asyncio.create_task(self._rows.page(tenant, names, page[-1][0], _PAGE_ROWS), name="next page")
            try:
                yield page
                page = await ahead
            finally:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    async def _write(
        self, page: Sequence[tuple[Place, bytes]], views: Mapping[tuple[str, int], FeatureView], snapshot: Snapshot, receipt: Receipt
    ) -> int:
        """Write one page; return how many rows were newer. Rows of versions and epochs that nobody uses, and old ones, are left out."""
        await self._erasures_loaded()  # Redis may be lost again meanwhile
        by_view: dict[tuple[str, int], list[tuple[Place, bytes]]] = {}
        for place, row in page:
            view = views.get((place.view, place.version))
            if view is None or place.epoch not in snapshot.epochs_of(place.tenant, view.name, view.version).in_use:
                continue
            if not view.retention_s or event_time_us(row) >= (self._clock() - view.retention_s) * 1e6:
                by_view.setdefault((view.name, view.version), []).append((place, row))
        applied = 0
        for name, chosen in by_view.items():
            retention_s = views[name].retention_s
            ttl_ms = int((retention_s + self._max_future_s) * 1000) if retention_s else 0
            places, rows = zip(*chosen, strict=True)
            verdicts = await self._store.write([p.key for p in places], [p.mark for p in places], rows, ttl_ms, receipt)
            applied += verdicts.count(APPLIED)
        return applied


def _views(snapshot: Snapshot, name: str, call: Call) -> dict[tuple[str, int], FeatureView]:
    """Return the views that have a durable copy, in each version that is kept, by name and version; or only the named one."""
    chosen = [view_of(snapshot, name, 0)] if name else [view for view in snapshot.feature_views.values() if view.durable != "off"]
    if not chosen or any(view.durable == "off" for view in chosen):
        whose = f"feature view {name!r} has no" if name else "no feature view has a"
        raise FailedPrecondition(
            f"{whose} durable copy: set spec.durable to behind or before, and rows are kept from then on", reason="DURABLE_COPY_OFF"
        )
    for view in chosen:
        check_writable(view, call)
    return {
        (view.name, version): found
        for view in chosen
        for version in (view.version, *(past.version for past in view.versions))
        if (found := view.at(version)) is not None
    }


def _place_of(cursor: bytes, tenant: str) -> Place | None:
    """Take a cursor apart: the key of the last row before it."""
    if not cursor:
        return None
    try:
        place = Place.of(cursor)
    except ValueError:
        place = None
    if place is None or place.tenant != tenant:
        raise InvalidArgument("the cursor is none that plait gave: leave it out to begin anew", reason="CURSOR_INVALID")
    return place
