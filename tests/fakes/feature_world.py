"""feature-retrieval on a real grpc.aio server and a real Redis, with a registry snapshot made by hand."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from tests.fakes.upkeep import upkeep_of

from feature_retrieval.aggregation.plan import AggregationPlans
from feature_retrieval.audience import Audience
from feature_retrieval.coalescing import CoalescedReads
from feature_retrieval.dead_letters import DeadLetters
from feature_retrieval.explanation import Explanation
from feature_retrieval.freshness import Freshness
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.near_cache import NearCache
from feature_retrieval.permissions import ADMIN, SCOPES
from feature_retrieval.publishing import Publishing
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.row_codec import entity_prefix
from feature_retrieval.servicer import FeatureRetrievalServicer
from feature_retrieval.servicing.events import EventParts
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.views import Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.dtypes import BY_NAME, BY_NUMBER
from plait.errors import Unavailable
from plait.registry.records import Snapshot
from plait.rpc.credentials import Authenticator
from plait.rpc.server import RpcServer
from plait.settings import RpcSettings
from plait.telemetry.metrics import Metrics
from plait.telemetry.tracing import off

TOKEN = (("x-plait-service-token", "t0ken"),)


class FeatureWorld:
    """A running service: `stub` to call it, and shorthands for writing and reading."""

    def __init__(self, store: RedisStore, cache: NearCache, server: RpcServer, stub: Any) -> None:
        self.store = store
        self.cache = cache
        self.server = server
        self.stub = stub

    async def write(self, view: str, ids: Sequence[str], columns: Mapping[str, Any], *, at_s: float | None = None, **more: Any) -> Any:
        """Write rows: `columns` maps a feature to [rows] values of its dtype."""
        batch = make_batch(view, ids, columns, at_s=at_s, **more)
        return await self.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=TOKEN, timeout=20)

    async def read(self, feature_set: str, timeout_s: float = 20, metadata: Any = TOKEN, policy: int = 0, **ids: Sequence[str]) -> Any:
        """Read a set; `ids` maps an entity type to its ids."""
        request = pb.GetFeaturesRequest(feature_set=feature_set, policy=policy, include_event_times=True)  # type: ignore[arg-type]
        for entity_type, values in ids.items():
            request.entities.add(entity_type=entity_type).ids.string_ids.extend(values)
        return await self.stub.GetFeatures(request, metadata=metadata, timeout=timeout_s)


def make_batch(
    view: str, ids: Sequence[str], columns: Mapping[str, Any], *, at_s: float | None = None, dtype: str = "float32", **more: Any
) -> pb.FeatureBatch:
    """Return a FeatureBatch with one block per column."""
    at_us = int((time.time() if at_s is None else at_s) * 1e6)
    batch = pb.FeatureBatch(feature_view=view, event_times_us=[at_us], **more)
    batch.ids.string_ids.extend(ids)
    known = BY_NAME[dtype]
    for name, values in columns.items():
        batch.columns.add(features=[name], dtype=known.number, data=np.asarray(values, known.numpy).tobytes())  # type: ignore[arg-type]
    return batch


def tensor(response: Any, name: str) -> np.ndarray[Any, Any]:
    """Return one tensor of an answer as numpy."""
    found = next(t for t in response.tensors if t.name == name)
    return np.frombuffer(found.data, BY_NUMBER[found.dtype].numpy).reshape(tuple(found.shape))


def statuses(response: Any, view: str) -> list[str]:
    """Return the row statuses of one view by name."""
    report = next(v for v in response.views if v.feature_view == view)
    return [types_pb2.RowStatus.Name(s).removeprefix("ROW_STATUS_") for s in report.statuses]


def no_events(store: RedisStore, snapshot: Snapshot) -> EventParts:
    """Return what the calls about events are handed to where no events are consumed."""
    return EventParts(
        publishing=Publishing(store.streams, store, None, plans=lambda: AggregationPlans(Snapshot())),
        dead_letters=DeadLetters(store.streams),
        freshness=Freshness(Metrics()),
        sources=(),
        snapshot=lambda: snapshot,
    )


@asynccontextmanager
async def feature_world(snapshot: Snapshot, redis_url: str, *, near_cache: bool = False) -> AsyncIterator[FeatureWorld]:
    """Run the service on a free port."""
    store = RedisStore(redis_url, connect_timeout_s=1.0)
    cache = NearCache(16 << 20 if near_cache else 0, 300.0)
    reads = CoalescedReads(store)
    plans = Plans(snapshot)
    prefixes = sorted({entity_prefix("default", v.entity.type) for v in snapshot.feature_views.values()})

    async def track() -> None:
        while True:
            with contextlib.suppress(Unavailable):
                await store.watch(lambda: prefixes, Audience(cache, reads))
            await asyncio.sleep(0.05)

    server = RpcServer(RpcSettings(grace_s=2), authenticator=Authenticator(snapshot.keys.get, service_token="t0ken"))
    retrieval = Retrieval(reads, cache, lambda: plans)
    explanation = Explanation(retrieval, lambda: plans, store.times_to_live)
    ingestion = Ingestion(store, lambda: snapshot)
    events = no_events(store, snapshot)
    name = pb.DESCRIPTOR.services_by_name["FeatureRetrievalService"].full_name
    async with upkeep_of(store, lambda: snapshot) as upkeep:
        servicer = FeatureRetrievalServicer(
            retrieval,
            ingestion,
            lambda: plans,
            explanation=explanation,
            events=events,
            max_in_flight=64,
            tracing=off(),
            upkeep=upkeep,
        )
        server.add(pb_grpc.add_FeatureRetrievalServiceServicer_to_server, servicer, name, scope=ADMIN, scopes=SCOPES)
        await server.start()
        tracker = asyncio.create_task(track()) if near_cache else None
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield FeatureWorld(store, cache, server, pb_grpc.FeatureRetrievalServiceStub(channel))
        await server.drain()
    if tracker is not None:
        tracker.cancel()
        await asyncio.gather(tracker, return_exceptions=True)
    await reads.close()
    await store.close()
