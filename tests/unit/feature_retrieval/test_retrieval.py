"""THE PAGE: tensors and the truth about every row, whatever the store does."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.calls import call_of
from tests.fakes.feature_world import make_batch, statuses, tensor

from feature_retrieval.audience import Audience
from feature_retrieval.coalescing import CoalescedReads
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.near_cache import NearCache
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.row_codec import KeySpace, RowCodec, entity_prefix, header, split
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.store.rows import Read
from feature_retrieval.views import Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, PlaitError, Unavailable
from plait.local.redis import EmbeddedRedis
from plait.registry.records import Entity, Feature, FeatureSchema, FeatureSet, FeatureView, ModelInput, Snapshot
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline

NOW_S = 1_700_000_000.0
STATS = FeatureView(name="stats", entity=Entity(type="item"), features=(Feature(name="a", default=1.5), Feature(name="b")), max_age_s=60)
CONTENT = FeatureView(
    name="content", entity=Entity(type="item"), features=(Feature(name="n", dtype="int64", default=7), Feature(name="x", default=-1))
)
PROFILE = FeatureView(name="profile", entity=Entity(type="user", key="int64"), features=(Feature(name="age", default=30),))
SETS = {
    "all": FeatureSet(
        name="all",
        inputs=(
            ModelInput(name="user", entity="user", features=("profile:age",)),
            ModelInput(name="item", entity="item", features=("stats:b", "content:n", "stats:a", "content:x")),
        ),
    ),
    "stats": FeatureSet(name="stats", inputs=(ModelInput(name="item", entity="item", features=("stats:a", "stats:b")),)),
    "content": FeatureSet(name="content", inputs=(ModelInput(name="item", entity="item", features=("content:x", "content:n")),)),
}
SNAPSHOT = Snapshot(revision=9, feature_views={v.name: v for v in (STATS, CONTENT, PROFILE)}, feature_sets=SETS)
STATS_SPACE = KeySpace.of("default", "item", "stats", 1)
STATS_CODEC = RowCodec(FeatureSchema(id=1, features=STATS.features))
PREFIXES = [entity_prefix("default", "item"), entity_prefix("default", "user")]


class Slow(RedisStore):
    """The real store, but only as many rows arrive in time as `arriving` says, and answers wait for `gate`; remembers what was asked."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: list[list[bytes]] = []
        self.arriving: int | None = None
        self.failing: list[int] = []
        self.gate: asyncio.Event | None = None
        self.reached = asyncio.Event()
        self.timeout_s = 0.0

    async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        self.asked.append(list(keys))
        self.timeout_s = timeout_s
        found = await super().read(keys, timeout_s)
        self.reached.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.arriving is None and not self.failing:
            return found
        late = np.arange(len(keys) if self.arriving is None else self.arriving, len(keys))
        unknown = {*self.failing, *late.tolist()}
        rows = [None if at in unknown else row for at, row in enumerate(found.rows)]
        return Read(rows, late=late, failed=np.array(self.failing, np.intp))


class World:
    """A page over a real store, and shorthands to write and read."""

    def __init__(self, store: Any, *, near_cache: bool = False) -> None:
        self.store = store
        self.cache = NearCache(1 << 22 if near_cache else 0, 60)
        if near_cache:
            self.cache.connected(PREFIXES)
        self.plans = Plans(SNAPSHOT)
        self.page = Retrieval(store, self.cache, lambda: self.plans, clock=lambda: NOW_S)
        self.ingestion = Ingestion(store, lambda: SNAPSHOT, clock=lambda: NOW_S)

    async def write(self, view: str, ids: list[Any], columns: dict[str, Any], *, age_s: float = 0, **more: Any) -> None:
        batch = make_batch(view, [], columns, at_s=NOW_S - age_s, **more)
        (batch.ids.int64_ids if view == "profile" else batch.ids.string_ids).extend(ids)
        await self.ingestion.write(batch, pb.WriteFeaturesResponse(), call_of())

    async def read(self, name: str = "stats", *, within_s: float = 20, policy: int = 0, share: float = 0, **ids: list[Any]) -> Any:
        request = pb.GetFeaturesRequest(feature_set=name, policy=policy, max_defaulted_share=share, include_event_times=True)  # type: ignore[arg-type]
        for entity_type, values in ids.items():
            rows = request.entities.add(entity_type=entity_type).ids
            (rows.int64_ids if entity_type == "user" else rows.string_ids).extend(values)
        response = pb.GetFeaturesResponse()
        await self.page.get_features(request, response, call_within(within_s))
        return response


