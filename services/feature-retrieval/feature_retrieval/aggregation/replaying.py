"""Events of the past into an epoch that is being built, so that an aggregate that was declared anew, or just now, has its history.

Live events go to the epoch, too, from when it was begun; which event is in a row is known per epoch, so each counts once whichever way it comes
first, and the row ends in the same bytes. What a log does not have yet, because it was published a moment ago, is in the tenant's stream still.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from feature_retrieval.aggregation.applying import Applying, Onto
from feature_retrieval.epochs import heard_by_all
from feature_retrieval.ingestion import view_of
from feature_retrieval.permissions import check_admin, check_writable, publisher_of
from feature_retrieval.row_codec import tenant_key
from feature_retrieval.sources import Message
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.store.streams import Entry
from plait.errors import FailedPrecondition, InvalidArgument, NotFound
from plait.redis.dispatch import Receipt
from plait.registry.records import FeatureView, Snapshot
from plait.rpc.call import Call

MAX_EVENTS: Final = 1_000
_CURSOR: Final = re.compile(rb"[0-9]{1,19}-[0-9]{1,19} [0-9]{1,19}")  # behind which entry, and until when


class Replaying:
    """Answers ReplayEvents. `heard` returns once no replica applies by less than a revision of the registry, or raises."""

    def __init__(
        self,
        store: RedisStore,
        applying: Applying,
        snapshot: Callable[[], Snapshot],
        *,
        heard: Callable[[int], Awaitable[None]] = heard_by_all,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._applying = applying
        self._snapshot = snapshot
        self._heard = heard
        self._clock = clock

    async def replay(self, request: Any, response: Any, call: Call) -> None:
        """Apply the events of a ReplayEventsRequest, or a page of the stream's; fill a ReplayEventsResponse. Raises as the contract says."""
        check_admin(call)
        snapshot = self._snapshot()
        view = view_of(snapshot, request.feature_view, request.view_version)
        check_writable(view, call)
        _check_is_built(snapshot, view, call.tenant, request.epoch)
        if len(request.events) > MAX_EVENTS:
            raise InvalidArgument(f"{len(request.events)} events are given: at most {MAX_EVENTS} are allowed in a call")
        if request.events:
            given = [(event.SerializeToString(), publisher_of(call)) for event in request.events]
        else:  # by whom each was published decides here as it did there
            found = await self._retained(request.cursor, response, snapshot, call.tenant)
            given = [(entry.fields.get(b"e", b""), entry.fields.get(b"w", b"").decode(errors="replace")) for entry in found]
        messages = [
            Message(tenant=call.tenant, payload=payload, traceparent="", origin="replay", token=None, published_us=0, publisher=publisher)
            for payload, publisher in given
        ]
        receipt = Receipt()
        outcome = await self._applying.apply(messages, receipt, onto=Onto(view=view.name, version=view.version, epoch=request.epoch))
        response.durability = await self._store.settle(receipt)
        response.unused = outcome.unused
        response.applied = len(messages) - outcome.unused - len(outcome.refused)
        for row, refusal in sorted(outcome.refused.items()):
            response.errors.add(row=row, reason=refusal.reason, message=refusal.message)

    async def _retained(self, cursor: bytes, response: Any, snapshot: Snapshot, tenant: str) -> Sequence[Entry]:
        """Return a page of what the stream holds of before everyone applied to the epoch; what comes after that is in it anyway."""
        if not cursor:
            await self._heard(snapshot.revision)
            cursor = b"0-0 %d" % (int(self._clock() * 1000) + 60_000)  # Redis' clock gave the ids, and may be ahead of ours
            first = True
        elif not _CURSOR.fullmatch(cursor):
            raise InvalidArgument("the cursor is none that plait gave: leave it out to begin anew", reason="CURSOR_INVALID")
        else:
            first = False
        after, _, until = cursor.partition(b" ")
        entries = await self._store.streams.range(tenant_key(b"e1", tenant), after=after, before=until, count=MAX_EVENTS)
        if first and entries:
            response.oldest_us = int(entries[0].id.partition(b"-")[0]) * 1000
        if len(entries) == MAX_EVENTS:
            response.cursor = entries[-1].id + b" " + until
        return entries


def _check_is_built(snapshot: Snapshot, view: FeatureView, tenant: str, epoch: int) -> None:
    if view.aggregation is None:
        raise FailedPrecondition(
            f"the rows of {view.name!r} are not counted from events: fill it with 'plait features materialize'",
            reason="VIEW_NOT_AGGREGATED",
        )
    building = snapshot.epochs_of(tenant, view.name, view.version).building
    if epoch != building:
        raise NotFound(f"epoch {epoch} of {view.name!r} is not being built here (yet)", reason="EPOCH_NOT_FOUND")
