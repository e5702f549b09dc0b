from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.fakes.registry_world import FEATURES, HOME, RANKER, SIGNATURE, VERSION, WORLD

from plait.registry.crosschecks import check, misfits, users_of
from plait.registry.policies import PoolEndpoint, Retrieve, Stages
from plait.registry.records import (
    ApiKey,
    Entity,
    Feature,
    FeatureView,
    ModelInput,
    Pool,
    Record,
    Signature,
    Snapshot,
    TensorSpec,
    Variant,
)
from plait.registry.resources import Key, snapshot_of
from plait.registry.specs import kind_of


def world(*changed: Record, without: tuple[str, ...] = ()) -> Snapshot:
    records = {(kind_of(r), r.name): r for r in (*WORLD, *changed)}
    return snapshot_of(1, (r for (kind, name), r in records.items() if f"{kind} {name}" not in without), [])


def problems(*changed: Record, without: tuple[str, ...] = ()) -> list[str]:
    return [str(p) for p in check(world(*changed, without=without))]


def model(signature: Signature | None = SIGNATURE, **fields: Any) -> Record:
    return dataclasses.replace(RANKER, versions=(dataclasses.replace(VERSION, signature=signature, **fields),))


def signature(user: TensorSpec = SIGNATURE.inputs[0], item: TensorSpec = SIGNATURE.inputs[1], **fields: Any) -> Signature:
    return dataclasses.replace(SIGNATURE, inputs=(user, item), **fields)


def features(*references: str, entity: str = "item", dtype: Any = "float32") -> Record:
    return dataclasses.replace(
        FEATURES, inputs=(FEATURES.inputs[0], ModelInput(name="item", entity=entity, features=references, dtype=dtype))
    )


USER, ITEM = SIGNATURE.inputs
SCORE = SIGNATURE.outputs[0]
INT_KEYS = FeatureView(name="item-more", entity=Entity(type="item", key="int64"), features=(Feature(name="x"),))


def test_a_world_that_fits_has_no_problems() -> None:
    assert problems() == []
    assert check(Snapshot()) == ()


