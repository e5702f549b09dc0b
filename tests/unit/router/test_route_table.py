"""What each route means under one snapshot, and that one that cannot serve hurts no other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.fakes.router_world import DI, DU, SIGNATURE, route, snapshot
from tests.unit.plait.registry.test_set_checks import COLUMNS
from tests.unit.plait.registry.test_set_checks import WORLD as EVERY_TYPE

from feature_retrieval.views import compile_plan
from plait.api.types.v1 import types_pb2
from plait.errors import FailedPrecondition, NotFound, PermissionDenied
from plait.registry.records import Entity, Feature, Model, ModelInput, Snapshot, TensorSpec, Variant
from plait.registry.resources import snapshot_of
from router.route_table import NO_ROUTES, Input, compile_table

BROKEN = Variant(name="bad", model="ranker", use="broken")
GOOD = Variant(name="good", model="ranker", use="1", weight=3.0)


def test_an_alias_is_resolved_once_to_a_version_with_its_inputs_in_signature_order() -> None:
    serving = compile_table(snapshot()).find("home", "shop")
    [arm] = serving.weighted
    assert (arm.name, arm.model, arm.version, arm.feature_set, arm.outputs) == ("main", "ranker", "2", "ranker", ("score",))
    assert [(i.name, i.entity, i.oip, i.per_row, dict(i.views), i.entities) for i in arm.inputs] == [
        ("user", "user", "FP32", False, {"user-view": "user"}, ("user",)),
        ("item", "item", "FP32", True, {"item-view": "item"}, ("item",)),
    ]
    assert arm.keys == {"user": Entity(type="user"), "item": Entity(type="item")}
    assert arm.input_bytes(500) == 4 * DU + 500 * 4 * DI
    keys = compile_table(snapshot(user_key="int64")).find("home", "shop").weighted[0].keys
    assert keys == {"user": Entity(type="user", key="int64"), "item": Entity(type="item")}


@pytest.mark.parametrize(
    ("fields", "policy", "share", "takes_defaults"),
    [
        ({}, types_pb2.MISSING_POLICY_DEFAULT, 0.0, True),
        ({"on_missing": "stale_ok"}, types_pb2.MISSING_POLICY_STALE_OK, 0.0, True),
        ({"on_missing": "fail"}, types_pb2.MISSING_POLICY_FAIL, 0.0, False),
        ({"max_defaulted_share": 0.25}, types_pb2.MISSING_POLICY_DEFAULT, 0.25, False),
        ({"max_defaulted_share": 1.0}, types_pb2.MISSING_POLICY_DEFAULT, 0.0, True),
    ],
)
def test_the_missing_policy_as_the_wire_has_it(fields: dict[str, Any], policy: int, share: float, takes_defaults: bool) -> None:
    serving = compile_table(snapshot(route(**fields))).find("home", "shop")
    assert (serving.policy, serving.max_defaulted_share, serving.takes_defaults) == (policy, share, takes_defaults)


def test_no_default_at_all_is_not_the_wires_zero_which_means_no_bound() -> None:
    share = compile_table(snapshot(route(max_defaulted_share=0.0))).find("home", "shop").max_defaulted_share
    assert 0 < np.float32(share) < 1 / 10_000


def test_an_unknown_route_says_how_to_list_them_and_names_none() -> None:
    table = compile_table(snapshot(route("home"), route("secret-launch", tenants=("other",))))
    with pytest.raises(NotFound, match="plait get routes") as caught:
        table.find("hom", "shop")
    assert caught.value.reason == "ROUTE_NOT_FOUND"
    assert "secret-launch" not in caught.value.message
    with pytest.raises(NotFound):
        NO_ROUTES.find("home", "shop")


def test_a_route_is_open_to_its_tenants_or_to_all() -> None:
    table = compile_table(snapshot(route("all"), route("some", tenants=("shop", "third"))))
    assert table.find("all", "anybody").name == "all"
    assert table.find("some", "third").name == "some"
    with pytest.raises(PermissionDenied) as caught:
        table.find("some", "other")
    assert caught.value.reason == "ROUTE_NOT_OPEN"
    assert "third" not in caught.value.message


def test_who_is_not_let_in_does_not_learn_what_is_wrong() -> None:
    with pytest.raises(PermissionDenied):
        compile_table(snapshot(route(variants=(BROKEN,), tenants=("shop",)))).find("home", "other")


@pytest.mark.parametrize(
    ("variants", "reason", "said"),
    [
        ((BROKEN,), "SIGNATURE_MISMATCH", "variant 'bad': 'item' has shape"),
        ((Variant(name="v", model="nope", use="1"),), "MODEL_NOT_FOUND", "there is no model 'nope'"),
        ((Variant(name="v", model="ranker", use="9"),), "MODEL_NOT_FOUND", "has no version or alias '9'"),
        ((BROKEN, Variant(name="v", model="nope", use="1")), "SIGNATURE_MISMATCH", "and 1 more variants cannot serve"),
        ((), "ROUTE_EMPTY", "has no variant"),
    ],
)
def test_a_route_that_cannot_serve_says_why(variants: tuple[Variant, ...], reason: str, said: str) -> None:
    table = compile_table(snapshot(route(variants=variants), route("other")))
    with pytest.raises(FailedPrecondition) as caught:
        table.find("home", "shop")
    assert caught.value.reason == reason
    assert said in caught.value.message
    assert table.find("other", "shop").fault is None
    assert repr(table) == "<RouteTable revision=7 routes=2 faulty=1>"


def test_a_variant_that_cannot_serve_is_left_out_and_gets_no_traffic() -> None:
    serving = compile_table(snapshot(route(variants=(BROKEN, GOOD)))).find("home", "shop")
    assert [(arm.name, arm.weight) for arm in serving.by_name.values()] == [("good", 3.0)]
    assert serving.left_out["bad"].reason == "SIGNATURE_MISMATCH"
    assert {serving.assign(f"u{n}").name for n in range(50)} == {"good"}


def without_signature(of: Snapshot) -> Snapshot:
    ranker = of.models["ranker"]
    return replace(of, models={"ranker": replace(ranker, versions=tuple(replace(v, signature=None) for v in ranker.versions))})


def with_version(of: Snapshot, **changes: Any) -> Snapshot:
    """The same registry with one more version of the ranker, its champion, whose signature is changed."""
    ranker = of.models["ranker"]
    version = replace(ranker.versions[0], version="9", signature=replace(SIGNATURE, **changes))
    return replace(of, models={"ranker": Model(name="ranker", versions=(*ranker.versions, version), aliases={"champion": "9"})})


@pytest.mark.parametrize(
    "bent",
    [
        without_signature(snapshot()),
        replace(snapshot(), feature_sets={}),
        replace(snapshot(), feature_views={}),
        with_version(snapshot(), feature_set=""),
        with_version(snapshot(), feature_set="another"),
        with_version(snapshot(), inputs=()),
        with_version(snapshot(), inputs=(*SIGNATURE.inputs, TensorSpec(name="more", dtype="float32", shape=(-1, 1)))),
        with_version(snapshot(), inputs=(replace(SIGNATURE.inputs[0], dtype="int64"), SIGNATURE.inputs[1])),
        with_version(snapshot(), inputs=(replace(SIGNATURE.inputs[0], per="row", shape=(-1, DU)), SIGNATURE.inputs[1])),
        with_version(snapshot(), outputs=()),
        with_version(snapshot(), outputs=(TensorSpec(name="score", dtype="int64", shape=(-1,)),)),
        with_version(snapshot(), outputs=(TensorSpec(name="score", dtype="float32", shape=(-1, 2)),)),
    ],
)
def test_whatever_does_not_fit_is_a_fault_and_never_an_exception(bent: Snapshot) -> None:
    fault = compile_table(bent).routes["home"].fault
    assert fault is not None
    assert fault.reason == "SIGNATURE_MISMATCH"


def defaults(features: tuple[Feature, ...], dtype: str) -> Input:
    """The item input of a table whose item features are these."""
    world = snapshot()
    view = replace(world.feature_views["item-view"], features=features)
    columns = tuple(f"item-view:{f.name}" for f in features)
    user, _ = world.feature_sets["ranker"].inputs
    item = ModelInput(name="item", entity="item", features=columns, dtype=dtype)  # type: ignore[arg-type]
    spec = TensorSpec(name="item", dtype=dtype, shape=(-1, len(features)))  # type: ignore[arg-type]
    world = with_version(world, inputs=(SIGNATURE.inputs[0], spec))
    sets = {"ranker": replace(world.feature_sets["ranker"], inputs=(user, item))}
    world = replace(world, feature_views={**world.feature_views, "item-view": view}, feature_sets=sets)
    return compile_table(world).find("home", "shop").weighted[0].inputs[1]


@pytest.mark.parametrize(
    ("dtype", "layout", "expected"),
    [
        ("float32", "<f4", [7.5, 3, 1, math.nan, 0]),
        ("float64", "<f8", [7.5, 3, 1, math.nan, 0]),
        ("float16", "<f2", [7.5, 3, 1, math.nan, 0]),
    ],
)
def test_the_default_row_in_the_inputs_dtype(dtype: str, layout: str, expected: list[float]) -> None:
    features = (
        Feature(name="price", default=7.5),
        Feature(name="views", dtype="int64", default=3),
        Feature(name="new", dtype="bool", default=True),
        Feature(name="unknown"),
        Feature(name="sales", dtype="int32"),
    )
    row = defaults(features, dtype).default_row
    assert np.array_equal(np.frombuffer(row, layout), np.array(expected, layout), equal_nan=True)


def test_it_is_the_very_row_that_feature_retrieval_would_have_put_there() -> None:
    world = snapshot()
    [plan] = compile_plan(world, "ranker", ("item",)).entities[0].views
    assert compile_table(world).find("home", "shop").weighted[0].inputs[1].default_row == plan.defaults[0].tobytes()


def test_the_default_row_of_integers() -> None:
    row = defaults((Feature(name="views", dtype="int64", default=-3), Feature(name="sales", dtype="int32")), "int64").default_row
    assert np.frombuffer(row, "<i8").tolist() == [-3, 0]


def test_subjects_are_split_by_route_and_stay_where_they_are() -> None:
    two = (Variant(name="a", model="ranker", use="1"), Variant(name="b", model="ranker", use="2"))
    first, again = (compile_table(snapshot(route(variants=two), revision=revision)).routes["home"] for revision in (1, 2))
    other = compile_table(snapshot(route("other", variants=two))).routes["other"]
    names = [first.assign(n).name for n in range(100)]
    assert names == [again.assign(n).name for n in range(100)]
    assert names != [other.assign(n).name for n in range(100)]


def test_an_arm_of_every_type_has_its_width_its_defaults_and_what_it_reads() -> None:
    """Embeddings, lists, codes, what is sent along and what is computed from another entity."""
    table = compile_table(snapshot_of(7, EVERY_TYPE, []))
    [arm] = table.find("home", "shop").weighted
    item, user = arm.inputs
    assert item.spec.shape == (-1, COLUMNS)
    assert len(item.default_row) == 4 * COLUMNS
    assert arm.input_bytes(10) == 10 * 4 * COLUMNS + 4 * 384
    defaults = np.frombuffer(item.default_row, np.float32)
    assert defaults[2] == 2  # the code of a text
    assert defaults[3:11].tolist() == [-1] * 8  # a list's padding
    assert np.isnan(defaults[11:-1]).all()
    assert defaults[-1] == 0  # a transform's default
    assert (item.entities, user.entities) == (("item", "user"), ("user",))
    assert item.views == {"facts": "item", "text": "item", "taste": "user"}
    assert {name: key.type for name, key in arm.keys.items() if key} == {"item": "item", "user": "user"}
