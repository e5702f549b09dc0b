"""The composition root: the only file that knows all parts and sees the settings."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress

from feature_retrieval.aggregation.applying import Applying
from feature_retrieval.aggregation.plan import AggregationPlans
from feature_retrieval.aggregation.replaying import Replaying
from feature_retrieval.audience import Audience
from feature_retrieval.coalescing import CoalescedReads
from feature_retrieval.consumer import Consumer, report
from feature_retrieval.dead_letters import DeadLetters
from feature_retrieval.durable_copy import DurableCopy
from feature_retrieval.epochs import EpochUpkeep
from feature_retrieval.erasing import Erasing
from feature_retrieval.erasure_guard import ErasureGuard
from feature_retrieval.explanation import Explanation
from feature_retrieval.exporting import Exporting
from feature_retrieval.feast.reading import FeastRows
from feature_retrieval.freshness import Freshness
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.near_cache import NearCache
from feature_retrieval.permissions import ADMIN, SCOPES
from feature_retrieval.publishing import Publishing
from feature_retrieval.read_metrics import ReadCounts, ReadMetrics
from feature_retrieval.read_through import Budget, ReadThrough
from feature_retrieval.rebuilding import Rebuilding
from feature_retrieval.replicas import Replicas
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.row_codec import entity_prefix
from feature_retrieval.servicer import FeatureRetrievalServicer
from feature_retrieval.servicing.events import EventParts
from feature_retrieval.servicing.upkeep import UpkeepParts
from feature_retrieval.settings import FeastSettings, FeatureRetrievalSettings, SkewLogSettings
from feature_retrieval.skew_log import SkewLog
from feature_retrieval.sources import EventSource
from feature_retrieval.sources.redis_stream import RedisStreamSource
from feature_retrieval.store.opening import open_store
from feature_retrieval.store.postgres import DurableRows
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.store.rows import Rows
from feature_retrieval.views import Plans
from feature_retrieval.write_metrics import WriteMetrics
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.errors import Unavailable
from plait.redis.opening import topology_of
from plait.redis.topologies import Topology
from plait.registry.callers import authenticator
from plait.registry.certificates import Signer
from plait.registry.database import open_pool
from plait.registry.records import Snapshot
from plait.registry.store import Store
from plait.registry.watcher import Watcher
from plait.rpc.process import Tasks
from plait.rpc.server import RpcServer
from plait.telemetry.logging import get_logger
from plait.telemetry.metrics import Metrics
from plait.telemetry.tracing import Tracing

log = get_logger(__name__)

_RETRY_S = 0.5  # between attempts to track changes in Redis


async def open_service(settings: FeatureRetrievalSettings, stack: AsyncExitStack, tasks: Tasks) -> RpcServer:
    """Build the service in dependency order; it is ready once a snapshot of the registry is here. Redis may be away."""
    tracing = Tracing(settings.telemetry, "feature-retrieval")
    metrics = Metrics()
    watcher = Watcher(settings.registry.dsn.get_secret_value(), settings.registry.last_known_good, settings.registry.poll_s)
    tasks.start(watcher.run(), "registry")

    store = open_store(settings.redis, settings.ingestion, metrics)
    stack.push_async_callback(store.close)
    cache = NearCache(settings.near_cache.max_bytes, settings.near_cache.max_age_s)

    current = CurrentPlans(await watcher.first(settings.registry.first_snapshot_timeout_s))
    watcher.subscribe(current.swap)

    registry = await Store.open(settings.registry.dsn.get_secret_value(), max_connections=2, lazy=True)
    stack.push_async_callback(registry.close)
    guard = ErasureGuard(store, registry, poll_s=settings.privacy.poll_s)
    tasks.start(guard.run(), "erasures")
    durable_rows, durable = await _durable_copy(settings, metrics, watcher, stack, tasks)
    behind: Rows = store
    if settings.durable.read_through_rows_per_s:
        behind = _read_through(settings, metrics, watcher, stack, store, durable_rows, guard)
    reads = CoalescedReads(FeastRows(behind, _feast(settings.feast, stack), lambda: watcher.snapshot))
    stack.push_async_callback(reads.close)
    if settings.near_cache.max_bytes:
        tasks.start(_track_changes(store, Audience(cache, reads), current), "near-cache")
    privacy_key = settings.privacy.key.get_secret_value().encode()
    future_s = settings.ingestion.max_future_s
    freshness, writes = Freshness(metrics), WriteMetrics(metrics)

    counts = ReadCounts()
    skew_log = open_skew_log(settings.skew_log, stack, tasks)
    ReadMetrics(metrics, counts, cache, reads, skew_log.outcomes if skew_log else {})
    retrieval = Retrieval(reads, cache, current.plans, counts=counts, note=skew_log.note if skew_log else None)
    ingestion = Ingestion(
        store,
        lambda: watcher.snapshot,
        erasures_loaded=guard.loaded,
        keep=durable.keep,
        wrote=freshness.wrote,
        metrics=writes,
        max_future_s=future_s,
    )
    aggregations = CurrentAggregations(watcher.snapshot)
    watcher.subscribe(aggregations.swap)
    applying = Applying(store, aggregations.plans, erasures_loaded=guard.loaded, max_future_s=future_s)
    replicas = Replicas(store.dispatch, _name_of_process(), lambda: min(ingestion.snapshots.oldest, applying.snapshots.oldest))
    await _announce(replicas, watcher, stack, tasks)
    server = RpcServer(settings.rpc, authenticator=authenticator(settings.rpc, watcher), metrics=metrics, tracing=tracing)
    servicer = FeatureRetrievalServicer(
        retrieval,
        ingestion,
        current.plans,
        explanation=Explanation(retrieval, current.plans, store.times_to_live),
        events=_open_events(settings, store, watcher, aggregations, applying, freshness, tracing, stack, tasks),
        max_in_flight=settings.rpc.max_in_flight,
        tracing=tracing,
        upkeep=UpkeepParts(
            epochs=EpochUpkeep(
                store, lambda: watcher.snapshot, guard.loaded, keep=durable.keep, heard=replicas.check_heard, max_future_s=future_s
            ),
            exporting=Exporting(store, lambda: watcher.snapshot),
            erasing=Erasing(
                store,
                registry,
                Signer(privacy_key) if privacy_key else None,
                guard.catch_up,
                max_future_s=future_s,
                snapshot=lambda: watcher.snapshot,
                metrics=writes,
            ),
            rebuilding=Rebuilding(store, durable_rows, lambda: watcher.snapshot, guard.loaded, max_future_s=future_s),
            replaying=Replaying(store, applying, lambda: watcher.snapshot, heard=replicas.check_heard),
        ),
        max_batches=settings.ingestion.max_batches,
        max_bytes=settings.ingestion.max_bytes,
    )
    name = pb.DESCRIPTOR.services_by_name["FeatureRetrievalService"].full_name
    server.add(pb_grpc.add_FeatureRetrievalServiceServicer_to_server, servicer, name, scope=ADMIN, scopes=SCOPES)
    watcher.subscribe(server.reexamine)
    if settings.feast.serving:
        _serve_feast(server, Retrieval(reads, NearCache(0, settings.near_cache.max_age_s), current.plans, counts=counts), current)
    return server


async def _announce(replicas: Replicas, watcher: Watcher, stack: AsyncExitStack, tasks: Tasks) -> None:
    """Announce this replica, the first time before it takes a write, where Redis is there."""
    with suppress(Unavailable):
        await replicas.announce()
    stack.push_async_callback(replicas.close)
    watcher.subscribe(replicas.changed)
    tasks.start(replicas.run(), "replicas")


def _name_of_process() -> str:
    """Return a name no other process has, nor this one after a restart."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


