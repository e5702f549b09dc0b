"""What answers when time, or a model, is short: the rungs of a route, from its own variant down to the popularity of the candidates.

    full → light → cached → popularity

A rung is passed over when what is left of the budget is less than it may be expected to take, and left when it fails for want of time,
place or workers. Which rung answered is told in the answer: nothing is passed off as the full model's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from plait.api.router.v1 import explanation_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import DeadlineExceeded, PlaitError, ResourceExhausted, Unavailable
from plait.rpc.deadline import Deadline
from plait.telemetry.metrics import Metrics
from router.consulting import Consulting
from router.expectations import Expectations
from router.partial_scoring import PartialScoring
from router.question import TIER_FULL, Question, Response, Road
from router.route_table import Arm, Popularity, Rung, ServingRoute

Filtering = Callable[[Question], Awaitable[None]]

_MARGIN: Final = 1.2
_UNKNOWN: Final = 0.1  # of what is left is kept for a rung of which nothing is known yet
_MOST_KEPT: Final = 0.5
_FULL: Final = Rung(tier=TIER_FULL)
_REFUSED_FOR_GOOD: Final = frozenset({"QUOTA_EXCEEDED", "REQUEST_TOO_COSTLY", "MESSAGE_TOO_LARGE"})  # a cheaper rung would be a way around


class Ladder:
    """Goes down the rungs of a route. At most `most_without` requests at once read features for a rung that needs no model."""

    def __init__(
        self, consulting: Consulting, scoring: PartialScoring, expectations: Expectations, metrics: Metrics, most_without: int = 64
    ) -> None:
        self._consulting = consulting
        self._scoring = scoring
        self._expectations = expectations
        self._free = most_without
        self._answered = metrics.counter(
            "plait_router_tier", "answers of routes with a ladder, by the tier that answered", ("route", "tier")
        )

    def __repr__(self) -> str:
        return f"<Ladder free={self._free} {self._expectations!r}>"

    def around(self, road: Road, route: ServingRoute, filtering: Filtering | None = None) -> Road:
        """Return the road with the route's rungs below it; the gate is part of `road`, so a full one is a reason to step down.

        `filtering` drops from a question what must not be shown, where no model is asked.
        """
        below = route.ladder

        async def stepping(question: Question) -> Response:
            rungs = [_FULL, *(rung for rung in below if _suits(rung, question))]
            return await self._step_down(road, question, rungs, filtering)

        return stepping

    async def _step_down(self, road: Road, question: Question, rungs: Sequence[Rung], filtering: Filtering | None) -> Response:
        whole, chosen, told = question.deadline, question.arm, len(question.reasons)
        failed: PlaitError | None = None
        for place, rung in enumerate(rungs):
            below = rungs[place + 1] if place + 1 < len(rungs) else None
            question.arm = rung.arm or chosen
            left_s, expected_s = whole.remaining_s(), self._expected_s(rung, chosen, question)
            if below is not None and left_s < expected_s * _MARGIN and not self._expectations.probe(question.arm, question.rows):
                _report(question, rung, "budget_too_small", left_s, expected_s)
                continue
            question.deadline = whole if below is None else Deadline(whole.at_s - self._kept_s(below, chosen, question, left_s))
            try:
                response = await self._ask(rung, road, question, failed, filtering)
            except PlaitError as error:
                _report(question, rung, _why(error), left_s, expected_s)
                if below is None or not _steps_down(error) or (whole.expired and _asks_a_model(below)):
                    raise  # (what asks no model answers at once, and late is better than not at all: the caller's own deadline still holds)
                failed = error
                del question.reasons[told:]  # what was wrong with an answer that never came
                continue
            self._settle(question, rung, chosen)
            _report(question, rung, "answered", left_s, expected_s)
            for unreached in rungs[place + 1 :]:
                _report(question, unreached, "not_reached", 0, 0)
            return response
        raise AssertionError("the last rung answers or raises")

    async def _ask(self, rung: Rung, road: Road, question: Question, failed: PlaitError | None, filtering: Filtering | None) -> Response:
        if rung.max_age_s:
            return await self._by_known(rung.max_age_s, question, filtering)
        if rung.popularity is not None:
            return await self._without_model(rung.popularity, question, failed, filtering)
        watch, arm = question.watch, question.arm
        watch.admitted = 0.0
        try:
            response = await road(question)
        except DeadlineExceeded:
            if watch.admitted:  # (what waited at the gate says nothing of the model)
                self._expectations.learn(arm, question.rows, watch.stamp() - watch.admitted, answered=False)
            raise
        finally:
            watch.admitted = watch.admitted or watch.stamp()
        self._expectations.learn(arm, question.rows, watch.predicted - watch.admitted)
        return response

    async def _without_model(
        self, popularity: Popularity, question: Question, failed: PlaitError | None, filtering: Filtering | None
    ) -> Response:
        """Bounded, so that what answers an overload does not become the next one; beyond it the first refusal stands."""
        if not self._free:
            raise failed or ResourceExhausted(
                "too many requests are answered without a model: retry", reason="OVERLOADED", retry_after_s=0.1
            )
        if not len(question.candidates):  # they were to be retrieved, by a model
            raise failed or DeadlineExceeded(
                "no candidates could be retrieved in time: allow the call more time", reason="BUDGET_TOO_SMALL"
            )
        self._free -= 1
        try:
            if filtering is not None:
                await filtering(question)
            return await self._consulting.by_popularity(question, popularity)
        finally:
            self._free += 1

    async def _by_known(self, max_age_s: float, question: Question, filtering: Filtering | None) -> Response:
        """By scores that are in memory: nothing is asked, so nothing bounds it but the filter's own read."""
        watch = question.watch
        watch.admitted = watch.featured = watch.predicted = watch.stamp()
        if filtering is not None:
            await filtering(question)
        return self._scoring.by_known(question, max_age_s)

    def _settle(self, question: Question, rung: Rung, chosen: Arm) -> None:
        question.tier = rung.tier
        question.arm = rung.arm or chosen
        if rung is not _FULL:
            question.reasons.append(f"tier_{rung.tier}")
        self._answered.labels(question.route.name, rung.tier).inc()

    def _expected_s(self, rung: Rung, chosen: Arm, question: Question) -> float:
        return self._expectations.expected_s(rung.arm or chosen, question.rows) if _asks_a_model(rung) else 0.0

    def _kept_s(self, below: Rung, chosen: Arm, question: Question, left_s: float) -> float:
        """Return what a rung must leave of the budget so that, failing late, it leaves the next one time to answer."""
        wanted_s = self._expected_s(below, chosen, question) * _MARGIN or left_s * _UNKNOWN
        return max(min(wanted_s, left_s * _MOST_KEPT), 0.0)


def _asks_a_model(rung: Rung) -> bool:
    return rung.popularity is None and not rung.max_age_s


def _why(error: PlaitError) -> str:
    if error.reason == "SCORES_UNKNOWN":
        return "nothing_cached"
    return "overloaded" if isinstance(error, ResourceExhausted) else "failed"


def _steps_down(error: PlaitError) -> bool:
    if isinstance(error, DeadlineExceeded | Unavailable | ResourceExhausted):
        return error.reason not in _REFUSED_FOR_GOOD
    return error.reason == "MODEL_FAILED"


def _suits(rung: Rung, question: Question) -> bool:
    """Whether a rung can answer this request, and is another one."""
    if not _asks_a_model(rung):
        return isinstance(question.request, pb.RankRequest)
    return rung.arm is not None and rung.arm is not question.arm and question.suits(rung.arm)


def _report(question: Question, rung: Rung, reason: str, left_s: float, expected_s: float) -> None:
    if question.trail is not None:
        question.trail.tiers.append(
            explanation_pb2.TierReport(
                tier=rung.tier,
                answered=reason == "answered",
                reason=reason,
                budget_us=int(max(left_s, 0) * 1e6),
                expected_us=int(expected_s * 1e6),
            )
        )
