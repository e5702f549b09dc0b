"""Events on a Redis Cluster: streams and rows lie on different servers, and everything holds as on one."""

from __future__ import annotations

import asyncio
import random

from tests.fakes.event_service import MALL, SHOP, EventService, consuming, event_service
from tests.fakes.event_world import LISTINGS, NOW_S, USERS, event
from tests.fakes.redis_cluster import RedisCluster

from feature_retrieval.row_codec import KeySpace
from feature_retrieval.settings import IngestionSettings, RowStoreSettings
from feature_retrieval.store.opening import open_store
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.telemetry.metrics import Metrics


async def rows(service: EventService, tenant: str) -> list[bytes | None]:
    keys = []
    for view, ids in ((LISTINGS, [f"l{n}" for n in range(20)]), (USERS, [f"u{n}" for n in range(20)])):
        keys += KeySpace.of(tenant, view.entity.type, view.name, view.version).keys(ids)
    return (await service.store.read(keys, 10)).rows


async def settled(service: EventService, tenant: str) -> None:
    async with asyncio.timeout(60):
        while (await service.source("front").backlog_of(tenant)).events:
            service.now_s += 1  # a look for what the dead left is due
            await asyncio.sleep(0.02)


async def test_on_a_cluster_events_count_once_and_dead_letters_go_their_way() -> None:
    chance = random.Random(4)  # noqa: S311
    events = [
        event(
            f"e{n}",
            chance.choice(["view", "like", "rate", "make_offer"]),
            at_s=NOW_S - chance.random() * 40_000,
            subject=f"u{n % 20}",
            listing=f"l{chance.randrange(20)}",
            value=float(n),
        )
        for n in range(400)
    ]
    again = events + events[::3]
    chance.shuffle(again)
    offers = sum(each.type == event("", "make_offer").type for each in events)
    async with RedisCluster() as cluster:
        store = open_store(RowStoreSettings.model_validate({"mode": "cluster", "url": cluster.url}), IngestionSettings(), Metrics())
        async with event_service(store) as service:
            await service.publish(events, SHOP)
            await service.publish(again[:300], MALL)
            await service.publish(again[300:], MALL)
            dead = service.source("dead")
            while not await dead.read(50, 0.5):  # takes some, and is never heard of again
                pass
            one, two = (service.consumer(service.source(name, claim_after_s=0.2), batch=40) for name in ("one", "two"))
            async with consuming(one), consuming(two):
                await settled(service, "shop")
                await settled(service, "mall")
                found = await rows(service, "shop")
                assert None not in found
                assert found == await rows(service, "mall")
                listed = await service.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=SHOP)
                assert listed.total == offers
                redriven = await service.stub.RedriveDeadLetters(pb.RedriveDeadLettersRequest(reason="VALUE_INVALID"), metadata=SHOP)
                assert redriven.redriven == offers
                await settled(service, "shop")
                listed = await service.stub.ListDeadLetters(pb.ListDeadLettersRequest(), metadata=SHOP)
                assert {letter.redrives for letter in listed.dead_letters} == {1}
                assert await rows(service, "shop") == found