async def _durable_copy(
    settings: FeatureRetrievalSettings, metrics: Metrics, watcher: Watcher, stack: AsyncExitStack, tasks: Tasks
) -> tuple[DurableRows, DurableCopy]:
    """Open the copy in the registry's Postgres, which may be away; what waits for it is committed at the end."""
    dsn = settings.registry.dsn.get_secret_value()
    pool = await open_pool(dsn, name="plait-features", min_connections=0, max_connections=settings.durable.connections)
    stack.push_async_callback(pool.close)
    rows = DurableRows(pool)
    copy = DurableCopy(rows, lambda: watcher.snapshot, queue_rows=settings.durable.queue_rows, batch_rows=settings.durable.batch_rows)
    stack.push_async_callback(copy.close)
    tasks.start(copy.run(), "durable-copy")
    metrics.gauge("plait_features_durable_queue_rows", "rows that wait to be copied to Postgres").set_function(lambda: copy.queued)
    metrics.gauge("plait_features_durable_lag_seconds", "how long the oldest of them has waited, seconds").set_function(lambda: copy.lag_s)
    return rows, copy


def _read_through(
    settings: FeatureRetrievalSettings,
    metrics: Metrics,
    watcher: Watcher,
    stack: AsyncExitStack,
    store: RedisStore,
    rows: DurableRows,
    guard: ErasureGuard,
) -> ReadThrough:
    """Look in the durable copy for what Redis does not have."""
    counted = metrics.counter("plait_features_read_through_rows", "rows looked for in the durable copy", ["result"])
    through = ReadThrough(
        store,
        rows,
        lambda: watcher.snapshot,
        guard.loaded,
        lambda result, count: counted.labels(result).inc(count),
        budget=Budget(settings.durable.read_through_rows_per_s),
        max_future_s=settings.ingestion.max_future_s,
    )
    stack.push_async_callback(through.close)
    return through


