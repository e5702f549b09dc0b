"""feature-retrieval with its events part on a real grpc.aio server and a real Redis, and a clock that tests move."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from tests.fakes.event_world import NOW_S, SNAPSHOT
from tests.fakes.upkeep import upkeep_of

from feature_retrieval.aggregation.applying import Applying
from feature_retrieval.aggregation.plan import AggregationPlans
from feature_retrieval.consumer import Consumer
from feature_retrieval.dead_letters import DeadLetters
from feature_retrieval.explanation import Explanation
from feature_retrieval.freshness import Freshness
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.near_cache import NearCache
from feature_retrieval.permissions import ADMIN, SCOPES
from feature_retrieval.publishing import Publishing
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.servicer import FeatureRetrievalServicer
from feature_retrieval.servicing.events import EventParts
from feature_retrieval.sources.redis_stream import RedisStreamSource
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.views import Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.registry.records import ApiKey, Snapshot
from plait.rpc.credentials import Authenticator, digest
from plait.rpc.server import RpcServer
from plait.settings import RpcSettings
from plait.telemetry.metrics import Metrics
from plait.telemetry.tracing import Tracing, off

SHOP = (("x-api-key", "shop-key"),)
MALL = (("x-api-key", "mall-key"),)
LEAN = (("x-api-key", "lean-key"),)  # of the shop's, no administrator
KEYS = {"shop-key": "shop", "mall-key": "mall", "lean-key": "shop"}


class EventService:
    """A running service; `stub` calls it. `snapshot` may be replaced while it runs."""

    def __init__(self, store: RedisStore, snapshot: Snapshot) -> None:
        self.store = store
        self.now_s = NOW_S
        self.snapshot = snapshot
        self.metrics = Metrics()
        self.freshness = Freshness(self.metrics, self.clock)
        self.dead_letters = DeadLetters(store.streams)
        self.stub: Any = None
        self.address = ""

    def clock(self) -> float:
        return self.now_s

    def aggregations(self) -> AggregationPlans:
        return AggregationPlans(self.snapshot)

    def tenants(self) -> Sequence[str]:
        return sorted({*KEYS.values()})

    def source(self, name: str = "one", **options: Any) -> RedisStreamSource:
        return RedisStreamSource(self.store.streams, self.dead_letters, self.tenants, consumer=name, clock=self.clock, **options)

    def consumer(self, source: RedisStreamSource | None = None, **options: Any) -> Consumer:
        applying = Applying(self.store, self.aggregations, clock=self.clock)
        return Consumer(source or self.source(), applying, self.store, self.freshness, **options)

    async def publish(self, events: Sequence[Any], metadata: Any = SHOP) -> Any:
        return await self.stub.PublishEvents(pb.PublishEventsRequest(events=events), metadata=metadata, timeout=20)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@asynccontextmanager
async def consuming(consumer: Consumer) -> AsyncIterator[Consumer]:
    """Run a consumer, and drain it at the end."""
    task = asyncio.create_task(consumer.run())
    try:
        yield consumer
        await consumer.drain()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def event_service(
    redis: str | RedisStore, *, snapshot: Snapshot = SNAPSHOT, max_backlog: int = 1_000_000, tracing: Tracing | None = None
) -> AsyncIterator[EventService]:
    """Run the service without a consumer, on a server's URL or a store, which it closes."""
    store = RedisStore(redis) if isinstance(redis, str) else redis
    service = EventService(store, snapshot)
    source = service.source("front")
    tracing = tracing or off()
    keys = {
        digest(key): ApiKey(id=key, tenant=tenant, sha256=digest(key), scopes=("features",) if key == "lean-key" else ("features", "admin"))
        for key, tenant in KEYS.items()
    }
    server = RpcServer(RpcSettings(grace_s=2), authenticator=Authenticator(keys.get), tracing=tracing)
    plans = Plans(snapshot)
    ingestion = Ingestion(store, lambda: service.snapshot, clock=service.clock, wrote=service.freshness.wrote)
    events = EventParts(
        publishing=Publishing(store.streams, store, source, plans=service.aggregations, max_backlog=max_backlog, clock=service.clock),
        dead_letters=service.dead_letters,
        freshness=service.freshness,
        sources=(source,),
        snapshot=lambda: service.snapshot,
    )
    retrieval = Retrieval(store, NearCache(0, 1.0), lambda: plans, clock=service.clock)
    name = pb.DESCRIPTOR.services_by_name["FeatureRetrievalService"].full_name
    async with upkeep_of(store, lambda: service.snapshot) as upkeep:
        servicer = FeatureRetrievalServicer(
            retrieval,
            ingestion,
            lambda: plans,
            explanation=Explanation(retrieval, lambda: plans, store.times_to_live),
            events=events,
            upkeep=upkeep,
            max_in_flight=64,
            tracing=tracing,
        )
        server.add(pb_grpc.add_FeatureRetrievalServiceServicer_to_server, servicer, name, scope=ADMIN, scopes=SCOPES)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(server.address) as channel:
                service.address = server.address
                service.stub = pb_grpc.FeatureRetrievalServiceStub(channel)
                yield service
        finally:
            await server.drain()
            await store.close()