def call_within(seconds: float, tenant: str = "default") -> Call:
    return Call(method="GetFeatures", tenant=tenant, deadline=Deadline.after(seconds))


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Slow]:
    store = Slow(url)
    try:
        yield store
    finally:
        await store.close()


@pytest_asyncio.fixture
async def store(redis_url: str) -> AsyncIterator[Slow]:
    async with opened(redis_url) as store:
        yield store


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


# --- what is read is what was written -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_answers_equal_a_model_with_and_without_the_near_cache(
    redis_server: EmbeddedRedis, redis_url: str, data: st.DataObject
) -> None:
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    async with opened(redis_url) as store:
        await _compare_with_a_model(store, data)


async def _compare_with_a_model(store: Slow, data: st.DataObject) -> None:
    w = World(store, near_cache=True)
    number = st.integers(-100, 100)
    # (item, view) → its two columns, each a number or None; an absent key is an absent row
    cell = st.none() | number
    known: dict[tuple[str, str], tuple[int | None, int | None]] = data.draw(
        st.dictionaries(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["stats", "content"])), st.tuples(cell, cell))
    )
    deleted = data.draw(st.sets(st.sampled_from(sorted(known)))) if known else set()
    for (item_id, view), (first, second) in known.items():
        one, two = ({"a": first}, {"b": second}) if view == "stats" else ({"x": first}, {"n": second})
        await w.write(view, [item_id], {k: [v] for k, v in (one | (two if view == "stats" else {})).items() if v is not None}, age_s=1)
        if view == "content" and second is not None:  # n is of another dtype: all columns again, later
            batch = make_batch(view, [item_id], {"x": [first]} if first is not None else {}, at_s=NOW_S)
            batch.columns.add(features=["n"], dtype=types_pb2.DATA_TYPE_INT64, data=np.int64(second).tobytes())
            await w.ingestion.write(batch, pb.WriteFeaturesResponse(), call_of())
        if (item_id, view) in deleted:
            await w.write(view, [item_id], {}, deleted=[True], sequences=[1])
    items = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12))
    part = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4))

    def told(item_id: str, view: str) -> str:
        row = known.get((item_id, view))
        if row is None or (item_id, view) in deleted:
            return "DEFAULTED" if view == "content" else "NOT_FOUND"
        return "NULL" if None in row else "PRESENT"

    def cells(item_id: str) -> list[float]:
        def value(view: str, at: int, default: float) -> float:
            row = known.get((item_id, view))
            found = None if row is None or (item_id, view) in deleted else row[at]
            return default if found is None else found

        return [value("stats", 1, math.nan), value("content", 1, 7), value("stats", 0, 1.5), value("content", 0, -1)]

    await w.read("all", user=[1], item=part)  # so that some are in the near cache before
    for _ in range(2):
        answer = await w.read("all", user=[1], item=items)
        np.testing.assert_array_equal(tensor(answer, "item"), np.array([cells(i) for i in items], np.float32))
        for view in ("stats", "content"):
            assert statuses(answer, view) == [told(i, view) for i in items]
    assert sum(len(keys) for keys in store.asked) == 2 * len(set(part + items)) + 1  # each row once, absent ones too


async def test_columns_of_several_views_and_entities(store: Slow) -> None:
    w = World(store)
    await w.write("stats", ["i", "j"], {"a": [1, 2], "b": [3, 4]})
    await w.write("content", ["i"], {"x": [5]})
    await w.write("profile", [42], {"age": [33]})
    answer = await w.read("all", user=[42, 43], item=["j", "i", "k"])
    assert tensor(answer, "user").tolist() == [[33], [30]]
    np.testing.assert_array_equal(tensor(answer, "item"), [[4, 7, 2, -1], [3, 7, 1, 5], [np.nan, 7, 1.5, -1]])
    assert (statuses(answer, "stats"), statuses(answer, "content"), statuses(answer, "profile")) == (
        ["PRESENT", "PRESENT", "NOT_FOUND"],
        ["DEFAULTED", "NULL", "DEFAULTED"],
        ["PRESENT", "DEFAULTED"],
    )
    assert answer.registry_revision == 9
    assert [list(t.shape) for t in answer.tensors] == [[2, 1], [3, 4]]
    assert len(store.asked) == 1  # every view of every entity in one round trip


