"""Outcomes and exposures in a real Redis: each outcome once over several routers, kept once acknowledged, and nobody waits for an exposure."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from tests.fakes.registry_world import eventually
from tests.fakes.tcp_proxy import TcpProxy

from plait.api.events.v1 import events_pb2, outcomes_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.client import Outcome, RankingClient
from plait.errors import InvalidArgument, Unavailable
from plait.local.child import Child
from plait.redis.dispatch import Dispatch
from plait.redis.opening import topology_of
from plait.registry.store import Store
from plait.rpc.call import Call, enter
from plait.rpc.deadline import Deadline
from plait.telemetry.metrics import Metrics
from router.journal import Journal
from router.outcomes import Outcomes
from router.settings import JournalSettings, SharedSettings


@asynccontextmanager
async def journal(url: str, metrics: Metrics | None = None, **changes: Any) -> AsyncIterator[Journal]:
    topology = topology_of(SharedSettings(url=SecretStr(url)))
    try:
        yield Journal(Dispatch(topology), JournalSettings(**changes), metrics or Metrics())
    finally:
        await topology.close()


def outcome(request_id: str, *, item: int = 1, kind: int = 1, at_s: float | None = None) -> outcomes_pb2.Outcome:
    made = outcomes_pb2.Outcome(request_id=request_id, type=kind)  # type: ignore[arg-type]
    made.item.entity_type = "item"
    made.item.ids.int64_ids.append(item)
    made.event_time.FromSeconds(int(time.time() if at_s is None else at_s))
    return made


def entries(url: str, key: str, kind: Any) -> list[Any]:
    with redis.Redis.from_url(url) as client:
        return [kind.FromString(fields[b"m"]) for _, fields in client.xrange(key)]


def asked_by(tenant: str) -> None:
    enter(Call(method="/RecordOutcome", tenant=tenant, deadline=Deadline.after(60)))


TELLINGS = st.lists(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=8), max_size=8)


@settings(max_examples=25, deadline=None)
@given(tellings=TELLINGS, tenant=st.sampled_from(["shop", "other"]))
def test_whatever_is_repeated_in_whatever_order_counts_once_over_two_routers(
    redis_server: Any, tellings: Sequence[Sequence[tuple[int, int, int]]], tenant: str
) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()

    async def tell() -> int:
        async with journal(redis_server.url) as one, journal(redis_server.url) as other:
            asked_by(tenant)
            routers = [Outcomes(kept, Metrics()) for kept in (one, other)]
            requests = [pb.RecordOutcomeRequest(outcomes=[outcome(f"r{r}", item=i, kind=k) for r, i, k in telling]) for telling in tellings]
            answers = await asyncio.gather(*(routers[at % 2].record(request) for at, request in enumerate(requests)))
            assert [a.accepted + a.duplicates for a in answers] == [len(telling) for telling in tellings]
            return sum(answer.accepted for answer in answers)

    different = {told for telling in tellings for told in telling}
    assert asyncio.run(tell()) == len(different)
    kept = entries(redis_server.url, f"o1{{{tenant}}}", outcomes_pb2.Outcome)
    assert {(int(o.request_id[1:]), o.item.ids.int64_ids[0], o.type) for o in kept} == different
    assert len(kept) == len(different)


async def test_wrong_ones_are_told_by_their_place_and_the_others_kept(redis_url: str) -> None:
    asked_by("shop")
    async with journal(redis_url) as kept:
        told = [outcome("r1"), outcome(""), outcome("r2", at_s=0), outcome("r3"), outcome("r1")]
        answer = await Outcomes(kept, Metrics()).record(pb.RecordOutcomeRequest(outcomes=told))
        assert [(e.index, e.reason) for e in answer.errors] == [(1, "REQUEST_ID_INVALID"), (2, "OUTCOME_TIME_INVALID")]
        assert (answer.accepted, answer.duplicates) == (2, 1)
        many = await Outcomes(kept, Metrics()).record(pb.RecordOutcomeRequest(outcomes=[outcome(f"m{n}") for n in range(1000)]))
        assert many.accepted == 1000
        for number in (0, 1001):
            with pytest.raises(InvalidArgument, match="1 to 1000"):
                await Outcomes(kept, Metrics()).record(pb.RecordOutcomeRequest(outcomes=[outcome("r")] * number))


async def test_tenants_do_not_know_each_others_outcomes(redis_url: str) -> None:
    async with journal(redis_url) as kept:
        for tenant in ("shop", "other"):
            asked_by(tenant)
            assert (await Outcomes(kept, Metrics()).record(pb.RecordOutcomeRequest(outcomes=[outcome("r1")]))).accepted == 1


async def test_with_redis_away_nothing_is_acknowledged_and_exposures_wait_until_it_is_back(redis_url: str) -> None:
    metrics = Metrics()
    host, port = redis_url.rpartition("@")[2].removeprefix("redis://").split("/")[0].split(":")
    async with TcpProxy((host, int(port))) as proxy:
        target = proxy.target
        url = redis_url.replace(f"{host}:{port}", f"127.0.0.1:{proxy.port}")
        async with journal(url, metrics, queue=3) as kept:
            running = asyncio.create_task(kept.run())
            proxy.target = None
            await proxy.cut()
            asked_by("shop")
            with pytest.raises(Unavailable) as caught:
                await Outcomes(kept, Metrics()).record(pb.RecordOutcomeRequest(outcomes=[outcome("r1")]))
            assert caught.value.reason == "JOURNAL_UNAVAILABLE"
            put = [kept.put(outcomes_pb2.Exposure(tenant="shop", request_id=f"r{n}")) for n in range(5)]
            assert put == [True, True, True, False, False]
            sample = metrics.registry.get_sample_value
            assert sample("plait_router_journal_total", {"outcome": "dropped"}) == 2
            proxy.target = target
            await eventually(lambda: sample("plait_router_journal_total", {"outcome": "written"}) == 3, 30)
            written = {e.request_id for e in entries(redis_url, "x1{shop}", outcomes_pb2.Exposure)}
            assert written == {"r0", "r1", "r2"}
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_streams_are_bounded_and_what_waits_is_written_at_the_end(redis_url: str) -> None:
    async with journal(redis_url, max_entries=1000) as kept:
        for number in range(3000):
            kept.put(outcomes_pb2.Exposure(tenant="shop" if number % 2 else "other", request_id=f"r{number}"))
        await kept.close()
        assert repr(kept) == "<Journal waiting=0>"
        last = entries(redis_url, "x1{shop}", outcomes_pb2.Exposure)
        assert last[-1].request_id == "r2999"
        assert 1000 <= len(last) < 1500


@asynccontextmanager
async def router_process(folder: Path, dsn: str, redis_url: str) -> AsyncIterator[tuple[Child, str]]:
    folder.mkdir()
    named = {"RPC__PORT_FILE": str(folder / "port"), "REGISTRY__DSN": dsn, "REDIS__URL": redis_url}
    env = {k: v for k, v in os.environ.items() if not k.startswith("PLAIT_")}
    env |= {f"PLAIT_ROUTER_{name}": value for name, value in named.items()}
    child = Child.start([sys.executable, "-m", "router"], name="router", log=folder / "log", env=env)
    try:
        await eventually(lambda: (folder / "port").exists() or not child.running, 60)
        assert child.running, child.log_tail()
        yield child, json.loads((folder / "port").read_text())["rpc"]
    finally:
        await child.stop(grace_s=10)


async def test_what_was_acknowledged_outlives_the_router(postgres_dsn: str, redis_url: str, tmp_path: Path) -> None:
    async with await Store.open(postgres_dsn) as store:
        await store.migrate()
        _, key = await store.create_key("default", ("rank",), actor="test")
    told = [Outcome(request_id=f"r{n}", type="like", item=f"listing-{n}") for n in range(50)]
    async with router_process(tmp_path / "one", postgres_dsn, redis_url) as (child, address):
        async with RankingClient(address, api_key=key) as client:
            assert (await client.record_outcomes(told[:30])).accepted == 30
        os.kill(child.pid, signal.SIGKILL)
    kept = entries(redis_url, "o1{default}", outcomes_pb2.Outcome)
    assert [o.request_id for o in kept] == [f"r{n}" for n in range(30)]
    assert {o.type for o in kept} == {events_pb2.EVENT_TYPE_LIKE}
    async with router_process(tmp_path / "two", postgres_dsn, redis_url) as (_, address), RankingClient(address, api_key=key) as client:
        again = await client.record_outcomes(told)  # whoever is not sure tells all of them again
        assert (again.accepted, again.duplicates) == (20, 30)
