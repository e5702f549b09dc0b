"""One request id, several routers, one Redis: it is answered once, whichever router is asked and whatever becomes of the first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio
from tests.fakes.questions import ask, rank, strings
from tests.fakes.router_world import route, snapshot

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import Aborted, InvalidArgument, Unavailable
from plait.local.redis import EmbeddedRedis
from plait.redis.dispatch import Dispatch
from plait.redis.opening import topology_of
from plait.redis.settings import RedisSettings
from plait.telemetry.metrics import Metrics
from router.question import Question
from router.redis_level import RedisLevel
from router.repeats import Repeats
from router.settings import RepeatsSettings

REPEATED = explanation_pb.CACHE_STATUS_REPEATED
REGISTRY = snapshot(route(repeat_window_s=600))
BUDGET_S = 10.0


class Router:
    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.runs = 0
        self.gate: asyncio.Event | None = None
        self.started = asyncio.Event()
        self.error: Exception | None = None
        metrics = Metrics()
        self.topology = topology_of(RedisSettings(url=url, connections=8, connect_timeout_s=BUDGET_S))  # type: ignore[arg-type]
        self.dispatch = Dispatch(self.topology)
        self.level = RedisLevel(self.dispatch, metrics, BUDGET_S)
        self.repeats = Repeats(RepeatsSettings(), metrics, self.level)
        self.road = self.repeats.around(self._make, "home", 600)

    async def ask(self, request: Any = None, **call: Any) -> Any:
        return await self.road(ask(REGISTRY, request or rank(request_id="r1"), **call))

    async def close(self) -> None:
        await self.repeats.close()
        await self.level.close()
        await self.topology.close()

    async def _make(self, question: Question) -> Any:
        self.runs += 1
        self.started.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return pb.RankResponse(item_ids=strings(self.name), scores=[self.runs], request_id=question.request_id)


@pytest_asyncio.fixture
async def pair(redis_url: str) -> AsyncIterator[tuple[Router, Router]]:
    async with AsyncExitStack() as stack:
        made = Router(redis_url, "one"), Router(redis_url, "other")
        for router in made:
            stack.push_async_callback(router.close)
        yield made


async def test_another_router_gives_the_same_answer(pair: tuple[Router, Router]) -> None:
    one, other = pair
    first = await one.ask()
    second = await other.ask()
    assert (one.runs, other.runs) == (1, 0)
    assert (first.cache, second.cache) == (0, REPEATED)
    assert 0 <= second.age_us < 600e6
    for answer in (first, second):
        answer.ClearField("cache")
        answer.ClearField("age_us")
    assert first.SerializeToString() == second.SerializeToString()


async def test_while_it_is_under_way_the_other_router_waits(pair: tuple[Router, Router]) -> None:
    one, other = pair
    one.gate = asyncio.Event()
    first = asyncio.create_task(one.ask())
    await one.started.wait()
    with pytest.raises(InvalidArgument, match="id of its own"):
        await other.ask(rank("u2", request_id="r1"))
    second = asyncio.create_task(other.ask())
    await asyncio.sleep(0)
    one.gate.set()
    assert (await first).scores[0] == 1
    assert list((await second).item_ids.string_ids) == ["one"]
    assert other.runs == 0


async def test_who_cannot_wait_so_long_is_told_so(pair: tuple[Router, Router]) -> None:
    one, other = pair
    one.gate = asyncio.Event()
    first = asyncio.create_task(one.ask())
    await one.started.wait()
    with pytest.raises(Aborted) as caught:
        await other.ask(timeout_s=0.2)
    assert caught.value.reason == "REQUEST_IN_PROGRESS"
    one.gate.set()
    await first


@pytest.mark.parametrize("how", ["failed", "left"])
async def test_a_call_that_came_to_nothing_is_tried_again(pair: tuple[Router, Router], how: str) -> None:
    one, other = pair
    one.gate = asyncio.Event()
    first = asyncio.create_task(one.ask())
    await one.started.wait()
    second = asyncio.create_task(other.ask())
    if how == "failed":
        one.error = Unavailable("away")
        one.gate.set()
    else:
        first.cancel()
    assert list((await second).item_ids.string_ids) == ["other"]
    with pytest.raises((Unavailable, asyncio.CancelledError)):
        await first


async def test_the_claim_of_a_router_that_died_is_taken_over(pair: tuple[Router, Router]) -> None:
    """What stays behind of it is its claim; it runs out a second after the call's deadline."""
    one, other = pair
    one.gate = asyncio.Event()
    dying = asyncio.create_task(one.ask(timeout_s=0.1))
    await one.started.wait()
    await one.topology.close()
    one.level.release = lambda *_: None  # type: ignore[method-assign]  # it dies before it can
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)
    assert list((await other.ask()).item_ids.string_ids) == ["other"]


async def test_without_redis_each_router_answers_for_itself() -> None:
    async with EmbeddedRedis() as server:
        one, other = Router(server.url, "one"), Router(server.url, "other")
        await one.ask()
        await one.level.close()
    assert (await one.ask()).cache == REPEATED
    assert list((await other.ask()).item_ids.string_ids) == ["other"]
    assert (await other.ask()).cache == REPEATED
    await one.close()
    await other.close()


async def test_what_is_not_ours_is_left_alone(pair: tuple[Router, Router]) -> None:
    one, other = pair
    await one.ask()
    await one.level.close()
    (key,) = await one.dispatch.one(b"", b"KEYS", [b"*"])
    await one.dispatch.one(key, b"SET", [key, b"d2 of a newer version", b"PX", b"60000"])
    assert list((await other.ask()).item_ids.string_ids) == ["other"]
    assert await one.dispatch.one(key, b"GET", [key]) == b"d2 of a newer version"
