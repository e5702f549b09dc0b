"""How wide what a set names is, and what stands in for it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from tests.unit.plait.registry.test_set_checks import COLUMNS, FACTS, SET, TASTE, TEXT

from plait.registry import shapes
from plait.registry.records import Feature, FeatureDType, RequestFeature, Transform
from plait.registry.references import parse

VIEWS = {view.name: view for view in (FACTS, TEXT, TASTE)}
ITEM = SET.inputs[0]
SHAPE = shapes.SetShape(SET, VIEWS)


def test_columns_of_an_input_are_the_widths_of_its_features() -> None:
    assert SHAPE.columns_of(ITEM) == COLUMNS
    assert len(SHAPE.default_columns(ITEM)) == COLUMNS


def test_defaults_are_coded_padded_and_repeated() -> None:
    row = SHAPE.default_columns(ITEM)
    assert math.isnan(row[0])
    assert math.isnan(row[1])
    assert row[2] == 2  # green
    assert row[3:11] == [-1] * 8
    assert all(math.isnan(value) for value in row[11:396])
    assert row[396] == 0  # the transform's default, not NaN
    whole = dataclasses.replace(ITEM, dtype="int32", features=("$request:hour", "$transform:age"))
    assert SHAPE.default_columns(whole) == [0, 0]


@pytest.mark.parametrize(
    ("feature", "wire", "stored", "stand_in"),
    [
        (Feature(name="f", dtype="timestamp"), "int64", "int64", 0),
        (Feature(name="f", dtype="string", vocabulary=("a", "b"), default="b"), "bytes", "int32", 2),
        (Feature(name="f", dtype="string", vocabulary=("a",)), "bytes", "int32", 0),
        (Feature(name="f", dtype="int8", max_length=2, pad=7, default=3), "int8", "int8", 3),
        (Feature(name="f", dtype="int8", max_length=2, pad=7), "int8", "int8", 7),
        (Feature(name="f", dtype="bool", default=True), "bool", "bool", True),
    ],
)
def test_types_on_the_wire_and_in_rows(feature: Feature, wire: str, stored: FeatureDType, stand_in: float) -> None:
    assert shapes.wire_type(feature).name == wire
    assert shapes.stored_type(feature).name == stored
    assert shapes.stand_in(feature) == stand_in


@pytest.mark.parametrize("text", ["nope:x", "facts:nope", "facts@7:price", "$request:nope", "$transform:nope", "nonsense"])
def test_what_is_not_there_has_no_width(text: str) -> None:
    broken = dataclasses.replace(ITEM, features=("facts:price", text))
    assert shapes.width(text, SET, VIEWS) is None
    assert SHAPE.columns_of(broken) is None
    with pytest.raises(KeyError):
        SHAPE.default_columns(broken)


@pytest.mark.parametrize("expression", ["1 +", "{nope:x}", "{text:vector} + {facts:sizes}"])
def test_a_transform_that_cannot_be_computed_has_no_width(expression: str) -> None:
    bent = dataclasses.replace(SET, transforms=(Transform(name="t", entity="item", expression=expression),))
    assert shapes.width("$transform:t", bent, VIEWS) is None


def test_views_and_entities_of_an_input_are_those_of_its_transforms_too() -> None:
    assert [(v.name, v.version) for v in SHAPE.views_of(ITEM)] == [("facts", 2), ("facts", 1), ("text", 1), ("taste", 1)]
    assert SHAPE.entities_of(ITEM) == ("item", "user")
    assert SHAPE.entities_of(SET.inputs[1]) == ("user",)
    assert SHAPE.operands("$request:hour") == (parse("$request:hour"),)
    found = shapes.find(SHAPE.operands("$request:hour")[0], SET, VIEWS)
    assert isinstance(found, RequestFeature)
