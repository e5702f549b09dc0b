from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.registry_world import DIGEST, ITEMS, OTHER_DIGEST, RANKER, SHOP, VERSION

from plait.registry.evolution import MAX_SCHEMA_ID, evolve
from plait.registry.records import Entity, Feature, FeatureSchema, FeatureView, Model
from plait.registry.resources import Past


def stored(view: FeatureView) -> tuple[FeatureView, Past]:
    record, problems = evolve(view, Past())
    assert isinstance(record, FeatureView)
    assert problems == []
    return record, Past(views={(record.name, record.version): record})


def columns(*names: str) -> tuple[Feature, ...]:
    return tuple(Feature(name=name) for name in names)


def test_a_new_view_gets_its_first_schema() -> None:
    record, _ = stored(ITEMS)
    assert record.schemas == (FeatureSchema(id=1, features=ITEMS.features),)


def test_the_same_again_is_equal_to_what_is_stored() -> None:
    record, past = stored(ITEMS)
    assert evolve(ITEMS, past) == (record, [])


def test_an_appended_column_is_a_new_schema_and_the_old_one_stays() -> None:
    _, past = stored(ITEMS)
    wider = dataclasses.replace(ITEMS, features=(*ITEMS.features, *columns("likes")))
    record, problems = evolve(wider, past)
    assert isinstance(record, FeatureView)
    assert problems == []
    assert record.schemas == (FeatureSchema(id=1, features=ITEMS.features), FeatureSchema(id=2, features=wider.features))


def test_a_changed_default_keeps_the_schema_id() -> None:
    _, past = stored(ITEMS)
    changed = dataclasses.replace(ITEMS, features=(dataclasses.replace(ITEMS.features[0], default=1.0), ITEMS.features[1]), max_age_s=5.0)
    record, problems = evolve(changed, past)
    assert isinstance(record, FeatureView)
    assert problems == []
    assert [s.id for s in record.schemas] == [1]
    assert record.schemas[0].features == changed.features


@pytest.mark.parametrize(
    ("features", "sentence"),
    [
        (columns("price"), "column 'views' was removed, but rows of version 1 have it"),
        (
            (ITEMS.features[0], Feature(name="views", dtype="int32")),
            "column 'views' was retyped from int64 to int32, but its rows keep the old type",
        ),
        (
            (ITEMS.features[1], ITEMS.features[0]),
            "column 'price' was moved, but columns are told apart by position; append new ones at the end",
        ),
        (
            (*columns("new"), *ITEMS.features),
            "column 'price' was moved, but columns are told apart by position; append new ones at the end",
        ),
    ],
)
def test_other_changes_of_columns_demand_a_new_version(features: tuple[Feature, ...], sentence: str) -> None:
    _, past = stored(ITEMS)
    changed = dataclasses.replace(ITEMS, features=features)
    assert evolve(changed, past)[1] == [(("features",), f"{sentence}; set version: 2 (it starts with no rows)")]
    assert evolve(dataclasses.replace(changed, version=2), past)[1] == []


def test_another_entity_demands_a_new_version() -> None:
    _, past = stored(ITEMS)
    ((steps, sentence),) = evolve(dataclasses.replace(ITEMS, entity=Entity(type="item", key="int64")), past)[1]
    assert steps == ("entity",)
    assert "was item (key string) in version 1" in sentence


def test_schema_ids_end_where_the_row_header_does() -> None:
    record, _ = stored(ITEMS)
    full = dataclasses.replace(record, schemas=(FeatureSchema(id=MAX_SCHEMA_ID, features=ITEMS.features),))
    past = Past(views={(ITEMS.name, 1): full})
    assert evolve(ITEMS, past)[1] == []
    assert "set version: 2" in evolve(dataclasses.replace(ITEMS, features=(*ITEMS.features, *columns("x"))), past)[1][0][1]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_any_history_of_appends_keeps_every_older_schema_a_prefix(appends: list[int]) -> None:
    view = dataclasses.replace(ITEMS, features=columns("c"))
    record, past = stored(view)
    for step, count in enumerate(appends):
        view = dataclasses.replace(view, features=(*view.features, *columns(*(f"c{step}.{n}" for n in range(count)))))
        evolved, problems = evolve(view, past)
        assert isinstance(evolved, FeatureView)
        assert problems == []
        record, past = evolved, Past(views={(view.name, 1): evolved})
    assert [s.id for s in record.schemas] == list(range(1, len(appends) + 2))
    for older, newer in zip(record.schemas, record.schemas[1:], strict=False):
        assert newer.features[: len(older.features)] == older.features
    assert record.schemas[-1].features == record.features


def test_a_published_version_keeps_its_digest_for_ever() -> None:
    past = Past(digests={("ranker", "1"): DIGEST})
    assert evolve(RANKER, past)[1] == []
    moved = Model(name="ranker", versions=(dataclasses.replace(VERSION, artifact="/elsewhere"),))
    assert evolve(moved, past)[1] == []
    changed = Model(name="ranker", versions=(dataclasses.replace(VERSION, digest=OTHER_DIGEST),))
    ((steps, sentence),) = evolve(changed, past)[1]
    assert steps == ("versions", 0, "digest")
    assert sentence.endswith("publish it under a new version")


def test_other_kinds_pass_as_they_are() -> None:
    assert evolve(SHOP, Past()) == (SHOP, [])
