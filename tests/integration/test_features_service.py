"""feature-retrieval over the wire, on a real Redis."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.feature_world import TOKEN, FeatureWorld, feature_world, make_batch, statuses, tensor

from feature_retrieval.row_codec import KeySpace
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import from_rpc_error
from plait.local.redis import EmbeddedRedis
from plait.registry.records import (
    Entity,
    Feature,
    FeatureSchema,
    FeatureSet,
    FeatureView,
    KeyPart,
    ModelInput,
    RequestFeature,
    Snapshot,
    Transform,
)

ITEM = Entity(type="item")
STATS = FeatureView(
    name="stats", entity=ITEM, features=(Feature(name="a", default=1.5), Feature(name="b", default=-1), Feature(name="c")), max_age_s=3600
)
CONTENT = FeatureView(name="content", entity=ITEM, features=(Feature(name="x", default=0), Feature(name="n", dtype="int64", default=7)))
PROFILE = FeatureView(name="profile", entity=Entity(type="user"), features=(Feature(name="age", default=30),))
SETS = {
    "both": FeatureSet(
        name="both",
        inputs=(
            ModelInput(name="user", entity="user", features=("profile:age",)),
            ModelInput(name="item", entity="item", features=("stats:b", "stats:a", "content:x", "content:n")),
        ),
    ),
    "stats": FeatureSet(name="stats", inputs=(ModelInput(name="item", entity="item", features=("stats:a", "stats:c")),)),
}
SNAPSHOT = Snapshot(revision=3, feature_views={v.name: v for v in (STATS, CONTENT, PROFILE)}, feature_sets=SETS)


async def error_of(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("near_cache", [False, True])
async def test_what_is_written_is_read_as_tensors(redis_url: str, near_cache: bool) -> None:
    async with feature_world(SNAPSHOT, redis_url, near_cache=near_cache) as w:
        await w.write("stats", ["i1", "i2"], {"a": [1, 2], "b": [10, 20], "c": [0, 0]})
        await w.write("content", ["i1", "i2"], {"x": [5, 6]})
        await w.write("profile", ["u"], {"age": [41]})
        for _ in range(3):  # with the near cache on, later reads come from it
            answer = await w.read("both", user=["u"], item=["i2", "i1", "i2"])
            assert tensor(answer, "user").tolist() == [[41]]
            assert tensor(answer, "item").tolist() == [[20, 2, 6, 7], [10, 1, 5, 7], [20, 2, 6, 7]]
            assert statuses(answer, "stats") == ["PRESENT"] * 3
            assert statuses(answer, "content") == ["NULL"] * 3
            assert answer.registry_revision == 3


async def test_who_wrote_reads_what_it_wrote_whoever_else_reads(redis_url: str) -> None:
    """Without tracking: a read that another caller has under way may be older than this caller's write, so it is not joined."""
    async with feature_world(SNAPSHOT, redis_url) as w:
        done = asyncio.Event()

        async def load() -> None:
            while not done.is_set():
                await w.read("stats", item=["i", "j"])

        async def write_and_read(item: str) -> None:
            for version in range(40):
                await w.write("stats", [item], {"a": [version]}, at_s=1_700_000_000 + version)
                assert tensor(await w.read("stats", item=[item, "other"]), "item")[0, 0] == version

        readers = [asyncio.create_task(load()) for _ in range(8)]
        await asyncio.gather(write_and_read("i"), write_and_read("j"))
        done.set()
        await asyncio.gather(*readers)


OFFERS = FeatureView(
    name="offers",
    entity=Entity(type="offer", key="composite", parts=(KeyPart(name="shop"), KeyPart(name="sku", type="int64"))),
    features=(Feature(name="price"), Feature(name="rating", default=3)),
)
OFFER_SET = FeatureSet(
    name="offers",
    request=(RequestFeature(name="km", entity="offer", minimum=0, maximum=100), RequestFeature(name="hour", default=12)),
    transforms=(Transform(name="cost", entity="offer", expression="{offers:price} + {$request:km}", default=-1),),
    inputs=(ModelInput(name="offer", entity="offer", features=("offers:rating", "$transform:cost", "$request:hour")),),
)
OFFER_SNAPSHOT = Snapshot(feature_views={"offers": OFFERS}, feature_sets={"offers": OFFER_SET})


