"""A Redis that was emptied is as it was, whatever was written, deleted and erased before, and however often the rebuild is cut off."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.fakes.calls import ADMIN, call_of
from tests.fakes.feature_world import make_batch

from feature_retrieval.durable_copy import DurableCopy
from feature_retrieval.erasing import Erasing
from feature_retrieval.erasure_guard import ErasureGuard
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.rebuilding import Rebuilding
from feature_retrieval.row_codec import KeySpace, encode_id
from feature_retrieval.store.postgres import DurableRows
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from plait.redis.dispatch import Receipt
from plait.registry.certificates import Signer
from plait.registry.database import Pool, open_pool
from plait.registry.manifests import Manifest
from plait.registry.records import Entity, Epochs, Feature, FeatureView, Snapshot
from plait.registry.store import Store

NOW_S = 1_700_000_000.0
STATS = FeatureView(name="stats", entity=Entity(type="item"), features=(Feature(name="a"),), durable="before", retention_s=1000)
TEXT = FeatureView(name="text", entity=Entity(type="item"), features=(Feature(name="a"),), durable="before")
LOOSE = FeatureView(name="loose", entity=Entity(type="item"), features=(Feature(name="a"),))
VIEWS = {view.name: view for view in (STATS, TEXT, LOOSE)}
IDS = [f"i{n}" for n in range(4)]


@dataclass
class Clock:
    now_s: float = NOW_S

    def __call__(self) -> float:
        return self.now_s


@dataclass
class World:
    """A service's parts around one Redis and one Postgres."""

    store: RedisStore
    registry: Store
    rows: DurableRows
    snapshot: Snapshot
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.guard = ErasureGuard(self.store, self.registry)
        copy = DurableCopy(self.rows, lambda: self.snapshot)
        self.ingestion = Ingestion(self.store, lambda: self.snapshot, self.clock, erasures_loaded=self.guard.loaded, keep=copy.keep)
        self.erasing = Erasing(self.store, self.registry, Signer(b"k" * 32), self.guard.catch_up, self.clock)
        self.rebuilding = Rebuilding(self.store, self.rows, lambda: self.snapshot, self.guard.loaded, self.clock)

    async def write(self, view: str, one: str, at_s: float, *, deleted: bool = False, tenant: str = "default") -> Any:
        result = pb.WriteFeaturesResponse()
        batch = make_batch(view, [one], {"a": [at_s]}, at_s=at_s)
        if deleted:
            batch.deleted.append(True)
        await self.ingestion.write(batch, result, call_of(tenant))
        return result

    async def erase(self, one: str) -> None:
        request = pb.EraseEntityRequest(reason="asked")
        request.entities.entity_type = "item"
        request.entities.ids.string_ids.append(one)
        await self.erasing.erase(request, pb.EraseEntityResponse(), ADMIN)

    async def rebuild(self, **options: Any) -> list[Any]:
        return [answer async for answer in self.rebuilding.rebuild(pb.RebuildFeaturesRequest(**options), ADMIN)]

    async def held(self, epoch: int = 0, tenant: str = "default") -> dict[str, list[bytes | None]]:
        found = {}
        for view in VIEWS:
            found[view] = (await self.store.read(KeySpace.of(tenant, "item", view, 1, epoch).keys(IDS), 10)).rows
        return found


@pytest_asyncio.fixture
async def registry(postgres_dsn: str) -> AsyncIterator[Store]:
    async with await Store.open(postgres_dsn) as opened:
        await opened.migrate()
        await opened.apply([Manifest(record=view) for view in VIEWS.values()], actor="me")
        yield opened


@pytest_asyncio.fixture
async def pool(registry: Store, postgres_dsn: str) -> AsyncIterator[Pool]:
    opened = await open_pool(postgres_dsn, name="test")
    yield opened
    await opened.close()


@asynccontextmanager
async def world(redis_url: str, registry: Store, pool: Pool, epochs: Epochs | None = None) -> AsyncIterator[World]:
    snapshot = Snapshot(feature_views=VIEWS, epochs={("default", "stats", 1): epochs} if epochs else {})
    store = RedisStore(redis_url)
    try:
        yield World(store, registry, DurableRows(pool), snapshot)
    finally:
        await store.close()


def flush(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushall()


_WRITES = st.tuples(st.sampled_from(["write", "delete"]), st.sampled_from(["stats", "text"]), st.sampled_from(IDS), st.integers(-600, 250))
_ERASURES = st.tuples(st.just("erase"), st.just(""), st.sampled_from(IDS), st.just(0))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.one_of(_WRITES, _WRITES, _WRITES, _ERASURES), min_size=1, max_size=12), later=st.integers(0, 900))
@example(steps=[("write", "stats", "i0", -600), ("write", "stats", "i1", 0)], later=900)
async def test_what_was_there_is_there_again(redis_url: str, registry: Store, pool: Pool, steps: list[Any], later: int) -> None:
    flush(redis_url)
    async with pool.connection() as connection:
        await connection.execute("truncate plait.feature_row, plait.erasure")
    async with world(redis_url, registry, pool) as w:
        for what, view, one, at in steps:
            if what == "erase":
                await w.erase(one)
            else:
                await w.write(view, one, NOW_S + at, deleted=what == "delete")
        before = await w.held()
        flush(redis_url)
        w.clock.now_s += later
        assert set((await w.held())["stats"]) == {None}
        answers = await w.rebuild()
        expected = dict(before)  # what is past its retention by now need not come back
        expected["stats"] = [
            row if row and int.from_bytes(row[8:16], "little") >= (w.clock() - 1000) * 1e6 else None for row in before["stats"]
        ]
        assert await w.held() == expected
        assert answers[-1].applied == sum(row is not None for rows in expected.values() for row in rows)
        assert answers[-1].read == answers[-1].total == sum(row is not None for rows in before.values() for row in rows)
        assert answers[-1].erasures == sum(what == "erase" for what, *_ in steps)
        assert (await w.rebuild())[-1].applied == 0
        for one in {one for what, _, one, _ in steps if what == "erase"}:  # and nothing older is taken
            assert (await w.write("text", one, NOW_S)).errors[0].reason == "ENTITY_ERASED"


