"""Events of the past in a new epoch, on a real Redis: it ends as if all had been live, whichever way, order and number of times they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.calls import ADMIN, call_of
from tests.fakes.event_world import DAY_S, LISTINGS, NOW_S, NOW_US, PLANS, SNAPSHOT, USERS, event, messages
from tests.unit.feature_retrieval.aggregation.test_applying import event_sets, flush, opened, rows_of

from feature_retrieval.aggregation.applying import Applying, Onto
from feature_retrieval.aggregation.plan import AggregationPlans
from feature_retrieval.aggregation.replaying import Replaying
from feature_retrieval.row_codec import KeySpace, tenant_key
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, PlaitError, Unavailable
from plait.local.redis import EmbeddedRedis
from plait.registry.records import Entity, Epochs, Feature, FeatureView, Snapshot

VIEWS = (LISTINGS, USERS)
BUILDING = Epochs(building=1, newest=1)
PLAIN = FeatureView(name="plain", entity=Entity(type="item"), features=(Feature(name="a"),))
BUILT = dataclasses.replace(
    SNAPSHOT,
    revision=7,
    feature_views={**SNAPSHOT.feature_views, "plain": PLAIN},
    epochs={("default", view.name, 1): BUILDING for view in VIEWS},
)


def applying(store: RedisStore, snapshot: Snapshot = BUILT, now_s: float = NOW_S) -> Applying:
    plans = AggregationPlans(snapshot)
    return Applying(store, lambda: plans, clock=lambda: now_s)


def replaying(store: RedisStore, snapshot: Snapshot = BUILT) -> Replaying:
    return Replaying(store, applying(store, snapshot), lambda: snapshot)


async def replayed(replays: Replaying, call: Any = ADMIN, **request: Any) -> Any:
    response = pb.ReplayEventsResponse()
    await replays.replay(pb.ReplayEventsRequest(**({"feature_view": LISTINGS.name, "epoch": 1} | request)), response, call)
    return response


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=event_sets(), data=st.data())
async def test_a_new_epoch_ends_as_if_all_events_had_been_live_in_it(
    redis_server: EmbeddedRedis, events: Sequence[Any], data: st.DataObject
) -> None:
    live = data.draw(st.lists(st.sampled_from(events), unique_by=lambda one: one.event_id), label="published since it was begun")
    others = [one for one in events if one not in live]
    more = data.draw(st.lists(st.sampled_from(events), max_size=8), label="repeated in the log")
    # What was refused live for being too late is in the log as well, as everything older is.
    late = [one for one in live if one.event_time.ToMicroseconds() < (NOW_S - 2 * DAY_S) * 1e6]
    log = data.draw(st.permutations([*others, *more, *late]), label="the log")
    steps = data.draw(st.permutations([("live", one) for one in live] + [("log", one) for one in log]))
    async with opened(redis_server.url) as store:
        flush(redis_server.url)
        await Applying(store, lambda: PLANS, clock=lambda: NOW_S).apply(messages(others))  # before it was begun
        for way, one in steps:
            if way == "live":
                await applying(store).apply(messages([one]))
            else:
                for view in VIEWS:
                    await applying(store).apply(messages([one]), onto=Onto(view=view.name, version=1, epoch=1))
        for view in VIEWS:
            await applying(store).apply(messages(events), onto=Onto(view=view.name, version=1, epoch=2))  # all of it at once
        assert await rows_of(store, epoch=1) == await rows_of(store, epoch=2)
        served = await rows_of(store)
        if not any(one.event_time.ToMicroseconds() < (NOW_S - 2 * DAY_S) * 1e6 for one in events):
            assert served == await rows_of(store, epoch=2)


async def test_only_the_named_epoch_of_the_named_view_changes(redis_url: str) -> None:
    async with opened(redis_url) as store:
        answer = await replayed(replaying(store), events=[event("e1"), event("e2", "rate"), event("old", at_s=NOW_S - 900 * DAY_S)])
        assert (answer.applied, answer.unused, list(answer.errors)) == (3, 0, [])
        assert {key for key, row in (await rows_of(store, epoch=1)).items() if row} == {(LISTINGS.name, "l1")}
        assert set((await rows_of(store)).values()) == {None}
        again = await replayed(replaying(store), events=[event("e1"), event("e3", listing=""), event("", "rate")])
        assert (again.applied, again.unused, [(e.row, e.reason) for e in again.errors]) == (1, 1, [(2, "EVENT_ID_INVALID")])


@pytest.mark.parametrize("ways", [["log", "live"], ["live", "log"], ["live"], ["log"], ["log", "later"], ["live", "later"]])
async def test_what_is_in_an_epoch_that_is_built_is_known_for_longer(redis_url: str, ways: Sequence[str]) -> None:
    flipped = dataclasses.replace(BUILT, epochs={("default", LISTINGS.name, 1): Epochs(serving=1, previous=0, newest=1)})
    async with opened(redis_url) as store:
        for way in ways:
            if way == "log":
                await replayed(replaying(store), events=[event(way)])
            else:
                await applying(store, flipped if way == "later" else BUILT).apply(messages([event(way)]))
        await applying(store, SNAPSHOT).apply(messages([event("usual")]))
        built, served = [
            KeySpace.of("default", "listing", LISTINGS.name, 1, epoch).applied_key("l1", NOW_US // 14_400_000_000) for epoch in (1, 0)
        ]
        [longer, usual] = await store.times_to_live([built, served])
        assert 0 < usual < 4 * DAY_S * 1000
        assert longer > usual + 6 * DAY_S * 1000


async def test_who_published_decides_in_a_replay_as_it_did_live(redis_url: str) -> None:
    closed = dataclasses.replace(LISTINGS, writers=(ADMIN.caller,))
    snapshot = dataclasses.replace(BUILT, feature_views={closed.name: closed})
    async with opened(redis_url) as store:
        replays = replaying(store, snapshot)
        answer = await replayed(replays, events=[event("e1", "view"), event("e2", "view")])  # whoever may write it may replay into it
        assert (answer.applied, len(answer.errors)) == (2, 0)
        kept = [
            {b"e": event(f"s{n}", "view").SerializeToString(), b"w": by} for n, by in enumerate((ADMIN.caller.encode(), b"another", b""))
        ]
        await store.streams.append([tenant_key(b"e1", "default")] * len(kept), kept)
        answer = await replayed(replays)
        assert (answer.applied, [error.reason for error in answer.errors]) == (1, ["VIEW_NOT_WRITABLE"] * 2)


async def test_the_stream_is_replayed_page_by_page_once_everyone_has_heard(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_retrieval.aggregation.replaying.MAX_EVENTS", 3)
    asked: list[int] = []

    async def heard(revision: int) -> None:
        asked.append(revision)
        if len(asked) == 1:
            raise Unavailable("not yet", reason="REPLICA_BEHIND")

    async with opened(redis_url) as store:
        replays = Replaying(store, applying(store), lambda: BUILT, heard=heard)  # ids of the stream are of the real time
        key = tenant_key(b"e1", "default")
        kept = [event(f"e{n}") for n in range(7)]
        await store.streams.append([key] * 8, [{b"e": one.SerializeToString()} for one in kept] + [{b"e": b"\xff"}])
        with pytest.raises(Unavailable):
            await replayed(replays)
        pages = [await replayed(replays)]
        assert pages[0].oldest_us > 0
        while pages[-1].cursor:
            pages.append(await replayed(replays, cursor=pages[-1].cursor))
        assert asked == [7, 7]
        assert [page.applied for page in pages] == [3, 3, 1]
        assert [error.reason for page in pages for error in page.errors] == ["EVENT_UNREADABLE"]
        await applying(store).apply(messages(kept), onto=Onto(view=LISTINGS.name, version=1, epoch=2))
        assert await rows_of(store, epoch=1) == await rows_of(store, epoch=2)


async def test_events_count_from_whom_they_counted_when_they_were_published(redis_url: str) -> None:
    guarded = dataclasses.replace(LISTINGS, writers=(ADMIN.caller, "shop-key"))
    snapshot = dataclasses.replace(BUILT, feature_views={**BUILT.feature_views, LISTINGS.name: guarded})
    async with opened(redis_url) as store:
        replays = replaying(store, snapshot)
        given = await replayed(replays, events=[event("given")])
        assert (given.applied, list(given.errors)) == (1, [])
        publishers = [b"shop-key", b"someone-else", b""]
        fields = [{b"e": event(f"by {who!r}").SerializeToString(), b"w": who} for who in publishers]
        await store.streams.append([tenant_key(b"e1", "default")] * 3, fields)
        kept = await replayed(replays)
        assert (kept.applied, kept.unused) == (1, 0)
        assert [(error.row, error.reason) for error in kept.errors] == [(1, "VIEW_NOT_WRITABLE"), (2, "VIEW_NOT_WRITABLE")]


@pytest.mark.parametrize(
    ("request_", "call", "kind", "reason"),
    [
        ({}, call_of(), PermissionDenied, "SCOPE_MISSING"),
        ({"epoch": 0}, ADMIN, NotFound, "EPOCH_NOT_FOUND"),
        ({"epoch": 2}, ADMIN, NotFound, "EPOCH_NOT_FOUND"),
        ({"feature_view": "plain"}, ADMIN, FailedPrecondition, "VIEW_NOT_AGGREGATED"),
        ({"feature_view": "none"}, ADMIN, NotFound, "FEATURE_VIEW_NOT_FOUND"),
        ({"events": [event("e")] * 1001}, ADMIN, InvalidArgument, "INVALID_ARGUMENT"),
    ],
)
async def test_what_is_not_replayed(redis_url: str, request_: Any, call: Any, kind: type[PlaitError], reason: str) -> None:
    async with opened(redis_url) as store:
        with pytest.raises(kind) as caught:
            await replayed(replaying(store), call, **request_)
        assert caught.value.reason == reason
