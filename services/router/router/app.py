"""The composition root: the only file that knows all parts and sees the settings."""

from __future__ import annotations

from contextlib import AsyncExitStack
from importlib.metadata import version

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.router.v1 import router_service_pb2_grpc as pb_grpc
from plait.redis.dispatch import Dispatch
from plait.redis.opening import topology_of
from plait.registry.callers import authenticator
from plait.registry.watcher import Watcher
from plait.rpc.loop_bound import LoopBound
from plait.rpc.process import Tasks
from plait.rpc.server import RpcServer
from plait.settings import ChannelSettings
from plait.telemetry.metrics import Metrics
from plait.telemetry.tracing import Tracing
from router import auth, open_inference
from router.answers import Answers
from router.cascade import Cascade
from router.consulting import Consulting
from router.expectations import Expectations
from router.exposures import Exposures
from router.feature_client import FeatureClient
from router.gate import Gate
from router.invalidating import Invalidating
from router.invalidation import Invalidations
from router.journal import Journal
from router.ladder import Ladder
from router.open_inference import OpenInference
from router.outcomes import Outcomes
from router.partial_scoring import PartialScoring
from router.pass_through import PassThrough
from router.pool_metrics import PoolMetrics
from router.pools import Pools
from router.quota_leases import QuotaLeases
from router.quotas import Quotas
from router.ranking import Ranking
from router.redis_level import RedisLevel
from router.repeats import Repeats
from router.scores_cache import Scores
from router.servicer import RouterServicer
from router.settings import RouterSettings
from router.shadow import Shadows
from router.shared_invalidations import SharedInvalidations
from router.stopwatch import RankingMetrics


async def open_service(settings: RouterSettings, stack: AsyncExitStack, tasks: Tasks) -> RpcServer:
    """Build the service in dependency order; it is ready once a snapshot of the registry is here. What is behind it may be away."""
    tracing = Tracing(settings.telemetry, "router")
    metrics = Metrics()
    registry = settings.registry
    watcher = Watcher(registry.dsn.get_secret_value(), registry.last_known_good, registry.poll_s)
    tasks.start(watcher.run(), "registry")

    features = FeatureClient(settings.features, _channel(settings.features.channel, settings), tracing)
    stack.push_async_callback(features.close)
    workers = Pools(settings.workers, _channel(settings.workers.channel, settings), tracing=tracing, metrics=PoolMetrics(metrics))
    stack.push_async_callback(workers.close)
    invalidations = Invalidations()
    quotas = Quotas()
    shared = level = journal = None
    if settings.redis.url.get_secret_value():
        topology = topology_of(settings.redis)
        stack.push_async_callback(topology.close)
        level = RedisLevel(Dispatch(topology), metrics, settings.cache.redis_budget_s)
        stack.push_async_callback(level.close)
        shared = SharedInvalidations(invalidations, Dispatch(topology), metrics)
        tasks.start(shared.run(), "invalidations")
        journal = Journal(Dispatch(topology), settings.journal, metrics)
        stack.push_async_callback(journal.close)
        tasks.start(journal.run(), "journal")
        leases = QuotaLeases(quotas, Dispatch(topology), settings.quotas, metrics)
        tasks.start(leases.run(), "quota leases")
    answers, repeats = Answers(settings.cache, invalidations, metrics, level), Repeats(settings.repeats, metrics, level)
    stack.push_async_callback(answers.close)
    stack.push_async_callback(repeats.close)
    consulting = Consulting(features, workers, settings.features.budget_share)
    gate = Gate(settings.admission, quotas, metrics)
    shadows = Shadows(consulting, lambda: gate.load, metrics, tracing)
    stack.push_async_callback(shadows.close)
    scoring = PartialScoring(consulting, Scores(settings.cache.scores_bytes, invalidations, metrics))
    ranking = Ranking(
        gate=gate,
        consulting=consulting,
        cascade=Cascade(consulting, features, settings.features.budget_share),
        ladder=Ladder(consulting, scoring, Expectations(), metrics),
        scoring=scoring,
        answers=answers,
        repeats=repeats,
        shadows=shadows,
        exposures=Exposures(metrics, journal, key=settings.journal.key.get_secret_value().encode()),
        metrics=RankingMetrics(metrics),
        max_message_bytes=min(settings.features.channel.max_message_bytes, settings.workers.channel.max_message_bytes),
    )
    await watcher.first(registry.first_snapshot_timeout_s)
    watcher.subscribe(workers.adopt)
    watcher.subscribe(ranking.adopt)
    passing = PassThrough(lambda: ranking.table, gate, workers, metrics)
    watcher.subscribe(passing.adopt)
    tasks.start(workers.run(), "pools")

    bound = LoopBound(settings.rpc.max_in_flight)
    tasks.start(bound.run(), "loop bound")
    metrics.gauge("plait_router_calls_limit", "calls that may be under way at once, so that the loop keeps up").set_function(
        lambda: bound.most
    )
    server = RpcServer(
        settings.rpc, authenticator=authenticator(settings.rpc, watcher), metrics=metrics, tracing=tracing, takes=bound.takes
    )
    name = pb.DESCRIPTOR.services_by_name["RouterService"].full_name
    servicer = RouterServicer(ranking, Invalidating(invalidations, shared), Outcomes(journal, metrics))
    server.add(pb_grpc.add_RouterServiceServicer_to_server, servicer, name, scope=auth.SCOPE, scopes=auth.OTHER_SCOPES)
    open_inference.add(
        server,
        OpenInference(
            passing,
            workers,
            version("plait-router"),
            max_in_flight=settings.rpc.max_in_flight,
            default_timeout_s=settings.rpc.default_timeout_s,
        ),
    )
    watcher.subscribe(server.reexamine)
    return server


def _channel(channel: ChannelSettings, settings: RouterSettings) -> ChannelSettings:
    """Services of one mesh share one token, so it need not be set twice."""
    if channel.service_token.get_secret_value():
        return channel
    return channel.model_copy(update={"service_token": settings.rpc.service_token})
