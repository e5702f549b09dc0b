"""The heart of every road: features → predict → order → answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.api.model_worker.v1 import model_worker_service_pb2 as worker_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded, PlaitError
from router import degradation
from router.connections import CallPlan
from router.feature_client import FeatureClient, Unreachable
from router.ordering import best_first
from router.pools import Pools
from router.question import Question, Response
from router.route_table import Arm, Input, Popularity
from router.tensors import column_of, copy_outputs, fill_infer, scores_of
from router.validation import count

if TYPE_CHECKING:
    from plait.api.inference.v2 import inference_pb2


class Consulting:
    """Reads features, asks the model and makes the answer.

    `features_share`: the part of what is left of a budget that features may take, so that late ones degrade the answer instead of failing it.
    """

    def __init__(self, features: FeatureClient, workers: Pools, features_share: float) -> None:
        self._features = features
        self._workers = workers
        self._features_share = features_share

    def __repr__(self) -> str:
        return f"<Consulting {self._features!r} {self._workers!r}>"

    def ready(self, model: str, version: str) -> bool:
        """Whether some worker holds the version, as far as is known."""
        return self._workers.ready(model, version)

    async def answer(self, question: Question) -> Response:
        """Return the answer to a question; errors are those of the contract."""
        watch = question.watch
        features = await self.features_of(question)
        watch.featured = watch.stamp()
        question.reasons += degradation.reasons(features.views)
        return await self.conclude(question, features)

    async def conclude(self, question: Question, features: features_pb.GetFeaturesResponse) -> Response:
        """Have the model look at the features, and make the answer."""
        answer = await self.infer(question, features)
        question.watch.predicted = question.watch.stamp()
        response: Response
        if isinstance(question.request, pb.RankRequest):
            response = ordered(question, scores_of(answer, question.route.score, len(question.candidates)))
        else:
            response = pb.PredictResponse()
            copy_outputs(answer, response.outputs)
        self.tell(question, features, answer, response)
        return response

    def tell(
        self,
        question: Question,
        features: features_pb.GetFeaturesResponse,
        answer: inference_pb2.ModelInferResponse,
        response: Response,
    ) -> None:
        """Add where the time went and what the features were like, if the caller asked."""
        if question.request.explain:
            degradation.report(features.views, response.feature_report)
            question.watch.write(response.timings, answer, features.store_us)

    async def by_popularity(self, question: Question, popularity: Popularity) -> Response:
        """Return the answer to a Rank without a model: by one feature of the candidates, read unless it was; where it cannot be had, all
        candidates score alike and keep the caller's order."""
        question.watch.admitted = question.watch.featured = question.watch.predicted = question.watch.stamp()
        name, rows = popularity.place.name, len(question.candidates)
        if not rows:
            return pb.RankResponse()  # all were filtered
        tensor = question.inline.get(name)
        if tensor is None:
            features = await self._features_with(question, popularity)
            tensor = next((t for t in features.tensors if t.name == name), None)
            question.reasons += degradation.reasons(features.views)
        question.watch.featured = question.watch.predicted = question.watch.stamp()
        if tensor is None:
            return ordered(question, np.zeros(rows, np.float32))
        return ordered(question, column_of(tensor, popularity.place, rows))

    async def _features_with(self, question: Question, popularity: Popularity) -> features_pb.GetFeaturesResponse:
        """What was read already, where the feature is among it; otherwise only the input that holds it, or that it cannot be had."""
        known = question.features_for
        if question.features is not None and known is not None and known.feature_set == popularity.arm.feature_set:
            return question.features
        try:
            return await self.read(question, popularity.arm, (popularity.input,))
        except PlaitError:
            rows = {name: count(question.ids[name]) for name in popularity.input.entities}
            return degradation.defaults((popularity.input,), rows, types_pb2.ROW_STATUS_UNAVAILABLE)

    async def features_of(self, question: Question) -> features_pb.GetFeaturesResponse:
        """Read what is not given inline, unless it was read for another variant that takes the same."""
        arm, known = question.arm, question.features_for
        if question.features is not None and known is not None and (known is arm or _alike(known, arm)):
            return question.features
        inputs = arm.inputs
        if question.inline:
            inputs = tuple(item for item in inputs if item.name not in question.inline)
        features = await self.read(question, arm, inputs) if inputs else features_pb.GetFeaturesResponse()
        if question.route.required_views:
            degradation.require(features.views, question.route.required_views)
        question.features, question.features_for = features, arm
        return features

    async def infer(self, question: Question, features: features_pb.GetFeaturesResponse) -> inference_pb2.ModelInferResponse:
        """Have the question's model look at its features."""
        tensors = {tensor.name: tensor for tensor in features.tensors}
        tensors.update(question.inline)
        return await self._infer(question, question.arm, tensors, question.outputs)

    async def ask(self, question: Question, arm: Arm, outputs: Sequence[str], sent: AbstractSet[str]) -> inference_pb2.ModelInferResponse:
        """Have another model look at features of its own, and return its answer; `sent`: which request-time features it knows."""
        given = [tensor for tensor in question.request.request_features if tensor.name in sent]
        features = await self.read(question, arm, arm.inputs, given)
        return await self._infer(question, arm, {tensor.name: tensor for tensor in features.tensors}, outputs)

    async def read(
        self, question: Question, arm: Arm, inputs: Sequence[Input], sent: Sequence[types_pb2.Tensor] | None = None
    ) -> features_pb.GetFeaturesResponse:
        """Read inputs of an arm; where that cannot be done in time, defaults stand in (if the route takes them) and are told as such.

        `sent`: the request-time features to pass on, None = all.
        """
        entity_types = dict.fromkeys(entity for item in inputs for entity in item.entities)
        try:
            features = await self._features.get(
                question.route,
                arm.feature_set,
                [(entity_type, question.ids[entity_type]) for entity_type in entity_types],
                () if inputs is arm.inputs else [item.name for item in inputs],
                request_features=question.request.request_features if sent is None else sent,
                deadline=question.deadline.at_most(question.deadline.remaining_s() * self._features_share),
                tenant=question.tenant,
                request_id=question.request_id,
                trail=question.trail,
            )
        except (Unreachable, DeadlineExceeded) as error:
            if not question.route.takes_defaults:
                raise
            late = isinstance(error, DeadlineExceeded)
            status = types_pb2.ROW_STATUS_TIMED_OUT if late else types_pb2.ROW_STATUS_UNAVAILABLE
            features = degradation.defaults(inputs, {name: count(question.ids[name]) for name in entity_types}, status)
        if question.trail is not None:
            question.trail.aged(features.views, arm.view_versions)
        return features

    async def _infer(
        self, question: Question, arm: Arm, tensors: Mapping[str, types_pb2.Tensor], outputs: Sequence[str]
    ) -> inference_pb2.ModelInferResponse:
        frame = worker_pb.StreamInferRequest()
        fill_infer(frame.request, arm, tensors, outputs, question.request_id)
        call = CallPlan(
            model=arm.model,
            version=arm.version,
            rows=question.rows,
            deadline=question.deadline,
            tenant=question.tenant,
            request_id=question.request_id,
            attempts=question.route.attempts,
            hedge=question.route.hedge,
            trail=question.trail,
        )
        question.scored = answer = await self._workers.infer(frame, call)
        return answer


def _alike(one: Arm, other: Arm) -> bool:
    """Whether two variants are fed by the same tensors."""
    return one.feature_set == other.feature_set and {i.name for i in one.inputs} == {i.name for i in other.inputs}


def ordered(question: Question, scores: NDArray[np.float32], order: NDArray[np.intp] | None = None) -> pb.RankResponse:
    """Return the answer to a Rank: its candidates by `scores` [candidates], best first, or in the `order` given; what is not finite is told."""
    if not np.isfinite(scores).all():
        question.reasons.append(degradation.SCORES_NOT_FINITE)
    top_k = cast("pb.RankRequest", question.request).top_k
    order = best_first(scores, top_k) if order is None else order[: top_k or None]
    response = pb.RankResponse()
    ids = question.ids[question.route.candidate]
    items: list[Any] = list(map(question.candidates.__getitem__, order.tolist()))
    if ids.string_ids:
        response.item_ids.string_ids.extend(items)
    elif ids.int64_ids:
        response.item_ids.int64_ids.extend(items)
    else:
        response.item_ids.composite_ids.extend(map(ids.composite_ids.__getitem__, order.tolist()))
    response.scores.extend(scores[order].tolist())
    return response
