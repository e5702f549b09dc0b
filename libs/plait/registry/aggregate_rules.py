"""What aggregated features must satisfy: windows of whole tiles, bounded states, values that the events have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from plait.registry import findings
from plait.registry.findings import Finding
from plait.registry.records import Aggregate, Feature, FeatureView

EVENTS: Final = ("view", "like", "add_to_cart", "make_offer", "start_purchase", "complete_purchase", "rate")
MAX_TILES: Final = 128
MAX_WINDOW_S: Final = 10 * 366 * 86_400.0
MAX_REGISTERS: Final = 16 * 1024  # bytes of a distinct's state
_DECAY_TILES: Final = 64
_VALUE: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?\Z")
_DECAYING: Final = ("count", "sum")
_IDS: Final = ("subject", "object")


def check(view: FeatureView) -> Iterator[Finding]:
    """Yield everything wrong with a view's aggregation."""
    aggregated = [feature.aggregate is not None for feature in view.features]
    if view.aggregation is None:
        if any(aggregated):
            yield ("aggregation",), "is missing, and features are computed from events: say whose rows they change (entity_from)"
        return
    if not all(aggregated):
        yield ("features", aggregated.index(False)), "has no aggregate: in an aggregated view every feature is computed from events"
    if view.durable != "off":  # of a rebuilt row nobody would know which events are in it
        yield ("durable",), "is not for aggregated views: what they are counted from is kept where the events come from"
    yield from findings.in_range(("aggregation", "lateness_s"), view.aggregation.lateness_s, 0, MAX_WINDOW_S)
    for index, feature in enumerate(view.features):
        for steps, message in () if feature.aggregate is None else _aggregated(feature, feature.aggregate):
            yield ("features", index, *steps), message
    longest = max((feature.aggregate.window_s for feature in view.features if feature.aggregate is not None), default=0.0)
    if 0 < view.retention_s < longest + view.aggregation.lateness_s:
        needed = longest + view.aggregation.lateness_s
        yield (
            ("retention_s",),
            f"must be 0 or at least the longest window and lateness_s together ({needed:g}), or rows go while they count",
        )


def state_bytes(aggregate: Aggregate) -> int:
    """Return about how many bytes of a row the state takes."""
    if aggregate.function == "last":
        return 24
    if aggregate.function == "distinct":
        return 8 + _tiles(aggregate) * (1 << min(max(aggregate.precision, 0), 12))
    return 8 + (_DECAY_TILES if aggregate.half_life_s else _tiles(aggregate)) * (16 if aggregate.function == "mean" else 8)


def _tiles(aggregate: Aggregate) -> int:
    if not (aggregate.window_s > 0 and aggregate.tile_s > 0):
        return 1
    return max(1, round(min(aggregate.window_s / aggregate.tile_s, 1e9)))


def _aggregated(feature: Feature, aggregate: Aggregate) -> Iterator[Finding]:
    if feature.dtype in ("string", "timestamp", "bool") or feature.width or feature.max_length:
        yield ("dtype",), "an aggregate is one number: use an int or a float"
    at = ("aggregate",)
    yield from findings.count((*at, "events"), aggregate.events, len(EVENTS), "type of event")
    yield from findings.unique((*at, "events"), aggregate.events, leaf=())
    for index, event in enumerate(aggregate.events):
        if event not in EVENTS:
            yield (*at, "events", index), f"there is no event {event[:80]!r}; there are {', '.join(EVENTS)}"
    for steps, message in (*_value(aggregate), *_window(aggregate)):
        yield (*at, *steps), message


def _value(aggregate: Aggregate) -> Iterator[Finding]:
    if aggregate.function == "count":
        if aggregate.value:
            yield ("value",), "is not looked at by count; leave it out, or use sum"
        return
    if not aggregate.value:
        if aggregate.function == "sum":
            return  # each event counts one
        yield ("value",), f"{aggregate.function} needs what of an event it takes: value, a name of the event's values, or (distinct) an id"
    elif not _VALUE.match(aggregate.value):
        yield ("value",), f"{aggregate.value[:80]!r} is not a name: use {findings.NAME_HELP}"
    elif aggregate.value in _IDS and aggregate.function != "distinct":
        yield ("value",), f"is an id, which {aggregate.function} cannot take; distinct can"


def _window(aggregate: Aggregate) -> Iterator[Finding]:
    for field in ("window_s", "tile_s", "half_life_s"):
        yield from findings.in_range((field,), getattr(aggregate, field), 0, MAX_WINDOW_S)
    if aggregate.half_life_s:
        if aggregate.function not in _DECAYING:
            yield ("half_life_s",), f"is for {' and '.join(_DECAYING)}, not for {aggregate.function}"
        if aggregate.window_s or aggregate.tile_s:
            yield ("half_life_s",), "excludes window_s and tile_s"
        return
    if aggregate.tile_s > 0:
        if aggregate.function == "last":
            yield ("tile_s",), "is not looked at by last; leave it out"
        elif not aggregate.window_s > 0:
            yield ("tile_s",), "is a part of window_s, which is missing"
        elif (parts := aggregate.window_s / aggregate.tile_s) != round(parts) or not 1 <= parts <= MAX_TILES:
            yield ("tile_s",), f"must divide window_s ({aggregate.window_s:g}) into 1 to {MAX_TILES} tiles"
    if aggregate.function != "distinct":
        return
    yield from findings.in_range(("precision",), aggregate.precision, 4, 12)
    if 4 <= aggregate.precision <= 12 and _tiles(aggregate) << aggregate.precision > MAX_REGISTERS:
        yield ("precision",), f"needs {_tiles(aggregate) << aggregate.precision} bytes a row; at most {MAX_REGISTERS}: use longer tiles"
