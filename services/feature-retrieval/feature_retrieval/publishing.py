"""Events in at the front door: checked, and appended to the caller's stream unless its consumers are too far behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from feature_retrieval.aggregation.events import MAX_EVENT_BYTES, NOT_WRITABLE, TOO_LARGE, TYPE_UNKNOWN, Refusal, check
from feature_retrieval.aggregation.plan import AggregationPlans
from feature_retrieval.permissions import publisher_of
from feature_retrieval.row_codec import tenant_key
from feature_retrieval.sources import Backlog
from feature_retrieval.store.streams import Streams
from plait.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from plait.redis.dispatch import Receipt
from plait.rpc.call import Call

MAX_EVENTS: Final = 1_000
_BACKLOG_KNOWN_S: Final = 0.2  # for how long an answer about the backlog is good enough


class Settling(Protocol):
    """Who waits until writes are as safe as they must be."""

    async def settle(self, receipt: Receipt) -> int:
        """Return the Durability of what the receipt names."""
        ...


class Waiting(Protocol):
    """Who knows how much waits."""

    async def backlog_of(self, tenant: str) -> Backlog:
        """Return what waits for one tenant."""
        ...


class Publishing:
    """Answers PublishEvents. `source` None: no consumer runs on these streams, so nothing is taken."""

    def __init__(
        self,
        streams: Streams,
        acknowledging: Settling,
        source: Waiting | None,
        *,
        plans: Callable[[], AggregationPlans],
        max_backlog: int = 1_000_000,
        max_future_s: float = 300.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._streams = streams
        self._acknowledging = acknowledging
        self._source = source
        self._plans = plans
        self._max_backlog = max_backlog
        self._max_future_us = int(max_future_s * 1e6)
        self._clock = clock
        self._known: dict[str, tuple[float, int]] = {}

    async def publish(self, events: Sequence[Any], response: Any, call: Call, traceparent: str) -> None:
        """Append what can be applied; fill a PublishEventsResponse.

        An event of a type that is newer than this service is taken: another replica may know it. One that only views count whose writers do
        not name the caller is refused (VIEW_NOT_WRITABLE). Raises InvalidArgument,
        FailedPrecondition (EVENTS_OFF), ResourceExhausted (EVENT_BACKLOG), Unavailable.
        """
        if not 1 <= len(events) <= MAX_EVENTS:
            raise InvalidArgument(f"{len(events)} events are given: 1 to {MAX_EVENTS} are allowed in a call")
        tenant, publisher, plans = call.tenant, publisher_of(call), self._plans()
        await self._refuse_backlog(tenant)
        latest_us = int(self._clock() * 1e6) + self._max_future_us
        key = tenant_key(b"e1", tenant)
        given = {b"t": traceparent.encode(), b"w": publisher.encode()}
        more = {field: value for field, value in given.items() if value}
        entries = []
        for at, event in enumerate(events):
            payload = event.SerializeToString()
            found = TOO_LARGE if len(payload) > MAX_EVENT_BYTES else check(event, latest_us)
            if not isinstance(found, Refusal) and plans.fed_by(found, tenant, publisher) is NOT_WRITABLE:
                found = NOT_WRITABLE
            if isinstance(found, Refusal) and (found is not TYPE_UNKNOWN or not event.type):
                response.errors.add(row=at, reason=found.reason, message=found.message)
                continue
            entries.append({b"e": payload, **more})
        receipt = Receipt()
        await self._streams.append([key] * len(entries), entries, receipt=receipt)
        response.durability = await self._acknowledging.settle(receipt)
        response.accepted = len(entries)

    async def _refuse_backlog(self, tenant: str) -> None:
        if self._source is None:
            raise FailedPrecondition("no events are consumed here: set EVENTS__SOURCE of feature-retrieval", reason="EVENTS_OFF")
        now = self._clock()
        asked, waiting = self._known.get(tenant, (0.0, 0))
        if not asked <= now < asked + _BACKLOG_KNOWN_S:
            backlog = await self._source.backlog_of(tenant)
            waiting = backlog.most if backlog.events < 0 else backlog.events  # once all is read, it is known again
            self._known[tenant] = (now, waiting)
        if waiting > self._max_backlog:
            raise ResourceExhausted(
                f"{waiting} events wait to be applied: publish more slowly, or add replicas of feature-retrieval",
                reason="EVENT_BACKLOG",
                retry_after_s=1.0,
            )
