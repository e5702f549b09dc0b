"""The durable copy on a real PostgreSQL: it orders rows exactly as Redis does, and holds nothing that was erased."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_retrieval.row_codec import FLAG_BACKFILL, KeySpace, encode_id
from feature_retrieval.store.postgres import DurableRows, Place, newer, position
from feature_retrieval.store.redis import APPLIED, RedisStore
from plait.registry.database import Pool, open_pool
from plait.registry.records import Epochs
from plait.registry.store import Store

SPACE = KeySpace.of("shop", "item", "stats", 1)
_PARTS = st.text(max_size=8) | st.integers(-(1 << 63), (1 << 63) - 1)
_IDS = _PARTS | st.lists(_PARTS, min_size=1, max_size=3).map(tuple)
_NAMES = st.text(st.sampled_from("ab}{*?\0ü"), min_size=1, max_size=63)
_TIMES = st.sampled_from([-(1 << 63), -1, 0, 1, (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 63) - 1])
_SEQUENCES = st.sampled_from([0, 1, 1 << 32, (1 << 64) - 1])


def row(event_time_us: int, sequence: int = 0, tail: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack("<HHIqqQ", 1, 1, flags, event_time_us, 0, sequence) + tail


_ROWS = st.builds(row, _TIMES, _SEQUENCES, st.sampled_from([b"", b"\0", b"\x7f", b"\xff", b"ab"]), st.sampled_from([0, 1, FLAG_BACKFILL]))


@pytest_asyncio.fixture
async def registry(postgres_dsn: str) -> AsyncIterator[Store]:
    async with await Store.open(postgres_dsn) as opened:
        await opened.migrate()
        yield opened


@pytest_asyncio.fixture
async def pool(registry: Store, postgres_dsn: str) -> AsyncIterator[Pool]:
    opened = await open_pool(postgres_dsn, name="test", max_connections=8)
    yield opened
    await opened.close()


@pytest.fixture
def rows(pool: Pool) -> DurableRows:
    return DurableRows(pool)


@given(_NAMES, _NAMES, _IDS, _NAMES, st.integers(0, 65_535), st.integers(0, (1 << 32) - 1))
def test_a_key_says_where_its_row_belongs(tenant: str, entity_type: str, entity_id: Any, view: str, version: int, epoch: int) -> None:
    space = KeySpace.of(tenant, entity_type, view, version, epoch)
    [key], [mark] = space.keys([entity_id]), space.mark_keys([entity_id])
    place = Place.of(key)
    assert place == Place(tenant, entity_type, encode_id(entity_id), view, version, epoch)
    assert (place.key, place.mark) == (key, mark)
    for other in (mark, space.applied_key(entity_id, 1), key[:-1], key + b"\0", key[1:], b"", b"p1{"):
        with pytest.raises(ValueError, match=r"not (a|the) |utf-8"):
            Place.of(other)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=_ROWS, other=_ROWS)
async def test_it_orders_rows_as_redis_does(redis_url: str, one: bytes, other: bytes) -> None:
    store = RedisStore(redis_url, ack="applied")
    try:
        keys = [b"order"]
        await store.erase([b"m"], [keys], [-(1 << 63)])
        await store.dispatch.one(b"m", b"DEL", [b"m"])
        await store.write(keys, [b"m"], [other], 0)
        assert await store.write(keys, [b"m"], [one], 0) == (bytes([APPLIED]) if newer(one, other) else b"0")
    finally:
        await store.close()


_STEPS = st.lists(st.tuples(st.integers(0, 3), _ROWS), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_STEPS, erased=st.dictionaries(st.integers(0, 3), _TIMES, max_size=2), seed=st.integers(0, 99))
async def test_copies_may_come_in_any_order_and_twice(
    pool: Pool, registry: Store, steps: list[tuple[int, bytes]], erased: dict[int, int], seed: int
) -> None:
    rows, chance = DurableRows(pool), random.Random(seed)  # noqa: S311
    async with pool.connection() as connection:
        await connection.execute("truncate plait.feature_row, plait.erasure")
    for who, until_us in erased.items():
        await registry.remember_erasures("shop", "item", [encode_id(who)], until_us, actor="me", reason="")
    sent = steps + chance.sample(steps, len(steps))
    while sent:
        size = chance.randint(1, 4)
        batch, sent = sent[:size], sent[size:]
        newest: dict[bytes, bytes] = {}
        for who, data in batch:
            [key] = SPACE.keys([who])
            if key not in newest or newer(data, newest[key]):
                newest[key] = data
        await rows.keep(newest)
    best: dict[int, bytes] = {}
    for who, data in steps:
        late = who in erased and struct.unpack("<q", data[8:16])[0] <= erased[who]
        if not late and (who not in best or (position(data), data) > (position(best[who]), best[who])):
            best[who] = data
    assert await rows.read(SPACE.keys(range(4))) == [best.get(who) for who in range(4)]


async def test_many_writers_of_the_same_rows_never_block_each_other(rows: DurableRows) -> None:
    keys = SPACE.keys(range(300))
    orders = [random.Random(n).sample(range(300), 300) for n in range(8)]  # noqa: S311
    await asyncio.gather(*(rows.keep({keys[at]: row(n + 1) for at in order}) for n, order in enumerate(orders)))
    assert await rows.read(keys) == [row(8)] * 300


async def test_pages_meet_every_row_once_and_only_the_tenant_s(rows: DurableRows) -> None:
    spaces = [KeySpace.of("shop", kind, view, 1, epoch) for kind in ("item", "user") for view in ("a", "b") for epoch in (0, 1)]
    ids: list[Any] = ["", "x", "x" * 200, 5, -5, ("p", 1)]
    every = {space.keys([one])[0]: row(1, tail=b"%d" % n) for space in spaces for n, one in enumerate(ids)}
    await rows.keep(every | {KeySpace.of("other", "item", "a", 1).keys(["x"])[0]: row(9)})
    met: list[tuple[Place, bytes]] = []
    after = None
    while page := await rows.page("shop", ["a", "b"], after, 7):
        met += page
        after = Place.of(page[-1][0].key)  # as a cursor brings it back
    assert {place.key: data for place, data in met} == every
    assert len(met) == len(every) == await rows.count("shop", ["a", "b"])
    assert await rows.count("shop", ["a"]) == len(every) // 2
    assert await rows.count("nobody", ["a"]) == 0


async def test_what_nobody_keeps_is_dropped(rows: DurableRows, pool: Pool) -> None:
    async with pool.connection() as connection:
        await connection.execute(
            "insert into plait.view_epoch (tenant, view, version, serving, previous, newest) values ('shop', 'stats', 1, 2, 1, 2)"
        )
    spaces = [KeySpace.of("shop", "item", "stats", 1, epoch) for epoch in range(4)] + [KeySpace.of("other", "item", "stats", 1, 0)]
    await rows.keep({space.keys(["x"])[0]: row(5) for space in spaces})
    assert await rows.drop_unused_epochs() == 1
    assert await rows.read([space.keys(["x"])[0] for space in spaces]) == [None] + [row(5)] * 4
    assert await rows.drop_before("stats", 1, 5) == 0
    assert await rows.drop_before("stats", 2, 6) == 0
    assert await rows.drop_before("stats", 1, 6) == 4
    assert Epochs().in_use == (0,)


async def test_an_erasure_waits_for_writes_that_had_not_heard_of_it(rows: DurableRows, registry: Store) -> None:
    [key] = SPACE.keys(["x"])
    await registry.remember_erasures("shop", "item", [encode_id("x")], 10, actor="me", reason="")
    [erasure] = await registry.erasures_after(0)

    async def forget() -> int:
        [counts] = await registry.forget_rows([erasure])
        return sum(counts.values())

    await asyncio.gather(*(rows.keep({key: row(n)}) for n in range(8, 13)), forget())
    assert await rows.read([key]) == [row(12)]
    assert await forget() == 0
