"""Resources and changes as JSON and on a screen."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import pytest
import yaml
from tests.fakes.registry_world import FEATURES, HOME, ITEMS, RANKER, SHOP, WORLD

from plait.cli import render
from plait.registry.records import PastVersion, Record, RequestFeature, Transform, VersionPolicy
from plait.registry.resources import Change, Resource
from plait.registry.specs import kind_of, to_manifest, to_stored

KEPT = tuple(PastVersion(version=version, entity=ITEMS.entity, schemas=()) for version in (1, 2))
COMPUTED = tuple(Transform(name=name, entity="item", expression="1") for name in "ab")
MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def stored(record: Record) -> Resource:
    return Resource(record=record, generation=2, revision=9, created_at=MOMENT, updated_at=MOMENT)


def changed(record: Record, before: Record | None) -> Change:
    return Change(
        action="updated" if before else "created",
        kind=kind_of(record),
        name=record.name,
        generation=2,
        revision=9,
        before=to_stored(before) if before else None,
        after=to_stored(record),
        actor="ann@desk",
        reason="because",
        changed_at=MOMENT,
    )


@pytest.mark.parametrize("record", WORLD, ids=lambda record: record.name)
def test_json_is_the_manifest_and_what_the_registry_knows(record: Record) -> None:
    document = render.resource(stored(record))
    assert document.pop("status") == {"generation": 2, "revision": 9, "etag": "g2", "created_at": MOMENT, "updated_at": MOMENT}
    assert document == to_manifest(record)


@pytest.mark.parametrize("record", WORLD, ids=lambda record: record.name)
def test_a_manifest_on_the_screen_is_yaml(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    render.show_manifest(stored(record))
    assert yaml.safe_load(capsys.readouterr().out) == to_manifest(record)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (RANKER, "1 version(s); champion=1"),
        (ITEMS, "2 features of item, version 1"),
        (dataclasses.replace(ITEMS, version=3, versions=KEPT), "2 features of item, version 3 (and 1, 2)"),
        (FEATURES, "user[2], item[2]"),
        (
            dataclasses.replace(FEATURES, request=(RequestFeature(name="hour"),), transforms=COMPUTED),
            "user[2], item[2], 1 sent along, 2 computed",
        ),
        (HOME, "main: ranker@champion ×1"),
        (dataclasses.replace(SHOP, description="a shop"), "a shop"),
    ],
    ids=lambda part: getattr(part, "name", ""),
)
def test_lists_say_in_a_few_words_what_each_is(record: Record, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    render.show_list(kind_of(record), [stored(record)])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "WHAT", "GENERATION", "UPDATED", "(UTC)"]
    assert row.split() == [record.name, *says.split(), "2", "2026-01-02", "03:04:05"]


def test_a_model_is_described_with_versions_and_history(capsys: pytest.CaptureFixture[str]) -> None:
    before = dataclasses.replace(RANKER, aliases={})
    render.show_description(stored(RANKER), [changed(RANKER, before)])
    out = capsys.readouterr().out
    assert out.startswith("Model ranker\ngeneration 2 (etag g2), registry revision 9\n")
    assert ["1", "champion", "sha256:aaaaaaaaaaaa", "auc=0.75", "/models/ranker/1"] in [line.split() for line in out.splitlines()]
    assert "  2026-01-02 03:04:05  generation 2  updated by ann@desk: because\n    aliases.champion: nothing → 1\n" in out


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (VersionPolicy(), "the newest 1 version(s)"),
        (VersionPolicy(latest=3), "the newest 3 version(s)"),
        (VersionPolicy(latest=0), "no version of themselves"),
        (VersionPolicy(specific=("1", "2")), "version(s) 1, 2"),
        (VersionPolicy(all=True), "every version"),
    ],
)
def test_a_description_says_which_versions_workers_hold(policy: VersionPolicy, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    render.show_description(stored(dataclasses.replace(RANKER, version_policy=policy)), [])
    assert f"workers hold {says}, and what routes and aliases refer to" in capsys.readouterr().out.splitlines()


def test_changes_are_one_line_each_and_updates_their_differences(capsys: pytest.CaptureFixture[str]) -> None:
    longer = dataclasses.replace(SHOP, description="x" * 100)
    render.show_changes([changed(SHOP, None), changed(longer, SHOP)], dry_run=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Tenant/shop created (generation 2)", "Tenant/shop updated (generation 2)"]
    assert lines[2].endswith("x" * 77 + "…")
    render.show_changes([changed(SHOP, None)], dry_run=True)
    assert capsys.readouterr().out == "Tenant/shop would be created (generation 2)\n"


def test_a_change_as_json_names_fields(capsys: pytest.CaptureFixture[str]) -> None:
    document = render.change(changed(dataclasses.replace(SHOP, description="new"), SHOP))
    assert (document["action"], document["actor"], document["reason"], document["changed_at"]) == ("updated", "ann@desk", "because", MOMENT)
    assert [(d["field"], d["after"]) for d in document["differences"]] == [("description", "new")]
