from __future__ import annotations

from datetime import UTC, datetime

import pytest
from tests.fakes.registry_world import HOME, WORLD

from plait.registry.records import ApiKey, Epochs
from plait.registry.resources import Change, Difference, Resource, diff, records_of, snapshot_of

NOW = datetime(2025, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2, "b": 3}, [Difference("a", 1, 2), Difference("b", None, 3)]),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {}}}, [Difference("a.b.c", 1, None)]),
        ({"a": [1, 2]}, {"a": [1, 3, 4]}, [Difference("a[1]", 2, 3), Difference("a[2]", None, 4)]),
        (
            {"vs": [{"version": "1", "d": "x"}, {"version": "2", "d": "y"}]},
            {"vs": [{"version": "2", "d": "z"}, {"version": "1", "d": "x"}]},
            [Difference("vs[2].d", "y", "z")],
        ),
        (
            {"fs": [{"name": "a"}]},
            {"fs": [{"name": "b"}]},
            [Difference("fs[a]", {"name": "a"}, None), Difference("fs[b]", None, {"name": "b"})],
        ),
        ({}, {"a": None}, []),
    ],
)
def test_differences_are_found_by_name_where_there_is_one(before: object, after: object, expected: list[Difference]) -> None:
    assert list(diff(before, after)) == expected


def test_a_change_knows_its_differences() -> None:
    change = Change(action="created", kind="Tenant", name="a", generation=1, revision=1, before=None, after={"description": "x"})
    assert change.differences() == [Difference("description", None, "x")]


def test_a_resource_has_an_etag_that_changes_with_its_generation() -> None:
    first = Resource(record=HOME, generation=1, revision=5, created_at=NOW, updated_at=NOW)
    second = Resource(record=HOME, generation=2, revision=5, created_at=NOW, updated_at=NOW)
    assert (first.kind, first.name) == ("Route", "home")
    assert first.etag != second.etag


def test_a_snapshot_is_read_only_and_gives_its_records_back() -> None:
    key = ApiKey(id="k", tenant="shop", sha256="0" * 64)
    snapshot = snapshot_of(7, WORLD, [key])
    assert snapshot.epochs_of("shop", "item-stats", 1) == Epochs(serving=0, building=None, previous=None)
    assert repr(snapshot) == "<Snapshot revision=7 models=1 views=2 sets=1 routes=1 tenants=1 keys=1 epochs=0>"
    assert snapshot.keys == {"0" * 64: key}
    with pytest.raises(TypeError):
        snapshot.routes["x"] = HOME  # type: ignore[index]
    with pytest.raises(TypeError):
        snapshot.epochs["shop", "item-stats", 1] = Epochs()  # type: ignore[index]
    assert sorted(r.name for r in records_of(snapshot)) == sorted(r.name for r in WORLD)


def test_a_snapshot_knows_the_epochs_of_each_tenants_version() -> None:
    built = Epochs(serving=2, building=3, previous=1)
    snapshot = snapshot_of(7, WORLD, [], {("shop", "item-stats", 1): built})
    assert snapshot.epochs_of("shop", "item-stats", 1) == built
    for other in (("other", "item-stats", 1), ("shop", "user-profile", 1), ("shop", "item-stats", 2)):
        assert snapshot.epochs_of(*other) == Epochs()
