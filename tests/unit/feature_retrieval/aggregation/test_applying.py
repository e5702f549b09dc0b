"""Applying events on a real Redis: exactly once in effect under every permutation, duplication, batching, interleaving and lost answer."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.event_world import DAY_S, LISTINGS, NOW_S, NOW_US, PLANS, SNAPSHOT, USERS, event, feature, messages

from feature_retrieval.aggregation.applying import Applying
from feature_retrieval.aggregation.plan import AggregatedView, AggregationPlans
from feature_retrieval.row_codec import KeySpace, header
from feature_retrieval.store.redis import RedisStore, Swap
from plait.api.events.v1 import events_pb2
from plait.errors import Unavailable
from plait.local.redis import EmbeddedRedis
from plait.registry.records import Epochs, FeatureSchema, FeatureView, Snapshot

KINDS = ["view", "like", "make_offer", "complete_purchase", "rate"]
AGES_S = st.one_of(
    st.floats(0, 3 * 3600),
    st.floats(0, 1.9 * DAY_S),
    st.sampled_from([-250.0, 0.0, 299.9, 300.0, 3600.0, DAY_S, 1.999 * DAY_S, 3 * DAY_S, -400.0]),
)


@st.composite
def event_sets(draw: st.DrawFn) -> list[events_pb2.Event]:
    return [
        event(
            f"e{n}",
            draw(st.sampled_from(KINDS)),
            at_s=NOW_S - draw(AGES_S),
            subject=draw(st.sampled_from(["u1", "u2"])),
            listing=draw(st.sampled_from(["l1", "l2", ""])),
            value=draw(st.sampled_from([0.0, -0.0, 1.5, -2.25, 0.1, 1e9, 1e-7])),
            values={"price": draw(st.floats(0, 1000))} if draw(st.booleans()) else None,
        )
        for n in range(draw(st.integers(1, 20)))
    ]


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(url)
    try:
        yield store
    finally:
        await store.close()


def applying(store: RedisStore, plans: AggregationPlans = PLANS) -> Applying:
    return Applying(store, lambda: plans, clock=lambda: NOW_S)


def flush(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.flushall()


def space(view: FeatureView, tenant: str = "default", epoch: int = 0) -> KeySpace:
    return KeySpace.of(tenant, view.entity.type, view.name, view.version, epoch)


async def rows_of(store: RedisStore, epoch: int = 0, tenant: str = "default") -> dict[tuple[str, str], bytes | None]:
    wanted = [(view, one) for view, ids in ((LISTINGS, ("l1", "l2")), (USERS, ("u1", "u2"))) for one in ids]
    keys = [space(view, tenant, epoch).keys([one])[0] for view, one in wanted]
    found = (await store.read(keys, 10)).rows
    return {(view.name, one): row for (view, one), row in zip(wanted, found, strict=True)}


def values_of(view: FeatureView, row: bytes, now_us: int = NOW_US) -> dict[str, float | None]:
    plan = next(each for each in PLANS.views if each.view is view)
    block = np.frombuffer(row, np.uint8)[None, :]
    found: dict[str, float | None] = {}
    for each in plan.features:
        value, known = each.window.evaluate(block[:, each.at], now_us)
        found[each.name] = float(value[0]) if known is None or known[0] else None
    return found


def counted(view: FeatureView, entity: str, events: Sequence[events_pb2.Event]) -> list[events_pb2.Event]:
    """The distinct events that a row must have taken, by the rules in plain Python."""
    found = {}
    memory_s = {LISTINGS.name: 2 * DAY_S, USERS.name: 3 * DAY_S}[view.name]
    for each in events:
        at_s = each.event_time.ToMicroseconds() / 1e6
        about = each.object if view is LISTINGS else each.subject
        kinds = {TYPES[kind] for f in view.features if f.aggregate for kind in f.aggregate.events}
        if list(about.ids.string_ids) != [entity] or each.type not in kinds:
            continue
        if at_s > NOW_S + 300 or at_s < NOW_S - memory_s:
            continue
        if view is LISTINGS and each.type == TYPES["make_offer"] and "price" not in each.values:
            continue
        found[each.event_id] = each
    return list(found.values())


TYPES = {name.removeprefix("EVENT_TYPE_").lower(): number for name, number in events_pb2.EventType.items()}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=event_sets(), data=st.data())
async def test_any_permutation_duplication_batching_and_interleaving_ends_in_the_same_rows(
    redis_server: EmbeddedRedis, events: list[events_pb2.Event], data: st.DataObject
) -> None:
    async with opened(redis_server.url) as store:
        flush(redis_server.url)
        first = await applying(store).apply(messages(events))
        once = await rows_of(store)

        flush(redis_server.url)
        sent = data.draw(st.permutations(events + data.draw(st.lists(st.sampled_from(events), max_size=20))))
        batches: list[list[events_pb2.Event]] = []
        while sent:
            size = data.draw(st.integers(1, len(sent)))
            batches.append(sent[:size])
            sent = sent[size:]
        consumers = [applying(store) for _ in range(3)]

        async def consume(mine: list[list[events_pb2.Event]], who: Applying) -> None:
            for batch in mine:
                await who.apply(messages(batch))

        await asyncio.gather(*(consume(batches[n::3], who) for n, who in enumerate(consumers)))
        assert await rows_of(store) == once

    for view, ids in ((LISTINGS, ("l1", "l2")), (USERS, ("u1", "u2"))):
        for entity in ids:
            row, mine = once[view.name, entity], counted(view, entity, events)
            assert (row is None) == (not mine)
            if row is None:
                continue
            head = header(np.frombuffer(row, np.uint8)[None, :])
            assert head["sequence"][0] == len(mine)
            assert head["event_time_us"][0] == max(each.event_time.ToMicroseconds() for each in mine)
            check_values(view, values_of(view, row), mine)
    refused = {events[at].event_id for at in first.refused}
    for each in events:  # nothing is lost: it is in the rows that take it, or a dead letter
        late = not NOW_S - 2 * DAY_S <= each.event_time.ToMicroseconds() / 1e6 <= NOW_S + 300
        if each.type == TYPES["make_offer"] and each.object.ids.string_ids:
            assert (each.event_id in refused) == (late or "price" not in each.values)


def check_values(view: FeatureView, got: dict[str, float | None], events: list[events_pb2.Event]) -> None:
    """A few of the functions once more, end to end; `test_windows` has all of them in depth."""

    def picked(*kinds: str, tile_s: float = 0, window_s: float = 0) -> list[events_pb2.Event]:
        mine = [each for each in events if each.type in {TYPES[kind] for kind in kinds}]
        if not tile_s or not mine:
            return mine
        tile = {each.event_id: each.event_time.ToMicroseconds() // int(tile_s * 1e6) for each in mine}
        newest = max(*tile.values(), NOW_US // int(tile_s * 1e6))
        return [each for each in mine if tile[each.event_id] > newest - round(window_s / tile_s)]

    if view is USERS:
        assert got["views"] == len(picked("view"))
        assert got["spent_1d"] == pytest.approx(
            sum(round(e.value * 1e6) / 1e6 for e in picked("complete_purchase", tile_s=3600, window_s=DAY_S)), abs=1e-5
        )
        return
    assert got["views_1h"] == len(picked("view", tile_s=300, window_s=3600))
    assert got["spent"] == pytest.approx(sum(round(e.value * 1e6) / 1e6 for e in picked("complete_purchase", "make_offer")), abs=1e-5)
    offers = [e.value for e in picked("make_offer", tile_s=3600, window_s=DAY_S)]
    assert got["low_1d"] == (min(offers) if offers else None)
    ratings = [round(e.value * 1e6) / 1e6 for e in picked("rate")]
    assert got["rating"] == (pytest.approx(sum(ratings) / len(ratings), abs=1e-5) if ratings else None)


class Interrupted(RedisStore):
    """A store whose swaps sometimes lose their answer, after they were done or before."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(url)
        self.random = random.Random(seed)  # noqa: S311

    async def swap(self, swaps: Sequence[Swap], receipt: Any = None) -> list[bool]:
        fate = self.random.random()
        if fate < 0.3:
            raise Unavailable("lost before", reason="STORE_UNAVAILABLE")
        done = await super().swap(swaps[: max(1, len(swaps) // 2)] if fate < 0.5 else swaps, receipt)
        if fate < 0.7:
            raise Unavailable("lost after", reason="STORE_UNAVAILABLE")
        return done


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=event_sets(), seed=st.integers(0, 10_000))
async def test_a_batch_applied_again_after_any_lost_answer_counts_once(
    redis_server: EmbeddedRedis, events: list[events_pb2.Event], seed: int
) -> None:
    async with opened(redis_server.url) as store:
        flush(redis_server.url)
        await applying(store).apply(messages(events))
        once = await rows_of(store)
        flush(redis_server.url)
        broken = Interrupted(redis_server.url, seed)

        async def consume() -> None:
            while True:
                try:
                    await applying(broken).apply(messages(events))
                except Unavailable:
                    continue
                return

        try:
            await asyncio.gather(consume(), consume())
        finally:
            await broken.close()
        assert await rows_of(store) == once


async def test_a_row_that_returns_to_an_earlier_value_is_not_taken_for_unchanged(redis_url: str) -> None:
    """+5, then -5 by somebody else between our reading the row and asking what is known would look like nothing had happened."""
    plus, minus, ours = (event(f"e{n}", "complete_purchase", value=value) for n, value in enumerate((5.0, -5.0, 1.0)))
    async with opened(redis_url) as store:
        await applying(store).apply(messages([event("first", "complete_purchase", value=10.0)]))

        class Raced(RedisStore):
            async def applied(self, keys: Sequence[bytes], fingerprints: Any, receipt: Any = None) -> list[list[bool]]:
                if not self.raced:
                    self.raced = True
                    await applying(store).apply(messages([plus]))
                    known = await super().applied(keys, fingerprints, receipt)
                    await applying(store).apply(messages([minus]))
                    return known
                return await super().applied(keys, fingerprints, receipt)

            raced = False

        raced = Raced(redis_url)
        outcome = await applying(raced).apply(messages([ours, plus]))
        await raced.close()
        row = (await rows_of(store))[LISTINGS.name, "l1"]
        assert row is not None
        assert values_of(LISTINGS, row)["spent"] == 11
        assert outcome.retries == 2  # the listing's row and the user's


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"\xff\xff", "EVENT_UNREADABLE"),
        (event(""), "EVENT_ID_INVALID"),
        (event("x" * 129), "EVENT_ID_INVALID"),
        (event("e", "unspecified"), "EVENT_TYPE_UNKNOWN"),
        (event("e", at_s=NOW_S + 301), "EVENT_TIME_IN_FUTURE"),
        (event("e", at_s=0), "EVENT_TIME_INVALID"),
        (event("e", at_s=-5), "EVENT_TIME_INVALID"),
        (event("e", at_s=NOW_S - 3 * DAY_S - 1), "EVENT_TOO_LATE"),
        (event("e", "rate", value=float("nan")), "VALUE_INVALID"),
        (event("e", "rate", value=1e10), "VALUE_INVALID"),
        (event("e", "make_offer", value=1.0), "VALUE_INVALID"),  # last_price needs "price"
        (event("e", "view", values={f"v{n}": 1.0 for n in range(33)}), "VALUE_INVALID"),
        (event("e", listing="x" * 257), "ENTITY_ID_INVALID"),
    ],
)
async def test_a_bad_event_is_refused_and_the_good_ones_beside_it_count(redis_url: str, bad: events_pb2.Event | bytes, reason: str) -> None:
    async with opened(redis_url) as store:
        outcome = await applying(store).apply(messages([event("good1"), bad, event("good2")]))
        assert {at: refusal.reason for at, refusal in outcome.refused.items()} == {1: reason}
        row = (await rows_of(store))[LISTINGS.name, "l1"]
        assert row is not None
        assert values_of(LISTINGS, row)["views_1h"] == 2


