"""From a message to a question: validation with every violation told at once, and the choice of the variant."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import ResourceExhausted
from plait.registry.entity_ids import Id
from plait.rpc.call import Call
from router.choosing import Choice, Ready, choose, give_way
from router.question import Question
from router.route_table import RouteTable, ServingRoute
from router.rules import Facts
from router.stopwatch import Stopwatch
from router.trail import Trail
from router.validation import Findings, Ids, check_predict, check_predict_fits, check_rank, check_rank_fits


class Asking:
    """Makes questions. `max_tensor_bytes` bounds the tensors of one request: what a message may hold. `ready` says whether some worker holds
    a version of a model."""

    def __init__(self, max_tensor_bytes: int, ready: Ready = lambda _model, _version: True) -> None:
        self._max_tensor_bytes = max_tensor_bytes
        self._ready = ready

    def rank(self, request: pb.RankRequest, table: RouteTable, call: Call, watch: Stopwatch, trail: Trail | None = None) -> Question:
        """Return the question of a Rank. Raises as `RouteTable.find`; InvalidArgument with every violation."""
        found = Findings()
        subject, candidates = check_rank(request, found)
        route = table.find(request.route, call.tenant)
        request_id = _request_id(request, call)
        choice = _choose(request, call, route, subject, len(candidates), request.top_k, request_id, self._ready, trail)
        check_rank_fits(request, route, choice.arm, candidates, found)
        found.raise_if_any()
        ids = {route.subject: request.subject, route.candidate: request.candidates}
        return self._question(
            request, call, table, route, choice, ids, subject, candidates, len(candidates), (route.score,), request_id, watch, trail
        )

    def predict(self, request: pb.PredictRequest, table: RouteTable, call: Call, watch: Stopwatch, trail: Trail | None = None) -> Question:
        """Return the question of a Predict; raises as `rank`."""
        found = Findings()
        rows = check_predict(request, found)
        route = table.find(request.route, call.tenant)
        request_id = _request_id(request, call)
        subjects = rows.get(route.subject, ())
        subject = subjects[0] if len(subjects) == 1 else None
        most = max(map(len, rows.values()), default=0)
        choice = _choose(request, call, route, subject, most, 0, request_id, self._ready, trail)
        check_predict_fits(request, route, choice.arm, rows, found)
        found.raise_if_any()
        ids = {entity.entity_type: entity.ids for entity in request.entities}
        candidates = rows.get(route.candidate, ())
        return self._question(
            request, call, table, route, choice, ids, subject, candidates, most, request.outputs, request_id, watch, trail
        )

    def _question(
        self,
        request: pb.RankRequest | pb.PredictRequest,
        call: Call,
        table: RouteTable,
        route: ServingRoute,
        choice: Choice,
        ids: Mapping[str, types_pb2.EntityIds],
        subject: Id | None,
        candidates: Ids,
        rows: int,
        outputs: Sequence[str],
        request_id: str,
        watch: Stopwatch,
        trail: Trail | None,
    ) -> Question:
        tensor_bytes = choice.arm.input_bytes(len(candidates))
        if tensor_bytes > self._max_tensor_bytes:
            raise ResourceExhausted(
                f"the features of {len(candidates)} rows take {tensor_bytes} bytes, more than a message may hold ({self._max_tensor_bytes}): "
                "send fewer rows at a time",
                reason="MESSAGE_TOO_LARGE",
            )
        watch.resolved = watch.stamp()
        return Question(
            route=route,
            arm=choice.arm,
            request=request,
            ids=ids,
            subject=subject,
            candidates=candidates,
            rows=rows,
            inline={tensor.name: tensor for tensor in request.inline_features},
            outputs=outputs,
            request_id=request_id,
            tenant=call.tenant,
            caller=call.caller,
            scopes=call.scopes,
            metadata=call.metadata,
            deadline=call.deadline.at_most(route.timeout_s),
            watch=watch,
            reasons=[*choice.reasons],
            assignments=choice.assignments,
            unit=choice.unit,
            trail=trail,
            revision=table.revision,
        )


def _request_id(request: pb.RankRequest | pb.PredictRequest, call: Call) -> str:
    return request.request_id or call.request_id or uuid.uuid4().hex


def _choose(
    request: pb.RankRequest | pb.PredictRequest,
    call: Call,
    route: ServingRoute,
    subject: Id | None,
    rows: int,
    top_k: int,
    request_id: str,
    ready: Ready,
    trail: Trail | None,
) -> Choice:
    """A route without rules and experiments pays for none."""
    if route.plain:
        unit = request_id if subject is None else subject
        arm = route.assign(unit)
        return give_way(route, unit, Choice(arm=arm, assignments=route.by_weight.get(arm.name, ()), unit=unit), ready, trail)
    facts = Facts(
        tenant=call.tenant,
        metadata=call.metadata,
        labels=request.labels,
        candidates=rows,
        top_k=top_k,
        request_features=request.request_features,
        subject=subject,
        request_id=request_id,
    )
    return give_way(route, facts.unit(route.sticky), choose(route, facts, trail), ready, trail)
