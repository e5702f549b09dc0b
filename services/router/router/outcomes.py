"""RecordOutcome: what became of answers, each counted once; those that are wrong are told one by one, the others kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Final

from plait.api.events.v1 import events_pb2, outcomes_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import FailedPrecondition, InvalidArgument
from plait.rpc.call import current
from plait.telemetry.metrics import Metrics
from router.journal import Journal
from router.validation import MAX_NAME_BYTES, MAX_REQUEST_ID_BYTES, one_entity

MAX_OUTCOMES: Final = 1000
MAX_AHEAD_S: Final = 300.0
MAX_AGE_S: Final = 30 * 86_400.0

Wrong = tuple[str, str]


class Outcomes:
    """Hands what is right to the journal; without one nothing is kept, and that is said."""

    def __init__(self, journal: Journal | None, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self._journal = journal
        self._clock = clock
        counted = metrics.counter("plait_router_outcomes", "outcomes that were told, by what became of them", ("outcome",))
        self._accepted, self._duplicate, self._refused = (counted.labels(word) for word in ("accepted", "duplicate", "refused"))

    async def record(self, request: pb.RecordOutcomeRequest) -> pb.RecordOutcomeResponse:
        """Return how many were new. Raises InvalidArgument, FailedPrecondition (OUTCOMES_NOT_KEPT), Unavailable."""
        if self._journal is None:
            raise FailedPrecondition(
                "outcomes are not kept here: the router needs a Redis to write them to (redis.url)", reason="OUTCOMES_NOT_KEPT"
            )
        if not 1 <= len(request.outcomes) <= MAX_OUTCOMES:
            raise InvalidArgument(f"expected 1 to {MAX_OUTCOMES} outcomes; found {len(request.outcomes)}", reason="OUTCOMES_INVALID")
        now_s = self._clock()
        right: list[outcomes_pb2.Outcome] = []
        response = pb.RecordOutcomeResponse()
        for index, outcome in enumerate(request.outcomes):
            wrong = check(outcome, now_s)
            if wrong is None:
                right.append(outcome)
            else:
                response.errors.add(index=index, reason=wrong[0], message=wrong[1])
        response.accepted = await self._journal.record(current().tenant, right) if right else 0
        response.duplicates = len(right) - response.accepted
        self._accepted.inc(response.accepted)
        self._duplicate.inc(response.duplicates)
        self._refused.inc(len(response.errors))
        return response


def check(outcome: outcomes_pb2.Outcome, now_s: float) -> Wrong | None:
    """Return what is wrong with an outcome: a stable word and what to do about it."""
    return next((wrong for fits, wrong in _looked_at(outcome, now_s) if not fits), None)


def _looked_at(outcome: outcomes_pb2.Outcome, now_s: float) -> Iterator[tuple[bool, Wrong]]:
    most = MAX_REQUEST_ID_BYTES
    yield 1 <= len(outcome.request_id.encode()) <= most, ("REQUEST_ID_INVALID", f"request_id: expected the answer's, 1 to {most} bytes")
    item_fits = not outcome.HasField("item") or one_entity(outcome.item)
    yield item_fits, ("ITEM_INVALID", "item: expected an entity type and exactly one id, or nothing")
    known = outcome.type != events_pb2.EVENT_TYPE_UNSPECIFIED and outcome.type in events_pb2.EventType.values()
    yield known, ("OUTCOME_TYPE_UNKNOWN", "type: expected one of EventType's")
    yield len(outcome.outcome_id.encode()) <= most, ("OUTCOME_ID_INVALID", f"outcome_id: expected at most {most} bytes")
    yield len(outcome.route.encode()) <= MAX_NAME_BYTES, ("ROUTE_INVALID", f"route: expected at most {MAX_NAME_BYTES} bytes")
    timely = outcome.HasField("event_time") and -MAX_AGE_S <= outcome.event_time.seconds - now_s <= MAX_AHEAD_S
    yield timely, ("OUTCOME_TIME_INVALID", "event_time: expected at most 5 minutes from now and 30 days ago")
    yield math.isfinite(outcome.value), ("VALUE_INVALID", "value: expected a finite number")
