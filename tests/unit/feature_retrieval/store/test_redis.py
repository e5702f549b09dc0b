"""The row store on a real Redis: what wins, what a chunk boundary does not change, and what breaks when Redis breaks."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.tcp_proxy import TcpProxy

from feature_retrieval.store.redis import APPLIED, READ_CHUNK, WRITE_CHUNK, RedisStore
from feature_retrieval.store.tracking import Listener
from plait.errors import Unavailable
from plait.local.redis import EmbeddedRedis


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RedisStore]:
    store = RedisStore(url, **options)
    try:
        yield store
    finally:
        await store.close()


@pytest_asyncio.fixture
async def store(redis_url: str) -> AsyncIterator[RedisStore]:
    async with opened(redis_url) as store:
        yield store


async def write(store: RedisStore, keys: Sequence[bytes], rows: Sequence[bytes], ttl_ms: int) -> int:
    """Write rows of entities that nobody ever erased; return how many were newer."""
    return (await store.write(keys, [b"mark of " + key for key in keys], rows, ttl_ms)).count(APPLIED)


async def eventually(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.005)


def row(event_time_us: int = 1, sequence: int = 0, tail: bytes = b"") -> bytes:
    return struct.pack("<HHIqqQ", 1, 1, 0, event_time_us, 0, sequence) + tail


def keys(count: int, prefix: str = "k") -> list[bytes]:
    return [f"{prefix}{n}".encode() for n in range(count)]


# --- writes -------------------------------------------------------------------------------------------------------------------------------

# Where comparing goes wrong: signs, the halves of a 64-bit number, what a double cannot hold, bytes above 127, prefixes.
_TIMES = st.sampled_from([-(1 << 63), -1, 0, 1, (1 << 32) - 1, 1 << 32, (1 << 53), (1 << 53) + 1, (1 << 63) - 1, -(1 << 32)])
_SEQUENCES = st.sampled_from([0, 1, (1 << 31), (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 63), (1 << 64) - 1])
_TAILS = st.sampled_from([b"", b"\0", b"\x7f", b"\x80", b"\xff", b"a", b"ab", b"B", b"\r\n"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.builds(row, _TIMES, _SEQUENCES, _TAILS), min_size=1, max_size=6), seed=st.integers(0, 99))
async def test_the_greatest_row_wins_in_any_order_and_repetition(redis_server: EmbeddedRedis, rows: list[bytes], seed: int) -> None:
    def rank(data: bytes) -> tuple[int, int, bytes]:
        _, _, _, event_time_us, _, sequence = struct.unpack("<HHIqqQ", data[:32])
        return event_time_us, sequence, data

    with redis.Redis.from_url(redis_server.url) as client:
        client.delete("k0")
    sent = rows + rows[::2]
    random.Random(seed).shuffle(sent)  # noqa: S311
    best: bytes | None = None
    async with opened(redis_server.url) as store:
        for data in sent:
            applied = await write(store, [b"k0"], [data], 0)
            assert applied == int(best is None or rank(data) > rank(best))
            best = data if applied else best
        assert (await store.read([b"k0"], 10)).rows == [max(rows, key=rank)]


async def test_what_is_too_short_to_be_a_row_is_replaced(store: RedisStore, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set("k0", b"x" * 31)
    assert await write(store, [b"k0"], [row(-5)], 0) == 1


async def test_rows_of_one_call_are_ordered_too(store: RedisStore) -> None:
    assert await write(store, [b"k0"] * 3, [row(2), row(3), row(1)], 0) == 2
    assert (await store.read([b"k0"], 10)).rows == [row(3)]


async def test_chunks_change_nothing(store: RedisStore) -> None:
    count = 2 * READ_CHUNK + 1
    rows = [row(n + 1, tail=str(n).encode()) for n in range(count)]
    assert await write(store, keys(count), rows, 0) == count
    assert await write(store, keys(count), rows, 0) == 0
    wanted = [key for n, key in enumerate(keys(count)) for key in ([key, b"absent"] if n % 3 == 0 else [key])]
    found = await store.read(wanted, 10)
    assert found.whole
    assert [data for data in found.rows if data is not None] == rows
    assert [wanted[n] for n, data in enumerate(found.rows) if data is None] == [b"absent"] * len(range(0, count, 3))


async def test_a_script_call_is_small(store: RedisStore, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        await write(store, keys(1), [row()], 0)
        client.config_resetstat()
        await write(store, keys(3 * WRITE_CHUNK + 1), [row()] * (3 * WRITE_CHUNK + 1), 0)
        stats: Any = client.info("commandstats")
    assert stats["cmdstat_evalsha"]["calls"] == 4


async def test_a_redis_that_lost_the_script_is_given_it_again(store: RedisStore, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for turn in range(1, 3):
            client.script_flush()
            assert await write(store, keys(200), [row(turn)] * 200, 0) == 200
        assert client.dbsize() == 200


async def test_what_is_written_together_does_not_expire_together(store: RedisStore) -> None:
    keys = [b"k%d" % n for n in range(100)]
    await write(store, keys, [row()] * 100, 60_000)
    left = await store.times_to_live(keys)
    assert max(left) - min(left) > 3_000  # of 6 s
    assert min(left) > 59_000


@pytest.mark.parametrize(("ttl_ms", "low", "high"), [(0, -1, -1), (60_000, 59_000, 66_000)])
async def test_time_to_live(store: RedisStore, redis_url: str, ttl_ms: int, low: int, high: int) -> None:
    await write(store, [b"k0"], [row()], ttl_ms)
    with redis.Redis.from_url(redis_url) as client:
        assert low <= int(client.pttl("k0")) <= high


async def test_keys_and_rows_may_hold_any_bytes(store: RedisStore) -> None:
    odd = [b"", b"\0", b"a b\r\n$3", b"{}", bytes(range(256)), "ü漢".encode()]
    rows = [row(tail=key[::-1]) for key in odd]
    await write(store, odd, rows, 0)
    assert (await store.read(odd, 10)).rows == rows


# --- reads, bounded -----------------------------------------------------------------------------------------------------------------------


async def test_without_time_nothing_arrives(store: RedisStore) -> None:
    await write(store, [b"k0"], [row()], 0)
    for timeout_s in (0.0, -1.0):
        found = await store.read([b"k0", b"k1"], timeout_s)
        assert (found.rows, found.late.tolist(), found.failed.tolist()) == ([None, None], [0, 1], [])
        assert not found.whole
    assert (await store.read([b"k0", b"k1"], 10)).rows == [row(), None]
    assert not store.down  # the caller's lack of time is not Redis' fault


async def test_reads_and_writes_share_few_connections(redis_url: str) -> None:
    async with opened(redis_url, connections=3) as store:
        await write(store, keys(50), [row(n + 1) for n in range(50)], 0)
        answers = await asyncio.gather(*(store.read(keys(50)[n : n + 1], 20) for n in range(50)))
        assert [answer.rows for answer in answers] == [[row(n + 1)] for n in range(50)]
        assert repr(store) == "<RedisStore up connections=0+3>"
    assert repr(store) == "<RedisStore up connections=0+0>"


async def test_who_gives_up_never_leaves_an_answer_to_the_next(redis_url: str) -> None:
    count = 3_000
    async with opened(redis_url, connections=2) as store:
        await write(store, keys(count), [row(n + 1) for n in range(count)], 0)
        random_source = random.Random(1)  # noqa: S311

        async def read(at: int) -> bool:
            size = random_source.choice([1, 1_500])
            wanted = [(at * 37 + n) % count for n in range(size)]
            found = await store.read([b"k%d" % n for n in wanted], random_source.choice([0.0, 0.0005, 0.002, 20]))
            arrived = size - len(found.late)
            assert found.rows == [row(n + 1) for n in wanted[:arrived]] + [None] * (size - arrived)
            return arrived == size

        tasks = [asyncio.create_task(read(n)) for n in range(60)]
        for task in tasks[::5]:
            await asyncio.sleep(0)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {r for r in results if not isinstance(r, asyncio.CancelledError)} <= {True, False}
        assert True in results
        assert (await store.read([b"k7"], 20)).rows == [row(8)]
        assert "connections=0+" in repr(store)


# --- Redis breaks -------------------------------------------------------------------------------------------------------------------------


async def test_while_redis_is_away_calls_fail_at_once_and_then_recover(redis_server: EmbeddedRedis, redis_url: str) -> None:
    host, port = redis_server.address.rsplit(":", 1)
    async with TcpProxy((host, int(port))) as door, opened(redis_url.replace(f":{port}/", f":{door.port}/")) as store:
        await write(store, [b"k0"], [row()], 0)
        await door.cut()
        for failing in (lambda: store.read([b"k0"], 20), lambda: write(store, [b"k0"], [row(2)], 0)):
            with pytest.raises(Unavailable) as caught:
                await failing()
            assert (caught.value.reason, caught.value.retry_after_s) == ("STORE_UNAVAILABLE", 0.25)
        assert "connections=0+0" in repr(store)
        door.target = (host, int(port))
        await eventually(lambda: not store.down)
        assert (await store.read([b"k0"], 20)).rows == [row()]


async def test_a_server_that_is_not_there() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with opened(f"redis://127.0.0.1:{nobody.getsockname()[1]}") as store:
            with pytest.raises(Unavailable, match="see that Redis is up"):
                await store.read([b"k0"], 20)
            assert store.down


async def test_a_server_that_never_answers_a_write() -> None:
    with socket.socket() as silent:  # the kernel accepts, nobody reads
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with opened(f"redis://127.0.0.1:{silent.getsockname()[1]}", write_timeout_s=0.1, connect_timeout_s=30) as store:
            with pytest.raises(Unavailable):
                await write(store, [b"k0"], [row()], 0)
            assert "connections=0+0" in repr(store)


async def test_a_refused_write_does_not_keep_others_from_reading(tmp_path: Any) -> None:
    async with EmbeddedRedis(tmp_path / "r") as server, opened(server.url) as store:
        await write(store, [b"k0"], [row()], 0)
        with redis.Redis.from_url(server.url) as client:
            client.config_set("maxmemory", 1)
            with pytest.raises(Unavailable, match="answered with an error") as caught:
                await write(store, [b"k1"], [row()], 0)
            assert caught.value.reason == "STORE_UNAVAILABLE"
            assert not store.down
            assert (await store.read([b"k0", b"k1"], 10)).rows == [row(), None]
            client.config_set("maxmemory", 0)
        assert await write(store, [b"k1"], [row()], 0) == 1


async def test_a_key_of_another_type_refuses_its_write_only(store: RedisStore, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.hset("k0", "field", "value")
    with pytest.raises(Unavailable):
        await write(store, keys(130), [row()] * 130, 0)
    assert await write(store, keys(3)[1:], [row(2)] * 2, 0) == 2
    assert (await store.read(keys(3), 10)).rows == [None, row(2), row(2)]


# --- changes ------------------------------------------------------------------------------------------------------------------------------


class Told(Listener):
    """Remembers what it hears."""

    def __init__(self) -> None:
        self.on = 0
        self.off = 0
        self.prefixes: list[list[bytes]] = []
        self.keys: list[bytes] = []
        self.everything = 0

    def connected(self, prefixes: Sequence[bytes]) -> None:
        self.on += 1
        self.prefixes.append(list(prefixes))

    def disconnected(self) -> None:
        self.off += 1

    def changed(self, keys: Sequence[bytes] | None) -> None:
        if keys is None:
            self.everything += 1
        else:
            self.keys += keys


@asynccontextmanager
async def watching(store: RedisStore, told: Told, prefixes: Callable[[], Sequence[bytes]]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(store.watch(prefixes, told))
    try:
        await eventually(lambda: told.on > 0 or task.done())
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_changes_of_tracked_keys_are_told(store: RedisStore, redis_url: str) -> None:
    told = Told()
    with redis.Redis.from_url(redis_url) as client:
        async with watching(store, told, lambda: [b"a", b"b{"]):
            assert told.prefixes == [[b"a", b"b{"]]
            await write(store, [b"a1", b"b{1", b"b1", b"\xff"], [row()] * 4, 0)
            client.delete("a1")
            client.set("a2", "written by somebody else", px=1)
            await eventually(lambda: told.keys.count(b"a2") >= 2)  # written, and expired
            assert set(told.keys) == {b"a1", b"a2", b"b{1"}
            await write(store, [b"b{1"], [row()], 0)  # not newer: nothing changed
            client.flushall()
            await eventually(lambda: told.everything > 0)
            assert told.keys.count(b"b{1") == 1
            assert told.off == 0
    assert told.off == 1


async def test_when_the_tracking_connection_breaks_it_is_told(store: RedisStore, redis_url: str) -> None:
    told = Told()
    with redis.Redis.from_url(redis_url) as client:
        async with watching(store, told, lambda: [b"a"]) as task:
            client.client_kill_filter(_type="normal", skipme=True)
            with pytest.raises(Unavailable):
                await asyncio.wait_for(task, 20)
            assert told.off == 1


async def test_when_the_prefixes_change_it_begins_anew(store: RedisStore) -> None:
    told = Told()
    wanted = [b"a"]
    async with watching(store, told, lambda: wanted) as task:
        wanted.append(b"b")
        await asyncio.wait_for(task, 20)
        assert (told.on, told.off) == (1, 1)


async def test_without_a_server_tracking_never_begins() -> None:
    told = Told()
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with opened(f"redis://127.0.0.1:{nobody.getsockname()[1]}") as store:
            with pytest.raises(Unavailable):
                await store.watch(lambda: [b"a"], told)
    assert told.on == 0
