"""What replicas know, on a real Redis: nobody is overlooked who may still write by an older snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st

from feature_retrieval import replicas as module
from feature_retrieval.replicas import Replicas
from feature_retrieval.snapshots_in_use import SnapshotsInUse
from feature_retrieval.store.redis import RedisStore
from plait.errors import Unavailable
from plait.registry.records import Snapshot


@pytest_asyncio.fixture
async def store(redis_url: str) -> AsyncIterator[RedisStore]:
    opened = RedisStore(redis_url, ack="applied")
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def grown(redis_url: str) -> None:
    """A Redis in which replicas have announced themselves for long enough."""
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        await client.sadd("r1{replicas}n", "gone long ago")  # type: ignore[misc]


async def reason_of(replicas: Replicas, revision: int) -> str:
    try:
        await replicas.check_heard(revision)
    except Unavailable as error:
        return error.reason
    return ""


@pytest.mark.usefixtures("grown")
async def test_one_that_writes_by_less_is_waited_for(store: RedisStore) -> None:
    known = {"a": 7, "b": 6}
    a, b = (Replicas(store.dispatch, name, lambda name=name: known[name]) for name in known)  # type: ignore[misc]
    await b.announce()
    assert [await reason_of(a, revision) for revision in (6, 7)] == ["", "REPLICA_BEHIND"]
    assert await reason_of(b, 7) == "REPLICA_BEHIND"
    known["b"] = 7
    await b.announce()
    assert await reason_of(a, 7) == ""
    assert await reason_of(a, 8) == "REPLICA_BEHIND"  # who asks counts, too


@pytest.mark.usefixtures("grown")
async def test_one_that_ended_or_died_is_forgotten(store: RedisStore, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, ended, killed = (Replicas(store.dispatch, name, lambda known=known: known) for name, known in (("a", 7), ("b", 6), ("c", 6)))  # type: ignore[misc]
    await ended.announce()
    assert await reason_of(a, 7) == "REPLICA_BEHIND"
    await ended.close()
    assert await reason_of(a, 7) == ""
    monkeypatch.setattr(module, "LEASE_S", 0.05)
    await killed.announce()
    async with asyncio.timeout(20):
        while await reason_of(a, 7):
            await asyncio.sleep(0.005)
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        assert await client.smembers("r1{replicas}n") == {b"a"}  # type: ignore[misc]


async def test_a_redis_that_was_lost_knows_nobody_until_all_have_said_so_again(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    a = Replicas(store.dispatch, "a", lambda: 7)
    assert await reason_of(a, 7) == "REPLICA_BEHIND"
    monkeypatch.setattr(module, "_YOUNG_S", 0.05)
    await store.remove([b"r1{replicas}n", b"r1{replicas}y"])
    async with asyncio.timeout(20):
        while await reason_of(a, 7):
            await asyncio.sleep(0.005)


async def test_one_that_ended_is_not_announced_again_by_its_loop(store: RedisStore) -> None:
    ended = Replicas(store.dispatch, "ended", lambda: 6)
    loop = asyncio.create_task(ended.run())
    async with asyncio.timeout(20):
        while (await store.read([b"r1{replicas}rended"], 5)).rows == [None]:
            await asyncio.sleep(0.005)
    await ended.close()
    ended.changed(Snapshot())
    for _ in range(20):  # its loop has time for an announcement
        assert (await store.read([b"r1{replicas}rended"], 5)).rows == [None]
    assert (await store.read([b"r1{replicas}rended"], 5)).rows == [None]
    loop.cancel()


@given(st.lists(st.one_of(st.just("swap"), st.just("begin"), st.integers(0, 5)), max_size=30))
def test_the_oldest_is_that_of_the_writes_under_way(steps: list[str | int]) -> None:
    newest = [Snapshot(revision=1)]
    in_use = SnapshotsInUse(lambda: newest[0])
    writes = []
    for step in steps:
        if step == "swap":
            newest[0] = Snapshot(revision=newest[0].revision + 1)
        elif step == "begin":
            held = in_use.held()
            writes.append((held, held.__enter__().revision))
        elif isinstance(step, int) and step < len(writes):
            writes.pop(step)[0].__exit__(None, None, None)
        assert in_use.oldest == min([newest[0].revision, *(revision for _, revision in writes)])
