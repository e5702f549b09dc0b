"""What moves while it is used: slots between servers, servers that die, and primaries that are replaced."""

from __future__ import annotations

import asyncio
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.fakes.redis_cluster import RedisCluster
from tests.fakes.redis_places import Place
from tests.fakes.redis_sentinel import SENTINEL_PASSWORD, SERVICE, RedisSentinel

from feature_retrieval.row_codec import KeySpace
from feature_retrieval.settings import RowStoreSettings
from feature_retrieval.store.redis import APPLIED, OLDER, RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import Unavailable
from plait.redis.commands import slot_of
from plait.redis.dispatch import Receipt

SPACE = KeySpace.of("shop", "item", "stats", 1)
IDS = list(range(150))


def row(event_time_us: int) -> bytes:
    return struct.pack("<HHIqqQ", 1, 1, 0, event_time_us, 0, 0)


@asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[RedisStore]:
    place = Place(RowStoreSettings.model_validate(options), lambda: None)
    store = place.open(ack="auto")
    try:
        yield store
    finally:
        await store.close()


async def write(store: RedisStore, event_time_us: int, ids: list[int] = IDS, receipt: Receipt | None = None) -> bytes:
    return await store.write(SPACE.keys(ids), SPACE.mark_keys(ids), [row(event_time_us)] * len(ids), 0, receipt)


class Move:
    """Hands a slot from one server to another, in the three steps that an operator's tool takes."""

    def __init__(self, cluster: RedisCluster, slot: int, source: int, target: int) -> None:
        self._slot = slot
        self._source: Any = cluster.client(source)
        self._target: Any = cluster.client(target)
        self._address = cluster.nodes[target].address.split(":")
        self._password = cluster.nodes[target].url.split(":")[2].split("@")[0]
        self._names = [client.execute_command("CLUSTER MYID").decode() for client in (self._source, self._target)]

    def begin(self) -> None:
        self._target.execute_command("CLUSTER SETSLOT", self._slot, "IMPORTING", self._names[0])
        self._source.execute_command("CLUSTER SETSLOT", self._slot, "MIGRATING", self._names[1])

    def hand_over(self, limit: int = 1000) -> None:
        keys = self._source.execute_command("CLUSTER GETKEYSINSLOT", self._slot, limit)
        if keys:
            self._source.execute_command("MIGRATE", *self._address, "", 0, 5000, "AUTH", self._password, "KEYS", *keys)

    def end(self) -> None:
        for client in (self._target, self._source):
            client.execute_command("CLUSTER SETSLOT", self._slot, "NODE", self._names[1])
            client.close()


async def test_rows_are_right_while_their_slots_move(redis_cluster: RedisCluster) -> None:
    redis_cluster.flush()
    slots = [slot_of(key) for key in SPACE.keys(IDS)]
    moving = sorted(slot for slot in set(slots) if slot < 16384 // 3)[:2]
    assert len(moving) == 2
    where = {"mode": "cluster", "url": redis_cluster.url}
    async with opened(**where) as store, opened(**where) as reader:
        await write(store, 1)
        assert (await reader.read(SPACE.keys(IDS), 20)).whole  # it knows where the slots were
        time_us = 1
        for source, target in ((0, 1), (1, 0)):  # and back again, as other tests want them
            for slot in moving:
                stuck = [who for who in IDS if slots[who] == slot]
                move = Move(redis_cluster, slot, source, target)
                before, time_us = time_us, time_us + 1
                for step in (move.begin, lambda move=move: move.hand_over(1), move.hand_over):
                    step()
                    with pytest.raises(Unavailable):  # Redis takes no command on two keys of a slot on the move: row and mark
                        await write(store, time_us)
                    found = await reader.read(SPACE.keys(IDS), 20)
                    assert found.whole
                    assert found.rows == [row(before if who in stuck else time_us) for who in IDS]
                move.end()
                assert await write(store, time_us) == bytes(APPLIED if who in stuck else OLDER for who in IDS)
                assert (await reader.read(SPACE.keys(IDS), 20)).rows == [row(time_us)] * len(IDS)
    await redis_cluster.settled()


async def test_a_dead_server_of_a_cluster_takes_only_its_own_rows_with_it() -> None:
    async with RedisCluster() as cluster:
        where = {"mode": "cluster", "url": cluster.url, "nodes": cluster.nodes[1].address}
        async with opened(**where) as store:
            await write(store, 1)
            await cluster.nodes[0].child.stop(signal.SIGKILL, grace_s=10)  # the one it was told of first
            mine = [slot_of(key) <= 16384 // 3 for key in SPACE.keys(IDS)]
            for _ in range(2):
                found = await store.read(SPACE.keys(IDS), 20)
                assert found.failed.tolist() == [who for who in IDS if mine[who]]
                assert not found.late.size
                assert found.rows == [None if mine[who] else row(1) for who in IDS]
            with pytest.raises(Unavailable):
                await write(store, 2)
            with pytest.raises(Unavailable):
                await store.read(SPACE.keys([who for who in IDS if mine[who]]), 20)
            assert not store.down
            alive = [who for who in IDS if not mine[who]]
            assert await write(store, 3, alive) == bytes([APPLIED]) * len(alive)
            async with opened(**where) as late_comer:
                assert (await late_comer.read(SPACE.keys(alive), 20)).rows == [row(3)] * len(alive)


async def test_writes_go_on_after_a_failover_and_nothing_replicated_is_lost() -> None:
    async with RedisSentinel() as sentinel:
        place = Place(
            RowStoreSettings.model_validate(
                {
                    "mode": "sentinel",
                    "url": sentinel.url,
                    "nodes": sentinel.address,
                    "sentinel_service": SERVICE,
                    "sentinel_password": SENTINEL_PASSWORD,
                }
            ),
            sentinel.flush,
        )
        store = place.open(ack="replicated")
        try:
            old = sentinel.primary()
            receipt = Receipt()
            await write(store, 1, receipt=receipt)
            assert await store.settle(receipt) == pb.DURABILITY_REPLICATED
            await old.child.stop(signal.SIGKILL, grace_s=10)
            with pytest.raises(Unavailable):
                await write(store, 2, [0])
            with pytest.raises(Unavailable):
                await store.settle(receipt)
            port = old.address.split(":")[1]
            await sentinel.eventually(lambda primary: str(primary["port"]) != port)
            while True:
                try:
                    assert await write(store, 2, IDS[:75]) == bytes([APPLIED]) * 75
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
            assert (await store.read(SPACE.keys(IDS), 20)).rows == [row(2)] * 75 + [row(1)] * 75
        finally:
            await store.close()
