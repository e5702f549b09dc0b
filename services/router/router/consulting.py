"""The heart of every road: features → predict → order → answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.api.model_worker.v1 import model_worker_service_pb2 as worker_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded
from router import degradation
from router.feature_client import FeatureClient, Unreachable
from router.ordering import best_first
from router.question import Question, Response
from router.tensors import copy_outputs, fill_infer, scores_of
from router.validation import count
from router.worker_pool import WorkerPool

if TYPE_CHECKING:
    from plait.api.inference.v2 import inference_pb2


class Consulting:
    """Reads features, asks the model and makes the answer.

    `features_share`: the part of what is left of a budget that features may take, so that late ones degrade the answer instead of failing it.
    """

    def __init__(self, features: FeatureClient, workers: WorkerPool, features_share: float) -> None:
        self._features = features
        self._workers = workers
        self._features_share = features_share

    def __repr__(self) -> str:
        return f"<Consulting {self._features!r} {self._workers!r}>"

    async def answer(self, question: Question) -> Response:
        """Return the answer to a question; errors are those of the contract."""
        watch = question.watch
        features = await self.read(question)
        watch.featured = watch.stamp()
        answer = await self.infer(question, features)
        watch.predicted = watch.stamp()
        question.reasons += degradation.reasons(features.views)
        response: Response
        if isinstance(question.request, pb.RankRequest):
            scores = scores_of(answer, question.route.score, len(question.candidates))
            response = ordered(question, scores)
        else:
            response = pb.PredictResponse()
            copy_outputs(answer, response.outputs)
        if question.request.explain:
            degradation.report(features.views, response.feature_report)
            watch.write(response.timings, answer, features.store_us)
        return response

    async def read(self, question: Question) -> features_pb.GetFeaturesResponse:
        """Read what is not given inline; where that cannot be done in time, defaults stand in (if the route takes them) and are told as such."""
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
                request_features=question.request.request_features,
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

    async def infer(self, question: Question, features: features_pb.GetFeaturesResponse) -> inference_pb2.ModelInferResponse:
        """Have the question's model look at its features."""
        frame = worker_pb.StreamInferRequest()
        tensors = {tensor.name: tensor for tensor in features.tensors}
        tensors.update(question.inline)
        fill_infer(frame.request, question.arm, tensors, question.outputs, question.request_id)
        question.scored = answer = await self._workers.infer(
            frame, deadline=question.deadline, tenant=question.tenant, request_id=question.request_id
        )
        return answer


def ordered(question: Question, scores: NDArray[np.float32]) -> pb.RankResponse:
    """Return the answer to a Rank: its candidates by `scores` [candidates], best first; what is not finite is told."""
    if not np.isfinite(scores).all():
        question.reasons.append(degradation.SCORES_NOT_FINITE)
    request = cast("pb.RankRequest", question.request)
    order = best_first(scores, request.top_k)
    response = pb.RankResponse()
    items: list[Any] = list(map(question.candidates.__getitem__, order.tolist()))
    if request.candidates.string_ids:
        response.item_ids.string_ids.extend(items)
    elif request.candidates.int64_ids:
        response.item_ids.int64_ids.extend(items)
    else:
        response.item_ids.composite_ids.extend(map(request.candidates.composite_ids.__getitem__, order.tolist()))
    response.scores.extend(scores[order].tolist())
    return response
