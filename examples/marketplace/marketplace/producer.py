"""The event producer: what happened, written as feature rows through the same door as in production, in the order it happened; and the same
events themselves, for the view that the service counts from them.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from marketplace.data import Dataset
from marketplace.features import Array, Features, view_features
from plait.api.events.v1 import events_pb2
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.errors import PlaitError, from_status

BATCH_EVENTS: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What the service acknowledged."""

    rows: int
    applied: int
    seconds: float


async def replay(
    channel: Any, api_key: str, data: Dataset, features: Features, progress: Callable[[int], None] = lambda _: None
) -> Written:
    """Write profiles and content, then both running views after every event; return once all of it is acknowledged.

    `progress` hears of every acknowledged batch's rows. Raises the PlaitError of the first batch or row that was refused.
    """
    stub: Any = pb_grpc.FeatureRetrievalServiceStub(channel)
    began = time.perf_counter()
    sizes: dict[int, int] = {}

    async def requests() -> AsyncIterator[pb.IngestFeaturesRequest]:
        for number, batch in enumerate(batches(data, features)):
            sizes[number] = len(batch.ids.string_ids)
            yield pb.IngestFeaturesRequest(batch_id=number, batch=batch)

    rows = applied = 0
    async for ack in stub.IngestFeatures(requests(), metadata=(("x-api-key", api_key),)):
        _refuse(ack)
        size = sizes.pop(ack.batch_id)
        rows, applied = rows + size, applied + ack.result.applied
        progress(size)
    return Written(rows=rows, applied=applied, seconds=time.perf_counter() - began)


async def publish(channel: Any, api_key: str, data: Dataset, last_s: float, progress: Callable[[int], None] = lambda _: None) -> int:
    """Publish every rating as an event, moved in time so that the last one is at `last_s`; return how many were taken.

    What is counted from them is the service's work: see the view `item-activity`. Publishing twice changes nothing.
    """
    stub: Any = pb_grpc.FeatureRetrievalServiceStub(channel)
    taken = 0
    for first in range(0, len(data.rating), BATCH_EVENTS):
        events = _events(data, range(first, min(first + BATCH_EVENTS, len(data.rating))), last_s)
        answer = await stub.PublishEvents(pb.PublishEventsRequest(events=events), metadata=(("x-api-key", api_key),), timeout=30)
        if answer.errors:
            raise PlaitError(
                f"{len(answer.errors)} events were refused, the first for {answer.errors[0].reason}: {answer.errors[0].message}"
            )
        taken += answer.accepted
        progress(answer.accepted)
    return taken


def _events(data: Dataset, numbers: range, last_s: float) -> list[events_pb2.Event]:
    shift_s = last_s - float(data.event_time_s[-1])
    found = []
    for at in numbers:
        event = events_pb2.Event(event_id=f"rating-{at}", type=events_pb2.EVENT_TYPE_RATE, value=float(data.rating[at]))
        event.event_time.FromMicroseconds(round((float(data.event_time_s[at]) + shift_s) * 1e6))
        for about, kind, entity in (
            (event.subject, "user", data.user_ids[data.event_user[at]]),
            (event.object, "item", data.item_ids[data.event_item[at]]),
        ):
            about.entity_type = kind
            about.ids.string_ids.append(entity)
        found.append(event)
    return found


def row_count(data: Dataset) -> int:
    """Return how many rows `replay` writes."""
    return len(data.user_ids) + len(data.item_ids) + 2 * len(data.rating)


def batches(data: Dataset, features: Features) -> Iterator[pb.FeatureBatch]:
    """Yield everything to write, in time order."""
    names = view_features(data)
    start = np.array([int(data.event_time_s[0])])
    yield _batch("user-profile", names, list(data.user_ids), features.user_profile, start, None)
    yield _batch("item-content", names, list(data.item_ids), features.item_content, start, None)
    for first in range(0, len(data.rating), BATCH_EVENTS):
        events = np.arange(first, min(first + BATCH_EVENTS, len(data.rating)))
        for view, running, entities, ids in (
            ("user-behaviour", features.user_behaviour, data.event_user, data.user_ids),
            ("item-stats", features.item_stats, data.event_item, data.item_ids),
        ):
            who = [ids[at] for at in entities[events].tolist()]
            yield _batch(view, names, who, running.rows[events + 1], data.event_time_s[events], events + 1)


def _batch(view: str, names: dict[str, tuple[str, ...]], ids: list[str], values: Array, time_s: Any, sequences: Any) -> pb.FeatureBatch:
    batch = pb.FeatureBatch(feature_view=view, event_times_us=(time_s * 1_000_000).tolist())
    batch.ids.string_ids.extend(ids)
    if sequences is not None:  # several events of one second keep their order
        batch.sequences.extend(sequences.tolist())
    batch.columns.add(features=names[view], dtype=types_pb2.DATA_TYPE_FLOAT32, data=np.ascontiguousarray(values, "<f4").tobytes())
    return batch


def _refuse(ack: Any) -> None:
    if ack.HasField("status"):
        raise from_status(ack.status.code, ack.status.message, ack.status.status_details)
    if ack.result.errors:
        first = ack.result.errors[0]
        raise PlaitError(f"batch {ack.batch_id}: {len(ack.result.errors)} rows were refused, the first for {first.reason}: {first.message}")
