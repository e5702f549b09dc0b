"""Rows on their way to Postgres: what is promised of them before they are there, and what an outage does."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from tests.fakes.calls import call_of
from tests.fakes.feature_world import make_batch
from tests.fakes.tcp_proxy import TcpProxy

from feature_retrieval.durable_copy import DurableCopy
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.row_codec import KeySpace
from feature_retrieval.store.postgres import DurableRows
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import Unavailable
from plait.registry.database import open_pool
from plait.registry.records import Entity, Feature, FeatureView, Snapshot
from plait.registry.store import Store

NOW_S = 1_700_000_000.0
SPACE = KeySpace.of("default", "item", "stats", 1)


def view(durable: Any) -> FeatureView:
    return FeatureView(name="stats", entity=Entity(type="item"), features=(Feature(name="a"),), retention_s=3600, durable=durable)


def row(event_time_us: int) -> bytes:
    return struct.pack("<HHIqqQ", 1, 1, 0, event_time_us, 0, 0)


class Clock:
    now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


@pytest_asyncio.fixture
async def door(postgres_dsn: str) -> AsyncIterator[TcpProxy]:
    """The way to a database that has the tables; it can be cut."""
    async with await Store.open(postgres_dsn) as registry:
        await registry.migrate()
    host, port = postgres_dsn.rpartition("@")[2].partition("/")[0].split(":")
    async with TcpProxy((host, int(port))) as proxy:
        yield proxy


@asynccontextmanager
async def opened(dsn: str, door: TcpProxy, clock: Callable[[], float], **options: Any) -> AsyncIterator[tuple[DurableCopy, DurableRows]]:
    address = dsn.rpartition("@")[2].partition("/")[0]
    pool = await open_pool(dsn.replace(address, f"127.0.0.1:{door.port}"), name="test", min_connections=0)
    rows = DurableRows(pool)
    copy = DurableCopy(rows, lambda: Snapshot(feature_views={"stats": view("behind")}), clock=clock, **options)
    running = asyncio.create_task(copy.run())
    try:
        yield copy, rows
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await pool.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_behind_its_lag_tells_how_much_is_at_stake_and_all_of_it_arrives(postgres_dsn: str, door: TcpProxy) -> None:
    clock = Clock()
    async with opened(postgres_dsn, door, clock, batch_rows=7) as (copy, rows):
        keys = SPACE.keys([f"i{n}" for n in range(50)])
        target = door.target
        await door.cut()
        assert await copy.keep(view("behind"), keys, [row(5)] * 50) is False
        clock.now_s += 9
        assert await copy.keep(view("behind"), keys[:10] * 3, [row(4)] * 10 + [row(6)] * 10 + [row(3)] * 10) is False
        assert copy.queued >= 50
        assert copy.lag_s == 9
        assert repr(copy) == f"<DurableCopy waiting={copy.queued} lag_s=9.0>"
        door.target = target
        await until(lambda: copy.queued == 0)
        assert copy.lag_s == 0
        assert await rows.read(keys) == [row(6)] * 10 + [row(5)] * 40


async def test_a_queue_that_is_full_for_a_moment_holds_back_and_refuses_nobody(postgres_dsn: str, door: TcpProxy) -> None:
    async with opened(postgres_dsn, door, Clock(), queue_rows=20, batch_rows=5) as (copy, rows):
        most = 0

        async def keep(name: str) -> None:
            nonlocal most
            await copy.keep(view("behind"), SPACE.keys([f"{name}{n}" for n in range(15)]), [row(5)] * 15)
            most = max(most, copy.queued)

        await asyncio.gather(*(keep(f"writer{n}-") for n in range(12)))
        assert most <= 20
        await copy.keep(view("behind"), SPACE.keys([f"many{n}" for n in range(100)]), [row(5)] * 100)  # more than ever fit
        await until(lambda: copy.queued == 0)
        wanted = [f"writer{n}-{at}" for n in range(12) for at in range(15)] + [f"many{n}" for n in range(100)]
        assert await rows.read(SPACE.keys(wanted)) == [row(5)] * 280


async def test_a_full_queue_refuses_instead_of_losing(postgres_dsn: str, door: TcpProxy) -> None:
    async with opened(postgres_dsn, door, Clock(), queue_rows=60, patience_s=0.05) as (copy, rows):
        target = door.target
        await door.cut()
        keys = SPACE.keys([f"i{n}" for n in range(50)])
        await copy.keep(view("behind"), keys, [row(5)] * 50)
        with pytest.raises(Unavailable) as caught:
            await copy.keep(view("behind"), SPACE.keys([f"j{n}" for n in range(11)]), [row(5)] * 11)
        assert caught.value.reason == "DURABLE_COPY_BEHIND"
        with pytest.raises(Unavailable):
            await copy.keep(view("before"), keys[:1], [row(5)])
        assert await copy.keep(view("off"), keys, [row(5)] * 50) is False
        door.target = target
        await until(lambda: copy.queued == 0)
        assert await copy.keep(view("before"), [keys[0]] * 3, [row(8), row(9), row(7)]) is True
        assert await rows.read(keys) == [row(9)] + [row(5)] * 49


async def test_the_end_waits_for_what_is_on_its_way(postgres_dsn: str, door: TcpProxy) -> None:
    async with opened(postgres_dsn, door, Clock(), batch_rows=3) as (copy, rows):
        keys = SPACE.keys([f"i{n}" for n in range(20)])
        await copy.keep(view("behind"), keys, [row(5)] * 20)
        await copy.close()
        assert copy.queued == 0
        assert await rows.read(keys) == [row(5)] * 20


async def test_what_is_past_its_retention_is_pruned(postgres_dsn: str, door: TcpProxy) -> None:
    clock = Clock()
    async with opened(postgres_dsn, door, clock) as (copy, rows):
        keys = SPACE.keys(["old", "new"])
        await rows.keep({keys[0]: row(int((NOW_S - 3601) * 1e6)), keys[1]: row(int((NOW_S - 3599) * 1e6))})
        await copy.prune()
        assert [found is None for found in await rows.read(keys)] == [True, False]


async def test_a_write_is_acknowledged_as_committed_only_where_it_is(postgres_dsn: str, door: TcpProxy, redis_url: str) -> None:
    store = RedisStore(redis_url)
    async with opened(postgres_dsn, door, Clock()) as (copy, rows):

        async def write(durable: Any, at_s: float) -> Any:
            snapshot = Snapshot(feature_views={"stats": view(durable)})
            ingestion = Ingestion(store, lambda: snapshot, clock=lambda: NOW_S, keep=copy.keep)
            result = pb.WriteFeaturesResponse()
            await ingestion.write(make_batch("stats", ["x"], {"a": [at_s]}, at_s=at_s), result, call_of())
            return result

        assert (await write("off", NOW_S - 9)).durability == pb.DURABILITY_APPLIED
        assert await rows.read(SPACE.keys(["x"])) == [None]
        assert (await write("behind", NOW_S - 8)).durability == pb.DURABILITY_APPLIED
        await until(lambda: copy.queued == 0)
        target = door.target
        await door.cut()
        with pytest.raises(Unavailable):  # it is in Redis, but nobody was told that it is safe
            await write("before", NOW_S - 7)
        door.target = target
        again = await write("before", NOW_S - 7)
        assert (again.applied, again.ignored, again.durability) == (0, 1, pb.DURABILITY_COMMITTED)
        assert await rows.read(SPACE.keys(["x"])) == (await store.read(SPACE.keys(["x"]), 10)).rows
    await store.close()


async def test_a_database_without_its_tables_refuses_the_write_as_one_to_be_repeated(postgres_server: Any, door: TcpProxy) -> None:
    bare = postgres_server.create_database("without_tables")
    async with opened(bare, door, Clock()) as (copy, _):
        with pytest.raises(Unavailable, match="plait migrate") as caught:
            await copy.keep(view("before"), SPACE.keys(["x"]), [row(5)])
        assert caught.value.reason == "REGISTRY_NOT_MIGRATED"
    postgres_server.drop_database("without_tables")