async def test_repeated_ids_are_read_once_and_answered_each_time(store: Slow) -> None:
    w = World(store)
    await w.write("stats", ["i", "j"], {"a": [1, 2], "b": [3, 4]})
    answer = await w.read(item=["j", "i", "j", "j", "k", "k"])
    assert len(store.asked[0]) == 3
    assert tensor(answer, "item")[:, 0].tolist() == [2, 1, 2, 2, 1.5, 1.5]
    assert statuses(answer, "stats") == ["PRESENT"] * 4 + ["NOT_FOUND"] * 2
    [report] = answer.views
    assert np.frombuffer(report.event_times_us, "<i8").tolist() == [int(NOW_S * 1e6)] * 4 + [0, 0]
    assert list(report.status_counts) == [0, 4, 0, 0, 2, 0, 0, 0]


async def test_event_times_come_only_when_asked(store: Slow) -> None:
    w = World(store)
    request = pb.GetFeaturesRequest(feature_set="stats", entities=[{"entity_type": "item", "ids": {"string_ids": ["i"]}}])
    response = pb.GetFeaturesResponse()
    await w.page.get_features(request, response, call_within(20))
    assert response.views[0].event_times_us == b""


@pytest.mark.parametrize("near_cache", [False, True])
async def test_stale_rows_are_given_and_called_stale(store: Slow, client: Any, near_cache: bool) -> None:
    w = World(store, near_cache=near_cache)
    await w.write("stats", ["limit"], {"a": [1], "b": [1]}, age_s=60)
    await w.write("stats", ["old"], {"a": [2], "b": [2]}, age_s=60.001)
    await w.write("stats", ["old and null"], {"a": [3]}, age_s=100)
    await w.write("stats", ["expired"], {"a": [4], "b": [4]})
    [key] = STATS_SPACE.keys(["expired"])
    row = np.frombuffer(client.get(key), np.uint8).copy()[None]
    header(row)["expires_us"] = int(NOW_S * 1e6) - 1
    client.set(key, row.tobytes())
    for _ in range(2):
        answer = await w.read(item=["limit", "old", "old and null", "expired"])
        assert statuses(answer, "stats") == ["PRESENT", "STALE", "STALE", "STALE"]
        np.testing.assert_array_equal(tensor(answer, "item"), [[1, 1], [2, 2], [3, np.nan], [4, 4]])


@pytest.mark.parametrize("near_cache", [False, True])
async def test_a_deleted_row_is_gone_with_its_time(store: Slow, near_cache: bool) -> None:
    w = World(store, near_cache=near_cache)
    await w.write("stats", ["i", "j"], {"a": [1, 2], "b": [3, 4]}, age_s=2)
    await w.write("stats", ["i"], {}, age_s=1, deleted=[True])
    await w.write("stats", ["i"], {"a": [9], "b": [9]}, age_s=1.5)  # came late: it was true before it was deleted
    for _ in range(2):
        answer = await w.read(item=["i", "j"])
        assert statuses(answer, "stats") == ["NOT_FOUND", "PRESENT"]
        np.testing.assert_array_equal(tensor(answer, "item"), [[1.5, np.nan], [2, 4]])
        assert np.frombuffer(answer.views[0].event_times_us, "<i8").tolist() == [0, int((NOW_S - 2) * 1e6)]