async def test_newer_rows_that_were_written_meanwhile_stay(redis_url: str, registry: Store, pool: Pool) -> None:
    async with world(redis_url, registry, pool) as w:
        for one in IDS:
            await w.write("text", one, NOW_S - 10)
        flush(redis_url)
        await w.write("text", IDS[0], NOW_S)
        [newer, *_] = (await w.held())["text"]
        assert (await w.rebuild(feature_view="text"))[-1].applied == len(IDS) - 1
        found = (await w.held())["text"]
        assert found[0] == newer
        assert None not in found


async def test_an_erasure_that_died_half_way_is_completed_first(redis_url: str, registry: Store, pool: Pool) -> None:
    async with world(redis_url, registry, pool) as w:
        await w.write("text", IDS[0], NOW_S)
        flush(redis_url)
        # Remembered, and no more: the process died before it removed the row from the copy.
        await registry.remember_erasures("default", "item", [encode_id(IDS[0])], int(NOW_S * 1e6), actor="me", reason="asked")
        assert (await w.rebuild())[-1].erasures == 1
        assert (await w.held())["text"] == [None] * len(IDS)


async def test_all_that_was_written_is_safe_at_the_end(
    redis_url: str, registry: Store, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_retrieval.rebuilding._PAGE_ROWS", 2)
    async with world(redis_url, registry, pool) as w:
        for one in IDS:
            await w.write("text", one, NOW_S)
        written: list[Receipt] = []
        settled: list[Receipt] = []
        write, settle = w.store.write, w.store.settle

        async def watched_write(keys: Any, marks: Any, rows: Any, ttl_ms: int, receipt: Receipt) -> bytes:
            written.append(receipt)
            return await write(keys, marks, rows, ttl_ms, receipt)

        async def watched_settle(receipt: Receipt) -> int:
            settled.append(receipt)
            return await settle(receipt)

        monkeypatch.setattr(w.store, "write", watched_write)
        monkeypatch.setattr(w.store, "settle", watched_settle)
        await w.rebuild()
        assert len(written) == 2  # whole pages only: none of them is the last by its size
        assert {id(receipt) for receipt in written} <= {id(receipt) for receipt in settled}


async def test_it_goes_on_where_it_was_cut_off(redis_url: str, registry: Store, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_retrieval.rebuilding._PAGE_ROWS", 2)
    monkeypatch.setattr("feature_retrieval.rebuilding._PAGES_SETTLED_AT_ONCE", 2)
    async with world(redis_url, registry, pool) as w:
        for view in ("stats", "text"):
            for one in IDS:
                await w.write(view, one, NOW_S)
        before = await w.held()
        whole = len(await w.rebuild())
        cursors: set[bytes] = set()
        for cut in range(1, whole):
            flush(redis_url)
            cursor, read = b"", 0
            answers = w.rebuilding.rebuild(pb.RebuildFeaturesRequest(), ADMIN)
            for _ in range(cut):
                answer = await anext(answers)
                cursor, read = answer.cursor, answer.read
            await answers.aclose()  # type: ignore[attr-defined]
            rest = await w.rebuild(cursor=cursor)
            assert await w.held() == before
            assert rest[-1].read >= 8 - read
            cursors.add(cursor)
        assert len(cursors) > 1  # not every cut was before the first rows were safe


async def test_only_the_tenant_s_rows_in_epochs_that_are_in_use_come_back(redis_url: str, registry: Store, pool: Pool) -> None:
    async with world(redis_url, registry, pool, Epochs(serving=1, previous=0, newest=1)) as w:
        await w.write("stats", IDS[0], NOW_S)
        await w.write("text", IDS[0], NOW_S, tenant="other")
        await w.write("loose", IDS[0], NOW_S)
        flush(redis_url)
        w.snapshot = Snapshot(feature_views=VIEWS, epochs={("default", "stats", 1): Epochs(serving=1, newest=1)})
        last = (await w.rebuild())[-1]
        assert (last.read, last.applied) == (2, 1)
        assert (await w.held(epoch=1))["stats"][0]
        assert {row for rows in (await w.held()).values() for row in rows} == {None}
        assert {row for rows in (await w.held(tenant="other")).values() for row in rows} == {None}


async def test_who_may_not_and_what_cannot(redis_url: str, registry: Store, pool: Pool) -> None:
    async with world(redis_url, registry, pool) as w:
        for options, error, reason in (
            ({"feature_view": "loose"}, FailedPrecondition, "DURABLE_COPY_OFF"),
            ({"feature_view": "none"}, NotFound, "FEATURE_VIEW_NOT_FOUND"),
            ({"cursor": b"nonsense"}, InvalidArgument, "CURSOR_INVALID"),
            ({"cursor": KeySpace.of("other", "item", "text", 1).keys(["x"])[0]}, InvalidArgument, "CURSOR_INVALID"),
        ):
            with pytest.raises(error) as caught:
                await w.rebuild(**options)
            assert caught.value.reason == reason
        with pytest.raises(PermissionDenied):
            [answer async for answer in w.rebuilding.rebuild(pb.RebuildFeaturesRequest(), call_of())]
        w.snapshot = Snapshot(feature_views={"loose": LOOSE})
        with pytest.raises(FailedPrecondition, match="no feature view has a durable copy"):
            await w.rebuild()
