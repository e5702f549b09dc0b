"""Events over the wire on a real Redis: published, applied, refused, redriven, and who is told what."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import redis
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.fakes.calls import call_of
from tests.fakes.event_service import LEAN, MALL, SHOP, EventService, consuming, event_service
from tests.fakes.event_world import LISTINGS, NOW_S, NOW_US, PLANS, SNAPSHOT, USERS, event, feature, messages

from feature_retrieval.aggregation.applying import Applying
from feature_retrieval.aggregation.events import Refusal
from feature_retrieval.erasing import Erasing
from feature_retrieval.erasure_guard import ErasureGuard
from feature_retrieval.row_codec import KeySpace, tenant_key
from feature_retrieval.sources import Message
from plait.api.events.v1 import events_pb2
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import from_rpc_error
from plait.redis.commands import pack
from plait.registry.certificates import Signer
from plait.registry.manifests import Manifest
from plait.registry.records import Epochs, Feature, FeatureSet, FeatureView, ModelInput, Snapshot
from plait.registry.store import Store
from plait.settings import TelemetrySettings
from plait.telemetry.tracing import Tracing


@pytest_asyncio.fixture
async def service(redis_url: str) -> AsyncIterator[EventService]:
    async with event_service(redis_url) as running:
        yield running


async def settled(service: EventService, tenant: str = "shop") -> None:
    """Wait until nothing waits."""
    async with asyncio.timeout(20):
        while (await service.source("front").backlog_of(tenant)).events:
            await asyncio.sleep(0.005)


async def value(service: EventService, name: str = "views_1h", tenant: str = "shop", listing: str = "l1") -> float | None:
    space = KeySpace.of(tenant, "listing", LISTINGS.name, LISTINGS.version)
    row = (await service.store.read(space.keys([listing]), 10)).rows[0]
    if row is None:
        return None
    plan = next(each for each in PLANS.views if each.view is LISTINGS)
    found = next(each for each in plan.features if each.name == name)
    return float(found.window.evaluate(np.frombuffer(row, np.uint8)[None, found.at], NOW_US)[0][0])


async def refused(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call()
    return from_rpc_error(caught.value)


async def letters(service: EventService, metadata: Any = SHOP, **request: Any) -> Any:
    return await service.stub.ListDeadLetters(pb.ListDeadLettersRequest(**request), metadata=metadata, timeout=20)


async def status(service: EventService, view: str = LISTINGS.name, metadata: Any = SHOP) -> Any:
    return await service.stub.GetViewStatus(pb.GetViewStatusRequest(feature_view=view), metadata=metadata, timeout=20)


async def test_events_are_applied_for_their_tenant_alone(service: EventService) -> None:
    async with consuming(service.consumer()):
        answer = await service.publish([event("e1"), event("e2"), event("e2")])
        assert (answer.accepted, len(answer.errors)) == (3, 0)
        assert answer.durability in {pb.DURABILITY_APPLIED, pb.DURABILITY_SYNCED}
        await service.publish([event("e1")], MALL)
        await settled(service)
        await settled(service, "mall")
        assert (await value(service), await value(service, tenant="mall")) == (2, 1)
        assert await value(service, tenant="default") is None


async def test_what_can_be_seen_at_the_door_is_refused_there(service: EventService) -> None:
    answer = await service.publish(
        [
            event("good"),
            event(""),
            event("e", at_s=NOW_S + 400),
            event("e", at_s=0),
            event("e", "unspecified"),
            event("x", value=float("inf")),
        ]
    )
    assert [(error.row, error.reason) for error in answer.errors] == [
        (1, "EVENT_ID_INVALID"),
        (2, "EVENT_TIME_IN_FUTURE"),
        (3, "EVENT_TIME_INVALID"),
        (4, "EVENT_TYPE_UNKNOWN"),
        (5, "VALUE_INVALID"),
    ]
    assert answer.accepted == 1
    large = event("large")
    large.request_id = "x" * 70_000
    assert (await service.publish([large])).errors[0].reason == "EVENT_TOO_LARGE"
    assert (await refused(lambda: service.publish([]))).code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await refused(lambda: service.publish([event(str(n)) for n in range(1001)]))).code is grpc.StatusCode.INVALID_ARGUMENT
    newer = event("e9")
    newer.type = 99  # type: ignore[assignment]  # another replica may know it
    assert (await service.publish([newer])).accepted == 1


async def test_only_the_writers_a_view_names_are_counted_in_it(redis_url: str) -> None:
    def with_writers(*names: str, users: tuple[str, ...] = ()) -> Snapshot:
        views = (dataclasses.replace(LISTINGS, writers=names), dataclasses.replace(USERS, writers=users))
        return dataclasses.replace(SNAPSHOT, feature_views={view.name: view for view in views})

    like = event("like", "like")  # only listings count likes
    async with event_service(redis_url, snapshot=with_writers("shop-key")) as service, consuming(service.consumer()):
        assert (await service.publish([event("e1"), like])).accepted == 2
        answer = await service.publish([event("e2"), like], MALL)  # of e2 the users' view counts the view
        assert [(error.row, error.reason) for error in answer.errors] == [(1, "VIEW_NOT_WRITABLE")]
        await settled(service)
        await settled(service, "mall")
        assert [await value(service, tenant=tenant) for tenant in ("shop", "mall")] == [1, None]
        space = KeySpace.of("mall", "user", USERS.name, USERS.version)
        assert None not in (await service.store.read(space.keys(["u1"]), 10)).rows

        # Accepted before its view was closed to the key: a dead letter, which counts once the view is open to it again.
        message = dataclasses.replace(messages([like], "mall")[0], publisher="mall-key")
        refusal = (await Applying(service.store, service.aggregations, clock=service.clock).apply([message])).refused[0]
        assert refusal.reason == "VIEW_NOT_WRITABLE"
        await service.dead_letters.add(message, refusal)
        service.snapshot = with_writers("mall-key")
        await service.stub.RedriveDeadLetters(pb.RedriveDeadLettersRequest(reason="VIEW_NOT_WRITABLE"), metadata=MALL, timeout=20)
        await settled(service, "mall")
        assert await value(service, "heat", tenant="mall") == pytest.approx(1, abs=0.1)


async def test_with_too_many_waiting_none_is_taken(redis_url: str) -> None:
    async with event_service(redis_url, max_backlog=3) as service:
        await service.publish([event(f"e{n}") for n in range(4)])
        service.now_s += 1
        error = await refused(lambda: service.publish([event("e9")]))
        assert (error.reason, error.retry_after_s) == ("EVENT_BACKLOG", 1.0)
        await service.publish([event("e9")], MALL)  # the others' backlog is theirs
        async with consuming(service.consumer()):
            await settled(service)
        service.now_s += 1
        assert (await service.publish([event("e9")])).accepted == 1


async def test_dead_letters_keep_bytes_reason_and_trace_and_are_redriven_once(redis_url: str) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(TelemetrySettings(trace_sample_ratio=1.0), "test", exporter)
    async with event_service(redis_url, tracing=tracing) as service:
        bad = event("e1", "make_offer", value=5.0)  # "price" is missing
        await service.publish([bad, event("e2", "make_offer", value=6.0, values={"price": 6.0})])
        async with consuming(service.consumer()):
            await settled(service)
            found = await letters(service)
            (letter,) = found.dead_letters
            assert (letter.reason, found.total, found.next_page_token) == ("VALUE_INVALID", 1, "")
            assert events_pb2.Event.FromString(letter.payload) == bad
            assert letter.origin.startswith("redis:events:")
            assert letter.redrives == 0
            assert len(letter.traceparent.split("-")) == 4
            assert "l1" not in letter.message
            assert service.metric("plait_features_dead_letters_total", reason="VALUE_INVALID") == 1
            assert (await letters(service, MALL)).total == 0

            # Nothing has changed: it dies again, and counts how often.
            redriven = await service.stub.RedriveDeadLetters(pb.RedriveDeadLettersRequest(ids=[letter.id]), metadata=SHOP, timeout=20)
            assert redriven.redriven == 1
            await settled(service)
            (again,) = (await letters(service)).dead_letters
            assert (again.redrives, again.traceparent) == (1, letter.traceparent)
            assert again.payload == letter.payload

            # The view no longer asks for a price: now it counts, once.
            relaxed = FeatureView(
                name=LISTINGS.name,
                entity=LISTINGS.entity,
                aggregation=LISTINGS.aggregation,
                features=tuple(
                    f if f.name != "last_price" else feature("last_price", "last", "rate", value="value") for f in LISTINGS.features
                ),
            )
            service.snapshot = Snapshot(feature_views={relaxed.name: relaxed, USERS.name: USERS})
            error = await refused(
                lambda: service.stub.RedriveDeadLetters(pb.RedriveDeadLettersRequest(ids=[again.id]), metadata=MALL, timeout=20)
            )
            assert error.reason == "DEAD_LETTER_NOT_FOUND"
            for wanted in ({"reason": "EVENT_TOO_LATE"}, {"reason": "VALUE_INVALID"}, {}):
                await service.stub.RedriveDeadLetters(pb.RedriveDeadLettersRequest(**wanted), metadata=SHOP, timeout=20)
            await settled(service)
            assert (await letters(service)).total == 0
            assert await value(service, "spent") == 11
    tracing.close()


async def test_dead_letters_are_shown_to_administrators_only(service: EventService) -> None:
    await service.dead_letters.add(message_of("m"), refusal_of("VALUE_INVALID"))
    for call in (
        service.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=LEAN),
        service.stub.RedriveDeadLetters(pb.RedriveDeadLettersRequest(), metadata=LEAN),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert from_rpc_error(caught.value).reason == "SCOPE_MISSING"
    assert (await service.stub.GetViewStatus(pb.GetViewStatusRequest(feature_view=LISTINGS.name), metadata=LEAN)).dead_letters == 1


async def test_dead_letters_come_in_pages_newest_first(service: EventService) -> None:
    for n in range(7):
        await service.dead_letters.add(message_of(f"m{n}"), refusal_of("VALUE_INVALID" if n % 2 else "EVENT_TOO_LATE"))
    seen, token = [], ""
    while True:
        page = await letters(service, page_size=2, page_token=token)
        assert page.total == 7
        seen += [letter.payload.decode() for letter in page.dead_letters]
        token = page.next_page_token
        if not token:
            break
    assert seen == [f"m{n}" for n in reversed(range(7))]
    only = await letters(service, reason="VALUE_INVALID")
    assert [letter.payload for letter in only.dead_letters] == [b"m5", b"m3", b"m1"]
    for bad in ({"page_token": "no id"}, {"page_size": 1001}, {"page_size": -1}):
        assert (await refused(lambda bad=bad: letters(service, **bad))).code is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[misc]


def message_of(payload: str) -> Message:
    return Message(tenant="shop", payload=payload.encode(), traceparent="", origin="test", token=None, published_us=0)


def refusal_of(reason: str) -> Refusal:
    return Refusal(reason, "")


async def test_whatever_somebody_appends_to_the_stream_the_events_after_it_count(service: EventService) -> None:
    good = event("e1").SerializeToString()
    odd: list[dict[bytes, bytes]] = [
        {b"z": b"z"},
        {b"e": b"\xff", b"t": b"\xff", b"w": b"\xff", b"n": b"9" * 5000},
        {b"e": good, b"t": b"\xff", b"w": b"\xff", b"n": b"-1"},
        {b"e": good, b"n": b"9" * 5000},
    ]
    await service.store.streams.append([tenant_key(b"e1", "shop")] * len(odd), odd)
    await service.publish([event("e2")])
    async with consuming(service.consumer()):
        await settled(service)
    assert await value(service) == 2
    found = await letters(service)
    assert sorted((letter.reason, letter.redrives) for letter in found.dead_letters) == [("EVENT_ID_INVALID", 0), ("EVENT_UNREADABLE", 0)]


@pytest.mark.parametrize("word", ["", "x", "1", "-1-1", "0-0", f"{1 << 64}-0", f"1-{1 << 64}", "9" * 5000 + "-1"])
async def test_what_is_no_dead_letter_s_id_blames_the_caller(service: EventService, word: str) -> None:
    def redrive() -> Any:
        return service.stub.RedriveDeadLetters(pb.RedriveDeadLettersRequest(ids=[word]), metadata=SHOP, timeout=20)

    assert (await refused(redrive)).reason == "INVALID_ARGUMENT"
    if word:
        assert (await refused(lambda: letters(service, page_token=word))).reason == "INVALID_ARGUMENT"
    long = "n" * 50_000  # what is said of it must fit into a trailer
    assert (await refused(lambda: status(service, long))).reason == "FEATURE_VIEW_NOT_FOUND"


async def test_the_names_of_killed_consumers_go_once_nothing_is_theirs(service: EventService, redis_url: str) -> None:
    await service.publish([event("e1"), event("e2")])
    for name in ("killed", "killed-too"):
        assert len(await service.source(name, claim_after_s=3600).read(1, 0.05)) == 1
    alive = service.source("alive", claim_after_s=0.01, forget_after_s=0.01)
    async with consuming(service.consumer(alive)), asyncio.timeout(20):
        with redis.Redis.from_url(redis_url) as client:
            while {entry["name"] for entry in client.xinfo_consumers(tenant_key(b"e1", "shop"), "plait")} != {b"alive"}:  # type: ignore[union-attr]
                service.now_s += 601
                await asyncio.sleep(0.02)
    assert (await status(service)).lag_events == 0


async def test_a_backlog_that_redis_cannot_tell_is_shown_as_unknown_and_bounded_still(redis_url: str) -> None:
    async with event_service(redis_url, max_backlog=1) as service:
        source = service.source()
        async with consuming(service.consumer(source)):
            await service.publish([event("e0")])
            await settled(service)
        await service.publish([event(f"e{n}") for n in range(1, 5)])
        with redis.Redis.from_url(redis_url) as client:
            entries: Any = client.xrange(tenant_key(b"e1", "shop"))
            client.xdel(tenant_key(b"e1", "shop"), entries[-2][0])
        assert (await status(service)).lag_events == -1
        service.freshness.waits("redis", {"shop": await source.backlog_of("shop"), "mall": await source.backlog_of("mall")}, [])
        assert math.isnan(service.metric("plait_features_event_lag", source="redis") or 0)
        service.now_s += 1
        assert (await refused(lambda: service.publish([event("more")]))).reason == "EVENT_BACKLOG"
        async with consuming(service.consumer(service.source("two"))):
            await settled(service)
        assert (await status(service)).lag_events == 0
        service.now_s += 1
        assert (await service.publish([event("more")])).accepted == 1


async def test_status_and_metrics_tell_lag_watermark_and_freshness(service: EventService, redis_url: str) -> None:
    empty = await status(service)
    assert (empty.lag_events, empty.newest_event_time_us, empty.dead_letters, empty.serving_epoch) == (0, 0, 0, 0)
    assert empty.watermark_us == NOW_US
    assert not empty.HasField("building_epoch")
    await service.publish([event("e1", at_s=NOW_S - 50), event("e2", at_s=NOW_S - 70), event("e3", at_s=NOW_S - 3 * 86_400)])
    waiting = await status(service)
    assert waiting.lag_events == 3
    with redis.Redis.from_url(redis_url) as client:
        first: Any = client.xrange(tenant_key(b"e1", "shop"), count=1)
    assert waiting.watermark_us == int(first[0][0].partition(b"-")[0]) * 1000 - 1
    source = service.source()
    async with consuming(service.consumer(source)):
        await settled(service)
        service.freshness.waits("redis", {"shop": await source.backlog_of("shop")}, [LISTINGS.name])
    after = await status(service)
    assert (after.lag_events, after.dead_letters, after.newest_event_time_us) == (0, 1, int((NOW_S - 50) * 1e6))
    assert (await status(service, metadata=MALL)).newest_event_time_us == 0
    assert service.metric("plait_features_event_lag", source="redis") == 0
    assert service.metric("plait_features_watermark_seconds", view=LISTINGS.name) == NOW_S
    assert service.metric("plait_features_freshness_seconds", view=LISTINGS.name) == 50
    service.now_s += 10
    assert service.metric("plait_features_freshness_seconds", view=LISTINGS.name) == 60
    assert service.metric("plait_features_events_total", source="redis", outcome="applied") == 2
    assert service.metric("plait_features_events_total", source="redis", outcome="refused") == 1
    assert service.metric("plait_features_event_visible_seconds_count", source="redis") == 2
    assert (await refused(lambda: status(service, "listing-activty"))).reason == "FEATURE_VIEW_NOT_FOUND"

    service.snapshot = Snapshot(
        feature_views=SNAPSHOT.feature_views, epochs={("shop", LISTINGS.name, 1): Epochs(serving=2, building=3, previous=1)}
    )
    epochs = await status(service)
    assert (epochs.serving_epoch, epochs.building_epoch, epochs.previous_epoch) == (2, 3, 1)


async def test_what_a_dead_consumer_held_is_claimed_and_what_is_done_is_trimmed(service: EventService) -> None:
    await service.publish([event(f"e{n}") for n in range(5)])
    dead = service.source("dead")
    assert len(await dead.read(3, 1.0)) == 3  # and never heard of again
    async with consuming(service.consumer(service.source("alive", claim_after_s=0.05, keep_s=0))):
        async with asyncio.timeout(20):
            while (await service.source("front").backlog_of("shop")).events:
                service.now_s += 1  # its next look for what the dead left is due
                await asyncio.sleep(0.02)
        assert await value(service) == 5


async def test_a_consumer_that_drains_acknowledges_what_it_took_and_leaves(service: EventService) -> None:
    async with consuming(service.consumer(service.source("leaver"))):
        await service.publish([event(f"e{n}") for n in range(50)])
        await settled(service)
    assert (await service.source("front").backlog_of("shop")).events == 0
    key = tenant_key(b"e1", "shop")
    (groups,) = await service.store.streams.ask(key, [pack(b"XINFO", [b"GROUPS", key])])
    assert dict(zip(groups[0][::2], groups[0][1::2], strict=True))[b"consumers"] == 0


async def test_an_aggregated_view_is_read_like_any_other_and_as_of_the_moment(service: EventService) -> None:
    async def read(*listings: str) -> tuple[np.ndarray, list[str]]:
        request = pb.GetFeaturesRequest(feature_set="home")
        request.entities.add(entity_type="listing").ids.string_ids.extend(listings)
        answer = await service.stub.GetFeatures(request, metadata=SHOP, timeout=20)
        (tensor,) = answer.tensors
        found = np.frombuffer(tensor.data, np.float32).reshape(tuple(tensor.shape))
        return found, [types_pb2.RowStatus.Name(one).removeprefix("ROW_STATUS_") for one in answer.views[0].statuses]

    async with consuming(service.consumer()):
        await service.publish([event(f"e{n}", at_s=NOW_S - 60 * n, subject=f"u{n % 3}") for n in range(10)])
        await service.publish([event("offer", "make_offer", value=9.5, values={"price": 12.0}), event("like", "like", listing="l2")])
        await settled(service)
    values, statuses = await read("l1", "l2", "nobody")
    # views_1h, viewers, heat, rating (nobody rated), last_price
    assert values[0, :2] == pytest.approx([10, 3], abs=0.2)
    assert values[0, 2] == pytest.approx(sum(2 ** (-n / 60) for n in range(10)), rel=1e-3)
    assert values[0, 3:].tolist() == [-1, 12]
    assert values[1, [0, 3, 4]].tolist() == [0, -1, 0]
    assert statuses == ["NULL", "NULL", "NOT_FOUND"]
    service.now_s += 1800
    later, _ = await read("l1")
    assert later[0, 2] == pytest.approx(values[0, 2] * 2**-0.5, rel=1e-3)
    service.now_s += 1500
    assert (await read("l1"))[0][0, 0] == 4  # of the hour's twelve tiles only the oldest still has any: those of the last 200 s
    service.now_s += 300
    assert (await read("l1"))[0][0, 0] == 0
    service.now_s += 7200
    gone, statuses = await read("l1")
    assert gone[0, [0, 1, 4]].tolist() == [0, 0, 12]
    assert statuses == ["NULL"]


async def test_what_a_tensor_cannot_hold_is_null_and_never_another_number(redis_url: str) -> None:
    columns = (
        feature("few", "count", "view", default=-1, window_s=0.0),
        feature("rated", "mean", "rate", default=-1, value="value"),
        feature("huge", "last", "rate", default=-1, value="price"),
    )
    view = dataclasses.replace(LISTINGS, features=tuple(dataclasses.replace(one, dtype="int8") for one in columns[:2]) + columns[2:])
    inputs = (
        ModelInput(name="small", entity="listing", dtype="int8", features=(f"{view.name}:few", f"{view.name}:rated")),
        ModelInput(name="large", entity="listing", features=(f"{view.name}:few", f"{view.name}:rated", f"{view.name}:huge")),
    )
    snapshot = Snapshot(feature_views={view.name: view}, feature_sets={"home": FeatureSet(name="home", inputs=inputs)})

    async def read() -> tuple[list[int], list[float], str]:
        request = pb.GetFeaturesRequest(feature_set="home")
        request.entities.add(entity_type="listing").ids.string_ids.append("l1")
        answer = await service.stub.GetFeatures(request, metadata=SHOP, timeout=20)
        small, large = answer.tensors
        status = types_pb2.RowStatus.Name(answer.views[0].statuses[0])
        return np.frombuffer(small.data, np.int8).tolist(), np.frombuffer(large.data, np.float32).tolist(), status

    async with event_service(redis_url, snapshot=snapshot) as service, consuming(service.consumer()):
        await service.publish([event("a", "rate", value=2, values={"price": 7}), event("b", "rate", value=3, values={"price": 7})])
        await service.publish([event(f"e{n}") for n in range(100)])
        await settled(service)
        assert await read() == ([100, 2], [100, 2.5, 7], "ROW_STATUS_PRESENT")
        await service.publish([event(f"f{n}") for n in range(100)])
        await service.publish([event("c", "rate", at_s=NOW_S + 1, value=4, values={"price": 1e300})])
        await settled(service)
        assert await read() == ([-1, 3], [-1, 3, -1], "ROW_STATUS_NULL")  # null in one tensor, so null in all


async def test_nobody_writes_an_aggregated_view_by_hand(service: EventService) -> None:
    batch = pb.FeatureBatch(feature_view=LISTINGS.name, event_times_us=[NOW_US])
    batch.ids.string_ids.append("l1")
    error = await refused(lambda: service.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=SHOP, timeout=20))
    assert error.reason == "VIEW_IS_AGGREGATED"


async def test_a_view_that_callers_write_is_as_fresh_as_its_newest_row(redis_url: str) -> None:
    stats = FeatureView(name="stats", entity=LISTINGS.entity, features=(Feature(name="price"),))
    async with event_service(redis_url, snapshot=Snapshot(feature_views={"stats": stats})) as service:
        for ids, times in ((["l1", "l2"], [NOW_US - 9_000_000, NOW_US - 7_000_000]), (["l2"], [NOW_US - 8_000_000])):
            batch = pb.FeatureBatch(feature_view="stats", event_times_us=times)
            batch.ids.string_ids.extend(ids)
            await service.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=SHOP, timeout=20)
        told = await status(service, "stats")
        assert (told.newest_event_time_us, told.lag_events, told.watermark_us) == (NOW_US - 7_000_000, -1, 0)
        assert service.metric("plait_features_freshness_seconds", view="stats") == 7


async def test_who_was_erased_is_counted_from_zero_whatever_is_delivered_again(service: EventService, postgres_dsn: str) -> None:
    old = [event(f"e{n}", at_s=NOW_S - 60 + n) for n in range(5)]
    async with consuming(service.consumer()), await Store.open(postgres_dsn) as registry:
        await registry.migrate()
        await registry.apply([Manifest(record=view) for view in (LISTINGS, USERS)], actor="test")
        await service.publish(old)
        await settled(service)
        assert await value(service) == 5
        guard = ErasureGuard(service.store, registry)
        erasing = Erasing(service.store, registry, Signer(bytes(32)), guard.catch_up, service.clock)
        request, erased = pb.EraseEntityRequest(reason="asked for it"), pb.EraseEntityResponse()
        request.entities.entity_type = "listing"
        request.entities.ids.string_ids.append("l1")
        await erasing.erase(request, erased, call_of("shop", scopes=("features", "admin")))
        assert [(view.feature_view, view.rows) for view in erased.certificates[0].views if view.rows] == [(LISTINGS.name, 1)]
        assert await value(service) is None
        service.now_s += 400  # an erasure reaches as far as an event may be ahead
        await service.publish([*old, event("late", at_s=NOW_S - 1), event("new", at_s=service.now_s)])
        await settled(service)
        assert await value(service) == 1
        dead = (await letters(service)).dead_letters
        assert {(letter.reason, letter.payload) for letter in dead} == {("ENTITY_ERASED", b"")}  # the bytes hold who was erased
        redrive = pb.RedriveDeadLettersRequest(reason="ENTITY_ERASED")
        assert (await service.stub.RedriveDeadLetters(redrive, metadata=SHOP, timeout=20)).redriven == 0


async def test_explain_shows_what_a_window_is_worth(service: EventService) -> None:
    async with consuming(service.consumer()):
        await service.publish([event(f"e{n}", at_s=NOW_S - n) for n in range(3)])
        await settled(service)
    request = pb.ExplainFeaturesRequest(feature_set="home")
    request.entities.add(entity_type="listing").ids.string_ids.append("l1")
    answer = await service.stub.ExplainFeatures(request, metadata=SHOP, timeout=20)
    told = {column.reference.partition(":")[2]: (column.value, column.stored_value, column.defaulted) for column in answer.columns}
    assert told["views_1h"][0] == 3
    assert not told["views_1h"][2]
    assert (told["rating"][0], told["rating"][2]) == (-1, True)