@pytest.mark.parametrize("near_cache", [False, True])
async def test_rows_of_an_older_schema_are_read_beside_new_ones(store: Slow, near_cache: bool) -> None:
    w = World(store, near_cache=near_cache)
    await w.write("stats", ["old", "older"], {"a": [1, 2], "b": [3, 4]})
    features = (*STATS.features, Feature(name="c", default=8))
    schemas = (FeatureSchema(id=1, features=STATS.features), FeatureSchema(id=2, features=features))
    longer = FeatureView(name="stats", entity=STATS.entity, features=features, schemas=schemas)
    item = ModelInput(name="item", entity="item", features=("stats:c", "stats:a"))
    snapshot = Snapshot(feature_views={"stats": longer}, feature_sets={"stats": FeatureSet(name="stats", inputs=(item,))})
    w.plans, w.ingestion = Plans(snapshot), Ingestion(store, lambda: snapshot, clock=lambda: NOW_S)
    await w.write("stats", ["new"], {"a": [5], "b": [6], "c": [7]})
    for _ in range(2):
        answer = await w.read(item=["old", "new", "older", "none"])
        assert tensor(answer, "item").tolist() == [[8, 1], [7, 5], [8, 2], [8, 1.5]]
        assert statuses(answer, "stats") == ["NULL", "PRESENT", "NULL", "DEFAULTED"]


@pytest.mark.parametrize("near_cache", [False, True])
async def test_rows_nobody_can_read_count_as_missing(store: Slow, client: Any, near_cache: bool) -> None:
    w = World(store, near_cache=near_cache)
    good = STATS_CODEC.blank(1)
    header(good)["event_time_us"] = int(NOW_S * 1e6)
    [row] = split(good)
    bad = {
        "empty": b"",
        "a byte": b"\1",
        "half a header": row[:20],
        "cut short": row[:-1],
        "too long": row + b"\0",
        "another layout": b"\2\0" + row[2:],
        "an unknown schema": row[:2] + b"\x09\0" + row[4:],
        "noise": bytes(range(255, 255 - len(row), -1)),
    }
    for name, data in bad.items():
        client.set(STATS_SPACE.keys([name])[0], data)
    client.hset(STATS_SPACE.keys(["a hash"])[0], "a", 1)  # type: ignore[arg-type]
    await w.write("stats", ["good"], {"a": [5], "b": [6]})
    for names in ([*bad, "a hash"], [*bad, "a hash", "good"], ["another layout"], ["noise"]):
        for _ in range(2):
            answer = await w.read(item=names)
            assert statuses(answer, "stats") == ["PRESENT" if name == "good" else "NOT_FOUND" for name in names]
            expected = [[5, 6] if name == "good" else [1.5, np.nan] for name in names]
            np.testing.assert_array_equal(tensor(answer, "item"), expected)


# --- the store is slow, away or gives up --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("near_cache", [False, True])
async def test_at_the_deadline_what_arrived_is_answered(store: Slow, near_cache: bool) -> None:
    w = World(store, near_cache=near_cache)
    await w.write("stats", ["i", "j", "k"], {"a": [1, 2, 3], "b": [4, 5, 6]})
    store.arriving = 2
    answer = await w.read(item=["i", "none", "j", "k"])
    assert statuses(answer, "stats") == ["PRESENT", "NOT_FOUND", "TIMED_OUT", "TIMED_OUT"]
    np.testing.assert_array_equal(tensor(answer, "item"), [[1, 4], [1.5, np.nan], [1.5, np.nan], [1.5, np.nan]])
    store.arriving = None
    answer = await w.read(item=["i", "none", "j", "k"])
    assert statuses(answer, "stats") == ["PRESENT", "NOT_FOUND", "PRESENT", "PRESENT"]  # what did not arrive was not taken for absent
    assert len(store.asked[-1]) == (2 if near_cache else 4)


@pytest.mark.parametrize("arriving", range(6))
async def test_late_rows_are_late_in_the_views_they_belong_to(store: Slow, arriving: int) -> None:
    w = World(store)
    await w.write("profile", [1], {"age": [20]})
    for view in ("stats", "content"):
        await w.write(view, ["i", "j"], {"a": [1, 2], "b": [3, 4]} if view == "stats" else {"x": [5, 6]})
    store.arriving = arriving
    answer = await w.read("all", user=[1], item=["i", "j"])
    told = statuses(answer, "profile") + statuses(answer, "stats") + statuses(answer, "content")
    assert ["TIMED_OUT" if t == "TIMED_OUT" else "arrived" for t in told] == ["arrived"] * arriving + ["TIMED_OUT"] * (5 - arriving)
    assert tensor(answer, "item")[:, 2].tolist() == [1 if arriving > 1 else 1.5, 2 if arriving > 2 else 1.5]


