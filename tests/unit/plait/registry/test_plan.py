from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest
from tests.fakes.registry_world import FEATURES, HOME, ITEMS, SHOP, USERS, WORLD, manifests

from plait.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from plait.registry import plan
from plait.registry.evolution import evolve
from plait.registry.manifests import Manifest
from plait.registry.records import FeatureSet, Record, Snapshot
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
    assert [v.field for v in caught.value.violations] == ["FeatureSet home spec.inputs[1].features[1]"]


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