def _feast(settings: FeastSettings, stack: AsyncExitStack) -> Topology | None:
    """Return where Feast's rows are, if anywhere."""
    if not settings.enabled:
        return None
    topology = topology_of(settings.redis)
    stack.push_async_callback(topology.close)
    return topology


def open_skew_log(settings: SkewLogSettings, stack: AsyncExitStack, tasks: Tasks) -> SkewLog | None:
    """Return the skew log where one is kept; it is written until the process ends."""
    if not settings.share:
        return None
    made = SkewLog(
        settings.folder,
        share=settings.share,
        max_file_bytes=settings.max_file_bytes,
        max_file_s=settings.max_file_s,
        queue_rows=settings.queue_rows,
    )
    tasks.start(made.run(), "skew log")
    stack.callback(made.close)
    return made


def _serve_feast(server: RpcServer, retrieval: Retrieval, current: CurrentPlans) -> None:
    """Answer Feast's clients, too. Only a process that does has Feast's stubs in it."""
    from feature_retrieval.feast import serving  # noqa: PLC0415

    servicer = serving.Serving(retrieval, current.plans)
    server.add(serving.register, servicer, serving.SERVICE, scope="read")


class CurrentPlans:
    """Holds the compiled feature sets of the newest snapshot and swaps them whole."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._plans = Plans(snapshot)

    def plans(self) -> Plans:
        """Return the newest plans."""
        return self._plans

    def swap(self, snapshot: Snapshot) -> None:
        """Start anew with a snapshot."""
        self._plans = Plans(snapshot)

    def key_prefixes(self) -> Sequence[bytes]:
        """Return what the keys of every tenant's entity types begin with."""
        snapshot = self._plans.snapshot
        types = {view.entity.type for view in snapshot.feature_views.values()}
        return sorted(entity_prefix(tenant, entity_type) for tenant in tenants_of(snapshot) for entity_type in types)


def tenants_of(snapshot: Snapshot) -> Sequence[str]:
    """Return every tenant there is, whoever only has a key included."""
    return sorted({*snapshot.tenants, *(key.tenant for key in snapshot.keys.values()), "default"})


async def _track_changes(store: RedisStore, audience: Audience, current: CurrentPlans) -> None:
    """Keep those who hold rows told of changes, over every break of the connection."""
    while True:
        try:
            await store.watch(current.key_prefixes, audience)
        except Unavailable as error:
            log.info("changes in redis are not tracked, so nothing is cached", reason=error.reason)
            await asyncio.sleep(_RETRY_S)


def _open_events(
    settings: FeatureRetrievalSettings,
    store: RedisStore,
    watcher: Watcher,
    plans: CurrentAggregations,
    applying: Applying,
    freshness: Freshness,
    tracing: Tracing,
    stack: AsyncExitStack,
    tasks: Tasks,
) -> EventParts:
    """Build what takes events in and applies them; its loops run until the process ends."""
    wanted, max_future_s = settings.events, settings.ingestion.max_future_s
    streams, dead_letters = store.streams, DeadLetters(store.streams)
    sources: list[EventSource] = []
    if wanted.source != "none":
        name = wanted.consumer or _name_of_process()
        sources.append(
            RedisStreamSource(streams, dead_letters, plans.tenants, consumer=name, claim_after_s=wanted.claim_after_s, keep_s=wanted.keep_s)
        )
    if wanted.source == "kafka":
        from feature_retrieval.sources.kafka import KafkaSource  # noqa: PLC0415  (aiokafka is an extra)

        sources.append(KafkaSource(wanted, dead_letters))
    for source in sources:
        consumer = Consumer(source, applying, store, freshness, batch=wanted.batch, tracing=tracing)
        stack.push_async_callback(consumer.drain)
        tasks.start(consumer.run(), f"events from {source.name}")
        tasks.start(report(source, plans, freshness), f"lag of {source.name}")
    front = sources[0] if sources else None
    publishing = Publishing(streams, store, front, plans=plans.plans, max_backlog=wanted.max_backlog, max_future_s=max_future_s)
    return EventParts(
        publishing=publishing,
        dead_letters=dead_letters,
        freshness=freshness,
        sources=tuple(sources),
        snapshot=lambda: watcher.snapshot,
    )


class CurrentAggregations:
    """Holds the aggregated views of the newest snapshot, and whose events there may be."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._plans = AggregationPlans(snapshot)

    def plans(self) -> AggregationPlans:
        """Return the newest plans."""
        return self._plans

    def swap(self, snapshot: Snapshot) -> None:
        """Start anew with a snapshot."""
        self._plans = AggregationPlans(snapshot)

    def tenants(self) -> Sequence[str]:
        """Return every tenant."""
        return tenants_of(self._plans.snapshot)

    def views(self) -> Sequence[str]:
        """Return the names of the views that events feed."""
        return sorted({each.view.name for each in self._plans.views})
