"""What the mesh answers while a part of it is gone, and that it is whole again afterwards."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.fakes import small_ranker
from tests.fakes.small_mesh import ROUTE, SmallMesh, small_mesh

from plait.errors import NotFound, PlaitError, Unavailable
from plait.local.postgres import EmbeddedPostgres
from plait.local.redis import EmbeddedRedis

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]


class Stores:
    """A PostgreSQL and a Redis of our own: what the mesh itself started it would start again at once."""

    def __init__(self, postgres: EmbeddedPostgres, redis: EmbeddedRedis) -> None:
        self.postgres = postgres
        self.redis = redis


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stores(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stores]:
    folder = tmp_path_factory.mktemp("stores")
    async with EmbeddedPostgres(folder / "postgres") as postgres, EmbeddedRedis(folder / "redis") as redis:
        yield Stores(postgres, redis)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, stores: Stores) -> AsyncIterator[SmallMesh]:
    folder = tmp_path_factory.mktemp("mesh")
    quick = {f"PLAIT_{service}_REGISTRY__FIRST_SNAPSHOT_TIMEOUT_S": "1" for service in ("ROUTER", "FEATURE_RETRIEVAL", "MODEL_WORKER")}
    dsn = stores.postgres.create_database("mesh")
    async with small_mesh(folder, quick, postgres_dsn=dsn, redis_url=stores.redis.url) as world:
        yield world


async def test_without_redis_answers_are_degraded_and_say_so_and_recover(mesh: SmallMesh, stores: Stores) -> None:
    async with mesh.client() as client:
        before = await client.rank(ROUTE, "u1", list(mesh.items)[:20])
        await stores.redis.child.stop(signal.SIGKILL, grace_s=5)
        degraded = await mesh.rank_until(client, lambda ranking: ranking.degraded_reasons == ("features_unavailable",))
        assert len(degraded.items) == 20
        await stores.redis.start()
        after = await mesh.rank_until(client, lambda ranking: not ranking.degraded_reasons)
    assert after.items == before.items


async def test_without_postgres_everything_goes_on_also_after_a_restart(mesh: SmallMesh, stores: Stores) -> None:
    async with mesh.client() as client:
        before = await client.rank(ROUTE, "u1", list(mesh.items)[:20])
        assert stores.postgres.child is not None
        await stores.postgres.child.stop(signal.SIGINT, grace_s=20)
        try:
            assert (await client.rank(ROUTE, "u1", list(mesh.items)[:20])).items == before.items
            for name in ("router", "feature-retrieval", "model-worker"):
                pid = mesh.endpoints.pids[name]
                os.kill(pid, signal.SIGKILL)
                await _until_gone(pid)
            again = await mesh.rank_until(client, lambda ranking: ranking.items == before.items)
            assert again.degraded_reasons == ()
        finally:
            await stores.postgres.start()
        second = small_ranker.publish(mesh.folder / "ranker-2", seed=2)
        await mesh.apply(small_ranker.model("ranker", mesh.artifact, second))
        await mesh.rank_until(client, lambda ranking: ranking.version == "2")
        back = dataclasses.replace(small_ranker.model("ranker", mesh.artifact, second), aliases={"champion": "1"})
        await mesh.apply(back)
        await mesh.rank_until(client, lambda ranking: ranking.version == "1")


@pytest.mark.parametrize("victim", ["model-worker", "feature-retrieval"])
async def test_a_killed_service_is_a_typed_error_or_a_degraded_answer_until_it_is_back(mesh: SmallMesh, victim: str) -> None:
    async with mesh.client(retries=0) as client:
        os.kill(mesh.endpoints.pids[victim], signal.SIGKILL)
        give_up = asyncio.get_running_loop().time() + 30
        errors: list[PlaitError] = []
        degraded: list[str] = []
        while asyncio.get_running_loop().time() < give_up:
            try:
                ranking = await client.rank(ROUTE, "u1", list(mesh.items)[:20], timeout_s=5)
            except PlaitError as error:
                errors.append(error)
            else:
                if not ranking.degraded_reasons:
                    break
                degraded.extend(ranking.degraded_reasons)
            await asyncio.sleep(0.01)
        else:
            pytest.fail(f"{victim} did not come back: {errors[-3:]} {degraded[-3:]}")
    assert errors or degraded, "nothing was noticed of the kill"
    assert all(isinstance(error, Unavailable | NotFound) and error.retry_after_s is not None for error in errors), errors


async def test_calls_under_way_when_the_router_drains_are_answered(mesh: SmallMesh) -> None:
    async with mesh.client(retries=0) as client:
        calls = [asyncio.create_task(client.rank(ROUTE, "u1", list(mesh.items), timeout_s=20)) for _ in range(50)]
        await asyncio.sleep(0)
        os.kill(mesh.endpoints.pids["router"], signal.SIGTERM)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for outcome in outcomes:
            assert not isinstance(outcome, BaseException) or isinstance(outcome, Unavailable), outcome
        await mesh.rank_until(client, lambda ranking: not ranking.degraded_reasons)


async def test_nothing_is_left_behind(tmp_path: Path) -> None:
    async with small_mesh(tmp_path, {}) as world:
        endpoints = world.endpoints
        assert (tmp_path / "state" / "endpoints.json").exists()
    for name, pid in endpoints.pids.items():
        assert not Path(f"/proc/{pid}").exists(), name
    addresses = [endpoints.router, endpoints.feature_retrieval, endpoints.model_worker, *endpoints.metrics.values()]
    for address in addresses:
        host, _, port = address.rpartition(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host.removeprefix("http://"), int(port))) != 0, address
    assert not (tmp_path / "state" / "endpoints.json").exists()


async def _until_gone(pid: int) -> None:
    give_up = asyncio.get_running_loop().time() + 20
    while Path(f"/proc/{pid}").exists():
        assert asyncio.get_running_loop().time() < give_up
        await asyncio.sleep(0.01)