@pytest.mark.parametrize("near_cache", [False, True])
async def test_keys_of_a_failed_node_are_unavailable_wherever_they_stand(store: Slow, near_cache: bool) -> None:
    w = World(store, near_cache=near_cache)
    for view in ("stats", "content"):
        await w.write(view, ["i", "j", "k"], {"a": [1, 2, 3], "b": [3, 4, 5]} if view == "stats" else {"x": [5, 6, 7]})
    await w.write("profile", [1], {"age": [20]})
    store.failing = [1, 4]  # of: profile 1, stats i j k, content i j k
    store.arriving = 6
    answer = await w.read("all", user=[1], item=["i", "j", "k"])
    assert statuses(answer, "profile") == ["PRESENT"]
    assert statuses(answer, "stats") == ["UNAVAILABLE", "PRESENT", "PRESENT"]
    assert statuses(answer, "content") == ["UNAVAILABLE", "NULL", "TIMED_OUT"]
    np.testing.assert_array_equal(tensor(answer, "item")[:, 2:], [[1.5, -1], [2, 6], [3, -1]])
    store.failing, store.arriving = [], None
    answer = await w.read("all", user=[1], item=["i", "j", "k"])
    assert statuses(answer, "stats") == ["PRESENT"] * 3  # neither was taken for absent, and none for another's row
    np.testing.assert_array_equal(tensor(answer, "item")[:, 2:], [[1, 5], [2, 6], [3, 7]])
    assert len(store.asked[-1]) == (3 if near_cache else 7)


async def test_cached_rows_are_answered_when_the_rest_is_late(store: Slow) -> None:
    w = World(store, near_cache=True)
    await w.write("stats", ["i", "j"], {"a": [1, 2], "b": [3, 4]})
    await w.read(item=["i"])
    store.arriving = 0
    answer = await w.read(item=["i", "j"])
    assert statuses(answer, "stats") == ["PRESENT", "TIMED_OUT"]
    np.testing.assert_array_equal(tensor(answer, "item"), [[1, 3], [1.5, np.nan]])


async def test_a_store_that_does_not_answer_costs_no_more_than_the_deadline(tmp_path: Path) -> None:
    async with EmbeddedRedis(tmp_path / "r") as server, opened(server.url) as store:
        w = World(store)
        await w.write("stats", ["i"], {"a": [1], "b": [2]})
        os.kill(server.child.pid, signal.SIGSTOP)
        try:
            answer = await w.read(item=["i"], within_s=0.2)
            assert statuses(answer, "stats") == ["TIMED_OUT"]
            assert 0 < store.timeout_s < 0.19  # less than what is left: the answer must still reach the caller
            assert answer.store_us > 0
        finally:
            os.kill(server.child.pid, signal.SIGCONT)
        assert statuses(await w.read(item=["i"]), "stats") == ["PRESENT"]


async def test_a_deadline_that_has_passed_is_not_read_for(store: Slow) -> None:
    with pytest.raises(DeadlineExceeded):
        await World(store).read(item=["i"], within_s=-1)
    assert store.asked == []


async def test_with_the_store_away_answers_are_defaults_that_say_so() -> None:
    with socket.socket() as nobody:  # bound, but never listening: connections are refused
        nobody.bind(("127.0.0.1", 0))
        w = World(RedisStore(f"redis://127.0.0.1:{nobody.getsockname()[1]}"), near_cache=True)
        answer = await w.read("all", user=[1], item=["i", "j"])
        assert {*statuses(answer, "stats"), *statuses(answer, "content"), *statuses(answer, "profile")} == {"UNAVAILABLE"}
        np.testing.assert_array_equal(tensor(answer, "item"), [[np.nan, 7, 1.5, -1]] * 2)
        assert tensor(answer, "user").tolist() == [[30]]
        assert not any(entity.index for entity in w.cache._entities.values())  # "not there" was not learnt from it
        with pytest.raises(Unavailable) as caught:
            await w.read(item=["i"], policy=types_pb2.MISSING_POLICY_FAIL)
        assert (caught.value.reason, caught.value.retry_after_s) == ("STORE_UNAVAILABLE", 0.25)


# --- the near cache and reads that cross --------------------------------------------------------------------------------------------------


