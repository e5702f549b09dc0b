"""Sets against views: versions, types, keys, transforms, and who is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from plait.registry.crosschecks import check, misfits, pinned, readers, users_of
from plait.registry.records import (
    Entity,
    Feature,
    FeatureSchema,
    FeatureSet,
    FeatureView,
    KeyPart,
    Model,
    ModelInput,
    ModelVersion,
    PastVersion,
    Record,
    RequestFeature,
    Route,
    Signature,
    TensorSpec,
    Transform,
    Variant,
)
from plait.registry.resources import snapshot_of
from plait.registry.set_checks import MAX_COLUMNS, views_read

ITEM, USER = Entity(type="item"), Entity(type="user")
OLD = (Feature(name="price"), Feature(name="gone"))
FACTS = FeatureView(
    name="facts",
    entity=ITEM,
    version=2,
    features=(
        Feature(name="price"),
        Feature(name="listed_at", dtype="timestamp"),
        Feature(name="colour", dtype="string", vocabulary=("red", "green"), default="green"),
        Feature(name="brand", dtype="string", hash_buckets=40_000),
        Feature(name="sizes", dtype="int16", max_length=8, pad=-1),
        Feature(name="sold", dtype="bool"),
        Feature(name="views", dtype="int64"),
    ),
    versions=(PastVersion(version=1, entity=ITEM, schemas=(FeatureSchema(id=1, features=OLD),)),),
)
TEXT = FeatureView(name="text", entity=ITEM, features=(Feature(name="vector", dtype="int8", width=384, scale=0.01),))
TASTE = FeatureView(name="taste", entity=USER, features=(Feature(name="vector", width=384),))
SET = FeatureSet(
    name="home",
    request=(RequestFeature(name="hour", dtype="int32"),),
    transforms=(
        Transform(name="affinity", entity="item", expression="cosine({taste:vector}, {text:vector})", default=0),
        Transform(name="age", entity="item", expression="time_since({facts:listed_at})"),
    ),
    inputs=(
        ModelInput(
            name="item",
            entity="item",
            features=("facts:price", "facts@1:price", "facts:colour", "facts:sizes", "text:vector", "$request:hour", "$transform:affinity"),
        ),
        ModelInput(name="user", entity="user", features=("taste:vector",)),
    ),
)
COLUMNS = 1 + 1 + 1 + 8 + 384 + 1 + 1
SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="item", dtype="float32", shape=(-1, COLUMNS)),
        TensorSpec(name="user", dtype="float32", shape=(1, 384), per="request"),
    ),
    outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
    feature_set="home",
)
MODEL = Model(name="ranker", versions=(ModelVersion(version="3", artifact="/m", digest="sha256:" + "a" * 64, signature=SIGNATURE),))
ROUTE = Route(name="home", variants=(Variant(name="main", model="ranker", use="3"),), subject="user", candidate="item")
WORLD: tuple[Record, ...] = (FACTS, TEXT, TASTE, SET, MODEL, ROUTE)


def problems(*changed: Record) -> list[str]:
    records = {(type(r).__name__, r.name): r for r in (*WORLD, *changed)}
    return [f"{p.where} {p.field}: {p.message}" for p in check(snapshot_of(1, records.values(), []))]


def reading(*features: str, dtype: Any = "float32", **fields: Any) -> FeatureSet:
    """The set, whose item input has other features."""
    item = dataclasses.replace(SET.inputs[0], features=features, dtype=dtype)
    return dataclasses.replace(SET, inputs=(item, SET.inputs[1]), **fields)


def of_set(feature_set: FeatureSet) -> list[str]:
    return [p.removeprefix("FeatureSet home spec.") for p in problems(feature_set) if p.startswith("FeatureSet home")]


def test_a_world_of_every_type_fits() -> None:
    assert problems() == []
    assert misfits(ROUTE, MODEL, MODEL.versions[0], snapshot_of(1, WORLD, [])) == ()


def test_widths_make_the_shape() -> None:
    narrow = dataclasses.replace(SIGNATURE, inputs=(dataclasses.replace(SIGNATURE.inputs[0], shape=(-1, 7)), SIGNATURE.inputs[1]))
    version = dataclasses.replace(MODEL.versions[0], signature=narrow)
    found = misfits(ROUTE, MODEL, version, snapshot_of(1, WORLD, []))
    assert found == (f"'item' has shape [-1, 7], but feature set 'home' yields {COLUMNS} columns: [rows, {COLUMNS}]",)


@pytest.mark.parametrize(
    ("feature", "dtype", "words"),
    [
        ("facts@3:price", "float32", "view 'facts' has no version 3 at hand; it has 1, 2: an older one comes back"),
        ("facts@1:listed_at", "int64", "version 1 of view 'facts' has no feature 'listed_at'"),
        ("facts@1:price", "int64", "facts@1:price is float32 and cannot be cast to int64: a missing value is NaN"),
        ("facts:listed_at", "float32", "a timestamp in microseconds and does not fit float32: use int64, or time_since"),
        ("facts:colour", "bool", "coded up to 2 and does not fit bool: use int32"),
        ("facts:brand", "int16", "coded up to 39999 and does not fit int16"),
        ("facts:brand", "float16", "coded up to 39999 and does not fit float16"),
        ("text:vector", "int8", "text:vector is float32 and cannot be cast to int8"),
        ("facts:views", "int32", "facts:views is int64 and does not fit int32"),
        ("facts:views", "bool", "facts:views is int64 and does not fit bool"),
        ("facts:sizes", "int8", "facts:sizes is int16 and does not fit int8"),
        ("$request:hour", "int16", "$request:hour is int32 and does not fit int16"),
    ],
)
def test_what_would_become_something_else_is_refused(feature: str, dtype: str, words: str) -> None:
    [found] = of_set(reading(feature, dtype=dtype))
    assert found.startswith("inputs[0].features[0]: ")
    assert words in found


@pytest.mark.parametrize(
    ("feature", "dtype"),
    [
        ("facts:listed_at", "int64"),
        ("facts:listed_at", "float64"),
        ("facts:colour", "int8"),
        ("facts:brand", "int32"),
        ("facts:brand", "float32"),
        ("facts:sizes", "int16"),
        ("facts:sizes", "float16"),
        ("facts:sold", "bool"),
        ("facts:sold", "int8"),
        ("facts:views", "int64"),
        ("text:vector", "float16"),
        ("$request:hour", "int32"),
        ("$transform:affinity", "int8"),
        ("$transform:affinity", "bool"),
    ],
)
def test_what_can_be_cast_may_be(feature: str, dtype: str) -> None:
    assert of_set(reading(feature, dtype=dtype)) == []


def test_what_is_stored_and_was_fine_stays_served() -> None:
    """An int64 in an int32 tensor could always be declared; a set stored then is not taken off its routes now."""
    item = dataclasses.replace(SET.inputs[0], features=("facts:views",), dtype="int32")
    old = dataclasses.replace(SET, inputs=(item, SET.inputs[1]))
    tensor = dataclasses.replace(SIGNATURE.inputs[0], dtype="int32", shape=(-1, 1))
    version = dataclasses.replace(MODEL.versions[0], signature=dataclasses.replace(SIGNATURE, inputs=(tensor, SIGNATURE.inputs[1])))
    records = [r for r in WORLD if r.name != "home" or isinstance(r, Route)]
    assert misfits(ROUTE, MODEL, version, snapshot_of(1, [*records, old], [])) == ()


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("{nope:x}", "column 1: there is no feature view 'nope'"),
        ("1 + {facts@9:price}", "column 5: view 'facts' has no version 9 at hand"),
        ("1 + {facts:pric}", "column 5: view 'facts' has no feature 'pric'; did you mean 'price'?"),
        ("{text:vector} + {facts:sizes}", "column 15: + needs operands of one width, or of 1 column, found 384, 8 columns"),
        ("one_hot({facts:sizes}, 3)", "column 1: one_hot takes features of one column, found 8"),
    ],
)
def test_operands_of_transforms_are_looked_up(expression: str, words: str) -> None:
    found = of_set(reading("facts:price", transforms=(Transform(name="t", entity="item", expression=expression),)))
    assert found == [f"transforms[0].expression: {words}"] or words in found[0]
    assert len(found) == 1


def test_what_a_set_computes_is_bounded() -> None:
    costly = tuple(Transform(name=f"t{n}", entity="item", expression="norm({text:vector}) + norm({text:vector})") for n in range(6))
    [found] = of_set(reading("facts:price", transforms=costly))
    assert found == "transforms: compute 4626 numbers a row; at most 4096 are allowed in a set"
    wide = FeatureView(name="wide", entity=ITEM, features=tuple(Feature(name=f"e{n}", dtype="int8", width=8192) for n in range(3)))
    item = dataclasses.replace(SET.inputs[0], features=("wide:e0", "wide:e1", "wide:e2"))
    found_columns = problems(wide, dataclasses.replace(SET, inputs=(item, SET.inputs[1])))
    assert any(f"take 24576 columns; at most {MAX_COLUMNS}" in problem for problem in found_columns)


def test_a_default_of_a_transform_is_one_of_its_tensor() -> None:
    half = (dataclasses.replace(SET.transforms[0], default=0.5),)
    [found] = of_set(reading("$transform:affinity", dtype="int32", transforms=half))
    assert found == "inputs[0].features[0]: the default of $transform:affinity, 0.5, is no int32"
    assert of_set(reading("$transform:affinity", transforms=half)) == []


def test_keys_agree_in_their_parts_also_through_transforms() -> None:
    composite = Entity(type="item", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="n", type="int64")))
    turned = dataclasses.replace(composite, parts=composite.parts[::-1])
    changed = (dataclasses.replace(FACTS, entity=composite), dataclasses.replace(TEXT, entity=turned))
    found = [p for p in problems(*changed) if "keys" in p]
    words = "view 'text' and 'facts' have keys of different parts for the same entity 'item'"
    assert found
    assert all("view" in problem for problem in found)
    assert any(words in problem for problem in found)
    through = reading("facts:price", "$transform:affinity")
    both = problems(dataclasses.replace(FACTS, entity=ITEM), dataclasses.replace(TEXT, entity=composite), through)
    assert any("view 'text' has composite keys, but 'facts' has string keys for the same entity 'item'" in p for p in both)


def test_a_route_has_ids_for_what_transforms_read() -> None:
    seller = FeatureView(name="seller", entity=Entity(type="seller"), features=(Feature(name="x"),))
    crossing = (*SET.transforms, Transform(name="t", entity="item", expression="{seller:x}"))
    item = dataclasses.replace(SET.inputs[0], features=(*SET.inputs[0].features[:-1], "$transform:t"))
    found = problems(seller, dataclasses.replace(SET, inputs=(item, SET.inputs[1]), transforms=crossing))
    message = "a transform of input 'item' reads 'seller', of which a request on this route has no ids"
    assert found == [f"Route home spec.variants[0]: {message}"]
    back = (Transform(name="affinity", entity="user", expression="{facts:price}"), SET.transforms[1])
    user = dataclasses.replace(SET.inputs[1], features=("$transform:affinity",))
    found = problems(
        dataclasses.replace(SET, inputs=(dataclasses.replace(SET.inputs[0], features=("facts:price",)), user), transforms=back)
    )
    assert any("a transform of input 'user' reads 'item', of which a request has many rows" in p for p in found)


def test_who_reads_what_through_pins_and_transforms() -> None:
    snapshot = snapshot_of(1, WORLD, [])
    assert pinned(snapshot.feature_sets.values()) == {("facts", 1)}
    assert {(r.view, r.version) for r in views_read(SET)} == {("facts", None), ("facts", 1), ("text", None), ("taste", None)}
    assert readers(snapshot, "facts") == ("FeatureSet home (Model ranker version 3, Route home)",)
    assert readers(snapshot, "nope") == ()
    only = dataclasses.replace(reading("facts@2:price"), transforms=())
    assert readers(snapshot_of(1, [FACTS, TASTE, only], []), "facts") == ()
    unused = dataclasses.replace(SET, inputs=(SET.inputs[1],), transforms=SET.transforms[1:])
    assert users_of(snapshot_of(1, [FACTS, TASTE, unused], []), ("FeatureView", "facts")) == ("FeatureSet home",)
