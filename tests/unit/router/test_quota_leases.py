"""Routers that share quotas through a real Redis, one that goes away included; leases run out by a clock that is moved by hand here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from tests.fakes.tcp_proxy import TcpProxy

from plait.errors import ResourceExhausted
from plait.local.redis import EmbeddedRedis
from plait.redis.connections import Access
from plait.redis.dispatch import Dispatch
from plait.redis.topologies import Single
from plait.registry.policies import Quota
from plait.registry.records import Snapshot, Tenant
from plait.telemetry.metrics import Metrics
from router.quota_leases import QuotaLeases
from router.quotas import Quotas
from router.settings import QuotaSettings

QUOTA = Quota(requests_per_s=100, burst=300, rows_per_s=5000, in_flight=30)
TENANTS = {
    "shop": Tenant(name="shop", quota=QUOTA),
    "other": Tenant(name="other", quota=Quota(requests_per_s=10)),
    "free": Tenant(name="free"),
}


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Router:
    """A router's quotas, as far as requests and leases see them."""

    def __init__(self, dispatch: Dispatch, clock: Clock) -> None:
        self.metrics = Metrics()
        self.quotas = Quotas(clock)
        self.quotas.adopt(Snapshot(revision=1, tenants=TENANTS))
        self.leases = QuotaLeases(self.quotas, dispatch, QuotaSettings(lease_s=60), self.metrics, clock=clock)

    @property
    def part(self) -> float:
        return self.quotas.of["shop"].parts.requests

    def ask(self, times: int, tenant: str = "shop") -> int:
        given = 0
        for _ in range(times):
            try:
                self.quotas.of[tenant].request()
                given += 1
            except ResourceExhausted:
                pass
        return given


@asynccontextmanager
async def routers(url: str, count: int) -> AsyncIterator[tuple[list[Router], Clock]]:
    clock = Clock()
    topology = Single(Access(url=url, connections=4))
    try:
        yield [Router(Dispatch(topology), clock) for _ in range(count)], clock
    finally:
        await topology.close()


