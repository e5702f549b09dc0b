"""The wire work of events: PublishEvents, the dead letters, and how fresh a view is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from feature_retrieval.dead_letters import DeadLetters
from feature_retrieval.freshness import Freshness
from feature_retrieval.permissions import check_admin, check_readable
from feature_retrieval.publishing import Publishing
from feature_retrieval.sources import Backlog, EventSource
from plait.api.events.v1 import events_pb2
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.errors import InvalidArgument, NotFound
from plait.registry.explain import suggestion
from plait.registry.records import Snapshot
from plait.rpc.call import current
from plait.telemetry.tracing import Tracing

_MAX_PAGE: Final = 1_000
_USUAL_PAGE: Final = 100
_MAX_PAGE_BYTES: Final = 8 * 1024 * 1024  # half of what an answer may have
_MAX_IDS: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EventParts:
    """What the calls about events are handed to. `sources`: those that are consumed here, none where events are off."""

    publishing: Publishing
    dead_letters: DeadLetters
    freshness: Freshness
    sources: tuple[EventSource, ...]
    snapshot: Callable[[], Snapshot]

    async def waits(self, tenant: str) -> Backlog:
        """Return what waits for a tenant in all sources together."""
        each = [await source.backlog_of(tenant) for source in self.sources]
        events = [found.events for found in each]
        return Backlog(-1 if not each or -1 in events else sum(events), min((found.watermark_us for found in each), default=0))


class Events(pb_grpc.FeatureRetrievalServiceServicer):
    """Hands calls about events to their parts."""

    def __init__(self, parts: EventParts, *, tracing: Tracing) -> None:
        self._events = parts
        self._traced = tracing

    async def PublishEvents(self, request: Any, context: Any) -> Any:
        """Append events to the caller's tenant's stream."""
        response = pb.PublishEventsResponse()
        await self._events.publishing.publish(request.events, response, current(), self._traced.traceparent())
        return response

    async def ListDeadLetters(self, request: Any, context: Any) -> Any:
        """One page of them. They show events as they came, ids and values included."""
        check_admin(current())
        if not 0 <= request.page_size <= _MAX_PAGE:
            raise InvalidArgument(f"page_size is 1 to {_MAX_PAGE}, or 0 for {_USUAL_PAGE}")
        tenant = current().tenant
        dead = self._events.dead_letters
        page = await dead.page(tenant, size=request.page_size or _USUAL_PAGE, token=request.page_token, reason=request.reason)
        response = pb.ListDeadLettersResponse(next_page_token=page.next_token, total=await dead.count(tenant))
        size = 0
        for entry in page.entries:
            size += sum(map(len, entry.fields.values()))
            if size > _MAX_PAGE_BYTES and response.dead_letters:
                response.next_page_token = response.dead_letters[-1].id
                break
            _fill(response.dead_letters.add(), entry.id, entry.fields)
        return response

    async def RedriveDeadLetters(self, request: Any, context: Any) -> Any:
        """Append some again."""
        check_admin(current())
        if len(request.ids) > _MAX_IDS:
            raise InvalidArgument(f"{len(request.ids)} ids are given, at most {_MAX_IDS} are allowed in a call")
        return pb.RedriveDeadLettersResponse(
            redriven=await self._events.dead_letters.redrive(current().tenant, list(request.ids), request.reason)
        )

    async def GetViewStatus(self, request: Any, context: Any) -> Any:
        """How fresh a view is for the caller's tenant."""
        snapshot, tenant, name = self._events.snapshot(), current().tenant, request.feature_view
        view = snapshot.feature_views.get(name)
        if view is None:
            hint = suggestion(name, list(snapshot.feature_views))
            raise NotFound(
                f"no feature view {name[:80]!r}{hint}: see 'plait get featureview' for what there is", reason="FEATURE_VIEW_NOT_FOUND"
            )
        check_readable(view, current())
        epochs = snapshot.epochs_of(tenant, name, view.version)
        waits = Backlog(-1, 0) if view.aggregation is None else await self._events.waits(tenant)
        return pb.GetViewStatusResponse(
            feature_view=name,
            view_version=view.version,
            serving_epoch=epochs.serving,
            building_epoch=epochs.building,
            previous_epoch=epochs.previous,
            lag_events=waits.events,
            watermark_us=waits.watermark_us,
            newest_event_time_us=self._events.freshness.newest_us(tenant, name),
            dead_letters=await self._events.dead_letters.count(tenant),
        )


def _fill(letter: events_pb2.DeadLetter, entry_id: bytes, fields: Any) -> None:
    letter.id = entry_id.decode()
    letter.reason = fields.get(b"r", b"").decode(errors="replace")
    letter.message = fields.get(b"m", b"").decode(errors="replace")
    letter.payload = fields.get(b"e", b"")
    letter.traceparent = fields.get(b"t", b"").decode(errors="replace")
    letter.origin = fields.get(b"o", b"").decode(errors="replace")
    letter.dead_since.FromMilliseconds(int(entry_id.partition(b"-")[0]))
    letter.redrives = int(fields.get(b"n", b"0"))