async def test_a_row_that_changes_while_others_are_awaited_stays_its_own(store: Slow) -> None:
    w = World(store, near_cache=True)
    await w.write("stats", ["cached", "other", "far"], {"a": [1, 2, 3], "b": [1, 2, 3]})
    await w.read(item=["cached"])
    store.gate, gate = asyncio.Event(), store.gate
    store.reached.clear()
    waiting = asyncio.create_task(w.read(item=["cached", "far"]))
    await store.reached.wait()
    first_gate, store.gate = store.gate, gate
    w.cache.changed(STATS_SPACE.keys(["cached"]))
    await w.read(item=["other"])  # takes the slot that came free
    first_gate.set()
    assert tensor(await waiting, "item")[:, 0].tolist() == [1, 3]


async def test_a_change_during_a_read_is_not_overwritten_by_it(store: Slow) -> None:
    w = World(store, near_cache=True)
    await w.write("stats", ["i", "j"], {"a": [1, 1], "b": [1, 1]}, age_s=2)
    store.gate = asyncio.Event()
    waiting = asyncio.create_task(w.read(item=["i", "j"]))
    await store.reached.wait()
    await w.write("stats", ["i"], {"a": [2], "b": [2]}, age_s=1)
    w.cache.changed(STATS_SPACE.keys(["i"]))
    store.gate.set()
    await waiting
    store.gate = None
    assert tensor(await w.read(item=["i", "j"]), "item")[:, 0].tolist() == [2, 1]
    assert store.asked[-1] == STATS_SPACE.keys(["i"])  # j was kept


async def test_a_caller_that_leaves_hurts_nobody(store: Slow) -> None:
    w = World(store, near_cache=True)
    await w.write("stats", ["i"], {"a": [1], "b": [2]})
    store.gate = asyncio.Event()
    leaving, staying = (asyncio.create_task(w.read(item=["i"])) for _ in range(2))
    await store.reached.wait()
    leaving.cancel()
    store.gate.set()
    assert statuses(await staying, "stats") == ["PRESENT"]
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert [view.readings for view in [v for entity in w.cache._entities.values() for v in entity.views.values()]] == [0]


async def test_a_cold_key_that_many_want_is_read_once_and_once_more_after_it_changed(store: Slow) -> None:
    w = World(store, near_cache=True)
    reads = CoalescedReads(store)
    reads.connected(PREFIXES)
    w.page = Retrieval(reads, w.cache, lambda: w.plans, clock=lambda: NOW_S)
    for version in (1, 2):
        await w.write("stats", ["i"], {"a": [version], "b": [2]}, sequences=[version])
        Audience(w.cache, reads).changed(STATS_SPACE.keys(["i"]))
        answers = await asyncio.gather(*(w.read(item=["i"]) for _ in range(100)))
        assert {tensor(answer, "item")[0, 0] for answer in answers} == {version}
        assert len(store.asked) == version


async def test_a_refused_request_leaves_no_read_under_way(store: Slow) -> None:
    w = World(store, near_cache=True)
    with pytest.raises(InvalidArgument):
        await w.read("all", user=[1], item=["x" * 257])
    assert all(view.readings == 0 for view in [v for entity in w.cache._entities.values() for v in entity.views.values()])
    assert store.asked == []


async def test_a_tenant_sees_its_own_rows_only(store: Slow) -> None:
    w = World(store, near_cache=True)
    await w.write("stats", ["i"], {"a": [1], "b": [2]})
    request = pb.GetFeaturesRequest(feature_set="stats", entities=[{"entity_type": "item", "ids": {"string_ids": ["i"]}}])
    for tenant, told in (("default", "PRESENT"), ("other", "NOT_FOUND"), ("default", "PRESENT"), ("other", "NOT_FOUND")):
        response = pb.GetFeaturesResponse()
        await w.page.get_features(request, response, call_within(20, tenant))
        assert statuses(response, "stats") == [told]


# --- policies and bad requests ------------------------------------------------------------------------------------------------------------

_FAIL, _DEFAULT, _STALE_OK = types_pb2.MISSING_POLICY_FAIL, types_pb2.MISSING_POLICY_DEFAULT, types_pb2.MISSING_POLICY_STALE_OK