async def rounds(all_: list[Router], clock: Clock, wants: list[int], times: int = 3) -> None:
    """Let each router be asked so often per second, and renew."""
    for _ in range(times):
        clock.now_s += 0.2
        for router, want in zip(all_, wants, strict=True):
            router.ask(want // 5)
            await router.leases.renew()


async def test_a_lone_router_has_it_all(redis_url: str) -> None:
    async with routers(redis_url, 1) as (all_, clock):
        await rounds(all_, clock, [500])
        assert all_[0].quotas.of["shop"].parts == pytest.approx((1, 1, 1))
        assert repr(all_[0].leases) == "<QuotaLeases tenants=2 there>"
        assert all_[0].metrics.registry.get_sample_value("plait_router_quota_local") == 0


@pytest.mark.parametrize(
    ("wants", "parts"),
    [
        ([500, 500, 500], [1 / 3, 1 / 3, 1 / 3]),
        ([20, 500, 500], [0.2, 0.4, 0.4]),
        ([10, 30, 500], [0.1, 0.3, 0.6]),
        ([10, 10, 20], [0.3, 0.3, 0.4]),  # and of the 60 that nobody wants as much for each
    ],
)
async def test_parts_are_max_min_fair(redis_url: str, wants: list[int], parts: list[float]) -> None:
    async with routers(redis_url, 3) as (all_, clock):
        await rounds(all_, clock, wants, times=8)
        assert [router.part for router in all_] == pytest.approx(parts, abs=0.01)


async def test_parts_never_add_up_to_more_than_the_whole(redis_url: str) -> None:
    random_ = random.Random(3)  # noqa: S311
    async with routers(redis_url, 4) as (all_, clock):
        for router in all_:
            router.ask(1)
            await router.leases.renew()
        leased: set[Router] = set(all_)
        for _ in range(100):
            clock.now_s += 0.05
            router = random_.choice(all_)
            router.ask(random_.choice([0, 1, 5, 50]))
            await router.leases.renew()
            for bound in range(3):
                assert sum(one.quotas.of["shop"].parts[bound] for one in leased) <= 1 + 1e-6


async def test_over_any_time_routers_together_give_no_more_than_rate_and_a_burst_each(redis_url: str) -> None:
    random_ = random.Random(4)  # noqa: S311
    async with routers(redis_url, 3) as (all_, clock):
        given = 0
        start_s = clock.now_s
        for _ in range(60):
            clock.now_s += 0.1
            for router in all_:
                given += router.ask(random_.choice([0, 10, 60]))
                await router.leases.renew()
        assert given <= QUOTA.requests_per_s * (clock.now_s - start_s) + QUOTA.burst * len(all_)
        assert given >= QUOTA.requests_per_s * (clock.now_s - start_s) * 0.9


async def test_who_uses_nothing_gives_its_part_back(redis_url: str) -> None:
    async with routers(redis_url, 2) as (all_, clock):
        await rounds(all_, clock, [500, 500])
        assert all_[1].part == pytest.approx(0.5)
        clock.now_s += 61
        await all_[0].leases.renew()  # it only asks for what is in use: the lease runs out
        assert all_[0].leases._in_use(1.0, clock.now_s) == {}


async def test_a_lease_that_ran_out_is_forgotten_by_the_clock_of_redis(redis_url: str) -> None:
    async with routers(redis_url, 2) as (all_, clock):
        all_[0].leases._settings = QuotaSettings.model_construct(lease_s=0.001)
        await rounds([all_[0]], clock, [500], times=1)
        while all_[1].part != pytest.approx(1) or not all_[1].leases._held:
            all_[1].ask(100)
            await all_[1].leases.renew()
        assert all_[1].leases._held["shop"].routers == 1


async def test_without_redis_each_goes_on_with_an_equal_part_and_shares_again_when_it_is_back() -> None:
    options = {"requirepass": "secret-of-this-test"}
    async with TcpProxy(None) as door, routers(f"redis://:secret-of-this-test@127.0.0.1:{door.port}/0", 3) as (all_, clock):
        async with EmbeddedRedis(options=options) as server:
            door.target = _target(server)
            await rounds(all_, clock, [20, 500, 500], times=8)
            shared = [router.part for router in all_]
            assert shared[0] < 0.3
            await door.cut()
        await rounds(all_, clock, [20, 500, 500], times=1)
        assert [router.part for router in all_] == shared  # the leases still hold
        clock.now_s += 61
        await rounds(all_, clock, [500, 500, 500], times=1)
        assert [router.part for router in all_] == pytest.approx([1 / 3] * 3)
        assert all_[0].metrics.registry.get_sample_value("plait_router_quota_local") == 1
        assert "away" in repr(all_[0].leases)
        clock.now_s += 1
        assert all(router.ask(10) == 10 for router in all_)  # nobody stops serving
        async with EmbeddedRedis(options=options) as empty:  # which has forgotten everything
            door.target = _target(empty)
            async with asyncio.timeout(30):
                while any(router.metrics.registry.get_sample_value("plait_router_quota_local") for router in all_):
                    await rounds(all_, clock, [20, 500, 500], times=1)
            await rounds(all_, clock, [20, 500, 500], times=16)
            assert [router.part for router in all_] == pytest.approx(shared, abs=0.05)


def _target(server: EmbeddedRedis) -> tuple[str, int]:
    host, _, port = server.url.rpartition("@")[2].partition("/")[0].partition(":")
    return host, int(port)


async def test_a_router_that_never_saw_redis_serves_the_whole_quota() -> None:
    async with routers("redis://127.0.0.1:1/0", 1) as ([router], clock):
        router.ask(5)
        clock.now_s += 1
        await router.leases.renew()
        assert router.part == 1
        assert router.ask(200) == 200
