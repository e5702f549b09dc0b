from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.registry_world import FEATURES, HOME, ITEMS, RANKER, SHOP, SIGNATURE, VERSION, WORLD

from plait.registry import rules
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput, Record, Tenant, TensorSpec, Variant, VersionPolicy


def found(record: Record) -> dict[tuple[str | int, ...], str]:
    return dict(rules.check(record))


def test_the_world_is_in_order() -> None:
    assert [rules.check(record) for record in WORLD] == [[]] * len(WORLD)


@pytest.mark.parametrize("name", ["a", "0", "item-stats", "a.b_c-d", "a" * 63])
def test_names_that_are(name: str) -> None:
    assert rules.check(Tenant(name=name)) == []


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a b", "a" * 64, "ü", "a\n", "a:b", "a/b"])
def test_names_that_are_not(name: str) -> None:
    assert ("name",) in found(Tenant(name=name))


def feature(**fields: Any) -> FeatureView:
    return dataclasses.replace(ITEMS, features=(Feature(name="x", **fields),))


@pytest.mark.parametrize(
    ("dtype", "default", "fine"),
    [
        ("float32", 1, True),
        ("float32", -3.5, True),
        ("float32", 1e39, False),
        ("float16", 65504.0, True),
        ("float16", 65520.0, False),
        ("float64", math.nan, False),
        ("float64", math.inf, False),
        ("float32", True, False),
        ("int8", 127, True),
        ("int8", 128, False),
        ("int8", -129, False),
        ("int64", 2**63 - 1, True),
        ("int64", 2**63, False),
        ("int32", 1.0, False),
        ("int32", False, False),
        ("bool", True, True),
        ("bool", 1, False),
        ("bool", None, True),
    ],
)
def test_defaults_fit_their_dtype(dtype: Any, default: Any, fine: bool) -> None:
    assert (found(feature(dtype=dtype, default=default)) == {}) is fine


@given(st.integers(-(2**70), 2**70), st.sampled_from(["int8", "int16", "int32", "int64"]))
def test_an_integer_default_is_taken_exactly_when_it_fits(value: int, dtype: Any) -> None:
    bits = int(dtype.removeprefix("int"))
    assert (found(feature(dtype=dtype, default=value)) == {}) == (-(2 ** (bits - 1)) <= value < 2 ** (bits - 1))


def version(**fields: Any) -> Record:
    return dataclasses.replace(RANKER, versions=(dataclasses.replace(VERSION, **fields),))


def weighing(weight: float) -> Record:
    return dataclasses.replace(HOME, variants=(Variant(name="a", model="m", use="1", weight=weight),))


def columns(*references: str) -> Record:
    return FeatureSet(name="s", inputs=(ModelInput(name="x", entity="u", features=references),))


@pytest.mark.parametrize(
    ("dtype", "default", "part"),
    [
        ("float32", "x", "a feature of float32 is a number, found 'x'"),
        ("int8", "1", "of int8 is a number"),
        ("timestamp", "now", "of timestamp is a number"),
        ("bool", "true", "a bool feature needs true or false"),
        ("string", 1, "a string feature needs text as default, found 1"),
        ("string", True, "a string feature needs text"),
    ],
)
def test_a_default_of_another_type_is_told(dtype: Any, default: Any, part: str) -> None:
    assert part in found(feature(dtype=dtype, default=default))["features", 0, "default"]


MANY = tuple(Feature(name=f"f{n}") for n in range(1001))