@pytest.mark.parametrize(
    ("ids", "policy", "share", "arriving", "refused"),
    [
        (["good", "null"], _FAIL, 0, 9, None),
        (["good", "never"], _FAIL, 1, 9, FailedPrecondition),
        (["good", "old"], _FAIL, 1, 9, FailedPrecondition),
        (["good", "null"], _FAIL, 0, 1, DeadlineExceeded),
        (["good", "never"], _DEFAULT, 0, 9, None),
        (["good", "never"], 0, 0, 9, None),
        (["good", "never"], 0, 0.4, 9, FailedPrecondition),
        (["good", "never"], _DEFAULT, 0.5, 9, None),
        (["good", "never", "old"], _DEFAULT, 0.5, 9, FailedPrecondition),
        (["good", "never", "old"], _STALE_OK, 0.5, 9, None),
        (["never"], _STALE_OK, 0.5, 9, FailedPrecondition),
        (["never"] * 9 + ["good"], _DEFAULT, 0.8, 9, FailedPrecondition),  # each row the caller asked for counts
        (["good", "null"], _DEFAULT, 0.4, 1, DeadlineExceeded),
    ],
)
async def test_policies(store: Slow, ids: list[str], policy: int, share: float, arriving: int, refused: type[PlaitError] | None) -> None:
    w = World(store)
    await w.write("stats", ["good"], {"a": [1], "b": [2]})
    await w.write("stats", ["null"], {"a": [1]})
    await w.write("stats", ["old"], {"a": [1], "b": [2]}, age_s=1000)
    store.arriving = min(arriving, len(set(ids)))
    asked = w.read(item=ids, policy=policy, share=share)
    if refused is None:
        assert len(statuses(await asked, "stats")) == len(ids)
        return
    with pytest.raises(refused) as caught:
        await asked
    assert f"of {len(ids)} (row, view) pairs are not present" in caught.value.message
    if refused is FailedPrecondition:
        assert caught.value.reason == "FEATURES_MISSING"


@pytest.mark.parametrize("share", [0.07, 0.29, 0.57, 0.58, 0.7])
async def test_a_share_is_met_when_it_is_met_exactly(store: Slow, share: float) -> None:
    w = World(store)
    bad = round(share * 100)
    await w.write("stats", [f"i{n}" for n in range(100 - bad)], {"a": [1] * (100 - bad), "b": [1] * (100 - bad)})
    await w.read(item=[f"i{n}" for n in range(100)], share=share)
    with pytest.raises(FailedPrecondition):
        await w.read(item=[f"i{n}" for n in range(101)], share=share)


async def test_a_bound_that_is_none_is_refused_before_anything_is_read(store: Slow) -> None:
    w = World(store)
    with pytest.raises(InvalidArgument) as caught:
        await w.read(item=["a"], share=1.5)
    assert [v.field for v in caught.value.violations] == ["max_defaulted_share"]
    assert not store.asked


async def test_every_violation_is_reported(store: Slow) -> None:
    request = pb.GetFeaturesRequest(feature_set="all")
    request.entities.add(entity_type="shop").ids.string_ids.append("s")
    request.entities.add(entity_type="item").ids.int64_ids.append(1)
    request.entities.add(entity_type="item").ids.string_ids.extend(["a"] * 10_001)
    with pytest.raises(InvalidArgument) as caught:
        await World(store).page.get_features(request, pb.GetFeaturesResponse(), call_within(20))
    assert [(v.field, v.description) for v in caught.value.violations] == [
        ("entities[0].entity_type", "is not used by feature set 'all': it needs ['item', 'user']"),
        ("entities[1].ids", "int64_ids are given, but the entity type's key is string: set string_ids"),
        ("entities[2].entity_type", "is given twice"),
        ("entities", "ids of entity type 'user' are missing"),
    ]


async def test_rows_are_counted_by_entity_type(store: Slow) -> None:
    """A ranking of as many candidates as allowed also reads its user."""
    w = World(store)
    await w.read("all", user=[1], item=[f"{n}" for n in range(10_000)])
    with pytest.raises(InvalidArgument) as caught:
        await w.read("all", user=[1], item=["i"] * 10_001)
    assert [(v.field, v.description) for v in caught.value.violations] == [
        ("entities[1].ids", "10001 rows are asked for, at most 10000 of a type are allowed")
    ]
