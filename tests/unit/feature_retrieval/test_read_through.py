"""What Redis does not have comes from the durable copy, within its budget; of what was not asked nothing is claimed."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from tests.fakes.tcp_proxy import TcpProxy

from feature_retrieval.read_through import Budget, ReadThrough
from feature_retrieval.row_codec import KeySpace
from feature_retrieval.store.postgres import DurableRows
from feature_retrieval.store.redis import RedisStore
from plait.errors import Unavailable
from plait.registry.database import Pool, open_pool
from plait.registry.records import Entity, Feature, FeatureView, Snapshot
from plait.registry.store import Store

NOW_S = 1_700_000_000.0
KEPT = FeatureView(name="kept", entity=Entity(type="item"), features=(Feature(name="a"),), durable="behind", retention_s=1000)
LOOSE = FeatureView(name="loose", entity=Entity(type="item"), features=(Feature(name="a"),), retention_s=1000)
SPACE, OTHER = KeySpace.of("shop", "item", "kept", 1), KeySpace.of("shop", "item", "loose", 1)
IDS = [f"i{n}" for n in range(20)]


def row(at_s: float, tail: bytes = b"") -> bytes:
    return struct.pack("<HHIqqQ", 1, 1, 0, int(at_s * 1e6), 0, 0) + tail


async def nothing_was_erased() -> None:
    """As after a rebuild."""


@pytest_asyncio.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Pool]:
    async with await Store.open(postgres_dsn) as registry:
        await registry.migrate()
    opened = await open_pool(postgres_dsn, name="test")
    yield opened
    await opened.close()


class World:
    def __init__(self, store: RedisStore, pool: Pool, rows_per_s: float = 1000) -> None:
        self.store = store
        self.rows = DurableRows(pool)
        self.counts: Counter[str] = Counter()
        self.now_s = 0.0
        snapshot = Snapshot(feature_views={"kept": KEPT, "loose": LOOSE})
        self.through = ReadThrough(
            store,
            self.rows,
            lambda: snapshot,
            nothing_was_erased,
            lambda result, count: self.counts.update({result: count}),
            budget=Budget(rows_per_s, lambda: self.now_s),
            clock=lambda: NOW_S,
        )


@pytest_asyncio.fixture
async def opened(redis_url: str, pool: Pool) -> AsyncIterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(url: str = redis_url, **options: Any) -> World:
        worlds.append(World(RedisStore(url, connect_timeout_s=1.0), pool, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        await world.through.close()
        await world.store.close()


async def test_missing_rows_come_from_the_copy_and_go_back(opened: Callable[..., World]) -> None:
    w = opened()
    keys = SPACE.keys(IDS)
    await w.rows.keep({key: row(NOW_S - 5, b"durable") for key in keys[:8]} | {keys[8]: row(NOW_S - 1001)})
    await w.store.write(keys[:3], SPACE.mark_keys(IDS[:3]), [row(NOW_S, b"redis")] * 3, 0)
    await w.store.erase(SPACE.mark_keys(IDS[7:8]), [()], [int(NOW_S * 1e6)])  # Redis has heard of it, the copy not yet
    expected = [row(NOW_S, b"redis")] * 3 + [row(NOW_S - 5, b"durable")] * 5 + [None] * 12
    found = await w.through.read([*keys, *OTHER.keys(IDS)], 20)
    assert found.whole
    assert found.rows == [*expected, *[None] * 20]
    assert w.counts == {"found": 5, "absent": 12, "over_budget": 0}
    async with asyncio.timeout(20):
        while (await w.store.read(keys[:8], 20)).rows[6] is None:
            await asyncio.sleep(0.01)
    back = (await w.store.read(keys, 20)).rows
    assert back == [*expected[:7], *[None] * 13]  # what was erased does not come back
    assert 900_000 < int(await w.store.dispatch.one(keys[4], b"PTTL", [keys[4]])) < 1_500_000


async def test_over_its_budget_it_says_that_it_does_not_know(opened: Callable[..., World]) -> None:
    w = opened(rows_per_s=4)
    keys = SPACE.keys(IDS)
    await w.rows.keep({keys[1]: row(NOW_S), keys[9]: row(NOW_S)})
    found = await w.through.read([*OTHER.keys(IDS[:1]), *keys[:10]], 20)
    assert found.rows == [None, None, row(NOW_S), *[None] * 8]
    assert found.failed.tolist() == [5, 6, 7, 8, 9, 10]
    assert w.counts == {"found": 1, "absent": 3, "over_budget": 6}
    with pytest.raises(Unavailable):  # nothing at all is known
        await w.through.read(keys[5:7], 20)
    w.now_s += 0.5
    assert (await w.through.read(keys[4:6], 20)).whole


async def test_while_redis_is_away_the_copy_answers_for_views_that_have_one(opened: Callable[..., World], redis_url: str) -> None:
    host, port = redis_url.rpartition("@")[2].partition("/")[0].split(":")
    async with TcpProxy((host, int(port))) as door:
        w = opened(redis_url.replace(f":{port}/", f":{door.port}/"))
        await w.rows.keep({SPACE.keys(["x"])[0]: row(NOW_S)})
        await door.cut()
        found = await w.through.read([*SPACE.keys(["x", "y"]), *OTHER.keys(["x"])], 20)
        assert found.rows == [row(NOW_S), None, None]
        assert found.failed.tolist() == [2]
        with pytest.raises(Unavailable):
            await w.through.read(OTHER.keys(["x"]), 20)


async def test_while_postgres_is_away_nothing_is_claimed_of_what_redis_does_not_have(opened: Callable[..., World], pool: Pool) -> None:
    w = opened()
    keys = SPACE.keys(IDS[:3])
    await w.store.write(keys[:1], SPACE.mark_keys(IDS[:1]), [row(NOW_S)], 0)
    assert (await w.through.read(keys, 0)).late.tolist() == [0, 1, 2]
    await pool.close()
    found = await w.through.read(keys, 20)
    assert (found.rows, found.failed.tolist()) == ([row(NOW_S), None, None], [1, 2])
    assert w.counts["failed"] == 2
