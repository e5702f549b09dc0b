"""Erasures on a real Redis and a real PostgreSQL: what is gone stays gone, whatever is replayed, backfilled, restarted or lost."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.calls import ADMIN, call_of
from tests.fakes.event_world import messages
from tests.fakes.redis_cluster import RedisCluster
from tests.fakes.redis_places import Place
from tests.fakes.upkeep import NOBODY, nothing_was_erased

from feature_retrieval.aggregation.events import VALUES_INVALID
from feature_retrieval.dead_letters import DeadLetters
from feature_retrieval.epochs import EpochUpkeep
from feature_retrieval.erasing import FOR_EVER_US, Erasing
from feature_retrieval.erasure_guard import LOADED_KEY, ErasureGuard
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.row_codec import KeySpace, encode_id
from feature_retrieval.settings import RowStoreSettings
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.write_metrics import WriteMetrics
from plait.api.events.v1 import events_pb2
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, PlaitError, Unavailable
from plait.registry.certificates import Signer
from plait.registry.database import open_pool
from plait.registry.manifests import Manifest
from plait.registry.records import Entity, Feature, FeatureView
from plait.registry.store import Store
from plait.telemetry.metrics import Metrics

NOW_S = 1_700_000_000.0
NOW_US = int(NOW_S * 1e6)
AHEAD_US = 300_000_000
SIGNER = Signer(b"k" * 32)
VIEW = FeatureView(name="stats", entity=Entity(type="item"), features=(Feature(name="a"),))
OTHER = FeatureView(name="more", entity=Entity(type="item"), features=(Feature(name="a"),))
PEOPLE = FeatureView(name="profile", entity=Entity(type="user", key="int64"), features=(Feature(name="a"),))


class World:
    """One process with its stores, at a time that tests move."""

    def __init__(self, store: RedisStore, registry: Store) -> None:
        self.store = store
        self.registry = registry
        self.now_s = NOW_S
        self.restart()

    def restart(self) -> None:
        """A new process: it knows nothing of what was loaded."""
        self.guard = ErasureGuard(self.store, self.registry)
        self.metrics = Metrics()
        self.erasing = Erasing(
            self.store, self.registry, SIGNER, self.guard.catch_up, lambda: self.now_s, metrics=WriteMetrics(self.metrics)
        )

    async def write(self, view: str, entity: str | int, at_us: int = NOW_US, call: Any = ADMIN, **more: Any) -> list[str]:
        """Write one row; return why it was refused, if it was."""
        snapshot = await self.registry.snapshot()
        ingestion = Ingestion(self.store, lambda: snapshot, lambda: self.now_s, erasures_loaded=self.guard.loaded)
        batch = pb.FeatureBatch(feature_view=view, event_times_us=[at_us], **more)
        (batch.ids.string_ids if isinstance(entity, str) else batch.ids.int64_ids).append(entity)  # type: ignore[arg-type]
        batch.columns.add(features=["a"], dtype=11, data=np.float32(1).tobytes())  # type: ignore[arg-type]
        result = pb.WriteFeaturesResponse()
        await ingestion.write(batch, result, call)
        return [error.reason for error in result.errors]

    async def erase(self, *entities: str | int, entity_type: str = "item", call: Any = ADMIN, **more: Any) -> list[pb.ErasureCertificate]:
        request = pb.EraseEntityRequest(**more)
        request.entities.entity_type = entity_type
        for entity in entities:
            (request.entities.ids.string_ids if isinstance(entity, str) else request.entities.ids.int64_ids).append(entity)  # type: ignore[arg-type]
        response = pb.EraseEntityResponse()
        await self.erasing.erase(request, response, call)
        return list(response.certificates)

    async def there(self, view: str, entity: str | int, *, version: int = 1, epoch: int = 0, tenant: str = "default") -> bool:
        kind = "item" if isinstance(entity, str) else "user"
        [row] = (await self.store.read(KeySpace.of(tenant, kind, view, version, epoch).keys([entity]), 10)).rows
        return row is not None


@pytest_asyncio.fixture
async def world(redis_url: str, postgres_dsn: str) -> AsyncIterator[World]:
    store = RedisStore(redis_url, ack="applied")
    async with await Store.open(postgres_dsn) as registry:
        await registry.migrate()
        await registry.apply([Manifest(record=view) for view in (VIEW, OTHER, PEOPLE)], actor="test")
        yield World(store, registry)
    await store.close()


async def reason_of(work: Any, kind: type[PlaitError]) -> str:
    with pytest.raises(kind) as caught:
        await work
    return caught.value.reason


async def test_every_view_version_and_epoch_is_emptied_and_others_are_not(world: World) -> None:
    await world.registry.begin_epoch("default", "stats", actor="test")
    for entity in ("gone", "here"):
        for view in ("stats", "more"):
            await world.write(view, entity)
        await world.write("stats", entity, epoch=1, backfill=True)
    await world.registry.apply([Manifest(record=dataclasses.replace(VIEW, version=2))], actor="test")
    for entity in ("gone", "here"):
        await world.write("stats", entity)
    await world.write("stats", "gone", call=call_of("shop"))
    [certificate] = await world.erase("gone", reason="asked for it")
    places: list[dict[str, Any]] = [{"view": "stats"}, {"view": "stats", "epoch": 1}, {"view": "stats", "version": 2}, {"view": "more"}]
    assert [await world.there(entity="gone", **place) for place in places] == [False] * 4
    assert [await world.there(entity="here", **place) for place in places] == [True] * 4
    assert await world.there("stats", "gone", version=2, tenant="shop")  # of another tenant
    assert {view.feature_view: view.rows for view in certificate.views} == {"stats": 3, "more": 1}
    assert world.metrics.registry.get_sample_value("plait_features_erasures_total") == 1


async def test_what_happened_before_is_refused_and_what_happens_after_is_taken(world: World) -> None:
    await world.write("stats", "e")
    [certificate] = await world.erase("e")
    assert certificate.erased_until_us == NOW_US + AHEAD_US
    assert await world.write("stats", "e", NOW_US) == ["ENTITY_ERASED"]
    assert await world.write("stats", "e", NOW_US + AHEAD_US) == ["ENTITY_ERASED"]  # it may have been taken before the erasure
    world.now_s += 1000
    assert await world.write("stats", "e", NOW_US + AHEAD_US + 1) == []
    [certificate] = await world.erase("e", for_ever=True)
    assert certificate.erased_until_us == FOR_EVER_US
    world.now_s += 1e6
    assert await world.write("stats", "e", int(world.now_s * 1e6)) == ["ENTITY_ERASED"]


async def test_a_backfill_and_a_new_version_do_not_bring_it_back(world: World) -> None:
    await world.write("stats", "e")
    await world.erase("e")
    await world.registry.begin_epoch("default", "stats", actor="test")
    assert await world.write("stats", "e", NOW_US, epoch=1, backfill=True) == ["ENTITY_ERASED"]
    await world.registry.flip_epoch("default", "stats", actor="test")
    await world.registry.apply([Manifest(record=dataclasses.replace(VIEW, version=2))], actor="test")
    assert await world.write("stats", "e", NOW_US) == ["ENTITY_ERASED"]


async def test_a_lost_redis_is_told_before_it_takes_a_write(world: World, redis_url: str) -> None:
    await world.write("stats", "e")
    await world.erase("e", *(f"other-{n}" for n in range(300)))
    world.restart()
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    assert await world.write("stats", "e", NOW_US) == ["ENTITY_ERASED"]
    assert await world.write("stats", "fresh", NOW_US) == []
    with redis.Redis.from_url(redis_url) as client:
        assert client.get(LOADED_KEY) == b"301"
        client.flushdb()  # under a process that had it loaded
    assert await world.write("stats", "other-299", NOW_US) == ["ENTITY_ERASED"]
    with redis.Redis.from_url(redis_url) as client:  # an old replica took over
        client.set(LOADED_KEY, 5)
        client.delete(*KeySpace.of("default", "item", "", 0).mark_keys(["other-299"]))
    assert await world.write("stats", "other-299", NOW_US) == ["ENTITY_ERASED"]


async def test_while_postgres_is_away_a_lost_redis_takes_no_writes(world: World, redis_url: str) -> None:
    await world.write("stats", "e")
    working = world.registry
    async with await Store.open(NOBODY, lazy=True) as away:
        world.guard = ErasureGuard(world.store, away)
        assert (await world.store.read(KeySpace.of("default", "item", "stats", 1).keys(["e"]), 10)).rows != [None]
        assert await world.write("stats", "e", NOW_US + 1) == []  # Redis knows every erasure: nothing has to be asked
        with redis.Redis.from_url(redis_url) as client:
            client.flushdb()
        assert await reason_of(world.write("stats", "e", NOW_US), Unavailable) == "ERASURES_NOT_LOADED"
    world.guard = ErasureGuard(world.store, working)
    assert await world.write("stats", "e", NOW_US) == []


async def test_many_writers_load_a_lost_redis_once(world: World, redis_url: str) -> None:
    await world.erase("e")
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    asked = 0
    erasures_after = world.registry.erasures_after

    async def counted(number: int, limit: int = 1000) -> Any:
        nonlocal asked
        asked += 1
        return await erasures_after(number, limit)

    world.registry.erasures_after = counted  # type: ignore[method-assign]  # the real one, counted
    world.restart()
    leaver = asyncio.create_task(world.guard.loaded())
    stayers = [asyncio.create_task(world.guard.loaded()) for _ in range(20)]
    await asyncio.sleep(0)
    leaver.cancel()  # who leaves does not end it for the others
    await asyncio.gather(*stayers)
    assert asked == 2  # a page, and that there is no more
    assert repr(world.guard) == "<ErasureGuard loaded=1 loading=True>"


async def test_what_died_half_done_is_completed_by_another_process(world: World) -> None:
    """Killed right after Postgres had it: no mark, and the rows are still there."""
    await world.write("stats", "e")
    await world.write("stats", "newer", NOW_US + 5)
    until = [NOW_US, NOW_US]
    await world.registry.remember_erasures("default", "item", [encode_id("e")], until[0], actor="test", reason="")
    await world.registry.remember_erasures("default", "item", [encode_id("newer")], until[1], actor="test", reason="")
    other = ErasureGuard(world.store, world.registry, poll_s=3600)
    running = asyncio.create_task(other.run())
    async with asyncio.timeout(10):
        while await world.there("stats", "e"):
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert await world.write("stats", "e", NOW_US) == ["ENTITY_ERASED"]
    assert await world.there("stats", "newer")  # what happened after the erasure stays


async def test_the_durable_copy_is_emptied_up_to_the_erasure(world: World, postgres_dsn: str) -> None:
    def position(at_us: int) -> bytes:
        return (at_us + (1 << 63)).to_bytes(8, "big") + bytes(8) + b"\1"

    pool = await open_pool(postgres_dsn, name="test")
    rows = [("e", NOW_US), ("later", NOW_US + AHEAD_US + 1), ("other", NOW_US)]
    async with pool.connection() as connection:
        for entity, at_us in rows:
            await connection.execute(
                "insert into plait.feature_row values ('default', 'item', $1, 'stats', 1, 0, $2, '')", encode_id(entity), position(at_us)
            )
    certificates = await world.erase("e", "later")
    assert [{v.feature_view: v.durable_rows for v in c.views}["stats"] for c in certificates] == [1, 0]
    async with pool.connection() as connection:
        left = await connection.fetch("select entity from plait.feature_row order by entity")
    await pool.close()
    assert [row["entity"] for row in left] == sorted([encode_id("later"), encode_id("other")])


async def test_certificates_verify_and_say_what_they_do_not_cover(world: World) -> None:
    certificates = await world.erase("a", "b")
    assert all(SIGNER.verify(c) for c in certificates)
    assert [c.id for c in certificates] == ["erasure-1", "erasure-2"]
    assert len({c.entity_hash for c in certificates}) == 2
    assert any("dead letters" in words for words in certificates[0].not_covered)
    assert certificates[0].key_id == SIGNER.key_id


async def test_the_dead_letters_about_it_are_removed_and_no_others(world: World) -> None:
    letters = DeadLetters(world.store.streams)

    async def add(payload: bytes | events_pb2.Event, tenant: str = "default") -> None:
        [message] = messages([payload], tenant)
        await letters.add(message, VALUES_INVALID)

    def about(**parties: types_pb2.EntityIds) -> events_pb2.Event:
        return events_pb2.Event(
            event_id="e",
            **{name: types_pb2.EntityRows(entity_type="item" if name == "object" else "user", ids=ids) for name, ids in parties.items()},
        )  # type: ignore[arg-type]

    ann, seven = types_pb2.EntityIds(string_ids=["ann"]), types_pb2.EntityIds(int64_ids=[7])
    gone = [
        about(object=ann),
        about(object=ann, subject=seven),
        about(object=types_pb2.EntityIds(string_ids=["x", "ann"])),  # two ids where one belongs: that is what it died of
    ]
    kept: list[bytes | events_pb2.Event] = [
        about(subject=ann),  # a user of that name
        about(object=types_pb2.EntityIds(string_ids=["annette"])),
        about(subject=seven),
        b"\xffann",
        b"",
    ]
    for n in range(1100):  # some pages
        if n % 300 == 0:
            for payload in gone:
                await add(payload)
        await add(kept[n % len(kept)])
    await add(gone[0], "rival")
    [ann_s, bob_s] = await world.erase("ann", "bob")
    assert (ann_s.dead_letters, bob_s.dead_letters) == (4 * len(gone), 0)
    assert SIGNER.verify(ann_s)
    assert await letters.count("default") == 1100
    assert await letters.count("rival") == 1
    page = await letters.page("default", size=1000, token="", reason="")
    assert {e.fields[b"e"] for e in page.entries} == {one if isinstance(one, bytes) else one.SerializeToString() for one in kept}
    assert (await world.erase("ann"))[0].dead_letters == 0
    [user] = await world.erase(7, entity_type="user")
    assert user.dead_letters == 220
    await add(about(subject=types_pb2.EntityIds(string_ids=["7"])))  # of the wrong kind, and about the same user
    assert (await world.erase(7, entity_type="user"))[0].dead_letters == 1


async def test_ids_of_every_kind_are_erased_as_what_they_are(world: World) -> None:
    await world.write("profile", 7)
    await world.erase(7, entity_type="user")
    assert not await world.there("profile", 7)
    assert await world.write("profile", 7) == ["ENTITY_ERASED"]


async def test_ids_of_a_kind_that_cannot_be_there_are_refused(world: World) -> None:
    snapshot = await world.registry.snapshot()
    world.erasing = Erasing(world.store, world.registry, SIGNER, world.guard.catch_up, snapshot=lambda: snapshot)
    await world.write("profile", 7)
    with pytest.raises(InvalidArgument) as caught:
        await world.erase("7", entity_type="user")
    assert [(v.field, "set int64_ids" in v.description) for v in caught.value.violations] == [("entities.ids", True)]
    assert await world.there("profile", 7)
    await world.erase(7, entity_type="user")
    assert not await world.there("profile", 7)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ({}, "at least one id"),
        ({"string_ids": ["a"], "int64_ids": [1]}, "one kind"),
        ({"string_ids": ["a", ""]}, "empty"),
        ({"string_ids": ["a", "a"]}, "given twice"),
        ({"string_ids": [f"{n}" for n in range(1001)]}, "at most 1000"),
    ],
)
async def test_what_cannot_be_erased_is_refused_whole(world: World, ids: Any, words: str) -> None:
    request = pb.EraseEntityRequest(entities={"entity_type": "item", "ids": ids})
    with pytest.raises(InvalidArgument) as caught:
        await world.erasing.erase(request, pb.EraseEntityResponse(), ADMIN)
    assert words in caught.value.violations[0].description
    assert await world.registry.newest_erasure() == 0


async def test_who_may_not_and_what_is_not_there(world: World) -> None:
    assert await reason_of(world.erase("e", call=call_of()), PermissionDenied) == "SCOPE_MISSING"
    assert await reason_of(world.erase("e", entity_type="nothing"), NotFound) == "ENTITY_TYPE_NOT_FOUND"
    world.erasing = Erasing(world.store, world.registry, None, nothing_was_erased)
    assert await reason_of(world.erase("e"), FailedPrecondition) == "PRIVACY_KEY_MISSING"


async def test_no_id_is_in_a_log(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    await world.write("stats", "marked-needle-marked")
    await world.erase("marked-needle-marked", reason="asked")
    await world.write("stats", "marked-needle-marked")
    captured = capsys.readouterr()
    assert "entity erased" in captured.out + captured.err
    assert "needle" not in captured.out + captured.err


async def test_of_a_cluster_one_node_that_was_lost_is_told_again(postgres_dsn: str) -> None:
    ids = [f"e{n}" for n in range(30)]
    async with RedisCluster() as cluster, await Store.open(postgres_dsn) as registry:
        await registry.migrate()
        await registry.apply([Manifest(record=VIEW)], actor="test")
        store = Place(RowStoreSettings.model_validate({"mode": "cluster", "url": cluster.url}), cluster.flush).open(ack="applied")
        world = World(store, registry)
        for entity in ids:
            assert await world.write("stats", entity) == []
        certificates = await world.erase(*ids)
        assert all(next(v.rows for v in c.views if v.feature_view == "stats") == 1 for c in certificates)
        with cluster.client(1) as client:
            client.flushall()
        assert [await world.write("stats", entity) for entity in ids] == [["ENTITY_ERASED"]] * 30
        await store.close()


OPERATIONS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(["stats", "more"]), st.integers(-3, 3)),
    st.tuples(st.just("backfill"), st.just("stats"), st.integers(-3, 3)),
    st.tuples(st.sampled_from(["erase", "restart", "lose redis", "begin", "flip", "carry over", "pass"]), st.just("stats"), st.just(0)),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(OPERATIONS, min_size=3, max_size=14))
def test_nothing_from_before_an_erasure_is_ever_there_after_it(
    postgres_server: Any, redis_url: str, operations: list[tuple[str, str, int]]
) -> None:
    dsn = postgres_server.create_database("test_erasing_property")
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
        try:
            asyncio.run(_play(dsn, redis_url, operations, client.flushdb))
        finally:
            postgres_server.drop_database("test_erasing_property")


async def _play(dsn: str, redis_url: str, operations: list[tuple[str, str, int]], lose: Callable[[], Any]) -> None:
    store = RedisStore(redis_url, ack="applied")
    async with await Store.open(dsn) as registry:
        await registry.migrate()
        await registry.apply([Manifest(record=view) for view in (VIEW, OTHER)], actor="test")
        world, erased_until = World(store, registry), -1
        for operation, view, offset in operations:
            at_us = int(world.now_s * 1e6) + offset * 100_000_000
            epochs = await registry.epochs("default", "stats")
            match operation:
                case "write":
                    await world.write(view, "e", at_us)
                case "backfill" if epochs.building is not None:
                    await world.write(view, "e", at_us, epoch=epochs.building, backfill=True)
                case "erase":
                    [certificate] = await world.erase("e")
                    erased_until = certificate.erased_until_us
                case "restart":
                    world.restart()
                case "lose redis":
                    lose()
                case "begin" if epochs.building is None:
                    await registry.begin_epoch("default", "stats", actor="test")
                case "flip" if epochs.building is not None:
                    await registry.flip_epoch("default", "stats", actor="test")
                case "carry over" if epochs.building is not None:
                    snapshot = await registry.snapshot()
                    upkeep = EpochUpkeep(store, lambda snapshot=snapshot: snapshot, world.guard.loaded, lambda: world.now_s)  # type: ignore[misc]
                    request = pb.CarryOverEpochRequest(feature_view="stats", from_epoch=epochs.serving, to_epoch=epochs.building)
                    [answer async for answer in upkeep.carry_over(request, ADMIN)]
                case "pass":
                    world.now_s += 200
            for name in ("stats", "more"):
                keys = [KeySpace.of("default", "item", name, 1, epoch).keys(["e"])[0] for epoch in range(epochs.newest + 2)]
                for row in (await store.read(keys, 10)).rows:
                    assert row is None or int.from_bytes(row[8:16], "little") > erased_until
    await store.close()
