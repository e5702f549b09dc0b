"""The road of a route with stages: retrieve → filter → rank → boost → diversity.

What the rules look at is read beside the model's features, in the same moment. What a filter drops never reaches the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.api.router.v1 import explanation_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from router import degradation
from router.consulting import Consulting, ordered
from router.feature_client import FeatureClient
from router.ordering import best_first
from router.question import Question, Response, Road
from router.reranking import boosted, dropped, spread
from router.route_table import ServingRoute, ServingStages
from router.tensors import ids_of, scores_of

RULES_UNAVAILABLE: Final = "rules_unavailable"


class Cascade:
    """Makes the roads of routes with stages."""

    def __init__(self, consulting: Consulting, features: FeatureClient, features_share: float) -> None:
        self._consulting = consulting
        self._features = features
        self._features_share = features_share

    def road(self, route: ServingRoute, stages: ServingStages) -> Road:
        """Return the road of a route; a Predict has no order, so it takes the plain one."""
        plain = self._consulting.answer

        async def staged(question: Question) -> Response:
            if not isinstance(question.request, pb.RankRequest):
                return await plain(question)
            if stages.retriever is not None and not len(question.candidates):
                began_s = question.watch.stamp()
                await self._retrieve(question, stages)
                _report(question, "retrieve", 0, began_s)
                if not len(question.candidates):
                    return _nothing(question)
            return await self._rank(question, stages) if stages.rules_set else await plain(question)

        return staged

    async def _retrieve(self, question: Question, stages: ServingStages) -> None:
        """Put the candidates that the retriever finds for the subject into the question."""
        assert stages.retriever is not None  # noqa: S101  (the caller looked)
        answer = await self._consulting.ask(question, stages.retriever, (stages.output,), stages.retriever_sent)
        ids = types_pb2.EntityIds()
        found = list(dict.fromkeys(ids_of(answer, stages.output)))[: min(stages.limit, question.route.max_candidates)]
        key = question.arm.keys.get(question.route.candidate)
        wanted = int if key is not None and key.key == "int64" else str
        if found and not isinstance(found[0], wanted):
            raise FailedPrecondition(
                f"model {stages.retriever.model!r} answers ids of another kind than candidates of route {question.route.name!r} have: "
                "publish one whose output is the candidates' ids",
                reason="SIGNATURE_MISMATCH",
            )
        (ids.int64_ids if wanted is int else ids.string_ids).extend(cast("list[Any]", found))
        question.ids = {**question.ids, question.route.candidate: ids}
        question.candidates = cast("Any", found)
        question.rows = len(found)

    async def _rank(self, question: Question, stages: ServingStages) -> Response:
        watch = question.watch
        features, columns = await asyncio.gather(self._consulting.features_of(question), self._columns(question, stages))
        watch.featured = watch.stamp()
        question.reasons += degradation.reasons(features.views)
        if columns is None:
            question.reasons.append(RULES_UNAVAILABLE)
            return await self._consulting.conclude(question, features)
        given, began_s = len(question.candidates), watch.stamp()
        columns, removed = _filtered(question, features, columns, stages)
        _report(question, "filter", given, began_s, removed)
        if not len(question.candidates):
            return _nothing(question)
        answer = await self._consulting.infer(question, features)
        _report(question, "rank", len(question.candidates), watch.featured)
        watch.predicted = began_s = watch.stamp()
        scores, lifted = boosted(scores_of(answer, question.route.score, len(question.candidates)), columns, stages.boosts)
        order, held_back = spread(best_first(scores, 0), columns, stages.caps)
        question.by_rule = removed | lifted | held_back
        _report(question, "rerank", len(question.candidates), began_s, lifted | held_back)
        response = ordered(question, scores, order)
        self._consulting.tell(question, features, answer, response)
        return response

    def filtering(self, stages: ServingStages) -> Callable[[Question], Awaitable[None]]:
        """Return what drops candidates for an answer that needs no model: also then nothing may be shown that is sold out."""

        async def filtering(question: Question) -> None:
            columns = await self._columns(question, stages)
            if columns is None:
                question.reasons.append(RULES_UNAVAILABLE)
            else:
                _, question.by_rule = _filtered(question, question.features, columns, stages)

        return filtering

    async def _columns(self, question: Question, stages: ServingStages) -> NDArray[np.floating] | None:
        """Return what the rules look at [candidates, columns], None where it cannot be had and the route goes on without."""
        try:
            answer = await self._features.get(
                question.route,
                stages.rules_set,
                [(entity_type, question.ids[entity_type]) for entity_type in stages.rules_entities],
                [stages.rules_input],
                request_features=[tensor for tensor in question.request.request_features if tensor.name in stages.rules_sent],
                lenient=True,
                deadline=question.deadline.at_most(question.deadline.remaining_s() * self._features_share),
                tenant=question.tenant,
                request_id=question.request_id,
            )
        except (Unavailable, DeadlineExceeded):
            return None
        tensor = next((tensor for tensor in answer.tensors if tensor.name == stages.rules_input), None)
        rows = len(question.candidates)
        if tensor is None or tensor.shape[:1] != [rows] or any(_lost(view) for view in answer.views):
            return None
        return np.frombuffer(tensor.data, stages.rules_dtype).reshape(rows, -1)


def _report(question: Question, stage: str, given: int, began_s: float, by_rule: Mapping[str, int] = MappingProxyType({})) -> None:
    """Tell an Explain what a stage made of its candidates."""
    if question.trail is not None:
        took_us = int((question.watch.stamp() - began_s) * 1e6)
        question.trail.stages.append(
            explanation_pb2.StageReport(
                stage=stage, candidates_in=given, candidates_out=len(question.candidates), took_us=took_us, by_rule=by_rule
            )
        )


def _nothing(question: Question) -> pb.RankResponse:
    question.watch.featured = question.watch.predicted = question.watch.stamp()
    return pb.RankResponse()


def _filtered(
    question: Question, features: features_pb.GetFeaturesResponse | None, columns: NDArray[np.floating], stages: ServingStages
) -> tuple[NDArray[np.floating], dict[str, int]]:
    gone, removed = dropped(columns, stages.filters)
    if removed and gone.any():
        kept = np.flatnonzero(~gone)
        columns = columns[kept]
        _keep(question, features, kept)
    return columns, removed


def _lost(view: Any) -> bool:
    """Whether rows of a view could not be read at all, as against not being there."""
    counts = view.status_counts
    return any(status < len(counts) and counts[status] for status in (types_pb2.ROW_STATUS_TIMED_OUT, types_pb2.ROW_STATUS_UNAVAILABLE))


def _keep(question: Question, features: features_pb.GetFeaturesResponse | None, kept: NDArray[np.intp]) -> None:
    """Leave only some of the candidates in the question and in the tensors it will be answered from."""
    per_row = {item.name for item in question.arm.inputs if item.per_row}
    places = kept.tolist()
    candidate = question.route.candidate
    given, ids = question.ids[candidate], types_pb2.EntityIds()
    if given.composite_ids:
        ids.composite_ids.extend(map(given.composite_ids.__getitem__, places))
    elif given.int64_ids:
        ids.int64_ids.extend(map(given.int64_ids.__getitem__, places))
    else:
        ids.string_ids.extend(map(given.string_ids.__getitem__, places))
    rows = len(question.candidates)
    question.ids = {**question.ids, candidate: ids}
    question.candidates = cast("Any", list(map(question.candidates.__getitem__, places)))
    question.rows = len(places)
    if features is not None:
        _take(features.tensors, per_row, rows, kept)
    if question.inline:
        copies = {name: types_pb2.Tensor() for name in question.inline}
        for name, copy in copies.items():
            copy.CopyFrom(question.inline[name])
        _take(copies.values(), per_row, rows, kept)
        question.inline = cast("Mapping[str, types_pb2.Tensor]", copies)


def _take(tensors: Iterable[Any], per_row: set[str], rows: int, kept: NDArray[np.intp]) -> None:
    for tensor in tensors:
        if tensor.name in per_row and rows:
            tensor.data = np.frombuffer(tensor.data, np.uint8).reshape(rows, -1)[kept].tobytes()
            tensor.shape[0] = len(kept)