@pytest.mark.parametrize(
    ("changed", "where", "message"),
    [
        (
            features("item-stat:price", "item-stats:views"),
            "FeatureSet home spec.inputs[1].features[0]",
            "there is no feature view 'item-stat'; did you mean 'item-stats'?",
        ),
        (
            features("item-stats:pric", "item-stats:views"),
            "FeatureSet home spec.inputs[1].features[0]",
            "view 'item-stats' has no feature 'pric'; did you mean 'price'?",
        ),
        (
            features("item-stats:price", "user-profile:age"),
            "FeatureSet home spec.inputs[1].features[1]",
            "view 'user-profile' is about 'user', but this input is about 'item'; one input takes one entity type",
        ),
        (
            features("item-stats:price", "item-stats:views", dtype="int64"),
            "FeatureSet home spec.inputs[1].features[0]",
            "item-stats:price is float32 and cannot be cast to int64: a missing value is NaN",
        ),
        (model(None), "Model ranker spec.versions[0].signature", "is missing; pin the artifact first (plait apply does)"),
        (model(digest=""), "Model ranker spec.versions[0].digest", "is missing; pin the artifact first (plait apply does)"),
        (
            model(signature(feature_set="hom")),
            "Model ranker spec.versions[0].signature.feature_set",
            "version 1: there is no feature set 'hom'; did you mean 'home'?",
        ),
        (
            model(signature(item=dataclasses.replace(ITEM, dtype="float64"))),
            "Model ranker spec.versions[0].signature.inputs[1]",
            "version 1: 'item' is float64, but feature set 'home' yields float32",
        ),
        (
            model(signature(item=dataclasses.replace(ITEM, shape=(-1, 64)))),
            "Model ranker spec.versions[0].signature.inputs[1]",
            "version 1: 'item' has shape [-1, 64], but feature set 'home' yields 2 columns: [rows, 2]",
        ),
        (
            model(signature(item=dataclasses.replace(ITEM, shape=(-1,)))),
            "Model ranker spec.versions[0].signature.inputs[1]",
            "version 1: 'item' has shape [-1], but feature set 'home' yields 2 columns: [rows, 2]",
        ),
        (
            model(signature(item=dataclasses.replace(ITEM, shape=(5, 2)))),
            "Model ranker spec.versions[0].signature.inputs[1]",
            "version 1: 'item' has shape [5, 2]; a tensor per row needs -1 as its first dimension",
        ),
        (
            model(signature(user=dataclasses.replace(USER, shape=(3, 2)))),
            "Model ranker spec.versions[0].signature.inputs[0]",
            "version 1: 'user' has shape [3, 2]; a tensor per request needs 1 or -1 as its first dimension",
        ),
        (
            model(signature(item=dataclasses.replace(ITEM, name="listing"))),
            "Model ranker spec.versions[0].signature.inputs[1]",
            "version 1: feature set 'home' yields no input 'listing'; it has user, item",
        ),
        (
            model(signature(item=dataclasses.replace(ITEM, name="listing"))),
            "Model ranker spec.versions[0].signature.inputs",
            "version 1: feature set 'home' yields 'item', which the model does not take",
        ),
        (
            dataclasses.replace(HOME, variants=(Variant(name="a", model="rankr", use="1"),)),
            "Route home spec.variants[0].model",
            "there is no model 'rankr'; did you mean 'ranker'?",
        ),
        (
            dataclasses.replace(HOME, variants=(Variant(name="a", model="ranker", use="2"),)),
            "Route home spec.variants[0].use",
            "model 'ranker' has neither a version nor an alias '2'; it has champion, 1",
        ),
        (dataclasses.replace(HOME, tenants=("shopp",)), "Route home spec.tenants[0]", "there is no tenant 'shopp'; did you mean 'shop'?"),
        (
            dataclasses.replace(HOME, score="rank"),
            "Route home spec.variants[0]",
            "model 'ranker' version 1 has no output 'rank' to order by; it has score",
        ),
        (
            model(signature(outputs=(dataclasses.replace(SCORE, dtype="int64"),))),
            "Route home spec.variants[0]",
            "output 'score' of model 'ranker' version 1 is int64 [-1]; expected one float per row: [-1]",
        ),
        (
            model(signature(outputs=(dataclasses.replace(SCORE, shape=(-1, 2)),))),
            "Route home spec.variants[0]",
            "output 'score' of model 'ranker' version 1 is float32 [-1, 2]; expected one float per row: [-1]",
        ),
        (
            model(signature(feature_set="")),
            "Route home spec.variants[0]",
            "model 'ranker' version 1 names no feature set, so a route cannot fill its inputs",
        ),
        (
            dataclasses.replace(HOME, subject="seller"),
            "Route home spec.variants[0]",
            "input 'user' of feature set 'home' is about 'user', but the route's subject is 'seller', its candidate 'item'",
        ),
        (
            dataclasses.replace(HOME, candidate="listing"),
            "Route home spec.variants[0]",
            "feature set 'home' has no input about the candidate 'listing', so every score would be the same",
        ),
        (
            model(signature(user=dataclasses.replace(USER, per="row", shape=(-1, 2)))),
            "Route home spec.variants[0]",
            "input 'user' of model 'ranker' version 1 is per row, but features of 'user' come per request",
        ),
        (dataclasses.replace(HOME, timeout_s=-1), "Route home spec.timeout_s", "expected a number of more than 0 and at most 60, found -1"),
    ],
)
def test_each_misfit_is_said_where_it_is(changed: Record, where: str, message: str) -> None:
    assert f"{where}: {message}" in problems(changed)


