"""The step of a road that asks the model only for candidates whose scores are not known."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np

from plait.api.router.v1 import explanation_pb2 as explanation_pb
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import Unavailable
from plait.registry.policies import CachePolicy
from plait.registry.records import Snapshot
from router import degradation
from router.consulting import Consulting, ordered
from router.question import Question, Response, Road
from router.scores_cache import Scores
from router.tensors import scores_of

_LEAST_KNOWN: Final = 0.5  # of the candidates, for an answer by known scores alone


class PartialScoring:
    """Makes the roads of routes that keep scores."""

    def __init__(self, consulting: Consulting, scores: Scores) -> None:
        self._consulting = consulting
        self._scores = scores

    def adopt(self, snapshot: Snapshot) -> None:
        """Go by a new snapshot from now on."""
        self._scores.adopt(snapshot)

    def around(self, road: Road, policy: CachePolicy, keep_s: float) -> Road:
        """Return the road that asks for what is not known; what is older than `policy.scores_ttl_s` is asked for again, and kept for `keep_s`.

        A Predict, an Explain, and a request with features of its own take the plain road.
        """

        async def partly(question: Question) -> Response:
            request = question.request
            if not isinstance(request, pb.RankRequest) or request.explain or question.trail is not None or not Scores.usable(question):
                return await road(question)
            return await self._rank(question, policy.scores_ttl_s, keep_s)

        return partly

    def by_known(self, question: Question, max_age_s: float) -> Response:
        """Return the answer to a Rank by scores that are known and at most so old; candidates without one come last.

        Raises Unavailable (SCORES_UNKNOWN) where most of them are not known.
        """
        known = self._scores.known(question, max_age_s)
        if known.mask.mean() < _LEAST_KNOWN or not Scores.usable(question):
            raise Unavailable("too few scores of these candidates are known: retry", reason="SCORES_UNKNOWN", retry_after_s=0.1)
        lowest = known.scores[known.mask].min()
        response = ordered(question, np.where(known.mask, known.scores, lowest))
        response.age_us = int(known.age_s * 1e6)
        return response

    async def _rank(self, question: Question, ttl_s: float, keep_s: float) -> Response:
        begun_s, position = self._scores.now_s(), self._scores.position
        known = self._scores.known(question, ttl_s)
        scores = known.scores.copy()
        if not known.all:
            missing = np.flatnonzero(~known.mask)
            asked = _only(question, missing.tolist())
            features = await self._consulting.features_of(asked)
            question.watch.featured = question.watch.stamp()
            reasons = degradation.reasons(features.views)
            question.reasons += reasons
            answer = await self._consulting.infer(asked, features)
            question.scored = asked.scored
            scores[missing] = made = scores_of(answer, question.route.score, len(missing))
            if not reasons and np.isfinite(made).all():
                self._scores.keep(question, asked.candidates, made, begun_s=begun_s, position=position, keep_s=keep_s)
        question.watch.predicted = question.watch.stamp()
        there = int(known.mask.sum())
        self._scores.count(question.route.name, there, len(scores) - there)
        response = ordered(question, scores)
        if there:
            response.cache = explanation_pb.CACHE_STATUS_HIT if known.all else explanation_pb.CACHE_STATUS_PARTIAL
            response.age_us = int(known.age_s * 1e6)
        return response


def _only(question: Question, places: Sequence[int]) -> Question:
    """Return the question about some of its candidates."""
    asked = copy.copy(question)
    given, ids = question.ids[question.route.candidate], types_pb2.EntityIds()
    if given.composite_ids:
        ids.composite_ids.extend(map(given.composite_ids.__getitem__, places))
    elif given.int64_ids:
        ids.int64_ids.extend(map(given.int64_ids.__getitem__, places))
    else:
        ids.string_ids.extend(map(given.string_ids.__getitem__, places))
    asked.ids = {**question.ids, question.route.candidate: ids}
    asked.candidates = cast("Any", list(map(question.candidates.__getitem__, places)))
    asked.rows = len(places)
    return asked
