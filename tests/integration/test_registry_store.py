"""The store against a real PostgreSQL: migrations, all-or-none applies, audit, keys, refusals, concurrency."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import re
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest
from tests.fakes.registry_world import (
    FEATURES,
    HOME,
    ITEMS,
    OTHER_DIGEST,
    RANKER,
    SHOP,
    USERS,
    VERSION,
    WORLD,
    manifests,
)

from plait.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from plait.registry import migrator
from plait.registry.manifests import Manifest
from plait.registry.migrator import Migration
from plait.registry.records import Feature, FeatureView, Model, Tenant
from plait.registry.store import Store

DEFAULT = Tenant(name="default")


@pytest.fixture
def dsn(postgres_dsn: str) -> str:
    return postgres_dsn


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[Store]:
    async with await Store.open(dsn) as opened:
        await opened.migrate()
        yield opened


async def test_migrating_twice_does_nothing_the_second_time(dsn: str) -> None:
    async with await Store.open(dsn) as store:
        assert [str(m) for m in await store.migrate()] == ["0001_registry", "0002_features", "0003_built", "0004_keys"]
        assert await store.migrate() == ()
        assert (await store.snapshot()).tenants == {"default": DEFAULT}


async def test_processes_that_migrate_at_once_apply_each_migration_once(dsn: str) -> None:
    stores = [await Store.open(dsn, max_connections=1) for _ in range(6)]
    try:
        done = await asyncio.gather(*(store.migrate() for store in stores))
    finally:
        await asyncio.gather(*(store.close() for store in stores))
    applied = [migration for each in done for migration in each]  # between two migrations another process may take over
    assert sorted(applied, key=lambda migration: migration.version) == [*migrator.shipped()]


async def test_an_edited_migration_is_refused(store: Store) -> None:
    first = migrator.shipped()[0]
    with pytest.raises(FailedPrecondition, match="0001_registry was edited"):
        await store.migrate([dataclasses.replace(first, sql=first.sql + "-- oops")])


async def test_a_failing_migration_leaves_nothing_behind(store: Store, dsn: str) -> None:
    broken = Migration(version=len(migrator.shipped()) + 1, name="broken", sql="create table plait.half (a int); select 1/0;")
    with pytest.raises(Exception, match="SQLSTATE 22012"):
        await store.migrate([*migrator.shipped(), broken])
    connection = await asyncpg.connect(dsn)
    assert await connection.fetchval("select to_regclass('plait.half')") is None
    assert await connection.fetchval("select count(*) from plait.migration") == len(migrator.shipped())
    await connection.close()


async def test_what_a_newer_build_applied_is_left_alone(store: Store) -> None:
    newer = Migration(version=len(migrator.shipped()) + 1, name="newer", sql="create table plait.newer (a int)")
    assert await store.migrate([*migrator.shipped(), newer]) == (newer,)
    assert await store.migrate() == ()


async def test_before_migrating_the_message_says_what_to_run(dsn: str) -> None:
    async with await Store.open(dsn) as store:
        with pytest.raises(FailedPrecondition, match="plait migrate"):
            await store.snapshot()
        with pytest.raises(FailedPrecondition, match="plait migrate"):
            await store.apply(manifests(), actor="me")


async def test_apply_stores_everything_in_one_revision(store: Store) -> None:
    changes = await store.apply(manifests(), actor="anna", reason="first")
    assert {(c.action, c.generation, c.revision) for c in changes} == {("created", 1, 2)}
    snapshot = await store.snapshot()
    assert snapshot.revision == 2
    assert snapshot.routes == {"home": HOME}
    assert snapshot.models == {"ranker": RANKER}
    assert snapshot.feature_sets == {"home": FEATURES}
    assert snapshot.tenants == {"default": DEFAULT, "shop": SHOP}
    stored = snapshot.feature_views["user-profile"]
    assert [(s.id, s.features) for s in stored.schemas] == [(1, USERS.features)]
    with pytest.raises(TypeError):
        snapshot.models["ranker"].aliases["champion"] = "2"  # type: ignore[index]


async def test_applying_the_same_again_changes_nothing(store: Store) -> None:
    await store.apply(manifests(), actor="anna")
    changes = await store.apply(manifests(), actor="anna")
    assert {c.action for c in changes} == {"unchanged"}
    assert {c.revision for c in changes} == {2}
    assert (await store.snapshot()).revision == 2
    assert len(await store.history()) == 1 + len(WORLD)


async def test_only_what_changed_gets_a_new_generation(store: Store) -> None:
    await store.apply(manifests(), actor="anna")
    slower = dataclasses.replace(HOME, timeout_s=2.0)
    changes = await store.apply(manifests(USERS, slower), actor="bob", reason="slow model")
    assert [(c.action, c.generation, c.revision) for c in changes] == [("unchanged", 1, 2), ("updated", 2, 3)]
    assert [(d.field, d.before, d.after) for d in changes[1].differences()] == [("timeout_s", 1.0, 2.0)]
    assert (await store.get("Route", "home")).etag == "g2"


async def test_a_dry_run_answers_the_same_and_changes_nothing(store: Store) -> None:
    changes = await store.apply(manifests(), actor="anna", dry_run=True)
    assert {c.action for c in changes} == {"created"}
    assert (await store.snapshot()).revision == 1
    with pytest.raises(FailedPrecondition):
        await store.apply(manifests(HOME), actor="anna", dry_run=True)


async def test_apply_is_all_or_none_and_names_every_problem(store: Store) -> None:
    orphan = dataclasses.replace(HOME, name="orphan", tenants=("nobody",))
    with pytest.raises(FailedPrecondition) as caught:
        await store.apply(manifests(SHOP, FEATURES, orphan), actor="anna")
    assert caught.value.reason == "CROSS_CHECK_FAILED"
    fields = [v.field for v in caught.value.violations]
    assert any(f.startswith("FeatureSet home spec.inputs[0]") for f in fields)
    assert "Route orphan spec.tenants[0]" in fields
    assert "Route orphan spec.variants[0].model" in fields
    snapshot = await store.snapshot()
    assert (snapshot.revision, list(snapshot.tenants)) == (1, ["default"])


async def test_appending_a_column_adds_a_schema_and_removing_one_needs_a_version(store: Store) -> None:
    await store.apply(manifests(), actor="anna")
    wider = dataclasses.replace(ITEMS, features=(*ITEMS.features, Feature(name="likes")))
    await store.apply(manifests(wider), actor="anna")
    stored = (await store.snapshot()).feature_views["item-stats"]
    assert [s.id for s in stored.schemas] == [1, 2]
    with pytest.raises(FailedPrecondition, match=r"'likes' was removed.*set version: 2"):
        await store.apply(manifests(ITEMS), actor="anna")
    bumped = dataclasses.replace(ITEMS, version=2)
    with pytest.raises(FailedPrecondition, match=r"version 2 has no rows yet .* FeatureSet home \(Model ranker version 1, Route home\)"):
        await store.apply(manifests(bumped), actor="anna", dry_run=True)
    item = dataclasses.replace(FEATURES.inputs[1], features=("item-stats@1:price", "item-stats@1:views"))
    await store.apply(manifests(bumped, dataclasses.replace(FEATURES, inputs=(FEATURES.inputs[0], item))), actor="anna")
    both = (await store.snapshot()).feature_views["item-stats"]
    assert [past.version for past in both.versions] == [1]
    old = both.at(1)
    assert old is not None
    assert old.schemas == stored.schemas
    await store.apply(manifests(wider), actor="anna")  # back to version 1: its rows are still there, and so are its schemas
    assert (await store.snapshot()).feature_views["item-stats"].schemas == stored.schemas


async def test_a_deleted_view_keeps_its_claim_on_its_rows(store: Store) -> None:
    view = dataclasses.replace(ITEMS, name="loose")
    await store.apply(manifests(view), actor="anna")
    await store.delete("FeatureView", "loose", actor="anna")
    other = FeatureView(name="loose", entity=view.entity, features=(Feature(name="colour", dtype="int8"),))
    with pytest.raises(FailedPrecondition, match="'price' was removed"):
        await store.apply(manifests(other), actor="anna")
    (change,) = await store.apply(manifests(dataclasses.replace(other, version=2)), actor="anna")
    assert (change.action, change.generation) == ("created", 3)


async def test_a_published_version_stays_what_it_was(store: Store) -> None:
    await store.apply(manifests(), actor="anna")
    changed = Model(name="ranker", versions=(dataclasses.replace(VERSION, digest=OTHER_DIGEST),), aliases=RANKER.aliases)
    with pytest.raises(FailedPrecondition, match="publish it under a new version"):
        await store.apply(manifests(changed), actor="anna")
    second = dataclasses.replace(VERSION, version="2", digest=OTHER_DIGEST)
    await store.apply(manifests(dataclasses.replace(RANKER, versions=(VERSION, second))), actor="anna")


async def test_an_unpinned_version_is_refused(store: Store) -> None:
    bare = Model(name="bare", versions=(dataclasses.replace(VERSION, digest="", signature=None),))
    with pytest.raises(FailedPrecondition) as caught:
        await store.apply(manifests(bare), actor="anna")
    assert [v.field for v in caught.value.violations] == ["Model bare spec.versions[0].digest", "Model bare spec.versions[0].signature"]


async def test_an_etag_guards_against_overwriting(store: Store) -> None:
    await store.apply(manifests(), actor="anna")
    await store.apply([Manifest(record=dataclasses.replace(SHOP, description="one"), etag="g1")], actor="anna")
    with pytest.raises(Aborted, match="stored etag is g2, not g1"):
        await store.apply([Manifest(record=dataclasses.replace(SHOP, description="two"), etag="g1")], actor="bob")
    with pytest.raises(Aborted, match="its etag is g2"):
        await store.delete("Tenant", "shop", actor="bob", etag="g1")


async def test_delete_refuses_what_is_used_and_lists_the_users(store: Store) -> None:
    await store.apply(manifests(), actor="anna")
    await store.create_key("shop", actor="anna")
    users = (("FeatureView", "item-stats", "FeatureSet home"), ("FeatureSet", "home", "Model ranker"), ("Model", "ranker", "Route home"))
    for kind, name, user in users:
        with pytest.raises(FailedPrecondition) as caught:
            await store.delete(kind, name, actor="anna")  # type: ignore[arg-type]
        assert [v.field for v in caught.value.violations] == [user]
    with pytest.raises(FailedPrecondition, match="Tenant shop is still used"):
        await store.delete("Tenant", "shop", actor="anna")
    change = await store.delete("Route", "home", actor="anna", reason="gone")
    assert (change.action, change.generation, change.after) == ("deleted", 2, None)
    with pytest.raises(NotFound):
        await store.get("Route", "home")
    with pytest.raises(NotFound):
        await store.delete("Route", "home", actor="anna")


async def test_rollback_goes_one_back_or_to_a_generation_and_revives(store: Store) -> None:
    await store.apply(manifests(), actor="anna")
    for timeout_s in (2.0, 3.0):
        await store.apply(manifests(dataclasses.replace(HOME, timeout_s=timeout_s)), actor="anna")
    change = await store.rollback("Route", "home", actor="bob", reason="too slow")
    assert (change.action, change.generation, (await store.snapshot()).routes["home"].timeout_s) == ("updated", 4, 2.0)
    await store.rollback("Route", "home", generation=1, actor="bob")
    assert (await store.snapshot()).routes["home"] == HOME
    await store.delete("Route", "home", actor="bob")
    change = await store.rollback("Route", "home", actor="bob")
    assert (change.action, change.generation) == ("created", 7)
    assert (await store.snapshot()).routes["home"] == HOME
    with pytest.raises(NotFound, match="generation 99"):
        await store.rollback("Route", "home", generation=99, actor="bob")
    with pytest.raises(NotFound, match="no earlier generation"):
        await store.rollback("Tenant", "shop", actor="bob")


async def test_a_rollback_into_a_world_it_does_not_fit_is_refused(store: Store) -> None:
    second = dataclasses.replace(VERSION, version="2", digest=OTHER_DIGEST)
    await store.apply(manifests(), actor="anna")
    await store.apply(
        manifests(dataclasses.replace(RANKER, versions=(VERSION, second), aliases={"champion": "1", "canary": "2"})), actor="anna"
    )
    variants = (*HOME.variants, dataclasses.replace(HOME.variants[0], name="canary", use="canary"))
    await store.apply(manifests(dataclasses.replace(HOME, variants=variants)), actor="anna")
    with pytest.raises(FailedPrecondition, match="neither a version nor an alias 'canary'"):
        await store.rollback("Model", "ranker", actor="anna")


async def test_history_says_who_when_from_to_and_why(store: Store) -> None:
    await store.apply(manifests(SHOP), actor="anna", reason="new shop")
    await store.apply(manifests(dataclasses.replace(SHOP, description="x")), actor="bob", reason="say what it is")
    newest, oldest = await store.history("Tenant", "shop")
    assert (newest.actor, newest.reason, newest.action, newest.generation) == ("bob", "say what it is", "updated", 2)
    before, after = newest.before or {}, newest.after or {}
    assert (before["description"], after["description"]) == ("", "x")
    assert {**before, "description": "x"} == after
    assert (oldest.before, oldest.action) == (None, "created")
    assert newest.changed_at is not None
    assert oldest.changed_at is not None
    assert newest.changed_at > oldest.changed_at


async def test_history_pages_never_split_a_revision(store: Store) -> None:
    await store.apply(manifests(), actor="anna")
    page = await store.history(limit=2)
    assert {c.revision for c in page} == {2}
    assert len(page) == len(WORLD)
    rest = await store.history(limit=2, below_revision=page[-1].revision)
    assert [c.name for c in rest] == ["default"]


async def test_history_cannot_be_rewritten(store: Store, dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    for statement in ("update plait.change set actor = 'x'", "delete from plait.change", "truncate plait.change"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
            await connection.execute(statement)
    await connection.close()


async def test_concurrent_applies_queue_and_none_is_lost(store: Store) -> None:
    tenants = [Tenant(name=f"t{n}") for n in range(12)]
    changes = await asyncio.gather(
        *(store.apply(manifests(t, dataclasses.replace(SHOP, description=t.name)), actor="anna") for t in tenants)
    )
    assert sorted(c[0].revision for c in changes) == list(range(2, 14))
    snapshot = await store.snapshot()
    assert snapshot.revision == 13
    assert len(snapshot.tenants) == 14
    assert (await store.get("Tenant", "shop")).generation == 12
    assert [c.generation for c in await store.history("Tenant", "shop")] == list(range(12, 0, -1))


async def test_of_two_that_hold_the_same_etag_one_wins(store: Store) -> None:
    await store.apply(manifests(SHOP), actor="anna")
    writes = [store.apply([Manifest(record=dataclasses.replace(SHOP, description=d), etag="g1")], actor="anna") for d in "ab"]
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["Aborted", "list"]


async def test_keys_are_shown_once_stored_hashed_and_revoked(store: Store, dsn: str) -> None:
    key, secret = await store.create_key("default", ("rank",), actor="anna", expires_at=2e9, reason="for the app")
    assert re.fullmatch(r"plait_[A-Za-z0-9_-]{43}", secret)
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    snapshot = await store.snapshot()
    assert snapshot.keys == {key.sha256: key}
    assert await store.list_keys("default") == [key]
    connection = await asyncpg.connect(dsn)
    everything = str(await connection.fetch("select * from plait.api_key")) + str(await connection.fetch("select * from plait.change"))
    await connection.close()
    assert secret not in everything
    await store.revoke_key(key.id, actor="bob", reason="leaked")
    assert (await store.snapshot()).keys == {}
    assert (await store.snapshot()).revision == snapshot.revision + 1
    assert [(c.action, c.actor, c.reason) for c in await store.history("ApiKey", key.id)] == [
        ("deleted", "bob", "leaked"),
        ("created", "anna", "for the app"),
    ]
    with pytest.raises(NotFound):
        await store.revoke_key(key.id, actor="bob")


async def test_a_rotated_key_is_let_in_beside_its_successor_for_the_overlap(store: Store) -> None:
    old, old_secret = await store.create_key("default", ("rank",), actor="anna", note="home page")
    new, new_secret = await store.rotate_key(old.id, overlap_s=3600, actor="bob", reason="it is old")
    assert new_secret != old_secret
    assert (new.tenant, new.scopes, new.note, new.replaces, new.expires_at) == ("default", ("rank",), "home page", old.id, 0.0)
    keys = {key.id: key for key in (await store.snapshot()).keys.values()}
    assert keys[new.id] == new
    assert keys[old.id].expires_at == pytest.approx(new.created_at + 3600)
    assert [(c.action, c.generation, c.actor) for c in await store.history("ApiKey", old.id)] == [
        ("updated", 2, "bob"),
        ("created", 1, "anna"),
    ]
    with pytest.raises(FailedPrecondition, match=f"replaced by {new.id}"):
        await store.rotate_key(old.id, overlap_s=0, actor="bob")
    await store.revoke_key(old.id, actor="bob")
    assert [c.generation for c in await store.history("ApiKey", old.id)] == [3, 2, 1]
    newest, _ = await store.rotate_key(new.id, overlap_s=0, actor="bob")
    assert {key.id for key in await store.list_keys()} == {new.id, newest.id}
    await store.revoke_key(newest.id, actor="bob")
    await store.rotate_key(new.id, overlap_s=0, actor="bob")  # its successor is gone, so it may have another
    with pytest.raises(NotFound):
        await store.rotate_key("key-0", overlap_s=0, actor="bob")


async def test_a_successor_lives_as_long_as_the_key_was_made_to_and_the_overlap_adds_nothing(store: Store) -> None:
    old, _ = await store.create_key("default", ("rank",), actor="anna", expires_at=time.time() + 60)
    new, _ = await store.rotate_key(old.id, overlap_s=3600, actor="anna")
    assert new.expires_at - new.created_at == pytest.approx(old.expires_at - old.created_at)
    assert {key.expires_at for key in await store.list_keys() if key.id == old.id} == {old.expires_at}


async def test_keys_made_before_they_could_be_rotated_are_kept(dsn: str) -> None:
    async with await Store.open(dsn) as store:
        await store.migrate(migrator.shipped()[:3])
        connection = await asyncpg.connect(dsn)
        await connection.execute(
            "insert into plait.api_key (id, tenant, sha256, scopes) values ('key-1', 'default', $1, $2)", "ab" * 32, ["features"]
        )
        await connection.close()
        await store.migrate()
        (key,) = await store.list_keys()
        assert (key.id, key.scopes, key.replaces, key.note) == ("key-1", ("features",), "", "")
        new, _ = await store.rotate_key("key-1", overlap_s=60, actor="anna")
        assert new.replaces == "key-1"


async def test_keys_that_make_no_sense_are_refused(store: Store) -> None:
    with pytest.raises(InvalidArgument, match="found root"):
        await store.create_key("default", ("rank", "root"), actor="anna")
    with pytest.raises(InvalidArgument, match="found none"):
        await store.create_key("default", (), actor="anna")
    with pytest.raises(NotFound, match="no tenant 'nobody'"):
        await store.create_key("nobody", actor="anna")
    with pytest.raises(InvalidArgument, match="note"):
        await store.create_key("default", actor="anna", note="x" * 257)


async def test_a_change_needs_an_author_and_a_short_reason(store: Store) -> None:
    with pytest.raises(InvalidArgument, match="who makes this change"):
        await store.apply(manifests(SHOP), actor="")
    with pytest.raises(InvalidArgument, match="1024 are kept"):
        await store.apply(manifests(SHOP), actor="anna", reason="x" * 1025)
    with pytest.raises(InvalidArgument, match="found 0"):
        await store.apply([], actor="anna")


async def test_a_thousand_resources_in_one_go(store: Store) -> None:
    changes = await store.apply(manifests(*(Tenant(name=f"t{n}") for n in range(1000))), actor="anna")
    assert len(changes) == 1000
    with pytest.raises(InvalidArgument, match="found 1001"):
        await store.apply(manifests(*(Tenant(name=f"t{n}") for n in range(1001))), actor="anna")


@pytest.mark.parametrize(
    ("dsn", "error", "reason"),
    [
        ("", InvalidArgument, "REGISTRY_DSN"),
        ("mysql://root:hunter2@127.0.0.1/x", InvalidArgument, "REGISTRY_DSN"),
        ("postgresql://root:hunter2@127.0.0.1:notaport/x", InvalidArgument, "REGISTRY_DSN"),
        ("postgresql://root:hunter2@127.0.0.1:1/x", Unavailable, "REGISTRY_UNAVAILABLE"),
    ],
)
async def test_a_store_that_cannot_open_says_why_and_no_password(dsn: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error) as caught:
        await Store.open(dsn)
    assert caught.value.reason == reason  # type: ignore[attr-defined]
    assert "hunter2" not in str(caught.value)


async def test_a_missing_database_is_refused_by_name_of_the_fault(postgres_dsn: str) -> None:
    with pytest.raises(FailedPrecondition, match="check the DSN"):
        await Store.open(postgres_dsn.rsplit("/", 1)[0] + "/nosuchdatabase")