def test_one_entity_type_has_one_key_type_in_a_set() -> None:
    found = problems(INT_KEYS, features("item-stats:price", "item-more:x"))
    message = "view 'item-more' has int64 keys, but 'item-stats' has string keys for the same entity 'item'"
    assert found == [f"FeatureSet home spec.inputs[1].features[1]: {message}"]


def test_integers_may_be_cast_to_floats() -> None:
    assert problems(features("item-stats:views", "item-stats:price")) == []


def test_a_score_may_be_a_column() -> None:
    assert problems(model(signature(outputs=(dataclasses.replace(SCORE, shape=(-1, 1)),)))) == []


def test_every_problem_is_found_at_once() -> None:
    found = problems(without=("FeatureView item-stats", "FeatureView user-profile", "Tenant shop", "Model ranker"))
    assert len(found) == 4 + 1 + 1


@pytest.mark.parametrize(
    ("key", "users"),
    [
        (("FeatureView", "item-stats"), ("FeatureSet home",)),
        (("FeatureView", "item"), ()),
        (("FeatureSet", "home"), ("Model ranker",)),
        (("Model", "ranker"), ("Route home",)),
        (("Tenant", "shop"), ("Route home", "API key key-1")),
        (("Route", "home"), ()),
    ],
)
def test_users_are_listed(key: Key, users: tuple[str, ...]) -> None:
    with_key = snapshot_of(1, WORLD, [ApiKey(id="key-1", tenant="shop", sha256="0" * 64)])
    assert users_of(with_key, key) == users


FOREIGN = Pool(name="triton", protocol="oip", endpoints=(PoolEndpoint(address="triton:8001"),))
OWN = Pool(name="gpu", endpoints=(PoolEndpoint(address="gpu:50053"),))


def pooled(pool: str, **fields: Any) -> Record:
    return dataclasses.replace(RANKER, pool=pool, versions=(dataclasses.replace(VERSION, **fields),))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (pooled("triton", artifact="", digest=""), []),
        (pooled("gpu"), []),
        (pooled("tritom"), ["spec.pool: there is no pool 'tritom'; did you mean 'triton'?"]),
        (pooled("gpu", artifact="", digest=""), ["spec.versions[0].artifact: expected the folder of the artifact"]),
        (pooled("triton"), ["spec.versions[0].artifact: would be ignored"]),
        (pooled("triton", artifact="", digest="", signature=None), ["spec.versions[0].signature: is missing; write it down"]),
    ],
)
def test_a_model_runs_in_a_pool_that_there_is_and_has_what_it_takes_there(changed: Record, expected: list[str]) -> None:
    found = problems(changed, FOREIGN, OWN)
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(f"Model ranker {start}")


def test_a_pool_is_kept_by_its_models_and_a_model_by_what_retrieves_with_it() -> None:
    asking = dataclasses.replace(HOME, name="asking", stages=Stages(retrieve=Retrieve(model="finder", use="1")))
    finder = dataclasses.replace(RANKER, name="finder")
    there = world(pooled("gpu"), OWN, asking, finder)
    assert users_of(there, ("Pool", "gpu")) == ("Model ranker",)
    assert users_of(there, ("Model", "finder")) == ("Route asking",)


def test_a_version_that_fits_has_no_misfits_and_one_that_does_not_says_why() -> None:
    assert misfits(HOME, RANKER, VERSION, world()) == ()
    unpinned = dataclasses.replace(VERSION, signature=None)
    assert "has no signature" in misfits(HOME, RANKER, unpinned, world())[0]
    wide = dataclasses.replace(VERSION, signature=signature(item=dataclasses.replace(ITEM, shape=(-1, 64))))
    assert misfits(HOME, RANKER, wide, world()) == ("'item' has shape [-1, 64], but feature set 'home' yields 2 columns: [rows, 2]",)
    assert "there is no feature view 'item-stats'" in misfits(HOME, RANKER, VERSION, world(without=("FeatureView item-stats",)))[0]
