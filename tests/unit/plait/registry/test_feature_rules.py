"""Views and sets on their own: what rows can hold, what tensors can be made of, what can be computed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from plait.registry import rules
from plait.registry.records import (
    Aggregation,
    Entity,
    FeastSource,
    Feature,
    FeatureSet,
    FeatureView,
    KeyPart,
    ModelInput,
    RequestFeature,
    Transform,
)

VIEW = FeatureView(name="v", entity=Entity(type="item"), features=(Feature(name="x"),))
PARTS = (KeyPart(name="shop"), KeyPart(name="number", type="int64"))
SET = FeatureSet(
    name="s",
    request=(RequestFeature(name="hour", minimum=0, maximum=23, default=12), RequestFeature(name="km", entity="item", dtype="float64")),
    transforms=(Transform(name="late", entity="item", expression="{$request:hour} > 18 and {v@2:x} > 0"),),
    inputs=(ModelInput(name="item", entity="item", features=("v:x", "v@2:x", "$request:hour", "$request:km", "$transform:late")),),
)


def found(record: Any) -> dict[tuple[str | int, ...], str]:
    return dict(rules.check(record))


def feature(**fields: Any) -> dict[tuple[str | int, ...], str]:
    problems = found(dataclasses.replace(VIEW, features=(Feature(**{"name": "x", **fields}),)))
    return {steps[2:] if steps[:1] == ("features",) else steps: message for steps, message in problems.items()}


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "string", "vocabulary": ("red", "ü"), "default": "ü"},
        {"dtype": "string", "hash_buckets": 2**31 - 1, "default": "anything"},
        {"dtype": "timestamp", "default": 0},
        {"dtype": "int16", "max_length": 1024, "pad": -1, "default": 5},
        {"dtype": "bool", "max_length": 2, "pad": 1},
        {"dtype": "float32", "width": 8192},
        {"dtype": "float16", "width": 1},
        {"dtype": "int8", "width": 384, "scale": 0.0078125, "default": 0.5},
    ],
)
def test_every_type_has_its_fields(fields: dict[str, Any]) -> None:
    assert feature(**fields) == {}


@pytest.mark.parametrize(
    ("fields", "steps", "words"),
    [
        ({"dtype": "string"}, ("dtype",), "a vocabulary or a number of hash_buckets, and not both"),
        ({"dtype": "string", "vocabulary": ("a",), "hash_buckets": 3}, ("dtype",), "and not both"),
        ({"dtype": "string", "vocabulary": ("a", "a")}, ("vocabulary", 1), "twice"),
        ({"dtype": "string", "vocabulary": ("a" * 257,)}, ("vocabulary", 0), "longer than 256 bytes"),
        ({"dtype": "string", "vocabulary": ("a\0",)}, ("vocabulary", 0), "cannot be stored"),
        ({"dtype": "string", "vocabulary": tuple(map(str, range(100_001)))}, ("vocabulary",), "100001 words; at most 100000"),
        ({"dtype": "string", "vocabulary": ("a",), "default": "b"}, ("default",), "not in the vocabulary"),
        ({"dtype": "string", "hash_buckets": -1}, ("hash_buckets",), "at least 1"),
        ({"dtype": "string", "hash_buckets": 2**31}, ("hash_buckets",), "at most 2.14748e+09"),
        ({"dtype": "string", "hash_buckets": 2, "max_length": 2}, ("max_length",), "a list of texts cannot be stored"),
        ({"dtype": "string", "hash_buckets": 2, "width": 2}, ("width",), "this one is string"),
        ({"vocabulary": ("a",)}, ("vocabulary",), "is for string features, and this one is float32"),
        ({"hash_buckets": 2}, ("hash_buckets",), "is for string features"),
        ({"dtype": "int32", "width": 2}, ("width",), "float16, float32, int8, and this one is int32"),
        ({"width": -1}, ("width",), "at least 0"),
        ({"width": 8193}, ("width",), "at most 8192"),
        ({"max_length": 1025}, ("max_length",), "at most 1024"),
        ({"width": 2, "max_length": 2}, ("max_length",), "excludes width"),
        ({"dtype": "int8", "scale": 2.0}, ("scale",), "int8 features with a width"),
        ({"width": 2, "scale": 2.0}, ("scale",), "int8 features with a width"),
        ({"dtype": "int8", "width": 2, "scale": -1.0}, ("scale",), "more than 0"),
        ({"dtype": "int8", "width": 2, "scale": math.inf}, ("scale",), "more than 0"),
        ({"pad": 1.0}, ("pad",), "is for lists"),
        ({"dtype": "int8", "max_length": 2, "pad": 128.0}, ("pad",), "does not fit int8"),
        ({"dtype": "int8", "max_length": 2, "pad": 0.5}, ("pad",), "does not fit int8"),
        ({"dtype": "bool", "max_length": 2, "pad": 2.0}, ("pad",), "does not fit bool"),
        ({"max_length": 2, "pad": math.nan}, ("pad",), "does not fit float32"),
        ({"dtype": "timestamp", "default": 1.5}, ("default",), "whole number"),
    ],
)
def test_what_a_column_cannot_be_is_refused(fields: dict[str, Any], steps: tuple[Any, ...], words: str) -> None:
    assert words in feature(**fields)[steps]


def test_embeddings_live_in_a_view_of_their_own() -> None:
    both = (Feature(name="e", width=4), Feature(name="x"))
    assert "view of their own" in found(dataclasses.replace(VIEW, features=both))["features", 1]
    assert found(dataclasses.replace(VIEW, features=(both[0], Feature(name="f", width=8)))) == {}


def test_a_row_is_bounded() -> None:
    wide = tuple(Feature(name=f"e{n}", width=8192) for n in range(2))
    assert "at most 65536 are allowed: split the view" in found(dataclasses.replace(VIEW, features=wide))["features",]
    assert found(dataclasses.replace(VIEW, features=wide[:1])) == {}


@pytest.mark.parametrize(
    ("entity", "steps", "words"),
    [
        (Entity(type="item", key="composite"), ("entity", "parts"), "at least one part"),
        (Entity(type="item", key="composite", parts=(PARTS[0],) * 2), ("entity", "parts", 1, "name"), "twice"),
        (
            Entity(type="item", key="composite", parts=tuple(KeyPart(name=f"p{n}") for n in range(9))),
            ("entity", "parts"),
            "9 entries; at most 8",
        ),
        (Entity(type="item", key="composite", parts=(KeyPart(name="A"),)), ("entity", "parts", 0, "name"), "not a name"),
        (Entity(type="item", parts=PARTS), ("entity", "parts"), "are for composite keys, and this key is string"),
    ],
)
def test_keys_of_several_parts(entity: Entity, steps: tuple[Any, ...], words: str) -> None:
    assert words in found(dataclasses.replace(VIEW, entity=entity))[steps]
    assert found(dataclasses.replace(VIEW, entity=Entity(type="item", key="composite", parts=PARTS))) == {}


def test_readers_and_writers_are_names() -> None:
    assert found(dataclasses.replace(VIEW, readers=("shop-a", "key-1"), writers=("shop-a",))) == {}
    problems = found(dataclasses.replace(VIEW, readers=("Shop",), writers=("a", "a")))
    assert set(problems) == {("readers", 0), ("writers", 1)}


def test_a_view_of_feast_has_as_many_join_keys_as_parts() -> None:
    feast = FeastSource(project="shop", view="hourly", join_keys=("driver_id",))
    assert found(dataclasses.replace(VIEW, feast=feast)) == {}
    composite = dataclasses.replace(VIEW, feast=feast, entity=Entity(type="item", key="composite", parts=PARTS))
    assert "has 1 entries, but the entity's key has 2 parts" in found(composite)["feast", "join_keys"]
    assert ("feast", "project") in found(dataclasses.replace(VIEW, feast=dataclasses.replace(feast, project="")))
    assert "only read" in found(dataclasses.replace(VIEW, feast=feast, aggregation=Aggregation()))["aggregation",]


def test_a_set_with_everything_is_fine() -> None:
    assert found(SET) == {}


def bent(**fields: Any) -> dict[tuple[str | int, ...], str]:
    return found(dataclasses.replace(SET, **fields))


@pytest.mark.parametrize(
    ("fields", "steps", "words"),
    [
        ({"inputs": (ModelInput(name="i", entity="item", features=("v@0:x",)),)}, ("inputs", 0, "features", 0), "expected view:feature"),
        ({"request": ()}, ("inputs", 0, "features", 2), "there is no request feature 'hour'"),
        ({"request": ()}, ("transforms", 0, "expression"), "column 1: there is no request feature 'hour' under request"),
        ({"transforms": ()}, ("inputs", 0, "features", 4), "there is no transform 'late'"),
        ({"request": (SET.request[0], dataclasses.replace(SET.request[1], entity="user"))}, ("inputs", 0, "features", 3), "per 'user'"),
        (
            {"transforms": (dataclasses.replace(SET.transforms[0], entity="user"),)},
            ("inputs", 0, "features", 4),
            "transform 'late' is about 'user', but this input is about 'item'",
        ),
        ({"request": (*SET.request, SET.request[0])}, ("request", 2, "name"), "twice"),
        ({"transforms": SET.transforms * 2}, ("transforms", 1, "name"), "twice"),
        ({"transforms": (Transform(name="late", entity="item", expression="1 +"),)}, ("transforms", 0, "expression"), "column 4: expected"),
        (
            {"transforms": (dataclasses.replace(SET.transforms[0], default=math.nan),)},
            ("transforms", 0, "default"),
            "expected a finite number",
        ),
        ({"request": (RequestFeature(name="hour", default=24, maximum=23), SET.request[1])}, ("request", 0, "default"), "not between"),
        ({"request": (RequestFeature(name="hour", minimum=2, maximum=1), SET.request[1])}, ("request", 0, "maximum"), "not be below"),
        ({"request": (RequestFeature(name="hour", minimum=math.nan), SET.request[1])}, ("request", 0, "minimum"), "finite"),
        ({"request": (RequestFeature(name="hour", dtype="int8", default=1.5), SET.request[1])}, ("request", 0, "default"), "whole number"),
        ({"request": (RequestFeature(name="hour", dtype="bool", default=1), SET.request[1])}, ("request", 0, "default"), "true or false"),
        ({"request": tuple(RequestFeature(name=f"r{n}") for n in range(101))}, ("request",), "101 entries; at most 100"),
    ],
)
def test_what_a_set_cannot_compute_is_refused(fields: dict[str, Any], steps: tuple[Any, ...], words: str) -> None:
    assert words in bent(**fields)[steps]
