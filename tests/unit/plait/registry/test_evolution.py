from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.registry_world import DIGEST, ITEMS, OTHER_DIGEST, RANKER, SHOP, VERSION

from plait.registry.evolution import MAX_SCHEMA_ID, evolve
from plait.registry.records import Aggregate, Aggregation, Entity, Feature, FeatureSchema, FeatureView, KeyPart, Model
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


# --- every type ---------------------------------------------------------------------------------------------------------------------------

COUNT = Aggregate(function="count", events=("view",), window_s=60.0)
TYPED = {
    "word": Feature(name="x", dtype="string", vocabulary=("a", "b")),
    "hash": Feature(name="x", dtype="string", hash_buckets=8),
    "list": Feature(name="x", dtype="int16", max_length=4, pad=-1),
    "embedding": Feature(name="x", dtype="int8", width=4, scale=0.5),
    "count": Feature(name="x", aggregate=COUNT),
}


@pytest.mark.parametrize(
    ("of", "change", "words"),
    [
        (
            "word",
            {"vocabulary": ("b", "a")},
            "has another vocabulary, but its rows hold the places of the old words; add new words at the end",
        ),
        ("word", {"vocabulary": ("a",)}, "has another vocabulary"),
        ("word", {"vocabulary": (), "hash_buckets": 8}, "has another hash_buckets from 0 to 8"),
        ("hash", {"hash_buckets": 9}, "has another hash_buckets from 8 to 9, but its rows keep the old one"),
        ("hash", {"hash_buckets": 0, "vocabulary": ("a",)}, "has another hash_buckets"),
        ("list", {"max_length": 5}, "has another max_length from 4 to 5"),
        ("list", {"pad": 0}, "has another pad from -1 to 0"),
        ("list", {"max_length": 0, "pad": 0}, "has another max_length"),
        ("embedding", {"width": 5}, "has another width from 4 to 5"),
        ("embedding", {"scale": 1.0}, "has another scale from 0.5 to 1.0"),
        ("count", {"aggregate": dataclasses.replace(COUNT, window_s=120.0)}, "has another aggregate, but its rows keep the old one"),
    ],
)
def test_what_rows_depend_on_cannot_change_within_a_version(of: str, change: Any, words: str) -> None:
    view = dataclasses.replace(ITEMS, features=(TYPED[of],))
    _, past = stored(view)
    changed = dataclasses.replace(view, features=(dataclasses.replace(TYPED[of], **change),))
    [(steps, message)] = evolve(changed, past)[1]
    assert steps == ("features",)
    assert message.startswith("column 'x' ")
    assert words in message
    assert message.endswith("; set version: 2 (it starts with no rows)")
    record, problems = evolve(dataclasses.replace(changed, version=2), past)
    assert problems == []
    assert isinstance(record, FeatureView)
    old = record.at(1)  # what rows of version 1 are read by stays as it was
    assert old is not None
    assert old.features == view.features


@pytest.mark.parametrize(
    ("of", "change"),
    [("word", {"vocabulary": ("a", "b", "c")}), ("word", {"default": "b"}), ("hash", {"description": "other"}), ("list", {"default": 3})],
)
def test_what_rows_do_not_depend_on_may_change(of: str, change: Any) -> None:
    view = dataclasses.replace(ITEMS, features=(TYPED[of],))
    _, past = stored(view)
    record, problems = evolve(dataclasses.replace(view, features=(dataclasses.replace(TYPED[of], **change),)), past)
    assert problems == []
    assert isinstance(record, FeatureView)
    assert [schema.id for schema in record.schemas] == [1]


def test_parts_of_a_key_and_whose_events_count_demand_a_new_version() -> None:
    composite = Entity(type="item", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="number", type="int64")))
    view = dataclasses.replace(ITEMS, entity=composite)
    _, past = stored(view)
    other = dataclasses.replace(view, entity=dataclasses.replace(composite, parts=composite.parts[::-1]))
    [(steps, message)] = evolve(other, past)[1]
    assert steps == ("entity",)
    assert "was item (key composite of shop string, number int64) in version 1" in message

    counted = dataclasses.replace(ITEMS, features=(TYPED["count"],), aggregation=Aggregation())
    _, past = stored(counted)
    assert evolve(dataclasses.replace(counted, aggregation=Aggregation(lateness_s=5.0)), past)[1] == []
    [(steps, message)] = evolve(dataclasses.replace(counted, aggregation=Aggregation(entity_from="subject")), past)[1]
    assert (steps, message) == (
        ("aggregation", "entity_from"),
        "was object in version 1; set version: 2 (it starts with no rows)",
    )
    assert ("aggregation",) in dict(evolve(dataclasses.replace(counted, aggregation=None), past)[1])


def test_pinned_versions_are_kept_and_always_the_newest_of_the_others() -> None:
    views = {}
    for version in (1, 2, 3, 4):
        record, _ = evolve(dataclasses.replace(ITEMS, version=version, max_age_s=float(version)), Past(views=views))
        assert isinstance(record, FeatureView)
        views[record.name, version] = record

    def kept(version: int, *pinned: int) -> list[int]:
        view = dataclasses.replace(ITEMS, version=version, max_age_s=float(version))
        record, problems = evolve(view, Past(views=views), {("item-stats", v) for v in pinned} | {("other", 1)})
        assert problems == []
        assert isinstance(record, FeatureView)
        assert [past.max_age_s for past in record.versions] == [float(past.version) for past in record.versions]
        return [past.version for past in record.versions]

    assert kept(4) == [3]
    assert kept(4, 1) == [1, 3]
    assert kept(4, 4, 2) == [2, 3]
    assert kept(2) == [4]
    assert kept(5, 1, 2, 3, 4) == [1, 2, 3, 4]