async def test_composite_ids_and_what_is_sent_along_over_the_wire(redis_url: str) -> None:
    def entities(*keys: tuple[str, int]) -> list[Any]:
        ids = [{"parts": [{"string_part": shop}, {"int64_part": sku}]} for shop, sku in keys]
        return [{"entity_type": "offer", "ids": {"composite_ids": ids}}]

    def km(*values: float) -> list[Any]:
        data = np.array(values, "<f4").tobytes()
        return [{"name": "km", "dtype": types_pb2.DATA_TYPE_FLOAT32, "shape": [len(values)], "data": data}]

    async with feature_world(OFFER_SNAPSHOT, redis_url) as w:
        batch = make_batch("offers", [], {"price": [10, 20]}, at_s=time.time() - 30)
        batch.ids.CopyFrom(pb.GetFeaturesRequest(entities=entities(("a", 1), ("a", 2))).entities[0].ids)
        await w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=TOKEN)
        request = pb.GetFeaturesRequest(
            feature_set="offers", entities=entities(("a", 2), ("b", 1)), request_features=km(1, 2), include_ages=True
        )
        answer = await w.stub.GetFeatures(request, metadata=TOKEN)
        assert tensor(answer, "offer").tolist() == [[3, 21, 12], [3, -1, 12]]
        age, none = np.frombuffer(answer.views[0].ages_us, "<i8").tolist()
        assert 30e6 <= age < 3600e6
        assert (none, answer.views[0].defaulted_cells) == (-1, 2)  # two ratings; the cost that is one is not this view's

        error = await error_of(w.stub.GetFeatures(pb.GetFeaturesRequest(feature_set="offers", entities=entities(("a", 2))), metadata=TOKEN))
        assert (error.reason, [v.description for v in error.violations]) == (
            "REQUEST_FEATURE_INVALID",
            ["'km' is missing and has no default"],
        )
        explain = pb.ExplainFeaturesRequest(feature_set="offers", entities=entities(("a", 2)), request_features=km(1))
        told = await w.stub.ExplainFeatures(explain, metadata=TOKEN)
        assert [c.value for c in told.columns] == [3, 21, 12]
        assert [c.defaulted for c in told.columns] == [True, False, True]
        assert told.views[0].source == pb.ROW_SOURCE_REDIS
        described = await w.stub.DescribeFeatureSet(pb.DescribeFeatureSetRequest(feature_set="offers"), metadata=TOKEN)
        assert [r.name for r in described.request_features] == ["km", "hour"]
        [features] = [i.features for i in described.inputs]
        assert [(f.feature, f.width, f.expression) for f in features] == [
            ("rating", 1, ""),
            ("$transform:cost", 1, "{offers:price} + {$request:km}"),
            ("$request:hour", 1, ""),
        ]


async def test_statuses_are_always_true(redis_url: str) -> None:
    async with feature_world(SNAPSHOT, redis_url) as w:
        now = time.time()
        await w.write("stats", ["fresh", "gone"], {"a": [1, 1], "b": [2, 2], "c": [3, 3]})
        await w.write("stats", ["null"], {"a": [4]})
        await w.write("stats", ["old"], {"a": [9], "b": [9], "c": [9]}, at_s=now - 7200)
        await w.write("stats", ["gone"], {}, at_s=now + 1, deleted=[True])
        answer = await w.read("stats", item=["fresh", "null", "old", "never", "gone"])
        assert statuses(answer, "stats") == ["PRESENT", "NULL", "STALE", "NOT_FOUND", "NOT_FOUND"]
        values = tensor(answer, "item")
        np.testing.assert_array_equal(values[:, 0], [1, 4, 9, 1.5, 1.5])
        np.testing.assert_array_equal(values[:, 1], [3, np.nan, 9, np.nan, np.nan])
        [report] = answer.views
        assert list(report.status_counts) == [0, 1, 1, 0, 2, 1, 0, 0]
        times = np.frombuffer(report.event_times_us, "<i8")
        assert times[2] == int((now - 7200) * 1e6)
        assert times[3] == times[4] == 0
        both = await w.read("both", user=["nobody"], item=["fresh"])
        assert statuses(both, "profile") == ["DEFAULTED"]
        assert tensor(both, "user").tolist() == [[30]]


