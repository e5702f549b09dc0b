from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest
from tests.fakes.registry_world import FEATURES, HOME, ITEMS, SHOP, USERS, WORLD, manifests

from plait.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from plait.registry import plan
from plait.registry.evolution import evolve
from plait.registry.manifests import Manifest
from plait.registry.records import Feature, FeatureSchema, FeatureSet, FeatureView, Record, Snapshot
from plait.registry.resources import Key, Past, Resource, snapshot_of
from plait.registry.specs import kind_of

NOW = datetime(2025, 1, 1, tzinfo=UTC)


def stored(*records: Record) -> tuple[dict[Key, Resource], Snapshot, Past]:
    evolved = [evolve(r, Past())[0] for r in records]
    current = {(kind_of(r), r.name): Resource(record=r, generation=3, revision=9, created_at=NOW, updated_at=NOW) for r in evolved}
    views = {(v.name, v.version): v for v in snapshot_of(9, evolved, []).feature_views.values()}
    return current, snapshot_of(9, evolved, []), Past(views=views)


EMPTY = stored()
FULL = stored(*WORLD)


def test_everything_at_once_into_nothing_is_created_in_order() -> None:
    steps = plan.apply(manifests(*reversed(WORLD)), *EMPTY)
    assert [s.action for s in steps] == ["created"] * len(WORLD)
    assert [s.key[1] for s in steps] == [r.name for r in reversed(WORLD)]


def test_the_same_again_is_unchanged() -> None:
    assert {s.action for s in plan.apply(manifests(), *FULL)} == {"unchanged"}


def test_a_change_is_an_update_of_that_one() -> None:
    steps = plan.apply(manifests(SHOP, dataclasses.replace(HOME, timeout_s=2.0)), *FULL)
    assert [s.action for s in steps] == ["unchanged", "updated"]


def test_a_misfit_names_the_file_it_came_from() -> None:
    manifest = Manifest(record=dataclasses.replace(HOME, tenants=("nobody",)), source="routes.yaml:7")
    with pytest.raises(FailedPrecondition) as caught:
        plan.apply([manifest], *FULL)
    assert caught.value.reason == "CROSS_CHECK_FAILED"
    assert [v.field for v in caught.value.violations] == ["routes.yaml:7 Route home spec.tenants[0]"]


def test_a_misfit_brought_about_elsewhere_is_refused_too() -> None:
    narrower = dataclasses.replace(ITEMS, version=2, features=ITEMS.features[:1])
    with pytest.raises(FailedPrecondition) as caught:
        plan.apply(manifests(narrower), *FULL)
    fields = [v.field for v in caught.value.violations]
    assert fields == ["FeatureView item-stats spec.version", "FeatureSet home spec.inputs[1].features[1]"]
    assert caught.value.violations[1].description == "view 'item-stats' has no feature 'views'; it feeds Model ranker version 1; Route home"


def test_old_problems_of_others_do_not_stand_in_the_way() -> None:
    broken = FeatureSet(name="broken", inputs=FEATURES.inputs)
    world = stored(broken, SHOP)
    (step,) = plan.apply(manifests(dataclasses.replace(SHOP, description="x")), *world)
    assert step.action == "updated"
    with pytest.raises(FailedPrecondition):
        plan.apply(manifests(broken), *world)


def test_invalid_records_made_in_code_are_refused_as_those_from_files() -> None:
    with pytest.raises(InvalidArgument) as caught:
        plan.apply(manifests(dataclasses.replace(HOME, timeout_s=-1.0), SHOP, SHOP), *FULL)
    assert [v.field for v in caught.value.violations] == ["Route home spec.timeout_s", "Tenant shop", "Tenant shop"]


@pytest.mark.parametrize(("etag", "fine"), [("", True), ("g3", True), ("g2", False)])
def test_an_etag_must_be_the_stored_one(etag: str, fine: bool) -> None:
    manifest = Manifest(record=SHOP, etag=etag)
    if fine:
        assert plan.apply([manifest], *FULL)
        return
    with pytest.raises(Aborted, match="stored etag is g3, not g2"):
        plan.apply([manifest], *FULL)
    with pytest.raises(Aborted, match="stored etag is none"):
        plan.apply([manifest], *EMPTY)


