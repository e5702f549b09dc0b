"""Events and aggregated views for tests: makes events, applies them on a real store, and recounts them in plain Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from feature_retrieval.aggregation.plan import AggregationPlans
from feature_retrieval.sources import Message
from plait.api.events.v1 import events_pb2
from plait.registry.records import Aggregate, Aggregation, Entity, Feature, FeatureSet, FeatureView, ModelInput, Snapshot

NOW_S = 1_760_000_000.0
NOW_US = int(NOW_S * 1e6)
DAY_S = 86_400.0

TYPES = {name.removeprefix("EVENT_TYPE_").lower(): number for name, number in events_pb2.EventType.items()}


def feature(name: str, function: Any, *events: str, default: float | None = None, **more: Any) -> Feature:
    return Feature(name=name, dtype="float32", default=default, aggregate=Aggregate(function=function, events=events, **more))


LISTINGS = FeatureView(
    name="listing-activity",
    entity=Entity(type="listing"),
    aggregation=Aggregation(entity_from="object", lateness_s=DAY_S),
    features=(
        feature("views_1h", "count", "view", window_s=3600.0, tile_s=300.0),
        feature("spent", "sum", "complete_purchase", "make_offer", value="value"),
        feature("rating", "mean", "rate", value="value", default=-1),
        feature("low_1d", "min", "make_offer", value="value", window_s=DAY_S, tile_s=3600.0),
        feature("high", "max", "make_offer", value="value"),
        feature("last_price", "last", "make_offer", value="price", default=0),
        feature("viewers", "distinct", "view", value="subject", window_s=7200.0, tile_s=1800.0, precision=6),
        feature("heat", "count", "view", "like", half_life_s=3600.0),
    ),
)
USERS = FeatureView(
    name="user-activity",
    entity=Entity(type="user"),
    retention_s=30 * DAY_S,
    aggregation=Aggregation(entity_from="subject", lateness_s=2 * DAY_S),
    features=(
        feature("views", "count", "view"),
        feature("spent_1d", "sum", "complete_purchase", value="value", window_s=DAY_S, tile_s=3600.0),
    ),
)
HOME = FeatureSet(
    name="home",
    inputs=(
        ModelInput(
            name="listing",
            entity="listing",
            features=tuple(f"{LISTINGS.name}:{name}" for name in ("views_1h", "viewers", "heat", "rating", "last_price")),
        ),
    ),
)
SNAPSHOT = Snapshot(feature_views={view.name: view for view in (LISTINGS, USERS)}, feature_sets={HOME.name: HOME})
PLANS = AggregationPlans(SNAPSHOT)


def event(
    event_id: str,
    kind: str = "view",
    *,
    at_s: float = NOW_S,
    subject: str = "u1",
    listing: str = "l1",
    value: float = 0.0,
    values: Mapping[str, float] | None = None,
) -> events_pb2.Event:
    made = events_pb2.Event(event_id=event_id, type=TYPES[kind], value=value, values=values or {})  # type: ignore[arg-type]
    made.event_time.FromMicroseconds(round(at_s * 1e6))
    if subject:
        made.subject.entity_type = "user"
        made.subject.ids.string_ids.append(subject)
    if listing:
        made.object.entity_type = "listing"
        made.object.ids.string_ids.append(listing)
    return made


def messages(events: Iterable[events_pb2.Event | bytes], tenant: str = "default") -> Sequence[Message]:
    return [
        Message(
            tenant=tenant,
            payload=made if isinstance(made, bytes) else made.SerializeToString(),
            traceparent="",
            origin=f"test:{n}",
            token=n,
            published_us=NOW_US,
        )
        for n, made in enumerate(events)
    ]
