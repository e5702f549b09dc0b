"""That what is said of a write is true: servers are killed after it was said, and come back."""

from __future__ import annotations

import asyncio
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from tests.fakes.redis_cluster import RedisCluster
from tests.fakes.redis_places import Place

from feature_retrieval.settings import RowStoreSettings
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, Unavailable
from plait.local.redis import EmbeddedRedis
from plait.redis.dispatch import Receipt


def row(event_time_us: int) -> bytes:
    return struct.pack("<HHIqqQ", 1, 1, 0, event_time_us, 0, 0)


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RedisStore]:
    store = RedisStore(url, **options)
    try:
        yield store
    finally:
        await store.close()


async def write(store: RedisStore, event_time_us: int, key: bytes = b"k") -> Receipt:
    receipt = Receipt()
    await store.write([key], [b"{m}"], [row(event_time_us)], 0, receipt)
    return receipt


async def kill(server: EmbeddedRedis) -> None:
    """End the server as a crash does, and start it again on what is on the disk."""
    await server.child.stop(signal.SIGKILL, grace_s=10)
    await server.start()


async def eventually_read(store: RedisStore, keys: list[bytes]) -> list[bytes | None]:
    while True:  # the store rests for a moment after it met the dead server
        try:
            return (await store.read(keys, 20)).rows
        except Unavailable:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("ack", ["auto", "synced"])
@pytest.mark.parametrize("appendfsync", ["everysec", "always"])
async def test_what_is_called_synced_survives_a_kill(tmp_path: Path, ack: str, appendfsync: str) -> None:
    async with EmbeddedRedis(tmp_path / "r", options={"appendfsync": appendfsync}) as server, opened(server.url, ack=ack) as store:

        async def one(n: int) -> bytes:
            key = b"k%d" % n
            assert await store.settle(await write(store, n + 1, key)) == pb.DURABILITY_SYNCED
            return key

        keys = await asyncio.gather(*(one(n) for n in range(40)))
        await kill(server)
        assert await eventually_read(store, keys) == [row(n + 1) for n in range(40)]


async def test_what_a_killed_server_took_is_never_called_safe(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path / "r") as server, opened(server.url) as store:
        old = await write(store, 1)
        await kill(server)
        await eventually_read(store, [b"k"])
        with pytest.raises(Unavailable, match="write them again") as caught:
            await store.settle(old)
        assert caught.value.reason == "NOT_DURABLE"
        assert await store.settle(await write(store, 1)) == pb.DURABILITY_SYNCED


async def test_without_an_append_only_file_it_says_applied_until_there_is_one(tmp_path: Path) -> None:
    options = {"appendonly": "no"}
    async with (
        EmbeddedRedis(tmp_path / "r", options=options) as server,
        opened(server.url, ack="auto") as lax,
        opened(server.url, ack="synced") as strict,
    ):
        assert await lax.settle(await write(lax, 1)) == pb.DURABILITY_APPLIED
        with pytest.raises(FailedPrecondition, match="appendonly yes") as caught:
            await strict.settle(await write(strict, 2))
        assert caught.value.reason == "ACK_NOT_POSSIBLE"
        with redis.Redis.from_url(server.url) as client:
            client.config_set("appendonly", "yes")
        assert await strict.settle(await write(strict, 3)) == pb.DURABILITY_SYNCED


async def test_who_may_not_ask_the_server_s_name_is_told_no_more_than_is_known(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path / "r") as server:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("ACL SETUSER", "app", "on", ">secret", "~*", "+@all", "-info")
        url = f"redis://app:secret@{server.address}"
        async with opened(url, ack="auto") as lax, opened(url, ack="synced") as strict:
            assert await lax.settle(await write(lax, 1)) == pb.DURABILITY_APPLIED
            with pytest.raises(FailedPrecondition, match="INFO"):
                await strict.settle(await write(strict, 2))


async def test_replicated_means_that_so_many_replicas_have_it() -> None:
    common = {"requirepass": "secret", "masterauth": "secret", "repl-diskless-sync-delay": "0"}
    async with EmbeddedRedis(options=common) as primary:
        replica_of = {"replicaof": primary.address.replace(":", " ")}
        async with EmbeddedRedis(options=common | replica_of) as replica:
            with redis.Redis.from_url(primary.url) as client:
                while int(client.info("replication")["connected_slaves"]) < 1:
                    await asyncio.sleep(0.02)
                async with (
                    opened(primary.url, ack="replicated") as store,
                    opened(primary.url, ack="replicated", replicas=2, write_timeout_s=0.2) as more,
                ):
                    receipt = await write(store, 1)
                    assert await store.settle(receipt) == pb.DURABILITY_REPLICATED
                    with redis.Redis.from_url(replica.url) as behind:
                        assert behind.get("k") == row(1)
                    with pytest.raises(Unavailable, match="1 of 2 replicas"):
                        await more.settle(await write(more, 2))


async def test_many_who_wait_share_a_barrier_and_none_sent_before_their_write(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path / "r") as server, opened(server.url) as store:
        with redis.Redis.from_url(server.url) as client:
            receipt = await write(store, 1)
            client.config_resetstat()
            gone = asyncio.create_task(store.settle(receipt))
            waiting = [asyncio.create_task(store.settle(receipt)) for _ in range(50)]
            await asyncio.sleep(0)
            gone.cancel()  # who leaves leaves alone
            assert set(await asyncio.gather(*waiting)) == {pb.DURABILITY_SYNCED}
            stats: Any = client.info("commandstats")
        assert stats["cmdstat_waitaof"]["calls"] <= 2


async def test_a_server_that_holds_nothing_any_more_vouches_for_nothing() -> None:
    async with RedisCluster() as cluster:
        place = Place(RowStoreSettings.model_validate({"mode": "cluster", "url": cluster.url}), cluster.flush)
        store = place.open(ack="replicated")
        try:
            receipt = await write(store, 1, b"{m}k")
            [(node, _)] = receipt.places
            store.topology._primaries = tuple(one for one in store.topology.primaries() if one is not node)  # type: ignore[attr-defined]
            for _ in range(20):  # no lane is lost to it
                with pytest.raises(Unavailable):
                    await store.settle(receipt)
        finally:
            await store.close()


async def test_waits_for_the_disk_overlap(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path / "r") as server, opened(server.url, connections=8) as store:

        async def one(n: int) -> int:
            for turn in range(3):
                assert await store.settle(await write(store, turn + 1, b"k%d" % n)) == pb.DURABILITY_SYNCED
            return n

        tasks = [asyncio.create_task(one(n)) for n in range(30)]
        tasks[0].cancel()
        assert await asyncio.gather(*tasks[1:]) == list(range(1, 30))
        with redis.Redis.from_url(server.url) as client:
            assert int(client.info("clients")["connected_clients"]) <= 9
