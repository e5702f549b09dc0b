"""One column is found where feature-retrieval puts it."""

from __future__ import annotations

import pytest
from tests.fakes.router_world import snapshot
from tests.unit.plait.registry.test_set_checks import WORLD as EVERY_TYPE

from plait.registry.places import Place, place_of
from plait.registry.resources import snapshot_of
from plait.registry.shapes import SetShape


@pytest.mark.parametrize(
    ("feature", "entity", "place"),
    [
        ("item-view:f2", "item", Place("item", 2, "float32")),
        ("item-view:f2", "user", None),
        ("item-view:f9", "item", None),
        ("user-view:f1", "user", Place("user", 1, "float32")),
        ("nonsense", "item", None),
    ],
)
def test_where_a_feature_stands(feature: str, entity: str, place: Place | None) -> None:
    world = snapshot()
    feature_set = world.feature_sets["ranker"]
    assert place_of(feature, entity, feature_set, SetShape(feature_set, world.feature_views)) == place


def test_wide_features_before_it_are_counted_and_are_no_place_themselves() -> None:
    world = snapshot_of(7, EVERY_TYPE, [])
    [feature_set] = world.feature_sets.values()
    shape = SetShape(feature_set, world.feature_views)
    for item in feature_set.inputs:
        column = 0
        for text in item.features:
            width = shape.width(text)
            assert width is not None
            if ":" in text and not text.startswith("$") and "@" not in text:
                expected = Place(item.name, column, item.dtype) if width == 1 else None
                assert place_of(text, item.entity, feature_set, shape) == expected
            column += width
