"""Aggregated features: windows of whole tiles, bounded states, values that events have."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from plait.api.events.v1 import events_pb2
from plait.registry import rules
from plait.registry.aggregate_rules import EVENTS, state_bytes
from plait.registry.records import Aggregate, Aggregation, Entity, Feature, FeatureView

COUNT = Aggregate(function="count", events=("view",), window_s=3600, tile_s=300)
VIEW = FeatureView(
    name="live",
    entity=Entity(type="listing"),
    aggregation=Aggregation(),
    retention_s=2_592_000 + 86_400,
    features=(
        Feature(name="views_1h", aggregate=COUNT),
        Feature(
            name="spend_7d",
            aggregate=Aggregate(function="sum", events=("complete_purchase",), value="value", window_s=604800, tile_s=43200),
        ),
        Feature(name="rating", aggregate=Aggregate(function="mean", events=("rate",), value="value")),
        Feature(name="low", aggregate=Aggregate(function="min", events=("make_offer",), value="price", window_s=2592000, tile_s=86400)),
        Feature(name="last", aggregate=Aggregate(function="last", events=("make_offer",), value="value", window_s=60)),
        Feature(name="viewers", aggregate=Aggregate(function="distinct", events=("view",), value="subject", window_s=86400, tile_s=14400)),
        Feature(name="heat", dtype="int64", aggregate=Aggregate(function="sum", events=("view", "like"), half_life_s=60)),
    ),
)


def found(aggregate: Aggregate, **feature: Any) -> dict[tuple[str | int, ...], str]:
    view = dataclasses.replace(VIEW, retention_s=0, features=(Feature(name="x", aggregate=aggregate, **feature),))
    return {steps[2:]: message for steps, message in rules.check(view)}


def test_one_of_each_is_fine() -> None:
    assert rules.check(VIEW) == []


def test_events_are_those_of_the_contract() -> None:
    assert {f"EVENT_TYPE_{name.upper()}" for name in EVENTS} == set(events_pb2.EventType.keys()) - {"EVENT_TYPE_UNSPECIFIED"}


@pytest.mark.parametrize(
    ("change", "steps", "words"),
    [
        ({"events": ()}, ("aggregate", "events"), "at least one type of event"),
        ({"events": ("view", "view")}, ("aggregate", "events", 1), "twice"),
        ({"events": ("look",)}, ("aggregate", "events", 0), "there is no event 'look'; there are view, like"),
        ({"value": "value"}, ("aggregate", "value"), "not looked at by count"),
        ({"function": "min"}, ("aggregate", "value"), "min needs what of an event it takes"),
        ({"function": "max", "value": "A b"}, ("aggregate", "value"), "is not a name"),
        ({"function": "mean", "value": "subject"}, ("aggregate", "value"), "is an id, which mean cannot take"),
        ({"window_s": -1.0}, ("aggregate", "window_s"), "at least 0"),
        ({"tile_s": 7.0}, ("aggregate", "tile_s"), "must divide window_s (3600) into 1 to 128 tiles"),
        ({"tile_s": 10.0}, ("aggregate", "tile_s"), "into 1 to 128 tiles"),
        ({"tile_s": 7200.0}, ("aggregate", "tile_s"), "into 1 to 128 tiles"),
        ({"window_s": 0.0}, ("aggregate", "tile_s"), "is a part of window_s, which is missing"),
        ({"function": "last", "value": "value"}, ("aggregate", "tile_s"), "not looked at by last"),
        ({"half_life_s": 5.0}, ("aggregate", "half_life_s"), "excludes window_s and tile_s"),
        (
            {"function": "max", "value": "value", "half_life_s": 5.0, "window_s": 0.0, "tile_s": 0.0},
            ("aggregate", "half_life_s"),
            "is for count and sum, not for max",
        ),
        ({"function": "distinct", "value": "subject", "precision": 3}, ("aggregate", "precision"), "at least 4 and at most 12"),
        (
            {"function": "distinct", "value": "subject", "precision": 12},
            ("aggregate", "precision"),
            "needs 49152 bytes a row; at most 16384",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict[str, Any], steps: tuple[Any, ...], words: str) -> None:
    assert words in found(dataclasses.replace(COUNT, **change))[steps]


@pytest.mark.parametrize("feature", [{"dtype": "timestamp"}, {"dtype": "bool"}, {"width": 3}, {"max_length": 3}])
def test_an_aggregate_is_one_number(feature: dict[str, Any]) -> None:
    assert "one number" in found(COUNT, **feature)["dtype",]


def test_all_features_of_a_view_are_aggregated_or_none() -> None:
    mixed = dataclasses.replace(VIEW, features=(*VIEW.features, Feature(name="x")))
    assert "every feature is computed" in dict(rules.check(mixed))["features", 7]
    silent = dataclasses.replace(VIEW, aggregation=None)
    assert "say whose rows" in dict(rules.check(silent))["aggregation",]


def test_no_durable_copy_is_kept_of_what_is_counted() -> None:
    ((steps, message),) = rules.check(dataclasses.replace(VIEW, durable="behind"))
    assert (steps, "not for aggregated views" in message) == (("durable",), True)


def test_rows_stay_while_they_count() -> None:
    short = dataclasses.replace(VIEW, retention_s=VIEW.retention_s - 1)
    assert "(2.6784e+06)" in dict(rules.check(short))["retention_s",]
    assert rules.check(dataclasses.replace(VIEW, retention_s=0)) == []


def test_states_are_as_large_as_they_are_kept() -> None:
    assert [state_bytes(f.aggregate) for f in VIEW.features if f.aggregate] == [104, 120, 24, 248, 24, 8 + 6 * 256, 520]