@pytest.mark.parametrize(
    ("record", "steps", "part"),
    [
        (dataclasses.replace(ITEMS, features=()), ("features",), "at least one feature"),
        (dataclasses.replace(ITEMS, features=MANY), ("features",), "1001 entries; at most 1000"),
        (dataclasses.replace(ITEMS, features=(MANY[0], MANY[1], MANY[0])), ("features", 2, "name"), "twice, first as entry 0"),
        (dataclasses.replace(ITEMS, entity=Entity(type="I")), ("entity", "type"), "not a name"),
        (dataclasses.replace(ITEMS, version=0), ("version",), "at least 1"),
        (dataclasses.replace(ITEMS, max_age_s=-1.0), ("max_age_s",), "at least 0"),
        (dataclasses.replace(ITEMS, max_age_s=math.inf), ("max_age_s",), "at least 0"),
        (dataclasses.replace(ITEMS, max_age_s=60.0, retention_s=60.0), ("retention_s",), "longer than max_age_s (60)"),
        (dataclasses.replace(ITEMS, description="x" * 5000), ("description",), "5000 characters"),
        (dataclasses.replace(SHOP, description="a\0b"), ("description",), "cannot be stored"),
        (dataclasses.replace(SHOP, description="\ud800"), ("description",), "cannot be stored"),
        (FeatureSet(name="s", inputs=()), ("inputs",), "at least one input"),
        (FeatureSet(name="s", inputs=(ModelInput(name="1x", entity="u", features=("v:f",)),)), ("inputs", 0, "name"), "not a tensor name"),
        (columns("vf"), ("inputs", 0, "features", 0), "expected view:feature"),
        (columns("v:f", "v:f"), ("inputs", 0, "features", 1), "twice"),
        (FeatureSet(name="s", inputs=(FEATURES.inputs[0], FEATURES.inputs[0])), ("inputs", 1, "name"), "twice"),
        (dataclasses.replace(RANKER, versions=()), ("versions",), "at least one version"),
        (dataclasses.replace(RANKER, versions=(VERSION, VERSION)), ("versions", 1, "version"), "twice"),
        (dataclasses.replace(RANKER, aliases={"champion": "9"}), ("aliases", "champion"), "not listed under versions"),
        (dataclasses.replace(RANKER, aliases={"1": "1"}), ("aliases", "1"), "also a version"),
        (dataclasses.replace(RANKER, version_policy=VersionPolicy(latest=65)), ("version_policy", "latest"), "at most 64"),
        (dataclasses.replace(RANKER, version_policy=VersionPolicy(specific=("9",))), ("version_policy", "specific", 0), "not listed"),
        (dataclasses.replace(RANKER, version_policy=VersionPolicy(all=True, latest=2)), ("version_policy", "all"), "excludes"),
        (
            dataclasses.replace(RANKER, version_policy=VersionPolicy(specific=("1",), latest=2)),
            ("version_policy", "latest"),
            "not looked at",
        ),
        (version(digest="md5:1"), ("versions", 0, "digest"), "64 hexadecimal"),
        (version(artifact=""), ("versions", 0, "artifact"), "the folder"),
        (version(version="a b"), ("versions", 0, "version"), "is not a version"),
        (version(metrics={"auc": math.nan}), ("versions", 0, "metrics", "auc"), "finite"),
        (dataclasses.replace(HOME, variants=()), ("variants",), "at least one variant"),
        (dataclasses.replace(HOME, variants=(HOME.variants[0], HOME.variants[0])), ("variants", 1, "name"), "twice"),
        (weighing(0), ("variants",), "weight above 0"),
        (weighing(math.nan), ("variants", 0, "weight"), "at least 0"),
        (dataclasses.replace(HOME, timeout_s=0), ("timeout_s",), "more than 0 and at most 60"),
        (dataclasses.replace(HOME, timeout_s=61), ("timeout_s",), "at most 60"),
        (dataclasses.replace(HOME, max_candidates=10_001), ("max_candidates",), "at most 10000"),
        (dataclasses.replace(HOME, max_defaulted_share=1.5), ("max_defaulted_share",), "at most 1"),
        (dataclasses.replace(HOME, candidate="user"), ("candidate",), "must differ from subject"),
        (dataclasses.replace(HOME, tenants=("a", "a")), ("tenants", 1), "twice"),
        (dataclasses.replace(HOME, tenants=("A",)), ("tenants", 0), "not a name"),
    ],
)
def test_each_rule_points_at_its_field(record: Record, steps: tuple[str | int, ...], part: str) -> None:
    assert part in found(record)[steps]


@pytest.mark.parametrize(
    ("tensor", "field", "part"),
    [
        (TensorSpec(name="a b", dtype="float32", shape=(-1,)), "name", "not a tensor name"),
        (TensorSpec(name="x", dtype="float32", shape=()), "shape", "1 to 8 dimensions"),
        (TensorSpec(name="x", dtype="float32", shape=(-2, 3)), "shape", "-1 for a variable dimension"),
    ],
)
def test_signatures_are_looked_at(tensor: TensorSpec, field: str, part: str) -> None:
    problems = dict(rules.check_signature(dataclasses.replace(SIGNATURE, outputs=(tensor,))))
    assert part in problems["outputs", 0, field]