def test_delete_finds_users_absences_and_stale_etags() -> None:
    current, snapshot, _ = FULL
    assert plan.delete(("Route", "home"), "g3", current, snapshot).after is None
    with pytest.raises(NotFound):
        plan.delete(("Route", "nothing"), "", current, snapshot)
    with pytest.raises(Aborted):
        plan.delete(("Route", "home"), "g1", current, snapshot)
    with pytest.raises(FailedPrecondition) as caught:
        plan.delete(("FeatureView", USERS.name), "", current, snapshot)
    assert [v.field for v in caught.value.violations] == ["FeatureSet home"]


def test_only_views_and_models_have_a_past_that_matters() -> None:
    assert plan.names_with_past(manifests()) == (["user-profile", "item-stats"], ["ranker"])


def reading(*references: str) -> FeatureSet:
    return dataclasses.replace(FEATURES, inputs=(FEATURES.inputs[0], dataclasses.replace(FEATURES.inputs[1], features=references)))


def test_a_version_without_rows_is_refused_for_those_who_would_read_it() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        plan.apply(manifests(dataclasses.replace(ITEMS, version=2)), *FULL)
    [violation] = caught.value.violations
    assert violation.field == "FeatureView item-stats spec.version"
    assert violation.description == (
        "version 2 has no rows yet and would be read at once by FeatureSet home (Model ranker version 1, Route home): "
        "pin item-stats@1 there until it is filled, or item-stats@2 to begin with defaults"
    )


@pytest.mark.parametrize("version", [1, 2])
def test_a_pin_says_which_version_is_meant_and_that_is_kept(version: int) -> None:
    bumped = dataclasses.replace(ITEMS, version=2)
    pinned = reading(f"item-stats@{version}:price", f"item-stats@{version}:views")
    view_step, _ = plan.apply(manifests(bumped, pinned), *FULL)
    view = view_step.after
    assert isinstance(view, FeatureView)
    assert [past.version for past in view.versions] == [1]
    old = view.at(1)
    assert old is not None
    assert (old.features, old.schemas) == (ITEMS.features, (FeatureSchema(id=1, features=ITEMS.features),))


def test_a_version_that_had_rows_may_be_gone_back_to() -> None:
    current, snapshot, past = FULL
    second = evolve(dataclasses.replace(ITEMS, version=2), past)[0]
    assert isinstance(second, FeatureView)
    world = (
        {**current, ("FeatureView", "item-stats"): dataclasses.replace(current["FeatureView", "item-stats"], record=second)},
        dataclasses.replace(snapshot, feature_views={**snapshot.feature_views, "item-stats": second}),
        Past(views={**past.views, ("item-stats", 2): second}),
    )
    (step,) = plan.apply(manifests(ITEMS), *world)
    assert isinstance(step.after, FeatureView)
    assert [version.version for version in step.after.versions] == [2]


def test_a_bump_that_no_model_reads_is_free() -> None:
    current, snapshot, past = FULL
    alone = snapshot_of(9, [*snapshot.feature_views.values(), *snapshot.feature_sets.values()], [])
    left = {key: stored for key, stored in current.items() if key[0] in ("FeatureView", "FeatureSet")}
    (step,) = plan.apply(manifests(dataclasses.replace(ITEMS, version=2)), left, alone, past)
    assert step.action == "updated"


def test_what_forbids_a_change_says_for_whom() -> None:
    retyped = dataclasses.replace(ITEMS, features=(ITEMS.features[0], Feature(name="views", dtype="int32")))
    with pytest.raises(FailedPrecondition) as caught:
        plan.apply(manifests(retyped), *FULL)
    assert caught.value.violations[0].description == (
        "column 'views' was retyped from int64 to int32, but its rows keep the old type; set version: 2 (it starts with no rows); "
        "it is read by FeatureSet home (Model ranker version 1, Route home)"
    )


def test_an_appended_column_needs_a_default_where_somebody_reads_it() -> None:
    wider = dataclasses.replace(ITEMS, features=(*ITEMS.features, Feature(name="likes")))
    (step,) = plan.apply(manifests(wider), *FULL)
    assert step.action == "updated"
    with pytest.raises(FailedPrecondition) as caught:
        plan.apply(manifests(wider, reading("item-stats:price", "item-stats:likes")), *FULL)
    [violation] = caught.value.violations
    assert violation.field == "FeatureSet home spec.inputs[1].features[1]"
    assert "item-stats:likes was appended to a view that has rows and has no default" in violation.description
    given_default = dataclasses.replace(ITEMS, features=(*ITEMS.features, Feature(name="likes", default=0)))
    assert plan.apply(manifests(given_default, reading("item-stats:price", "item-stats:likes")), *FULL)
