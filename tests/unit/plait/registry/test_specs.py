from __future__ import annotations

import dataclasses
import json
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.registry_world import RANKER, WORLD

from plait.errors import Internal
from plait.registry import manifests
from plait.registry.records import (
    Aggregate,
    Aggregation,
    Entity,
    FeastSource,
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
    Tenant,
    Transform,
    Variant,
    VersionPolicy,
)
from plait.registry.specs import from_stored, kind_of, to_manifest, to_spec, to_stored
from plait.registry.yaml_tree import dump

names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
floats = st.floats(0.001, 50)
features = st.builds(
    Feature, name=names, dtype=st.sampled_from(["float32", "float64"]), default=st.none() | st.floats(-1e6, 1e6), description=texts
)
views = st.builds(
    FeatureView,
    name=names,
    entity=st.builds(Entity, type=names, key=st.sampled_from(["string", "int64"])),
    features=st.lists(features, min_size=1, max_size=4, unique_by=lambda f: f.name).map(tuple),
    version=st.integers(1, 1000),
    max_age_s=floats,
    description=texts,
)
versions = st.lists(
    st.builds(
        ModelVersion,
        version=st.from_regex(r"[A-Z0-9]{1,5}", fullmatch=True),
        artifact=st.just("/m"),
        metrics=st.dictionaries(names, st.floats(-1, 1)),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda v: v.version,
).map(tuple)


def policies(listed: tuple[ModelVersion, ...]) -> st.SearchStrategy[VersionPolicy]:
    """Policies for a model with these versions."""
    specific = st.lists(st.sampled_from([v.version for v in listed]), unique=True).map(tuple)
    return st.one_of(
        st.builds(VersionPolicy, latest=st.integers(0, 64)), st.builds(VersionPolicy, specific=specific), st.just(VersionPolicy(all=True))
    )


models = versions.flatmap(lambda listed: st.builds(Model, name=names, versions=st.just(listed), version_policy=policies(listed)))
routes = st.builds(
    Route,
    name=names,
    variants=st.lists(
        st.builds(Variant, name=names, model=names, use=names, weight=floats), min_size=1, max_size=3, unique_by=lambda v: v.name
    ).map(tuple),
    timeout_s=floats,
    max_candidates=st.integers(1, 10_000),
    on_missing=st.sampled_from(["fail", "default", "stale_ok"]),
)
records: st.SearchStrategy[Record] = st.one_of(views, models, routes, st.builds(Tenant, name=names, description=texts))


@given(records)
def test_what_is_stored_comes_back(record: Record) -> None:
    stored = json.loads(json.dumps(to_stored(record)))
    assert "name" not in stored
    assert from_stored(kind_of(record), record.name, stored) == record


@given(records)
def test_what_is_printed_can_be_applied_again(record: Record) -> None:
    (again,) = manifests.parse(dump(to_manifest(record)))
    assert again.record == record


@pytest.mark.parametrize("record", WORLD, ids=kind_of)
def test_a_spec_holds_no_defaults(record: Record) -> None:
    spec = to_spec(record)
    assert "name" not in spec
    assert "description" not in spec
    assert len(spec) < len(to_stored(record)) or not spec


def test_schemas_are_stored_but_not_printed() -> None:
    view = FeatureView(name="v", entity=Entity(type="u"), features=(Feature(name="a"),), schemas=(FeatureSchema(id=1, features=()),))
    assert "schemas" in to_stored(view)
    assert "schemas" not in to_spec(view)


def test_mappings_inside_a_record_are_read_only() -> None:
    model = from_stored("Model", "ranker", to_stored(RANKER))
    assert isinstance(model, Model)
    assert isinstance(model.aliases, MappingProxyType)
    assert isinstance(model.versions[0].metrics, MappingProxyType)
    assert model == RANKER


def test_a_field_of_a_newer_build_is_passed_over_but_a_wrong_one_is_not() -> None:
    assert from_stored("Tenant", "t", {"description": "x", "colour": 5}) == Tenant(name="t", description="x")
    with pytest.raises(Internal, match="the stored Tenant t cannot be read"):
        from_stored("Tenant", "t", {"description": 5})


def test_a_new_field_with_a_default_reads_old_rows() -> None:
    stored = to_stored(RANKER)
    del stored["aliases"]
    assert from_stored("Model", "ranker", stored) == dataclasses.replace(RANKER, aliases={})


WIDE = FeatureView(
    name="v",
    entity=Entity(type="u", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="sku", type="int64"))),
    features=(
        Feature(name="a", dtype="string", vocabulary=("red", "green"), default="red"),
        Feature(name="b", dtype="int8", width=384, scale=0.5),
        Feature(name="c", dtype="int16", max_length=8, pad=-1.0),
        Feature(name="d", aggregate=Aggregate(function="sum", events=("like",), value="value", window_s=60.0, tile_s=5.0)),
    ),
    readers=("shop",),
    durable="before",
    aggregation=Aggregation(entity_from="subject", lateness_s=5.0),
    feast=FeastSource(project="p", view="w", join_keys=("shop", "sku")),
    versions=(PastVersion(version=1, entity=Entity(type="u"), schemas=(FeatureSchema(id=1, features=(Feature(name="z"),)),)),),
)
SENT = FeatureSet(
    name="s",
    inputs=(ModelInput(name="x", entity="u", features=("v@1:z", "$request:hour", "$transform:heat"), dtype="int16"),),
    request=(RequestFeature(name="hour", minimum=0.0, maximum=23.0, default=12.0),),
    transforms=(Transform(name="heat", entity="u", expression="log1p({v:d})", default=0.0),),
)


@pytest.mark.parametrize("record", [WIDE, SENT], ids=kind_of)
def test_every_field_of_features_is_stored_and_comes_back(record: Record) -> None:
    assert from_stored(kind_of(record), record.name, json.loads(json.dumps(to_stored(record)))) == record


def test_past_versions_are_printed_of_a_model_but_not_of_a_view() -> None:
    assert "versions" in to_stored(WIDE)
    assert "versions" not in to_spec(WIDE)
    assert "versions" in to_spec(RANKER)