async def test_policies(redis_url: str) -> None:
    async with feature_world(SNAPSHOT, redis_url) as w:
        await w.write("stats", ["old"], {"a": [1], "b": [1], "c": [1]}, at_s=time.time() - 7200)

        async def ask(policy: int, share: float, ids: list[str]) -> Any:
            request = pb.GetFeaturesRequest(feature_set="stats", policy=policy, max_defaulted_share=share)  # type: ignore[arg-type]
            request.entities.add(entity_type="item").ids.string_ids.extend(ids)
            return await w.stub.GetFeatures(request, metadata=TOKEN)

        fail, default, stale_ok = types_pb2.MISSING_POLICY_FAIL, types_pb2.MISSING_POLICY_DEFAULT, types_pb2.MISSING_POLICY_STALE_OK
        assert (await error_of(ask(fail, 0, ["never"]))).reason == "FEATURES_MISSING"
        assert (await error_of(ask(fail, 0, ["old"]))).reason == "FEATURES_MISSING"
        await ask(default, 0, ["never", "old"])
        assert "2 of 2" in (await error_of(ask(default, 0.5, ["never", "old"]))).message
        await ask(stale_ok, 0.5, ["never", "old"])
        assert (await error_of(ask(stale_ok, 0.4, ["never", "old"]))).reason == "FEATURES_MISSING"


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        (lambda r: setattr(r, "feature_set", "none"), "FEATURE_SET_NOT_FOUND", "plait get"),
        (lambda r: r.inputs.append("nosuch"), "INVALID_ARGUMENT", "nosuch"),
        (lambda r: r.ClearField("entities"), "INVALID_ARGUMENT", "'item' are missing"),
        (lambda r: r.entities.add(entity_type="item"), "INVALID_ARGUMENT", "given twice"),
        (lambda r: r.entities.add(entity_type="shop"), "INVALID_ARGUMENT", "is not used by"),
        (lambda r: r.entities[0].ids.ClearField("string_ids"), "INVALID_ARGUMENT", "at least one id"),
        (lambda r: r.entities[0].ids.int64_ids.append(1), "INVALID_ARGUMENT", "only one of"),
        (lambda r: r.entities[0].ids.CopyFrom(types_pb2.EntityIds(int64_ids=[1])), "INVALID_ARGUMENT", "set string_ids"),
        (lambda r: r.entities[0].ids.string_ids.extend([f"{i}" for i in range(10_001)]), "INVALID_ARGUMENT", "at most 10000"),
        (lambda r: r.entities[0].ids.string_ids.append(""), "INVALID_ARGUMENT", "empty"),
        (lambda r: r.entities[0].ids.string_ids.append("x" * 257), "ID_INVALID", "256 bytes"),
    ],
)
async def test_bad_reads_are_refused_and_the_process_lives_on(redis_url: str, change: Any, reason: str, words: str) -> None:
    async with feature_world(SNAPSHOT, redis_url) as w:
        request = pb.GetFeaturesRequest(feature_set="stats")
        request.entities.add(entity_type="item").ids.string_ids.append("i")
        change(request)
        error = await error_of(w.stub.GetFeatures(request, metadata=TOKEN))
        assert error.reason == reason
        assert words in str(error)
        assert statuses(await w.read("stats", item=["i"]), "stats") == ["NOT_FOUND"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: setattr(b, "feature_view", "none"), "no feature view"),
        (lambda b: setattr(b.columns[0], "dtype", types_pb2.DATA_TYPE_FLOAT64), "not the declared dtype"),
        (lambda b: setattr(b.columns[0], "dtype", 99), "not the declared dtype"),
        (lambda b: setattr(b.columns[0], "data", b"123"), "3 bytes of data, expected 2 rows x 1 features x 4 bytes = 8"),
        (lambda b: b.columns[0].features.append("zz"), "unknown features ['zz']"),
        (lambda b: b.columns.append(b.columns[0]), "given twice"),
        (lambda b: setattr(b.columns[0], "null_bits", b"12"), "null bits"),
        (lambda b: b.event_times_us.extend([1, 2]), "event times for 2 rows"),
        (lambda b: b.sequences.append(1), "1 sequences for 2 rows"),
        (lambda b: b.ids.int64_ids.append(1), "only one of"),
        (lambda b: b.ids.string_ids.extend(["x"] * 10_000), "at most 10000"),
    ],
)
async def test_bad_writes_are_refused_whole(redis_url: str, change: Any, words: str) -> None:
    async with feature_world(SNAPSHOT, redis_url) as w:
        batch = make_batch("stats", ["i1", "i2"], {"a": [1, 2]})
        change(batch)
        assert words in str(await error_of(w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=TOKEN)))
        assert statuses(await w.read("stats", item=["i1"]), "stats") == ["NOT_FOUND"]


