"""Several routers on one Redis: what one is told to forget none of them answers any more, whatever happens to Redis."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.fakes.questions import strings

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import Unavailable
from plait.local.redis import EmbeddedRedis
from plait.redis.dispatch import Dispatch
from plait.redis.opening import topology_of
from plait.redis.settings import RedisSettings
from plait.telemetry.metrics import Metrics
from router import shared_invalidations
from router.invalidation import Invalidations, Space
from router.shared_invalidations import STREAM, SharedInvalidations

ITEMS: Space = ("shop", "entity", "item")


class Router:
    """A router's log, and what feeds it."""

    def __init__(self, url: str) -> None:
        self.topology = topology_of(RedisSettings(url=url, connections=4))  # type: ignore[arg-type]
        self.dispatch = Dispatch(self.topology)
        self.log = Invalidations()
        self.metrics = Metrics()
        self.shared = SharedInvalidations(self.log, self.dispatch, self.metrics)

    async def forgets(self, item: str, since: int = 0) -> None:
        """Return once what was begun at a position would be forgotten for an item."""
        async with asyncio.timeout(20):
            while not self.log.touched(since, [(ITEMS, [item])]):
                await asyncio.sleep(0.01)

    async def caught_up(self) -> None:
        async with asyncio.timeout(20):
            while "last=none" in repr(self.shared):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def routers(url: str, count: int = 3) -> AsyncIterator[list[Router]]:
    made = [Router(url) for _ in range(count)]
    tasks = [asyncio.create_task(router.shared.run(), name=f"router {n}") for n, router in enumerate(made)]
    try:
        for router in made:
            await router.caught_up()
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for router in made:
            await router.topology.close()


@pytest_asyncio.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    """A Redis of this test's own, which keeps nothing over a restart."""
    async with EmbeddedRedis() as embedded:
        yield embedded


def sold(*items: str) -> pb.InvalidateCacheRequest:
    return pb.InvalidateCacheRequest(items=types_pb2.EntityRows(entity_type="item", ids=strings(*items)))


async def append(router: Router, *fields: bytes) -> Any:
    return await router.dispatch.one(STREAM, b"XADD", [STREAM, b"*", *fields])


async def test_every_router_hears_what_one_was_told(redis_url: str) -> None:
    async with routers(redis_url) as all_:
        await all_[0].shared.tell("shop", sold("i1", "i2"))
        for router in all_:
            await router.forgets("i2")
            assert not router.log.touched(0, [(ITEMS, ["i3"]), (("other", "entity", "item"), ["i1"])])
        assert len({router.log.heard for router in all_}) == 1
        for router in all_:
            assert (router.metrics.registry.get_sample_value("plait_router_invalidations_behind_seconds") or 0) < 20


async def test_a_router_that_comes_later_knows_what_was_told_before(redis_url: str) -> None:
    async with routers(redis_url, 1) as (early,):
        await early.shared.tell("shop", sold("i1"))
        await early.forgets("i1")
        async with routers(redis_url, 1) as (late,):
            await late.forgets("i1")
            assert late.log.heard == early.log.heard


async def test_what_was_dropped_from_the_stream_counts_as_told(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with routers(redis_url, 1) as (early,):
        before = early.log.heard
        for number in range(5):
            await early.shared.tell("shop", sold(f"i{number}"))
        await early.forgets("i4")
        await early.dispatch.one(STREAM, b"XTRIM", [STREAM, b"MAXLEN", b"=", b"2"])
        async with routers(redis_url, 1) as (late,):
            await late.forgets("i4")
            assert late.log.touched(Invalidations.since(before), [(ITEMS, ["never told"])])
            assert not late.log.touched(Invalidations.since(early.log.heard), [(ITEMS, ["i0", "i4"])])


async def test_over_a_restart_of_redis_nothing_is_missed(server: EmbeddedRedis) -> None:
    """It comes back empty: who cannot know what was lost forgets everything, then hears again."""
    async with routers(server.url) as all_:
        await all_[0].shared.tell("shop", sold("i1"))
        for router in all_:
            await router.forgets("i1")
        positions = [router.log.position for router in all_]
        await server.child.stop(signal.SIGKILL, grace_s=10)
        with pytest.raises(Unavailable) as caught:
            await all_[1].shared.tell("shop", sold("i2"))
        assert caught.value.reason == "INVALIDATION_NOT_SHARED"
        await server.start()
        for router, position in zip(all_, positions, strict=True):
            await router.forgets("anything", position)
        positions = [router.log.position for router in all_]
        async with asyncio.timeout(20):
            while True:
                try:
                    await all_[1].shared.tell("shop", sold("i2"))
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
        for router, position in zip(all_, positions, strict=True):
            await router.forgets("i2", position)
            assert not router.log.touched(position, [(ITEMS, ["i3"])])


@pytest.mark.parametrize("fields", [(b"x", b"y"), (b"t", b"shop", b"r", b"\xff\xff"), (b"t", b"\xff", b"r", b"")])
async def test_what_cannot_be_understood_forgets_everything(redis_url: str, fields: tuple[bytes, ...]) -> None:
    async with routers(redis_url, 1) as (router,):
        position = router.log.position
        await append(router, *fields)
        await router.forgets("anything", position)
        await router.shared.tell("shop", sold("i1"))
        await router.forgets("i1", router.log.position - 1 if router.log.touched(position, []) else position)


def test_ids_are_numbers_in_the_same_order() -> None:
    ids = [b"0-0", b"1-0", b"1-1", b"1-4294967295", b"2-0", b"1764000000000-0"]
    numbers = list(map(shared_invalidations._number, ids))
    assert numbers == sorted(set(numbers))