async def test_an_event_for_no_view_is_unused(redis_url: str) -> None:
    async with opened(redis_url) as store:
        outcome = await applying(store).apply(messages([event("e1", "start_purchase"), event("e2", subject="", listing="")]))
        assert (outcome.unused, outcome.refused) == (2, {})


async def test_tenants_and_epochs_are_apart_and_every_epoch_in_use_is_written(redis_url: str) -> None:
    epochs = {("shop", LISTINGS.name, 1): Epochs(serving=3, building=4, previous=2)}
    plans = AggregationPlans(Snapshot(feature_views=SNAPSHOT.feature_views, epochs=epochs))
    async with opened(redis_url) as store:
        await applying(store, plans).apply([*messages([event("e1")]), *messages([event("e1"), event("e2")], "shop")])
        rows = {
            (tenant, epoch): (await rows_of(store, epoch, tenant))[LISTINGS.name, "l1"]
            for tenant in ("default", "shop")
            for epoch in range(6)
        }
        counts = {where: values_of(LISTINGS, row)["views_1h"] for where, row in rows.items() if row is not None}
        assert counts == {("default", 0): 1, ("shop", 2): 2, ("shop", 3): 2, ("shop", 4): 2}


async def test_an_erased_entity_refuses_older_events_and_counts_later_ones_from_zero(redis_url: str) -> None:
    async with opened(redis_url) as store:
        await applying(store).apply(messages([event("e1", at_s=NOW_S - 100), event("e2", at_s=NOW_S - 90)]))
        listings = space(LISTINGS)
        (mark,) = listings.mark_keys(["l1"])
        await store.erase([mark], [listings.keys(["l1"])], [int((NOW_S - 50) * 1e6)])
        outcome = await applying(store).apply(
            messages([event("e1", at_s=NOW_S - 100), event("e3", at_s=NOW_S - 50), event("e4", at_s=NOW_S - 49)])
        )
        assert {at: refusal.reason for at, refusal in outcome.refused.items()} == {0: "ENTITY_ERASED", 1: "ENTITY_ERASED"}
        rows = await rows_of(store)
        row, user = rows[LISTINGS.name, "l1"], rows[USERS.name, "u1"]
        assert row is not None
        assert user is not None
        assert values_of(LISTINGS, row)["views_1h"] == 1
        assert values_of(USERS, user)["views"] == 4  # nobody erased the user


