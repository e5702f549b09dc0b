"""Aggregates in the durable copy: their rows are ordered by event time and by how many events are in them, so a copy is never an older state."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.calls import ADMIN
from tests.fakes.event_world import DAY_S, LISTINGS, NOW_S, event, messages

from feature_retrieval.aggregation.applying import Applying
from feature_retrieval.aggregation.plan import AggregationPlans
from feature_retrieval.durable_copy import DurableCopy
from feature_retrieval.rebuilding import Rebuilding
from feature_retrieval.row_codec import KeySpace
from feature_retrieval.store.postgres import DurableRows
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import Unavailable
from plait.registry.database import Pool, open_pool
from plait.registry.records import FeatureView, Snapshot
from plait.registry.store import Store

KEPT = dataclasses.replace(LISTINGS, durable="before")
SNAPSHOT = Snapshot(feature_views={KEPT.name: KEPT})
IDS = ["l1", "l2"]
KEYS = KeySpace.of("default", KEPT.entity.type, KEPT.name, KEPT.version).keys(IDS)


@pytest_asyncio.fixture
async def pool(postgres_dsn: str) -> AsyncIterator[Pool]:
    async with await Store.open(postgres_dsn) as registry:
        await registry.migrate()
    opened = await open_pool(postgres_dsn, name="test")
    yield opened
    await opened.close()


def applying(store: RedisStore, copy: DurableCopy) -> Applying:
    plans = AggregationPlans(SNAPSHOT)
    return Applying(store, lambda: plans, keep=copy.keep, clock=lambda: NOW_S)


async def nothing_was_erased() -> None:
    """As in a Redis that was just lost, of nobody."""


_EVENTS = st.lists(
    st.tuples(st.sampled_from(["view", "like", "rate"]), st.sampled_from(IDS), st.sampled_from([0.0, 10.0, 301.0, 3600.0, 1.5 * DAY_S])),
    min_size=1,
    max_size=12,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=_EVENTS, seed=st.integers(0, 99))
async def test_the_copy_is_the_row_and_builds_it_again(redis_url: str, pool: Pool, drawn: list[tuple[str, str, float]], seed: int) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    async with pool.connection() as connection:
        await connection.execute("truncate plait.feature_row")
    store, rows, chance = RedisStore(redis_url), DurableRows(pool), random.Random(seed)  # noqa: S311
    copy = DurableCopy(rows, lambda: SNAPSHOT)
    sent = [event(f"e{n}", kind, at_s=NOW_S - age, listing=one) for n, (kind, one, age) in enumerate(drawn)]
    chance.shuffle(sent)
    try:
        while sent:
            size = chance.randint(1, 4)
            batch, sent = sent[:size], sent[size:]
            await applying(store, copy).apply(messages(batch))
            assert await rows.read(KEYS) == (await store.read(KEYS, 10)).rows
        before = (await store.read(KEYS, 10)).rows
        with redis.Redis.from_url(redis_url) as client:
            client.flushall()
        rebuilding = Rebuilding(store, rows, lambda: SNAPSHOT, nothing_was_erased, lambda: NOW_S)
        [_ async for _ in rebuilding.rebuild(pb.RebuildFeaturesRequest(), ADMIN)]
        assert (await store.read(KEYS, 10)).rows == before
    finally:
        await store.close()


async def test_a_copy_that_was_missed_is_made_up_for_when_the_events_come_again(redis_url: str, pool: Pool) -> None:
    store, rows = RedisStore(redis_url), DurableRows(pool)
    copy = DurableCopy(rows, lambda: SNAPSHOT)
    sent = messages([event("e1", "view", at_s=NOW_S - 5, listing="l1")])

    async def away(view: FeatureView, keys: Sequence[bytes], kept: Sequence[bytes]) -> bool:
        raise Unavailable("Postgres is away", reason="REGISTRY_UNAVAILABLE")

    plans = AggregationPlans(SNAPSHOT)
    with pytest.raises(Unavailable):
        await Applying(store, lambda: plans, keep=away, clock=lambda: NOW_S).apply(sent)
    [held, _] = (await store.read(KEYS, 10)).rows
    assert held is not None
    assert await rows.read(KEYS) == [None, None]
    await applying(store, copy).apply(sent)
    assert await rows.read(KEYS) == [held, None] == (await store.read(KEYS, 10)).rows
    await store.close()


async def test_nothing_is_applied_to_a_redis_that_has_not_heard_of_every_erasure(redis_url: str) -> None:
    store = RedisStore(redis_url)
    plans = AggregationPlans(SNAPSHOT)

    async def not_loaded() -> None:
        raise Unavailable("Postgres is away", reason="ERASURES_NOT_LOADED")

    with pytest.raises(Unavailable):
        await Applying(store, lambda: plans, erasures_loaded=not_loaded, clock=lambda: NOW_S).apply(
            messages([event("e1", "view", at_s=NOW_S - 5, listing="l1")])
        )
    assert (await store.read(KEYS, 10)).rows == [None, None]
    await store.close()