async def test_bad_rows_are_refused_alone(redis_url: str) -> None:
    async with feature_world(SNAPSHOT, redis_url) as w:
        batch = make_batch("stats", ["ok", "future", "past", "", "x" * 300], {"a": [1, 2, 3, 4, 5]})
        now_us = int(time.time() * 1e6)
        del batch.event_times_us[:]
        batch.event_times_us.extend([now_us, now_us + 3600 * 1_000_000, -5, now_us, now_us])
        answer = await w.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=TOKEN)
        assert (answer.applied, [(e.row, e.reason) for e in answer.errors]) == (
            1,
            [(1, "EVENT_TIME_IN_FUTURE"), (2, "EVENT_TIME_INVALID"), (3, "ID_INVALID"), (4, "ID_INVALID")],
        )
        assert statuses(await w.read("stats", item=["ok", "future"]), "stats") == ["NULL", "NOT_FOUND"]


async def test_tenants_are_kept_apart(redis_url: str) -> None:
    async with feature_world(SNAPSHOT, redis_url) as w:
        await w.write("stats", ["i"], {"a": [1], "b": [1], "c": [1]})
        other = await w.read("stats", metadata=(*TOKEN, ("x-plait-tenant", "other")), item=["i"])
        assert statuses(other, "stats") == ["NOT_FOUND"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
async def test_any_order_and_repetition_of_writes_ends_the_same(redis_server: EmbeddedRedis, data: st.DataObject) -> None:
    """Invariant (a): the state is decided by (event time, sequence, bytes), never by arrival."""
    events = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(-3, 3), st.booleans()), min_size=1, max_size=8))
    shuffled = data.draw(st.permutations(events + data.draw(st.lists(st.sampled_from(events), max_size=4))))
    async with feature_world(SNAPSHOT, redis_server.url) as w:
        run = f"{time.monotonic_ns()}"
        for name, order in (("x", events), ("y", shuffled)):
            for at, sequence, value, deleted in order:
                await w.write("stats", [f"{run}{name}"], {"a": [value]}, at_s=float(at), sequences=[sequence], deleted=[deleted])
        keys = KeySpace.of("default", "item", "stats", 1).keys([f"{run}x", f"{run}y"])
        left, right = (await w.store.read(keys, 5)).rows
        assert left is not None
        assert left == right
        header = np.frombuffer(left[:32], "<i8")
        assert header[1] == max(at for at, *_ in events) * 1_000_000


async def test_ingest_acks_in_order_and_goes_on_after_a_bad_batch(redis_url: str) -> None:
    async with feature_world(SNAPSHOT, redis_url) as w:

        async def batches() -> Any:
            for n in range(20):
                view = "none" if n == 7 else "stats"
                yield pb.IngestFeaturesRequest(batch_id=n, batch=make_batch(view, [f"i{n}"], {"a": [n]}))

        acks = [ack async for ack in w.stub.IngestFeatures(batches(), metadata=TOKEN)]
        assert [ack.batch_id for ack in acks] == list(range(20))
        assert [ack.batch_id for ack in acks if ack.HasField("status")] == [7]
        assert acks[7].status.code == grpc.StatusCode.NOT_FOUND.value[0]
        assert sum(ack.result.applied for ack in acks) == 19
        values = tensor(await w.read("stats", item=[f"i{n}" for n in range(20) if n != 7]), "item")
        assert values[:, 0].tolist() == [n for n in range(20) if n != 7]