async def test_nothing_is_applied_to_a_redis_that_has_not_heard_of_every_erasure(redis_url: str) -> None:
    async def not_loaded() -> None:
        raise Unavailable("Postgres is away", reason="ERASURES_NOT_LOADED")

    async with opened(redis_url) as store:
        with pytest.raises(Unavailable):
            await Applying(store, lambda: PLANS, erasures_loaded=not_loaded, clock=lambda: NOW_S).apply(messages([event("e1")]))
        assert set((await rows_of(store)).values()) == {None}


@pytest.mark.parametrize("counted_before", [True, False])
async def test_an_erasure_between_reading_and_swapping_wins(redis_url: str, counted_before: bool) -> None:
    async with opened(redis_url) as store:
        if counted_before:
            await applying(store).apply(messages([event("e1", at_s=NOW_S - 100)]))
        listings = space(LISTINGS)
        (mark,) = listings.mark_keys(["l1"])

        class Raced(RedisStore):
            async def swap(self, swaps: Sequence[Swap], receipt: Any = None) -> list[bool]:
                await store.erase([mark], [listings.keys(["l1"])], [NOW_US])
                return await super().swap(swaps, receipt)

        raced = Raced(redis_url)
        outcome = await applying(raced).apply(messages([event("e2", at_s=NOW_S - 50)]))
        await raced.close()
        assert {refusal.reason for refusal in outcome.refused.values()} == {"ENTITY_ERASED"}
        assert (await rows_of(store))[LISTINGS.name, "l1"] is None


