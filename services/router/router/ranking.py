"""The page: the whole story of a request, in the order it happens; everything it calls is one file away.

    authenticate (the server's interceptor) → knock → resolve route → choose variant → road → answer

A route's road is made once per snapshot, of the steps that the route uses and no others:

    asked before? → kept? → [shadows →] ladder → gate → [retrieve →] features [and rules] → [filter →] predict → [boost →] order [→ diversity] → sign
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, cast

from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import InvalidArgument, Violation
from plait.registry.records import Snapshot
from plait.rpc.call import current
from plait.telemetry.logging import get_logger
from router.answers import Answers
from router.asking import Asking
from router.cascade import Cascade
from router.consulting import Consulting
from router.explanation import explain
from router.exposures import Exposures
from router.gate import Gate
from router.ladder import Ladder
from router.partial_scoring import PartialScoring
from router.question import TIER_POPULARITY, Question, Response, Road
from router.repeats import Repeats
from router.route_table import NO_ROUTES, RouteTable, ServingRoute, compile_table
from router.shadow import Shadows
from router.stopwatch import RankingMetrics, Stopwatch
from router.trail import Trail

log = get_logger(__name__)
_stdlib_log: Final = logging.getLogger(__name__)

_OPERATORS: Final = frozenset({"operate", "admin"})  # scopes that may know where services live
_ENVELOPE: Final = 1 / 16  # of a message is kept for names, statuses and framing


class Ranking:
    """Answers Rank, Predict and Explain.

    `max_message_bytes` bounds the tensors of one request. `adopt` takes each new snapshot; a request reads the table once and so sees one
    world.
    """

    def __init__(
        self,
        *,
        gate: Gate,
        consulting: Consulting,
        cascade: Cascade,
        ladder: Ladder,
        scoring: PartialScoring,
        answers: Answers,
        repeats: Repeats,
        shadows: Shadows,
        exposures: Exposures,
        metrics: RankingMetrics,
        max_message_bytes: int,
    ) -> None:
        self._gate = gate
        self._answers = answers
        self._repeats = repeats
        self._consulting = consulting
        self._cascade = cascade
        self._ladder = ladder
        self._scoring = scoring
        self._shadows = shadows
        self._exposures = exposures
        self._metrics = metrics
        self._asking = Asking(int(max_message_bytes * (1 - _ENVELOPE)), consulting.ready)
        self._table = NO_ROUTES
        self._roads: dict[str, Road] = {}

    def __repr__(self) -> str:
        return f"<Ranking {self._table!r} {self._gate!r} {self._consulting!r} {self._answers!r} {self._repeats!r}>"

    @property
    def table(self) -> RouteTable:
        """The routes of the newest snapshot."""
        return self._table

    def adopt(self, snapshot: Snapshot) -> None:
        """Serve by a new snapshot from the next request on."""
        table = compile_table(snapshot, self._table)
        for route in table.routes.values():
            for variant, fault in route.left_out.items():
                log.warning("a variant cannot serve", route=route.name, variant=variant, reason=fault.reason, error=fault.message)
        self._gate.adopt(snapshot)
        self._answers.adopt(snapshot)
        self._scoring.adopt(snapshot)
        self._roads = {route.name: self._road(route) for route in table.routes.values()}
        self._table = table

    async def rank(self, request: pb.RankRequest) -> pb.RankResponse:
        """Answer a Rank; errors are those of the contract."""
        call, watch, table = current(), Stopwatch(), self._table
        self._gate.knock(call, request.route)
        question = self._asking.rank(request, table, call, watch)
        return cast("pb.RankResponse", await self._roads[question.route.name](question))

    async def predict(self, request: pb.PredictRequest) -> pb.PredictResponse:
        """Answer a Predict; errors are those of the contract."""
        call, watch, table = current(), Stopwatch(), self._table
        self._gate.knock(call, request.route)
        question = self._asking.predict(request, table, call, watch)
        return cast("pb.PredictResponse", await self._roads[question.route.name](question))

    async def explain(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        """Answer a Rank or Predict on the same road and tell how; InvalidArgument where neither is set, other errors are those of the call."""
        call, watch, table = current(), Stopwatch(), self._table
        trail = Trail(endpoints=call.is_service or bool(_OPERATORS & call.scopes))
        self._gate.knock(call, request.rank.route or request.predict.route)
        asked = request.WhichOneof("call")
        if asked is None:
            message = "nothing to explain: set rank or predict"
            raise InvalidArgument(message, violations=[Violation("call", "expected rank or predict")])
        getattr(request, asked).explain = True
        if asked == "rank":
            question = self._asking.rank(request.rank, table, call, watch, trail)
        else:
            question = self._asking.predict(request.predict, table, call, watch, trail)
        return explain(await self._roads[question.route.name](question), question, trail)

    def _road(self, route: ServingRoute) -> Road:
        """Return the steps of a route, the last one first: this is the only place where their order stands."""
        stages = route.stages
        road: Road = self._cascade.road(route, stages) if stages else self._consulting.answer
        if route.cache is not None and route.cache.scores_ttl_s:
            road = self._scoring.around(road, route.cache, max(route.cache.scores_ttl_s, *(rung.max_age_s for rung in route.ladder), 0.0))
        road = self._gate.around(road, route)
        if route.ladder:
            filtering = self._cascade.filtering(stages) if stages and stages.filters else None
            road = self._ladder.around(road, route, filtering)  # outside of the gate: an overloaded model is a reason to answer otherwise
        if route.shadows:
            road = self._shadows.around(road, route)
        if route.cache is not None and route.cache.ttl_s:
            road = self._answers.around(road, route, route.cache)
        road = self._signed(road)
        if route.repeat_window_s:
            road = self._repeats.around(road, route.name, route.repeat_window_s)
        return road

    def _signed(self, road: Road) -> Road:
        async def signed(question: Question) -> Response:
            return self._sign(await road(question), question)

        return signed

    def _sign(self, response: Response, question: Question) -> Response:
        """Say who answered, under which revision, and how well; count it once it is on its way: nobody waits for the counters."""
        if question.tier != TIER_POPULARITY:
            response.model = question.arm.model
            response.model_version = question.arm.version
        response.variant = question.arm.name
        response.tier = question.tier
        response.request_id = question.request_id
        response.registry_revision = question.revision
        response.degraded_reasons.extend(dict.fromkeys(question.reasons))  # (two tiers may have met the same)
        response.assignments.extend(question.assignments)
        question.watch.done = question.watch.stamp()
        asyncio.get_running_loop().call_soon(self._account, question)
        return response

    def _account(self, question: Question) -> None:
        """Count the answer, and log it where somebody looks: a log line costs as much as a stage."""
        watch = question.watch
        self._exposures.note(question)
        self._metrics.answered(question.route.name, question.arm.name, question.reasons, watch)
        if question.by_rule:
            self._metrics.ruled(question.route.name, question.by_rule)
        if _stdlib_log.isEnabledFor(logging.DEBUG):
            log.debug(
                "answered",
                route=question.route.name,
                variant=question.arm.name,
                request_id=question.request_id,
                rows=question.rows,
                degraded=question.reasons,
                features_ms=round((watch.featured - watch.admitted) * 1e3, 3),
                predict_ms=round((watch.predicted - watch.featured) * 1e3, 3),
            )
