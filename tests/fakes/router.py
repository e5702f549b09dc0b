"""A router that speaks the real wire, records what reaches it and fails to order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from plait.api.router.v1 import explanation_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.router.v1 import router_service_pb2_grpc as pb_grpc
from plait.errors import DETAILS_KEY, PlaitError


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One call as it reached the router; `left_s` is what was left of its deadline."""

    request: Any
    metadata: dict[str, str | bytes]
    left_s: float


class FakeRouter(pb_grpc.RouterServiceServicer):
    """Ranks by the caller's order, backwards; predicts by echoing the inline features.

    Faults: `errors` are met one by each call (None: it is answered); `gate` is waited for before an answer.
    """

    def __init__(self, *, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        self.received: list[Received] = []
        self.errors: list[PlaitError | None] = []
        self.gate: asyncio.Event | None = None
        self.started = asyncio.Event()
        self.change: Callable[[Any], None] = lambda _: None
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_RouterServiceServicer_to_server(self, self._server)
        target = f"127.0.0.1:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(target)
        else:
            self.port = self._server.add_secure_port(target, credentials)

    async def __aenter__(self) -> FakeRouter:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[Any]:
        return [received.request for received in self.received]

    async def RecordOutcome(self, request: Any, context: Any) -> pb.RecordOutcomeResponse:
        await self._receive(request, context)
        wrong = [(at, outcome) for at, outcome in enumerate(request.outcomes) if outcome.request_id == "bad"]
        errors = [pb.OutcomeError(index=at, reason="REQUEST_ID_INVALID", message="bad") for at, _ in wrong]
        return pb.RecordOutcomeResponse(accepted=len(request.outcomes) - len(errors), duplicates=0, errors=errors)

    async def Rank(self, request: Any, context: Any) -> pb.RankResponse:
        await self._receive(request, context)
        answer = pb.RankResponse(
            scores=[float(place) for place in reversed(range(_count(request.candidates)))],
            model="ranker",
            model_version="7",
            variant="champion",
            request_id=request.request_id,
            tier="full",
            registry_revision=3,
        )
        answer.item_ids.string_ids.extend(reversed(request.candidates.string_ids))
        answer.item_ids.int64_ids.extend(reversed(request.candidates.int64_ids))
        answer.item_ids.composite_ids.extend(reversed(request.candidates.composite_ids))
        if request.top_k:
            del answer.scores[request.top_k :]
            del answer.item_ids.string_ids[request.top_k :]
            del answer.item_ids.int64_ids[request.top_k :]
            del answer.item_ids.composite_ids[request.top_k :]
        if request.explain:
            self._explain(answer)
        self.change(answer)
        return answer

    async def Explain(self, request: Any, context: Any) -> pb.ExplainResponse:
        told = pb.ExplainResponse(rank=await self.Rank(request.rank, context), summary="It is so.", not_in={"v5": "layer"})
        told.rank.assignments.add(experiment="v4", layer="ranking", variant="champion", bucket=7)
        told.rules.add(rule="staff", failed_condition="headers.x-staff")
        told.rules.add(rule="all", matched=True)
        told.cache_would_be = explanation_pb2.CACHE_STATUS_HIT
        told.ages.add(feature_view="listing_stats", view_version=2, oldest_us=3_000_000, median_us=1_500_000)
        told.ages.add(feature_view="user_stats", view_version=1, oldest_us=-1, median_us=-1)
        told.tiers.add(tier="full", answered=True, reason="answered", budget_us=250_000, expected_us=5_000)
        told.stages.add(stage="filter", candidates_in=5, candidates_out=3, took_us=40, by_rule={"sold-out": 2})
        told.attempts.add(what="model", endpoint="10.0.0.7:1", kind="first", outcome="OK", took_us=1234)
        self.change(told)
        return told

    async def Predict(self, request: Any, context: Any) -> pb.PredictResponse:
        await self._receive(request, context)
        answer = pb.PredictResponse(
            outputs=request.inline_features,
            model="ranker",
            model_version="7",
            variant="champion",
            request_id=request.request_id,
            registry_revision=3,
        )
        if request.explain:
            self._explain(answer)
        self.change(answer)
        return answer

    async def InvalidateCache(self, request: Any, context: Any) -> pb.InvalidateCacheResponse:
        await self._receive(request, context)
        return pb.InvalidateCacheResponse()

    @staticmethod
    def _explain(answer: Any) -> None:
        answer.timings.CopyFrom(
            pb.Timings(
                total_us=1, resolve_us=2, features_us=3, store_us=4, predict_us=5, queue_us=6, compute_us=7, order_us=8
            )
        )  # fmt: skip
        answer.feature_report.add(feature_view="listing_stats", rows=3, present=2, not_found=1)

    async def _receive(self, request: Any, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        self.received.append(Received(request=request, metadata=metadata, left_s=context.time_remaining()))
        self.started.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.errors and (error := self.errors.pop(0)):
            context.set_trailing_metadata(((DETAILS_KEY, error.to_status().SerializeToString()),))
            await context.abort(error.code, error.message)


def _count(ids: Any) -> int:
    return len(ids.string_ids) + len(ids.int64_ids) + len(ids.composite_ids)