async def test_rows_of_an_older_schema_go_on_and_those_of_a_newer_one_are_left_alone(redis_url: str) -> None:
    more = (*LISTINGS.features, feature("likes", "count", "like"))
    schemas = (FeatureSchema(id=1, features=LISTINGS.features), FeatureSchema(id=2, features=more))
    wider = FeatureView(name=LISTINGS.name, entity=LISTINGS.entity, features=more, aggregation=LISTINGS.aggregation, schemas=schemas)
    newer = AggregationPlans(Snapshot(feature_views={wider.name: wider}))
    async with opened(redis_url) as store:
        await applying(store).apply(messages([event("e1"), event("e2", "like")]))
        await applying(store, newer).apply(messages([event("e2", "like"), event("e3", "like"), event("e4")]))
        row = (await rows_of(store))[LISTINGS.name, "l1"]
        assert row is not None
        assert struct.unpack_from("<HH", row) == (1, 2)
        plan: AggregatedView = newer.views[0]
        block = np.frombuffer(row, np.uint8)[None, :]
        got = {each.name: float(each.window.evaluate(block[:, each.at], NOW_US)[0][0]) for each in plan.features}
        assert (got["views_1h"], got["likes"]) == (2, 1)  # a young column counts from when it was declared
        with pytest.raises(Unavailable) as caught:
            await applying(store).apply(messages([event("e5")]))
        assert caught.value.reason == "ROW_UNREADABLE"
        assert (await rows_of(store))[LISTINGS.name, "l1"] == row


