"""A registry snapshot the router can serve, the router on a real gRPC server, and fakes behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc

from plait.api.inference.v2 import inference_pb2_grpc
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.router.v1 import router_service_pb2_grpc as pb_grpc
from plait.registry.records import (
    ApiKey,
    Entity,
    Feature,
    FeatureSet,
    FeatureView,
    Model,
    ModelInput,
    ModelVersion,
    Route,
    Signature,
    Snapshot,
    Tenant,
    TensorSpec,
    Variant,
)
from plait.rpc.credentials import Authenticator, digest
from plait.rpc.server import RpcServer
from plait.settings import ChannelSettings, RpcSettings, TelemetrySettings
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
from router.ladder import Ladder
from router.outcomes import Outcomes
from router.partial_scoring import PartialScoring
from router.pass_through import PassThrough
from router.pools import Pools
from router.quotas import Quotas
from router.ranking import Ranking
from router.repeats import Repeats
from router.scores_cache import Scores
from router.servicer import RouterServicer
from router.settings import AdmissionSettings, CacheSettings, FeaturesSettings, RepeatsSettings, WorkersSettings
from router.shadow import Shadows
from router.stopwatch import RankingMetrics

SERVICE = pb.DESCRIPTOR.services_by_name["RouterService"].full_name
KEY = "plait_test-key"
OTHER_KEY = "plait_other-tenants-key"
NARROW_KEY = "plait_key-without-rank"
OPERATING_KEY = "plait_operating-key"
EXPIRED_KEY = "plait_expired-key"
DEFAULT = 0.5  # of the first feature of each view; the others have none

DU, DI = 2, 3
SIGNATURE = Signature(
    inputs=(
        TensorSpec(name="user", dtype="float32", shape=(1, DU), per="request"),
        TensorSpec(name="item", dtype="float32", shape=(-1, DI)),
    ),
    outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
    feature_set="ranker",
)
WIDE = replace(SIGNATURE, inputs=(SIGNATURE.inputs[0], replace(SIGNATURE.inputs[1], shape=(-1, DI + 1))))
INPUTS = {"user": ("user", DU), "item": ("item", DI)}


def _view(entity: str, columns: int, key: Any) -> FeatureView:
    features = tuple(Feature(name=f"f{i}", default=None if i else DEFAULT) for i in range(columns))
    return FeatureView(name=f"{entity}-view", entity=Entity(type=entity, key=key), features=features)


def _input(entity: str, columns: int) -> ModelInput:
    return ModelInput(name=entity, entity=entity, features=tuple(f"{entity}-view:f{i}" for i in range(columns)))


def route(name: str = "home", **changes: Any) -> Route:
    """A route to version 2 of the ranker, by alias."""
    fields: dict[str, Any] = {"variants": (Variant(name="main", model="ranker", use="champion"),), "timeout_s": 10.0, **changes}
    return Route(name=name, **fields)


def snapshot(*routes: Route, revision: int = 7, user_key: str = "string", item_key: str = "string", columns: int = DI) -> Snapshot:
    """A registry with a ranker of two good versions and one that does not fit its feature set ("broken")."""
    versions = (
        ModelVersion(version="1", artifact="/m/1", digest="sha256:1", signature=SIGNATURE),
        ModelVersion(version="2", artifact="/m/2", digest="sha256:2", signature=SIGNATURE),
        ModelVersion(version="3", artifact="/m/3", digest="sha256:3", signature=WIDE),
    )
    if columns != DI:
        fitting = replace(SIGNATURE, inputs=(SIGNATURE.inputs[0], replace(SIGNATURE.inputs[1], shape=(-1, columns))))
        versions = tuple(replace(v, signature=fitting) for v in versions)
    model = Model(name="ranker", versions=versions, aliases={"champion": "2", "broken": "3"})
    keys = (
        ApiKey(id="k1", tenant="shop", sha256=digest(KEY)),
        ApiKey(id="k2", tenant="other", sha256=digest(OTHER_KEY)),
        ApiKey(id="k3", tenant="shop", sha256=digest(NARROW_KEY), scopes=("features",)),
        ApiKey(id="k5", tenant="shop", sha256=digest(OPERATING_KEY), scopes=("operate",)),
        ApiKey(id="k4", tenant="shop", sha256=digest(EXPIRED_KEY), expires_at=1.0),
    )
    return Snapshot(
        revision=revision,
        models={"ranker": model},
        feature_views={"user-view": _view("user", DU, user_key), "item-view": _view("item", columns, item_key)},
        feature_sets={"ranker": FeatureSet(name="ranker", inputs=(_input("user", DU), _input("item", columns)))},
        routes={r.name: r for r in (routes or (route(),))},
        tenants={"shop": Tenant(name="shop"), "other": Tenant(name="other")},
        keys={k.sha256: k for k in keys},
    )


class RouterWorld:
    """The router under test, as its clients see it."""

    def __init__(
        self, server: RpcServer, ranking: Ranking, shadows: Shadows, workers: Pools, channel: grpc.aio.Channel, metrics: Metrics
    ) -> None:
        self.server = server
        self.workers = workers
        self.ranking = ranking
        self.shadows = shadows
        self.stub: Any = pb_grpc.RouterServiceStub(channel)
        self.inference: Any = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.raw_infer: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        self.metrics = metrics

    @property
    def address(self) -> str:
        return self.server.address

    async def rank(
        self, request: Any, *, key: str | None = KEY, timeout_s: float | None = 20.0, headers: dict[str, str] | None = None
    ) -> Any:
        return await self.stub.Rank(request, metadata=(*_metadata(key), *(headers or {}).items()), timeout=timeout_s)

    async def infer(self, request: Any, *, key: str | None = KEY, timeout_s: float | None = 20.0, unit: str = "") -> Any:
        """Call ModelInfer with a message, or with bytes for bytes."""
        call = self.raw_infer if isinstance(request, bytes) else self.inference.ModelInfer
        return await call(request, metadata=(*_metadata(key), *((("x-plait-unit", unit),) if unit else ())), timeout=timeout_s)

    async def explain(self, request: Any, *, key: str | None = KEY, headers: dict[str, str] | None = None) -> Any:
        asked = pb.ExplainRequest(rank=request) if isinstance(request, pb.RankRequest) else pb.ExplainRequest(predict=request)
        return await self.stub.Explain(asked, metadata=(*_metadata(key), *(headers or {}).items()), timeout=20.0)

    async def predict(self, request: Any, *, key: str | None = KEY, timeout_s: float | None = 20.0) -> Any:
        return await self.stub.Predict(request, metadata=_metadata(key), timeout=timeout_s)

    async def invalidate(self, request: Any, *, key: str | None = OPERATING_KEY) -> Any:
        return await self.stub.InvalidateCache(request, metadata=_metadata(key), timeout=20.0)


def _metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),) if key else ()


@asynccontextmanager
async def router_world(
    features: str,
    workers: str,
    registry: Snapshot | None = None,
    *,
    admission: AdmissionSettings | None = None,
    token: str = "the-token",
    max_message_bytes: int = 16 << 20,
    features_share: float = 0.8,
    require_key: bool = True,
    telemetry: TelemetrySettings | None = None,
) -> AsyncIterator[RouterWorld]:
    """Run the router on a free port in front of comma separated addresses."""
    registry = registry or snapshot()
    channel = ChannelSettings(service_token=token)  # type: ignore[arg-type]
    feature_client = FeatureClient(FeaturesSettings(addresses=features, ejection_s=0.05), channel)
    pool = Pools(WorkersSettings(addresses=workers, ejection_s=0.05), channel)
    pool.adopt(registry)
    metrics = Metrics()
    invalidations = Invalidations()
    answers, repeats = Answers(CacheSettings(), invalidations, metrics), Repeats(RepeatsSettings(), metrics)
    consulting = Consulting(feature_client, pool, features_share)
    gate = Gate(admission or AdmissionSettings(), Quotas(), metrics)
    tracing = Tracing(telemetry or TelemetrySettings(), "router")
    shadows = Shadows(consulting, lambda: gate.load, metrics, tracing)
    scoring = PartialScoring(consulting, Scores(CacheSettings().scores_bytes, invalidations, metrics))
    ranking = Ranking(
        gate=gate,
        consulting=consulting,
        cascade=Cascade(consulting, feature_client, features_share),
        ladder=Ladder(consulting, scoring, Expectations(), metrics),
        scoring=scoring,
        answers=answers,
        repeats=repeats,
        shadows=shadows,
        exposures=Exposures(metrics),
        metrics=RankingMetrics(metrics),
        max_message_bytes=max_message_bytes,
    )
    passing = PassThrough(lambda: ranking.table, gate, pool, metrics)
    for part in (ranking, passing):
        part.adopt(registry)
    settings = RpcSettings(grace_s=5, max_message_bytes=max_message_bytes)
    server = RpcServer(
        settings,
        authenticator=Authenticator(registry.keys.get, service_token=token, required=require_key),
        metrics=metrics,
        tracing=tracing,
    )
    servicer = RouterServicer(ranking, Invalidating(invalidations), Outcomes(None, metrics))
    open_inference.add(server, open_inference.OpenInference(passing, pool, "1.2.3", max_in_flight=8, default_timeout_s=20.0))
    server.add(pb_grpc.add_RouterServiceServicer_to_server, servicer, SERVICE, scope=auth.SCOPE, scopes=auth.OTHER_SCOPES)
    await server.start()
    try:
        options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
        async with grpc.aio.insecure_channel(server.address, options=options) as to_router:
            yield RouterWorld(server, ranking, shadows, pool, to_router, metrics)
    finally:
        await server.drain()
        await shadows.close()
        await answers.close()
        await repeats.close()
        await feature_client.close()
        await pool.close()
        tracing.close()
