"""Answers that several routers share in one Redis: as good as their own, never worse, and no router waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.questions import ask, rank, strings
from tests.fakes.router_world import route, snapshot

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.local.redis import EmbeddedRedis
from plait.redis.dispatch import Dispatch
from plait.redis.opening import topology_of
from plait.redis.settings import RedisSettings
from plait.registry.policies import CachePolicy
from plait.telemetry.metrics import Metrics
from router import shared_answer
from router.answers import Answers
from router.invalidation import Invalidations
from router.question import Question
from router.redis_level import RedisLevel
from router.route_table import compile_table
from router.settings import CacheSettings

MISS, HIT = explanation_pb.CACHE_STATUS_MISS, explanation_pb.CACHE_STATUS_HIT
REGISTRY = snapshot(route(cache=CachePolicy(ttl_s=600, stale_s=600)))
BUDGET_S = 10.0  # a slow machine is not what these tests are about


@dataclass
class Router:
    """Answers of one router in front of a road that counts."""

    answers: Answers
    level: RedisLevel
    log: Invalidations
    dispatch: Dispatch
    name: str
    now_s: float = 0.0
    runs: int = 0

    async def ask(self, request: Any = None, **call: Any) -> Any:
        served = compile_table(REGISTRY).routes["home"]
        assert served.cache is not None
        road = self.answers.around(self._make, served, served.cache)
        return await road(ask(REGISTRY, request or rank(), **call))

    async def _make(self, question: Question) -> Any:
        self.runs += 1
        return pb.RankResponse(item_ids=strings(self.name, *question.candidates[:1]), scores=[self.runs, 0])  # type: ignore[arg-type]

    async def written(self) -> None:
        await self.level.close()


class Places:
    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    def router(self, url: str, name: str, chance: float = 0.0) -> Router:
        topology = topology_of(RedisSettings(url=url, connections=4, connect_timeout_s=BUDGET_S))  # type: ignore[arg-type]
        metrics, log = Metrics(), Invalidations()
        dispatch = Dispatch(topology)
        level = RedisLevel(dispatch, metrics, BUDGET_S)
        answers = Answers(CacheSettings(), log, metrics, level, chance=lambda: chance)
        self._stack.push_async_callback(topology.close)
        self._stack.push_async_callback(level.close)
        self._stack.push_async_callback(answers.close)
        return Router(answers, level, log, dispatch, name)


@pytest_asyncio.fixture
async def places() -> AsyncIterator[Places]:
    async with AsyncExitStack() as stack:
        yield Places(stack)


async def test_one_router_answers_what_another_made(places: Places, redis_url: str) -> None:
    one, other = places.router(redis_url, "one"), places.router(redis_url, "other")
    assert (await one.ask()).cache == MISS
    await one.written()
    found = await other.ask()
    assert (found.cache, list(found.item_ids.string_ids), other.runs) == (HIT, ["one", "i1"], 0)
    assert 0 < found.age_us < 600e6
    assert (await other.ask()).cache == HIT  # from memory now
    assert (await other.ask(tenant="other")).cache == MISS
    assert (await other.ask(rank("u2"))).cache == MISS


async def test_what_was_sold_meanwhile_is_not_taken_over(places: Places, redis_url: str) -> None:
    """The maker had not heard of it, the reader has."""
    one, other = places.router(redis_url, "one"), places.router(redis_url, "other")
    other.log.tell([(("shop", "entity", "item"), ["i1"])], heard=7)
    await one.ask()
    await one.written()
    assert (await other.ask()).cache == MISS
    await other.written()
    one.log.tell([(("shop", "entity", "item"), ["i1"])], heard=7)
    assert list((await one.ask()).item_ids.string_ids) == ["other", "i1"]


async def test_an_answer_of_one_that_has_heard_more_stays_good(places: Places, redis_url: str) -> None:
    one, other = places.router(redis_url, "one"), places.router(redis_url, "other")
    one.log.tell([(("shop", "entity", "item"), ["i1"])], heard=7)
    await one.ask()
    await one.written()
    assert (await other.ask()).cache == HIT
    other.log.tell([(("shop", "entity", "item"), ["i1"])], heard=7)
    assert (await other.ask()).cache == HIT
    other.log.tell([(("shop", "entity", "item"), ["i1"])], heard=8)
    assert (await other.ask()).cache == MISS


async def test_what_is_not_ours_is_a_miss(places: Places, redis_url: str) -> None:
    one = places.router(redis_url, "one")
    await one.ask()
    await one.written()
    (key,) = await one.dispatch.one(b"", b"KEYS", [b"*"])
    for value in (b"", b"\x02" * 60, b"\x01short", b"\x01" + bytes(32) + b"\xff\xff"):
        await one.dispatch.one(key, b"SET", [key, value, b"PX", b"60000"])
        other = places.router(redis_url, "other")
        assert (await other.ask()).cache == MISS
        await other.written()


async def test_nothing_outlives_its_time_in_redis(places: Places, redis_url: str) -> None:
    one = places.router(redis_url, "one")
    await one.ask()
    await one.written()
    (key,) = await one.dispatch.one(b"", b"KEYS", [b"*"])
    assert 0 < await one.dispatch.one(key, b"PTTL", [key]) <= 600_000


async def test_without_redis_a_router_is_on_its_own(places: Places) -> None:
    async with EmbeddedRedis() as server:
        one = places.router(server.url, "one")
        await one.ask()
        await one.written()
    assert (await one.ask()).cache == HIT
    assert (await one.ask(rank("u2"))).cache == MISS
    assert "away" in repr(one.level)
    assert (await one.ask(rank("u3"))).cache == MISS
    await one.written()


async def test_a_hundred_callers_read_redis_once(places: Places, redis_url: str) -> None:
    one, other = places.router(redis_url, "one"), places.router(redis_url, "other")
    await one.ask()
    await one.written()
    before = await other.dispatch.one(b"", b"INFO", [b"commandstats"])
    found = await asyncio.gather(*(other.ask() for _ in range(100)))
    after = await other.dispatch.one(b"", b"INFO", [b"commandstats"])
    assert {response.cache for response in found} == {HIT}
    assert _gets(after) - _gets(before) == 1


def _gets(stats: bytes) -> int:
    line = next((line for line in stats.decode().splitlines() if line.startswith("cmdstat_get:")), "calls=0,")
    return int(line.partition("calls=")[2].partition(",")[0])


@given(st.binary(max_size=100), st.floats(0, 3600), st.floats(0.001, 3600), st.integers(0, 2**74), st.floats(0, 1))
def test_what_is_written_is_read(data: bytes, took_s: float, lives_s: float, heard: int, share: float) -> None:
    left_s = lives_s * share
    found = shared_answer.read(shared_answer.write(data, took_s, lives_s, heard), left_s)
    assert found is not None
    assert (found.data, found.heard) == (data, heard)
    assert abs(found.age_s - (took_s + lives_s - left_s)) < 1e-5


@given(st.binary(max_size=80))
def test_whatever_lies_there_nothing_breaks(value: bytes) -> None:
    found = shared_answer.read(value, 1.0)
    assert found is None or found.age_s >= 0