async def test_fingerprints_outlive_the_time_in_which_a_duplicate_is_taken(redis_url: str) -> None:
    async with opened(redis_url) as store:
        await applying(store).apply(messages([event("e1", at_s=NOW_S + 299)]))
    with redis.Redis.from_url(redis_url) as client:
        lives: Any = {bytes(key)[:3]: client.pttl(key) for key in client.scan_iter("s1*")}  # type: ignore[union-attr]
        assert len(lives) == 1
        assert all(client.pttl(key) > (2 * DAY_S + 290) * 1000 for key in client.scan_iter("s1*"))  # type: ignore[operator,union-attr]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), chance=st.randoms(use_true_random=False))
async def test_whatever_the_bytes_the_good_events_beside_them_count(
    redis_server: EmbeddedRedis, data: st.DataObject, chance: random.Random
) -> None:
    """One that passes every check and then breaks something would stop all consumers, again and again."""
    made = event("e", chance.choice(KINDS), value=1.5, values={"price": 2.0})
    made.subject.ids.composite_ids.add().parts.add(int64_part=data.draw(st.integers(-(1 << 63), (1 << 63) - 1)))
    made.event_time.seconds = data.draw(st.integers(-(1 << 63), (1 << 63) - 1) | st.just(int(NOW_S)))
    made.value = data.draw(st.floats())
    payload = bytearray(made.SerializeToString())
    for _ in range(data.draw(st.integers(0, 6))):
        payload[chance.randrange(len(payload))] = chance.randrange(256)
    flush(redis_server.url)
    async with opened(redis_server.url) as store:
        await applying(store).apply(messages([event("good1", listing="l9"), bytes(payload), event("good2", listing="l9")]))
        (row,) = (await store.read(space(LISTINGS).keys(["l9"]), 10)).rows
        assert row is not None
        assert values_of(LISTINGS, row)["views_1h"] == 2
