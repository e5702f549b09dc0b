"""The page: the whole story of a request, in the order it happens; everything it calls is one file away.

    authenticate (the server's interceptor) → admit → resolve route → assign variant → features → predict → order → answer

Rank and Predict differ in what they are asked and how they answer; the road between, features → predict, is one.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.api.model_worker.v1 import model_worker_service_pb2 as worker_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded, ResourceExhausted
from plait.registry.records import Snapshot
from plait.rpc.call import Call, current
from plait.rpc.deadline import Deadline
from plait.telemetry.logging import get_logger
from router import degradation
from router.admission import Admission
from router.feature_client import FeatureClient, Unreachable
from router.ordering import best_first
from router.route_table import NO_ROUTES, Arm, ServingRoute, compile_table
from router.stopwatch import RankingMetrics, Stopwatch
from router.tensors import copy_outputs, fill_infer, scores_of
from router.validation import Findings, check_predict, check_predict_fits, check_rank, check_rank_fits, count
from router.worker_pool import WorkerPool

if TYPE_CHECKING:
    from plait.api.inference.v2 import inference_pb2

log = get_logger(__name__)
_stdlib_log: Final = logging.getLogger(__name__)

TIER_FULL: Final = "full"
_ENVELOPE: Final = 1 / 16  # of a message is kept for names, statuses and framing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """A request that was found good: what to read, what to run, and in whose time."""

    route: ServingRoute
    arm: Arm
    ids: Mapping[str, types_pb2.EntityIds]
    inline: Mapping[str, types_pb2.Tensor]
    request_features: Sequence[types_pb2.Tensor]
    outputs: Sequence[str]
    request_id: str
    tenant: str
    deadline: Deadline


class Ranking:
    """Answers Rank and Predict.

    `max_message_bytes` bounds the tensors of one request, `features_share` is the share of what is left of a budget that features may
    take. `adopt` takes each new snapshot; a request reads the table once and so sees one world.
    """

    def __init__(
        self,
        *,
        admission: Admission,
        features: FeatureClient,
        workers: WorkerPool,
        metrics: RankingMetrics,
        max_message_bytes: int,
        features_share: float,
    ) -> None:
        self._admission = admission
        self._features = features
        self._workers = workers
        self._metrics = metrics
        self._max_tensor_bytes = int(max_message_bytes * (1 - _ENVELOPE))
        self._features_share = features_share
        self._table = NO_ROUTES

    def __repr__(self) -> str:
        return f"<Ranking {self._table!r} {self._admission!r} {self._features!r} {self._workers!r}>"

    def adopt(self, snapshot: Snapshot) -> None:
        """Serve by a new snapshot from the next request on."""
        table = compile_table(snapshot)
        for route in table.routes.values():
            for variant, fault in route.left_out.items():
                log.warning("a variant cannot serve", route=route.name, variant=variant, reason=fault.reason, error=fault.message)
        self._table = table

    async def rank(self, request: pb.RankRequest) -> pb.RankResponse:
        """Answer a Rank; errors are those of the contract."""
        call, watch = current(), Stopwatch()
        await self._admission.enter(call.deadline)
        try:
            return await self._rank(request, call, watch)
        finally:
            self._admission.leave()

    async def predict(self, request: pb.PredictRequest) -> pb.PredictResponse:
        """Answer a Predict; errors are those of the contract."""
        call, watch = current(), Stopwatch()
        await self._admission.enter(call.deadline)
        try:
            return await self._predict(request, call, watch)
        finally:
            self._admission.leave()

    async def _rank(self, request: pb.RankRequest, call: Call, watch: Stopwatch) -> pb.RankResponse:
        table = self._table
        watch.admitted = watch.stamp()

        found = Findings()
        subject, candidates = check_rank(request, found)
        route = table.find(request.route, call.tenant)
        arm = route.assign(subject)
        check_rank_fits(request, route, arm, candidates, found)
        found.raise_if_any()
        ids = {route.subject: request.subject, route.candidate: request.candidates}
        question = self._question(request, call, route, arm, ids, outputs=(route.score,), rows=len(candidates))

        features, answer = await self._consult(question, watch)

        scores = scores_of(answer, route.score, len(candidates))
        reasons = degradation.reasons(features.views)
        if not np.isfinite(scores).all():
            reasons.append(degradation.SCORES_NOT_FINITE)
        order = best_first(scores, request.top_k)

        response = pb.RankResponse(tier=TIER_FULL)
        items: list[Any] = list(map(candidates.__getitem__, order.tolist()))
        if request.candidates.string_ids:
            response.item_ids.string_ids.extend(items)
        elif request.candidates.int64_ids:
            response.item_ids.int64_ids.extend(items)
        else:
            response.item_ids.composite_ids.extend(map(request.candidates.composite_ids.__getitem__, order.tolist()))
        response.scores.extend(scores[order].tolist())
        self._sign(response, question, table.revision, reasons)
        if request.explain:
            degradation.report(features.views, response.feature_report)
            watch.write(response.timings, answer, features.store_us)
        self._account_later(question, len(candidates), reasons, watch)
        return response

    async def _predict(self, request: pb.PredictRequest, call: Call, watch: Stopwatch) -> pb.PredictResponse:
        table = self._table
        watch.admitted = watch.stamp()

        found = Findings()
        rows = check_predict(request, found)
        route = table.find(request.route, call.tenant)
        subject = rows.get(route.subject, ())
        arm = route.assign(subject[0] if len(subject) == 1 else request.request_id or uuid.uuid4().hex)
        check_predict_fits(request, route, arm, rows, found)
        found.raise_if_any()
        ids = {entity.entity_type: entity.ids for entity in request.entities}
        question = self._question(request, call, route, arm, ids, outputs=request.outputs, rows=len(rows.get(route.candidate, ())))

        features, answer = await self._consult(question, watch)

        response = pb.PredictResponse()
        copy_outputs(answer, response.outputs)
        reasons = degradation.reasons(features.views)
        self._sign(response, question, table.revision, reasons)
        if request.explain:
            degradation.report(features.views, response.feature_report)
            watch.write(response.timings, answer, features.store_us)
        self._account_later(question, max(map(len, rows.values()), default=0), reasons, watch)
        return response

    def _question(
        self,
        request: pb.RankRequest | pb.PredictRequest,
        call: Call,
        route: ServingRoute,
        arm: Arm,
        ids: Mapping[str, types_pb2.EntityIds],
        *,
        outputs: Sequence[str],
        rows: int,
    ) -> _Question:
        tensor_bytes = arm.input_bytes(rows)
        if tensor_bytes > self._max_tensor_bytes:
            raise ResourceExhausted(
                f"the features of {rows} rows take {tensor_bytes} bytes, more than a message may hold ({self._max_tensor_bytes}): "
                "send fewer rows at a time",
                reason="MESSAGE_TOO_LARGE",
            )
        return _Question(
            route=route,
            arm=arm,
            ids=ids,
            inline={tensor.name: tensor for tensor in request.inline_features},
            request_features=request.request_features,
            outputs=outputs,
            request_id=request.request_id or call.request_id or uuid.uuid4().hex,
            tenant=call.tenant,
            deadline=call.deadline.at_most(route.timeout_s),
        )

    async def _consult(
        self, question: _Question, watch: Stopwatch
    ) -> tuple[features_pb.GetFeaturesResponse, inference_pb2.ModelInferResponse]:
        """Features → predict: the road that Rank and Predict share."""
        watch.resolved = watch.stamp()
        features = await self._read_features(question)
        watch.featured = watch.stamp()
        frame = worker_pb.StreamInferRequest()
        tensors = {tensor.name: tensor for tensor in features.tensors}
        tensors.update(question.inline)
        fill_infer(frame.request, question.arm, tensors, question.outputs, question.request_id)
        answer = await self._workers.infer(frame, deadline=question.deadline, tenant=question.tenant, request_id=question.request_id)
        watch.predicted = watch.stamp()
        return features, answer

    async def _read_features(self, question: _Question) -> features_pb.GetFeaturesResponse:
        """Read what is not given inline; where that cannot be done in time, defaults stand in (if the route takes them) and are told as such.

        So that late features can degrade the answer instead of failing it, they do not get the whole budget.
        """
        inputs = question.arm.inputs
        if question.inline:
            inputs = tuple(item for item in inputs if item.name not in question.inline)
            if not inputs:
                return features_pb.GetFeaturesResponse()
        entity_types = dict.fromkeys(entity for item in inputs for entity in item.entities)
        try:
            return await self._features.get(
                question.route,
                question.arm,
                [(entity_type, question.ids[entity_type]) for entity_type in entity_types],
                [item.name for item in inputs] if question.inline else (),
                request_features=question.request_features,
                deadline=question.deadline.at_most(question.deadline.remaining_s() * self._features_share),
                tenant=question.tenant,
                request_id=question.request_id,
            )
        except (Unreachable, DeadlineExceeded) as error:
            if not question.route.takes_defaults:
                raise
            late = isinstance(error, DeadlineExceeded)
            status = types_pb2.ROW_STATUS_TIMED_OUT if late else types_pb2.ROW_STATUS_UNAVAILABLE
            return degradation.defaults(inputs, {name: count(question.ids[name]) for name in entity_types}, status)

    @staticmethod
    def _sign(response: pb.RankResponse | pb.PredictResponse, question: _Question, revision: int, reasons: list[str]) -> None:
        """Say who answered, under which revision, and how well."""
        response.model = question.arm.model
        response.model_version = question.arm.version
        response.variant = question.arm.name
        response.request_id = question.request_id
        response.registry_revision = revision
        response.degraded_reasons.extend(reasons)

    def _account_later(self, question: _Question, rows: int, reasons: list[str], watch: Stopwatch) -> None:
        """Count the answer once it is on its way: the caller waits for it, nobody waits for the counters."""
        watch.done = watch.stamp()
        asyncio.get_running_loop().call_soon(self._account, question, rows, reasons, watch)

    def _account(self, question: _Question, rows: int, reasons: list[str], watch: Stopwatch) -> None:
        """Count the answer, and log it where somebody looks: a log line costs as much as a stage."""
        self._metrics.answered(question.route.name, question.arm.name, reasons, watch)
        if _stdlib_log.isEnabledFor(logging.DEBUG):
            log.debug(
                "answered",
                route=question.route.name,
                variant=question.arm.name,
                request_id=question.request_id,
                rows=rows,
                degraded=reasons,
                features_ms=round((watch.featured - watch.resolved) * 1e3, 3),
                predict_ms=round((watch.predicted - watch.featured) * 1e3, 3),
            )
