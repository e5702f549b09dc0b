"""Feast's definitions as ours: every type, what cannot be held is said, and names never meet."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.feast_repository import field, repository, service, view

from plait.cli.features.feast_mapping import Mapped, Options, mapped
from plait.registry import rules
from plait.registry.records import FeastSource, Feature, KeyPart

PAIR = [{"entity": "rider", "name": "rider_id", "type": "String"}, {"entity": "driver", "name": "driver_id", "type": "Int64"}]


def of(*views: dict[str, Any], services: list[dict[str, Any]] | None = None, options: Options | None = None, **more: Any) -> Mapped:
    return mapped(repository(list(views), services, **more), options or Options())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (field("f", "Bool"), Feature(name="f", dtype="bool")),
        (field("f", "Int32"), Feature(name="f", dtype="int32")),
        (field("f", "Int64"), Feature(name="f", dtype="int64")),
        (field("f", "Float32"), Feature(name="f", dtype="float32")),
        (field("f", "Float64", description="d"), Feature(name="f", dtype="float64", description="d")),
        (field("f", "UnixTimestamp"), Feature(name="f", dtype="timestamp")),
        (field("f", "String"), Feature(name="f", dtype="string", hash_buckets=1 << 20)),
        (field("f", "String", tags={"vocabulary": "a, b"}), Feature(name="f", dtype="string", vocabulary=("a", "b"))),
        (field("f", "Array(Float32)", tags={"width": "3"}), Feature(name="f", dtype="float32", width=3)),
        (field("f", "Array(Float32)", vector_length=8), Feature(name="f", dtype="float32", width=8)),
        (field("f", "Array(Float32)"), Feature(name="f", dtype="float32", max_length=32)),
        (field("f", "Array(Float64)", tags={"width": "3"}), Feature(name="f", dtype="float64", max_length=32)),
        (field("f", "Array(Bool)"), Feature(name="f", dtype="bool", max_length=32)),
    ],
)
def test_types(theirs: dict[str, Any], ours: Feature) -> None:
    found = of(view("v", [theirs]))
    assert [v.features for v in found.views] == [(ours,)]
    assert found.left_out == []
    assert rules.check(found.views[0]) == []


@pytest.mark.parametrize(
    "type_",
    ["Bytes", "Array(String)", "Array(UnixTimestamp)", "Array(Array(Int32))", "Set(Int64)", "Map", "Json", "Struct(…)", "Uuid", "Decimal"],
)
def test_what_has_no_equal_is_named(type_: str) -> None:
    found = of(view("v", [field("a", "Float32"), field("odd", type_)]), services=[service("s", ("v", ["a", "odd"]))])
    assert [f.name for f in found.views[0].features] == ["a"]
    assert found.sets[0].inputs[0].features == ("v:a",)
    assert found.left_out == [
        f"FeatureView 'v', feature 'odd' ({type_}): there is no such type here",
        "feature service 's': v:odd, as above",
    ]


def test_a_vector_that_is_too_wide_is_named() -> None:
    found = of(view("v", [field("a", "Float32"), field("w", "Array(Float32)", vector_length=8193)]))
    assert "at most 8192" in found.left_out[0]


def test_a_time_to_live_is_the_largest_age_and_stale_rows_are_kept() -> None:
    [one, ever] = of(view("v", [field("a", "Float32")], ttl_s=86400.0), view("w", [field("a", "Float32")])).views
    assert (one.max_age_s, one.retention_s) == (86400, 172800)
    assert (ever.max_age_s, ever.retention_s) == (0, 0)


def test_keys() -> None:
    found = of(
        view("single", [field("a", "Float32")]),
        view("pair", [field("a", "Float32")], keys=PAIR),
        view("other-order", [field("a", "Float32")], keys=PAIR[::-1]),
        view("untyped", [field("a", "Float32")], keys=[{"entity": "X y", "name": "k", "type": "Unknown"}]),
        view("odd", [field("a", "Float32")], keys=[{"entity": "t", "name": "t", "type": "UnixTimestamp"}]),
        view("none", [field("a", "Float32")], keys=[]),
        view("many", [field("a", "Float32")], keys=[{"entity": f"e{n}", "name": f"k{n}", "type": "Int64"} for n in range(9)]),
    )
    single, pair, other, untyped = found.views
    assert (single.entity.type, single.entity.key) == ("driver", "int64")
    assert (untyped.entity.type, untyped.entity.key) == ("x-y", "string")
    assert pair.entity == other.entity  # Feast's order, whatever was declared
    assert (pair.entity.type, pair.entity.key) == ("driver-rider", "composite")
    assert pair.entity.parts == (KeyPart(name="driver_id", type="int64"), KeyPart(name="rider_id", type="string"))
    assert [line.split(":")[0] for line in found.left_out] == ["FeatureView 'odd'", "FeatureView 'none'", "FeatureView 'many'"]
    assert "send such values along with the request" in found.left_out[1]


def test_vectors_get_a_view_of_their_own() -> None:
    features = [field("a", "Float32"), field("w", "Array(Float32)", vector_length=2)]
    found = of(view("v", features), view("w", features[1:]), services=[service("s", ("v", ["w", "a"]), ("w", ["w"]))])
    assert [(v.name, [f.name for f in v.features]) for v in found.views] == [("v", ["a"]), ("v-vectors", ["w"]), ("w", ["w"])]
    assert found.sets[0].inputs[0].features == ("v-vectors:w", "v:a", "w:w")


def test_a_service_has_an_input_per_entity_type_wide_enough_for_its_values() -> None:
    found = of(
        view("v", [field("a", "Float32"), field("n", "Int32")]),
        view("p", [field("t", "UnixTimestamp"), field("a", "Float32")], keys=PAIR),
        services=[service("S One", ("v", ["n", "a"]), ("p", ["t"]))],
    )
    [made] = found.sets
    assert made.name == "s-one"
    assert [(i.name, i.entity, i.features, i.dtype) for i in made.inputs] == [
        ("driver", "driver", ("v:n", "v:a"), "float32"),
        ("driver-rider", "driver-rider", ("p:t",), "float64"),
    ]
    assert rules.check(made) == []


def test_what_a_service_cannot_have_is_named() -> None:
    renamed = service("r", ("v", ["a"]))
    renamed["views"][0]["join_key_map"] = {"driver_id": "origin"}
    plus = {
        "name": "plus",
        "features": [field("p", "Float64")],
        "inputs": ["v:a", "v:gone"],
        "request": [field("x", "Int64")],
        "code": "def plus(df):\n    return df\n",
    }
    found = of(
        view("v", [field("a", "Float32")]),
        view("labels", [field("y", "Int64")], kind="LabelView"),
        view("offline", [field("y", "Int64")], online=False),
        services=[renamed, service("s", ("v", ["a"]), ("plus", ["p"]), ("labels", ["y"]))],
        on_demand=[plus, plus | {"name": "unused"}],
    )
    assert [s.name for s in found.sets] == ["s"]
    said = "\n".join(found.left_out)
    for words in (
        "LabelView 'labels': it holds labels", "'offline': it is offline only", "it renames keys", "feature service 'r': nothing of it is left",
        "on-demand view 'plus': its Python is not taken over", "labels:y, as above", "on-demand view 'unused': no feature service uses it",
    ):  # fmt: skip
        assert words in said
    suggested = "\n".join(found.transforms["s"])
    for words in ("transforms: [{name: p,", "{v:a}, v:gone (left out)", "{$request:x} (Int64)", "  |     return df"):
        assert words in suggested


def test_views_can_stay_where_their_rows_are() -> None:
    place = Options(in_place=True)
    views = [
        view("Hourly", [field("a", "Float32"), field("Big", "Float32")], ttl_s=60.0),
        view("pair", [field("a", "Float32")], keys=PAIR),
        view("short", [field("a", "Float32")], keys=[{"entity": "s", "name": "s", "type": "Int32"}]),
    ]
    found = of(*views, options=place)
    assert [v.feast for v in found.views] == [
        FeastSource(project="shop", view="Hourly", join_keys=("driver_id",)),
        FeastSource(project="shop", view="pair", join_keys=("driver_id", "rider_id")),
        None,
    ]
    assert [f.name for f in found.views[0].features] == ["a"]
    assert found.views[0].retention_s == 0
    assert len(found.left_out) == 2
    for why in ({"online_store": "sqlite"}, {"entity_key_serialization_version": 2}, {"versioned": True}):
        found = of(*views, options=place, **why)
        assert {v.feast for v in found.views} == {None}
        assert "made to be filled anew" in found.left_out[0]


_THEIRS = st.text(min_size=1, max_size=80)


@given(st.lists(_THEIRS, min_size=1, max_size=8, unique=True))
def test_two_names_never_become_one_and_each_is_allowed(names: list[str]) -> None:
    """Views, features, entities and services alike, whatever Feast let them be called."""
    views = [view(name, [field(n, "Float32") for n in names], keys=[{"entity": name, "name": "k", "type": "Int64"}]) for name in names]
    found = of(*views, services=[service(name, (name, names)) for name in names])
    assert (
        len({v.name for v in found.views}) == len({v.entity.type for v in found.views}) == len({s.name for s in found.sets}) == len(names)
    )
    for record in (*found.views, *found.sets):
        assert rules.check(record) == []
    for made in found.sets:
        assert len(made.inputs[0].features) == len(names)
