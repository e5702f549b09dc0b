"""What records say of themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plait.registry.records import Entity, Feature, FeatureSchema, FeatureView, PastVersion


@pytest.mark.parametrize(
    ("feature", "expected"),
    [
        (Feature(name="a", default=2.5), 2.5),
        (Feature(name="a", default=0), 0),
        (Feature(name="a", dtype="bool", default=True), 1),
        (Feature(name="a"), math.nan),
        (Feature(name="a", dtype="float16"), math.nan),
        (Feature(name="a", dtype="int64"), 0),
        (Feature(name="a", dtype="bool"), 0),
    ],
)
def test_what_stands_in_for_an_unknown_value(feature: Feature, expected: float) -> None:
    np.testing.assert_equal(float(feature.stand_in), float(expected))


def test_text_is_no_number_until_it_is_coded() -> None:
    with pytest.raises(TypeError, match="'colour' is text"):
        _ = Feature(name="colour", dtype="string", vocabulary=("red",), default="red").stand_in


def test_a_view_is_looked_at_as_it_was_in_an_earlier_version() -> None:
    old = PastVersion(
        version=1, entity=Entity(type="item", key="int64"), schemas=(FeatureSchema(id=1, features=(Feature(name="a"),)),), max_age_s=60
    )
    view = FeatureView(
        name="stats", entity=Entity(type="item"), features=(Feature(name="b"),), version=3, readers=("shop",), versions=(old,)
    )
    assert view.at(None) is view
    assert view.at(0) is view
    assert view.at(3) is view
    assert view.at(2) is None
    past = view.at(1)
    assert past is not None
    assert (past.version, past.entity, past.features, past.schemas, past.max_age_s) == (
        1,
        old.entity,
        (Feature(name="a"),),
        old.schemas,
        60,
    )
    assert (past.name, past.readers) == ("stats", ("shop",))  # who may read is decided now, not then