async def test_redis_away_gives_defaults_that_say_so_and_recovers(tmp_path: Any) -> None:
    async with EmbeddedRedis(tmp_path / "r") as server, feature_world(SNAPSHOT, server.url, near_cache=True) as w:
        await w.write("stats", ["i"], {"a": [1], "b": [1], "c": [1]})
        await until(lambda: w.cache.on)
        await w.read("stats", item=["i"])
        await server.child.stop(signal.SIGTERM, grace_s=10)
        await until(lambda: not w.cache.on)
        answer = await w.read("both", user=["u"], item=["i"])
        assert statuses(answer, "stats") == statuses(answer, "profile") == ["UNAVAILABLE"]
        assert tensor(answer, "item").tolist() == [[-1, 1.5, 0, 7]]
        error = await error_of(w.read("stats", policy=types_pb2.MISSING_POLICY_FAIL, item=["i"]))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        assert error.retry_after_s is not None
        assert (await error_of(w.write("stats", ["i"], {"a": [1]}))).reason == "STORE_UNAVAILABLE"
        await server.start()
        await until_async(lambda: _present(w))


async def _present(w: FeatureWorld) -> bool:
    return statuses(await w.read("stats", item=["i"]), "stats") == ["PRESENT"]


async def test_a_deadline_bounds_the_read(redis_url: str) -> None:
    async with feature_world(SNAPSHOT, redis_url) as w:
        [key] = KeySpace.of("default", "item", "stats", 1).keys(["i"])
        found = await w.store.read([key] * 5000, 0.0)
        assert (len(found.rows), len(found.late)) == (5000, 5000)
        await w.write("stats", ["i"], {"a": [1], "b": [1], "c": [1]})
        assert statuses(await w.read("stats", item=["i"]), "stats") == ["PRESENT"]  # the connection that was given up is not reused


async def test_the_near_cache_follows_changes(redis_url: str) -> None:
    async with feature_world(SNAPSHOT, redis_url, near_cache=True) as w:
        await until(lambda: w.cache.on)
        for n in range(1, 30):
            await w.write("stats", ["i"], {"a": [n], "b": [1], "c": [1]}, at_s=1e9 + n)

            async def seen(n: int = n) -> bool:
                return tensor(await w.read("stats", item=["i", "none"]), "item")[0, 0] == n

            await until_async(seen)
        assert "ids=2" in repr(w.cache)


async def test_rows_of_an_older_schema_stay_readable(redis_url: str) -> None:
    old = FeatureView(name="stats", entity=ITEM, features=(Feature(name="a", default=1.5),), schemas=())
    async with feature_world(Snapshot(feature_views={"stats": old}), redis_url) as w:
        await w.write("stats", ["old"], {"a": [5]})
    features = STATS.features
    new = FeatureView(
        name="stats",
        entity=ITEM,
        features=features,
        schemas=(FeatureSchema(id=1, features=features[:1]), FeatureSchema(id=2, features=features)),
    )
    async with feature_world(Snapshot(feature_views={"stats": new}, feature_sets={"stats": SETS["stats"]}), redis_url) as w:
        await w.write("stats", ["new"], {"a": [6], "b": [0], "c": [8]})
        answer = await w.read("stats", item=["new", "old", "none"])
        np.testing.assert_array_equal(tensor(answer, "item"), [[6, 8], [5, np.nan], [1.5, np.nan]])
        assert statuses(answer, "stats") == ["PRESENT", "NULL", "NOT_FOUND"]


async def test_describe(redis_url: str) -> None:
    async with feature_world(SNAPSHOT, redis_url) as w:
        answer = await w.stub.DescribeFeatureSet(pb.DescribeFeatureSetRequest(feature_set="both"), metadata=TOKEN)
        assert [(i.name, i.entity_type, [f.feature for f in i.features]) for i in answer.inputs] == [
            ("user", "user", ["age"]),
            ("item", "item", ["b", "a", "x", "n"]),
        ]
        assert answer.inputs[1].features[0].default_value == -1
        assert answer.inputs[1].features[0].max_age_s == 3600
        error = await error_of(w.stub.DescribeFeatureSet(pb.DescribeFeatureSetRequest(feature_set="none"), metadata=TOKEN))
        assert error.reason == "FEATURE_SET_NOT_FOUND"


async def test_strangers_are_not_let_in(redis_url: str) -> None:
    async with feature_world(SNAPSHOT, redis_url) as w:
        error = await error_of(w.read("stats", metadata=(), item=["i"]))
        assert error.code == grpc.StatusCode.UNAUTHENTICATED


async def until(condition: Any, timeout_s: float = 20) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.01)


async def until_async(condition: Any, timeout_s: float = 20) -> None:
    give_up = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.01)
