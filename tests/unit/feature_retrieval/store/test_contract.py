"""What the store promises, on every topology: one server, a cluster, behind Sentinel, through TLS."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.redis_places import Place

from feature_retrieval.replicas import Replicas
from feature_retrieval.row_codec import KeySpace
from feature_retrieval.store.redis import APPLIED, ERASED, OLDER, RedisStore, Swap
from feature_retrieval.store.tracking import Listener
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, InvalidArgument, Unavailable
from plait.redis.commands import pack
from plait.redis.dispatch import Receipt

FLAG_BACKFILL = 2
SPACE = KeySpace.of("shop", "item", "stats", 1)
OTHER = KeySpace.of("shop", "item", "text", 1)


def row(event_time_us: int, sequence: int = 0, tail: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack("<HHIqqQ", 1, 1, flags, event_time_us, 0, sequence) + tail


def rank(data: bytes) -> tuple[int, int, bool, bytes]:
    _, _, flags, event_time_us, _, sequence = struct.unpack("<HHIqqQ", data[:32])
    return event_time_us, sequence, not flags & FLAG_BACKFILL, data


async def write(store: RedisStore, ids: Sequence[Any], rows: Sequence[bytes], ttl_ms: int = 0, receipt: Receipt | None = None) -> bytes:
    return await store.write(SPACE.keys(ids), SPACE.mark_keys(ids), rows, ttl_ms, receipt)


async def read(store: RedisStore, ids: Sequence[Any], space: KeySpace = SPACE) -> list[bytes | None]:
    found = await store.read(space.keys(ids), 20)
    assert found.whole
    return found.rows


# --- rows ---------------------------------------------------------------------------------------------------------------------------------


async def test_rows_come_back_in_the_order_asked(placed: RedisStore) -> None:
    ids = [f"item-{n}" for n in range(700)]
    rows = [row(n + 1, tail=b"%d" % n) for n in range(700)]
    assert await write(placed, ids, rows) == bytes([APPLIED]) * 700
    assert await write(placed, ids, rows) == bytes([OLDER]) * 700
    order = list(range(700))
    random.Random(3).shuffle(order)  # noqa: S311
    wanted = [f"item-{n}" for n in order for n in (n, n + 10_000)]
    assert await read(placed, wanted) == [part for n in order for part in (rows[n], None)]
    assert not (await placed.read(SPACE.keys(ids), 0)).whole


_TIMES = st.sampled_from([-1, 1, (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 63) - 1])
_TAILS, _FLAGS = st.sampled_from([b"", b"\0", b"\x7f", b"\xff", b"ab"]), st.sampled_from([0, FLAG_BACKFILL])
_ROWS = st.builds(row, _TIMES, st.sampled_from([0, 1, 1 << 63]), _TAILS, _FLAGS)
_STEPS = st.lists(st.tuples(st.integers(0, 3), _ROWS | _TIMES), min_size=1, max_size=12)  # an entity, and its new row or its erasure


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_STEPS, seed=st.integers(0, 99))
async def test_the_greatest_row_wins_whoever_comes_last_and_no_erased_one_returns(place: Place, steps: list[Any], seed: int) -> None:
    place.flush()
    store = place.open(ack="applied")
    best: dict[int, bytes] = {}
    marks: dict[int, int] = {}
    try:
        for who, what in steps + random.Random(seed).sample(steps, len(steps)):  # noqa: S311
            if isinstance(what, int):
                held = await read(store, [who])
                assert await store.erase(SPACE.mark_keys([who]), [SPACE.keys([who])], [what]) == [int(held != [None])]
                marks[who] = max(what, marks.get(who, what))
                best.pop(who, None)
                continue
            expected = OLDER
            if who in marks and rank(what)[0] <= marks[who]:
                expected = ERASED
            elif who not in best or rank(what) > rank(best[who]):
                best[who], expected = what, APPLIED
            assert await write(store, [who], [what]) == bytes([expected])
        assert await read(store, range(4)) == [best.get(who) for who in range(4)]
    finally:
        await store.close()


async def test_one_call_may_hold_an_entity_s_rows_of_several_times(placed: RedisStore) -> None:
    assert await write(placed, ["a", "b", "a", "a"], [row(2), row(9), row(3), row(1)]) == bytes([APPLIED, APPLIED, APPLIED, OLDER])
    assert await read(placed, ["a", "b"]) == [row(3), row(9)]


async def test_times_to_live_are_spread_and_never_too_short(placed: RedisStore) -> None:
    ids = list(range(200))
    await write(placed, ids, [row(1)] * 200, ttl_ms=1_000_000)
    lives = [await placed.dispatch.one(key, b"PTTL", [key]) for key in SPACE.keys(ids)]
    assert min(lives) > 950_000
    assert max(lives) <= 1_100_000
    assert len({life // 10_000 for life in lives}) > 5


# --- erasing ------------------------------------------------------------------------------------------------------------------------------


async def test_erasing_takes_every_key_of_many_entities(placed: RedisStore) -> None:
    ids = [f"e{n}" for n in range(5)]
    await write(placed, ids, [row(5)] * 5)
    await placed.write(OTHER.keys(ids), OTHER.mark_keys(ids), [row(5)] * 5, 0)
    many = [[*SPACE.keys([one]), *OTHER.keys([one]), *(SPACE.applied_key(one, bucket) for bucket in range(150))] for one in ids]
    assert await placed.erase(SPACE.mark_keys(ids), many, [7, 7, 7, 7, (1 << 63) - 1]) == [2] * 5
    assert await placed.erase(SPACE.mark_keys(ids[:1]), [[]], [3]) == [0]  # never lowers it
    assert await read(placed, ids) == [None] * 5
    assert await write(placed, ids, [row(7)] * 5) == bytes([ERASED]) * 5
    assert await write(placed, ids, [row(8)] * 5) == bytes([APPLIED]) * 4 + bytes([ERASED])
    assert await placed.erase([], [], []) == []


# --- swapping -----------------------------------------------------------------------------------------------------------------------------


def swap(one: str, old: bytes | None, new: bytes, mark: bytes | None = None, fingerprints: Sequence[int] = ()) -> Swap:
    [key], [mark_key] = SPACE.keys([one]), SPACE.mark_keys([one])
    applied = {SPACE.applied_key(one, 4): fingerprints} if fingerprints else {}
    return Swap(key=key, mark_key=mark_key, old=old, mark=mark, new=new, applied=applied, ttl_ms=500_000, applied_ttl_ms=600_000)


async def test_a_swap_wins_only_against_what_was_read(placed: RedisStore) -> None:
    ids = ["a", "b", "c"]
    assert await placed.swap([swap(one, None, b"1" + one.encode(), fingerprints=[1, -(1 << 63)]) for one in ids]) == [True] * 3
    await placed.erase(SPACE.mark_keys(["c"]), [[]], [9])
    tried = [
        swap("a", None, b"x"),
        swap("a", b"1a", b"2a", fingerprints=list(range(5_000))),
        swap("b", b"1b ", b"x"),
        swap("c", b"1c", b"x"),
    ]
    assert await placed.swap(tried) == [False, True, False, False]
    assert await placed.swap([swap("c", b"1c", b"2c", mark=struct.pack("<q", 9))]) == [True]
    assert await read(placed, ids) == [b"2a", b"1b", b"2c"]
    sets = [SPACE.applied_key(one, 4) for one in ("a", "b", "none")]
    assert await placed.applied(sets, [[4_999, 5_000, -(1 << 63)], [1, 2], [1]]) == [[True, False, True], [True, False], [False]]
    assert 400_000 < await placed.dispatch.one(SPACE.keys(["a"])[0], b"PTTL", SPACE.keys(["a"])) <= 500_000
    assert 500_000 < await placed.dispatch.one(sets[0], b"PTTL", [sets[0]]) <= 600_000
    assert await placed.swap([]) == []


async def test_of_many_who_swap_at_once_every_one_counts_once(placed: RedisStore) -> None:
    async def count(one: str) -> None:
        while True:
            [old] = await read(placed, [one])
            if (await placed.swap([swap(one, old, b"%d" % (int(old or b"0") + 1))]))[0]:
                return

    await asyncio.gather(*(count(one) for one in ("a", "b") for _ in range(15)))
    assert await read(placed, ["a", "b"]) == [b"15", b"15"]


# --- durability ---------------------------------------------------------------------------------------------------------------------------


async def test_what_is_only_in_memory_is_called_applied(placed: RedisStore) -> None:
    receipt = Receipt()
    await write(placed, list(range(50)), [row(1)] * 50, receipt=receipt)
    assert {await placed.settle(receipt) for _ in range(3)} == {pb.DURABILITY_APPLIED}
    assert await placed.settle(Receipt()) == pb.DURABILITY_APPLIED


async def test_more_than_there_is_cannot_be_had(place: Place) -> None:
    for ack, error, reason in (("synced", FailedPrecondition, "ACK_NOT_POSSIBLE"), ("replicated", Unavailable, "NOT_DURABLE")):
        place_settings = place.settings.model_copy(update={"write_timeout_s": 0.2})
        store = Place(place_settings, place.flush).open(ack=ack, replicas=7)
        try:
            receipt = Receipt()
            await write(store, [1], [row(1)], receipt=receipt)
            with pytest.raises(error) as caught:
                await store.settle(receipt)
            assert caught.value.reason == reason
        finally:
            await store.close()


# --- streams ------------------------------------------------------------------------------------------------------------------------------


async def test_a_group_takes_every_entry_once_and_again_what_was_left(placed: RedisStore) -> None:
    streams, keys = placed.streams, [b"e1{a}", b"e1{b}"]
    assert await streams.read_group(keys, b"g", b"one", count=2, timeout_s=0.05) == {}
    ids = await streams.append([keys[0]] * 3 + [keys[1]], [{b"e": b"%d" % n, b"t": b""} for n in range(4)])
    first = await streams.read_group(keys, b"g", b"one", count=2, timeout_s=5)
    assert {key: [(entry.id, entry.fields[b"e"]) for entry in found] for key, found in first.items()} == {
        keys[0]: [(ids[0], b"0"), (ids[1], b"1")],
        keys[1]: [(ids[3], b"3")],
    }
    state = await streams.state(keys[0], b"g")
    assert (state.lag, state.pending) == (1, 2)
    assert await streams.acknowledge(keys[0], b"g", ids[:1]) == 1
    assert [entry.id for entry in await streams.claim(keys[0], b"g", b"two", idle_s=0, count=10)] == [ids[1]]
    assert await streams.claim(keys[0], b"g", b"two", idle_s=60, count=10) == []
    assert [entry.id for entry in (await streams.read_group(keys[:1], b"g", b"two", count=9, timeout_s=5))[keys[0]]] == [ids[2]]
    assert await streams.acknowledge(keys[0], b"g", ids[:3]) == 2
    assert await streams.acknowledge(keys[0], b"g", []) == 0
    state = await streams.state(keys[0], b"g")
    assert (state.lag, state.pending) == (0, 0)


async def test_consumers_that_hold_nothing_and_ask_no_more_are_forgotten(placed: RedisStore) -> None:
    streams, key = placed.streams, b"e1{a}"
    assert await streams.forget_consumers(key, b"g", b"me", idle_s=0, limit=10) == 0  # there is no stream
    await streams.append([key] * 2, [{b"e": b"0"}] * 2)
    assert await streams.forget_consumers(key, b"g", b"me", idle_s=0, limit=10) == 0  # there is no group
    for name in (b"holds", b"me", b"a", b"b", b"c"):
        await streams.read_group([key], b"g", name, count=2, timeout_s=0)

    async def names() -> list[bytes]:
        (found,) = await streams.ask(key, [pack(b"XINFO", [b"CONSUMERS", key, b"g"])])
        return sorted(dict(zip(fields[::2], fields[1::2], strict=True))[b"name"] for fields in found)

    assert await streams.forget_consumers(key, b"g", b"me", idle_s=3600, limit=10) == 0
    async with asyncio.timeout(20):
        removed: list[int] = []
        while sum(removed) < 3:
            removed.append(await streams.forget_consumers(key, b"g", b"me", idle_s=0, limit=2))
    assert max(removed) == 2
    assert await names() == [b"holds", b"me"]
    assert len(await streams.claim(key, b"g", b"me", idle_s=0, count=10)) == 2  # nothing of it was lost
    async with asyncio.timeout(20):
        while await names() != [b"me"]:
            await streams.forget_consumers(key, b"g", b"me", idle_s=0, limit=2)


async def test_a_stream_that_was_lost_is_begun_again(placed: RedisStore, place: Place) -> None:
    streams = placed.streams
    await streams.append([b"e1{a}"], [{b"e": b"0"}])
    assert await streams.read_group([b"e1{a}"], b"g", b"one", count=2, timeout_s=1)
    place.flush()
    [again] = await streams.append([b"e1{a}"], [{b"e": b"1"}])
    assert [entry.id for entry in (await streams.read_group([b"e1{a}"], b"g", b"one", count=2, timeout_s=1))[b"e1{a}"]] == [again]
    assert await streams.claim(b"e1{z}", b"g", b"one", idle_s=0, count=1) == []


async def test_who_waits_hears_of_what_comes(placed: RedisStore) -> None:
    keys = [b"e1{a}", b"e1{b}", b"e1{c}"]
    waiting = asyncio.create_task(placed.streams.read_group(keys, b"g", b"one", count=2, timeout_s=30))
    await asyncio.sleep(0)
    await placed.streams.append([b"e1{b}"], [{b"e": b"0"}])
    assert list(await waiting) == [b"e1{b}"]


async def test_entries_are_looked_through_from_both_ends(placed: RedisStore) -> None:
    streams, key = placed.streams, b"d1{a}"
    ids = await streams.append([key] * 4, [{b"r": b"%d" % n} for n in range(4)])
    assert [entry.id for entry in await streams.range(key, count=3)] == ids[:3]
    assert [entry.id for entry in await streams.range(key, count=3, newest_first=True)] == ids[:0:-1]
    assert [entry.id for entry in await streams.range(key, after=ids[0], before=ids[3], count=9)] == ids[1:3]
    assert await streams.delete(key, ids[1:2]) == 1
    assert await streams.delete(key, []) == 0
    found = await streams.entries(key, ids)
    assert [None if entry is None else entry.fields[b"r"] for entry in found] == [b"0", None, b"2", b"3"]
    assert await streams.length(key) == 3
    state = await streams.state(b"d1{never}", b"g")
    assert (state.lag, state.pending) == (0, 0)


async def test_a_stream_forgets_its_oldest(placed: RedisStore) -> None:
    for _ in range(5):
        await placed.streams.append([b"d1{a}"] * 100, [{b"r": b""}] * 100, max_length=100)
    assert 100 <= await placed.streams.length(b"d1{a}") < 500


# --- scanning -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tenant", ["shop", "*" * 3, "t" * 42, "u" * 63])
async def test_a_walk_meets_every_key_of_its_kind_and_no_other(placed: RedisStore, tenant: str) -> None:
    space, ids = KeySpace.of(tenant, "item", "stats", 1), [f"i{n}" for n in range(300)]
    await placed.write(space.keys(ids), space.mark_keys(ids), [row(1)] * 300, 0)
    await write(placed, ids[:50], [row(1)] * 50) if tenant != "shop" else None
    await placed.write(OTHER.keys(ids), OTHER.mark_keys(ids), [row(1)] * 300, 0)
    met: list[bytes] = []
    cursor, scanned, pages = b"", 0, 0
    while True:  # every page by a walk of its own, as after a restart
        page = await anext(placed.scan(space.prefix, space.suffix, cursor=cursor, count=50))
        met += page.keys
        assert page.scanned >= scanned
        cursor, scanned, pages = page.cursor, page.scanned, pages + 1
        if not cursor:
            break
    assert set(met) == set(space.keys(ids))
    assert page.scanned == page.total
    assert pages > 3


async def test_a_cursor_of_another_life_begins_anew(placed: RedisStore) -> None:
    await write(placed, list(range(40)), [row(1)] * 40)
    pages = [page async for page in placed.scan(SPACE.prefix, cursor=b"1 1 77 5")]
    assert {key for page in pages for key in page.keys} == set(SPACE.keys(list(range(40))))
    with pytest.raises(InvalidArgument) as caught:
        await anext(placed.scan(b"p", cursor=b"no"))
    assert caught.value.reason == "CURSOR_INVALID"


# --- changes ------------------------------------------------------------------------------------------------------------------------------


class Told(Listener):
    def __init__(self) -> None:
        self.on, self.off = asyncio.Event(), 0
        self.keys: set[bytes] = set()
        self.enough = asyncio.Event()
        self.wanted: set[bytes] = set()

    def connected(self, prefixes: Sequence[bytes]) -> None:
        self.on.set()

    def disconnected(self) -> None:
        self.off += 1

    def changed(self, keys: Sequence[bytes] | None) -> None:
        self.keys |= set(keys or ())
        if self.keys >= self.wanted:
            self.enough.set()


async def test_changes_on_every_server_are_told(placed: RedisStore) -> None:
    told, ids = Told(), list(range(60))
    told.wanted = set(SPACE.keys(ids))
    watching = asyncio.create_task(placed.watch(lambda: [SPACE.prefix], told))
    await asyncio.wait_for(told.on.wait(), 20)
    await write(placed, ids, [row(1)] * 60)
    await asyncio.wait_for(told.enough.wait(), 20)
    assert told.keys == told.wanted
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert told.off == 1


# --- who gives up -------------------------------------------------------------------------------------------------------------------------


async def test_who_gives_up_never_leaves_an_answer_to_the_next(placed: RedisStore) -> None:
    count = 600
    await write(placed, list(range(count)), [row(n + 1) for n in range(count)])
    chance = random.Random(1)  # noqa: S311

    async def one(at: int) -> bool:
        wanted = [(at * 37 + n) % count for n in range(chance.choice([1, 300]))]
        try:
            found = await placed.read(SPACE.keys(wanted), chance.choice([0.0, 0.001, 0.005, 20]))
        except Unavailable:
            raise AssertionError("nobody was away") from None
        late = set(found.late.tolist())
        assert not found.failed.size
        assert found.rows == [None if n in late else row(who + 1) for n, who in enumerate(wanted)]
        return found.whole

    tasks = [asyncio.create_task(one(n)) for n in range(60)]
    for task in tasks[::5]:
        await asyncio.sleep(0)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {r for r in results if not isinstance(r, asyncio.CancelledError)} <= {True, False}
    assert True in results
    assert await read(placed, [7]) == [row(8)]
    assert "connections=0+" in repr(placed)


# --- replicas -----------------------------------------------------------------------------------------------------------------------------


async def test_replicas_know_of_each_other(placed: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_retrieval.replicas._YOUNG_S", 0.001)
    one, other = (Replicas(placed.dispatch, name, lambda known=known: known) for name, known in (("one", 7), ("other", 6)))  # type: ignore[misc]
    await other.announce()
    with pytest.raises(Unavailable) as caught:
        await one.check_heard(7)
    assert caught.value.reason == "REPLICA_BEHIND"
    await other.close()
    async with asyncio.timeout(20):
        while True:
            try:
                await one.check_heard(7)
            except Unavailable:
                await asyncio.sleep(0.005)
            else:
                break
    await one.close()
