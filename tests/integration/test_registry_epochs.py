"""Epochs and erasures in a real PostgreSQL: one moves at a time, everyone hears of it, nothing of a person reaches the audit log."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.fakes.registry_world import ITEMS, WORLD

from plait.errors import FailedPrecondition, NotFound
from plait.registry.manifests import Manifest
from plait.registry.records import Epochs, FeatureView, Tenant
from plait.registry.store import Store
from plait.registry.watcher import Watcher

VIEW = ITEMS.name


@pytest_asyncio.fixture
async def store(postgres_dsn: str) -> AsyncIterator[Store]:
    async with await Store.open(postgres_dsn) as opened:
        await opened.migrate()
        alone = [
            record for record in WORLD if isinstance(record, FeatureView | Tenant)
        ]  # nobody reads the views: a new version is nobody's loss
        await opened.apply([Manifest(record=record) for record in alone], actor="me")
        yield opened


async def test_a_flip_reaches_the_snapshot_and_the_audit_log(store: Store) -> None:
    before = await store.snapshot()
    assert before.epochs == {}
    assert await store.epochs("shop", VIEW) == Epochs()
    await store.begin_epoch("shop", VIEW, actor="anna", reason="new history")
    flipped = await store.flip_epoch("shop", VIEW, actor="anna")
    after = await store.snapshot()
    assert flipped == Epochs(serving=1, previous=0, newest=1) == after.epochs_of("shop", VIEW, ITEMS.version)
    assert after.epochs_of("default", VIEW, ITEMS.version) == Epochs()
    assert after.revision == before.revision + 2
    log = await store.history("FeatureEpoch")
    assert [(c.name, c.action, c.generation, c.actor) for c in log] == [
        (f"shop/{VIEW}@{ITEMS.version}", "updated", 2, "anna"),
        (f"shop/{VIEW}@{ITEMS.version}", "created", 1, "anna"),
    ]
    assert log[0].after == {"serving": 1, "building": None, "previous": 0, "newest": 1, "built": False}


async def test_of_many_who_begin_at_once_one_wins(store: Store) -> None:
    done = await asyncio.gather(*(store.begin_epoch("shop", VIEW, actor="me") for _ in range(5)), return_exceptions=True)
    assert [d for d in done if not isinstance(d, FailedPrecondition)] == [Epochs(building=1, newest=1)]
    assert {d.reason for d in done if isinstance(d, FailedPrecondition)} == {"EPOCH_BUSY"}


async def test_a_new_version_of_a_view_has_epochs_of_its_own(store: Store) -> None:
    await store.begin_epoch("shop", VIEW, actor="me")
    await store.apply([Manifest(record=dataclasses.replace(ITEMS, version=ITEMS.version + 1))], actor="me")
    assert await store.epochs("shop", VIEW) == Epochs()


@pytest.mark.parametrize(
    ("tenant", "view", "version", "reason"),
    [
        ("nobody", VIEW, 0, "RESOURCE_NOT_FOUND"),
        ("shop", "no-view", 0, "RESOURCE_NOT_FOUND"),
        ("shop", VIEW, 99, "VIEW_VERSION_NOT_FOUND"),
    ],
)
async def test_epochs_of_nothing_are_refused(store: Store, tenant: str, view: str, version: int, reason: str) -> None:
    with pytest.raises(NotFound) as caught:
        await store.begin_epoch(tenant, view, version=version, actor="me")
    assert caught.value.reason == reason


async def test_a_watcher_hears_of_a_flip_and_keeps_it_on_disk(store: Store, postgres_dsn: str, tmp_path: object) -> None:
    async with Watcher(postgres_dsn) as watcher:
        await watcher.first(10)
        flipped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def look(snapshot: object) -> None:
            if watcher.snapshot.epochs_of("shop", VIEW, ITEMS.version).serving == 1 and not flipped.done():
                flipped.set_result(None)

        watcher.subscribe(look)
        await store.begin_epoch("shop", VIEW, actor="me")
        await store.flip_epoch("shop", VIEW, actor="me")
        async with asyncio.timeout(10):
            await flipped


async def test_erasures_are_remembered_in_order_and_not_in_the_audit_log(store: Store) -> None:
    entities = [b"s\0\x03ann", b"s\0\x03bob", b"i" + bytes(8)]
    numbers = await store.remember_erasures("shop", "user", entities, 17, actor="anna", reason="asked for it")
    assert numbers == sorted(numbers)
    assert await store.newest_erasure() == numbers[-1]
    found = await store.erasures_after(0)
    assert [(e.id, e.tenant, e.entity_type, e.entity, e.until_us) for e in found] == [
        (number, "shop", "user", entity, 17) for number, entity in zip(numbers, entities, strict=True)
    ]
    assert await store.erasures_after(numbers[0], 1) == found[1:2]
    assert all("ann" not in str(c.after) + c.name for c in await store.history())


async def test_views_that_held_rows_are_known_after_they_are_gone(store: Store) -> None:
    newer = dataclasses.replace(ITEMS, version=ITEMS.version + 1)
    await store.begin_epoch("shop", VIEW, actor="me")
    await store.apply([Manifest(record=newer)], actor="me")
    held = await store.views_that_held("shop", ITEMS.entity.type)
    assert (VIEW, ITEMS.version, 1) in held
    assert (VIEW, newer.version, 0) in held
    assert (VIEW, ITEMS.version, 0) in await store.views_that_held("default", ITEMS.entity.type)
