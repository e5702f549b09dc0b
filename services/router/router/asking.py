"""From a message to a question: validation with every violation told at once, and the choice of the variant."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.errors import ResourceExhausted
from plait.rpc.call import Call
from router.question import Question
from router.route_table import Arm, RouteTable, ServingRoute
from router.stopwatch import Stopwatch
from router.validation import Findings, Ids, check_predict, check_predict_fits, check_rank, check_rank_fits


class Asking:
    """Makes questions. `max_tensor_bytes` bounds the tensors of one request: what a message may hold."""

    def __init__(self, max_tensor_bytes: int) -> None:
        self._max_tensor_bytes = max_tensor_bytes

    def rank(self, request: pb.RankRequest, table: RouteTable, call: Call, watch: Stopwatch) -> Question:
        """Return the question of a Rank. Raises as `RouteTable.find`; InvalidArgument with every violation."""
        found = Findings()
        subject, candidates = check_rank(request, found)
        route = table.find(request.route, call.tenant)
        arm = route.assign(subject)
        check_rank_fits(request, route, arm, candidates, found)
        found.raise_if_any()
        ids = {route.subject: request.subject, route.candidate: request.candidates}
        return self._question(request, call, table, route, arm, ids, candidates, len(candidates), (route.score,), watch)

    def predict(self, request: pb.PredictRequest, table: RouteTable, call: Call, watch: Stopwatch) -> Question:
        """Return the question of a Predict; raises as `rank`."""
        found = Findings()
        rows = check_predict(request, found)
        route = table.find(request.route, call.tenant)
        subject = rows.get(route.subject, ())
        arm = route.assign(subject[0] if len(subject) == 1 else request.request_id or uuid.uuid4().hex)
        check_predict_fits(request, route, arm, rows, found)
        found.raise_if_any()
        ids = {entity.entity_type: entity.ids for entity in request.entities}
        most = max(map(len, rows.values()), default=0)
        return self._question(request, call, table, route, arm, ids, rows.get(route.candidate, ()), most, request.outputs, watch)

    def _question(
        self,
        request: pb.RankRequest | pb.PredictRequest,
        call: Call,
        table: RouteTable,
        route: ServingRoute,
        arm: Arm,
        ids: Mapping[str, types_pb2.EntityIds],
        candidates: Ids,
        rows: int,
        outputs: Sequence[str],
        watch: Stopwatch,
    ) -> Question:
        tensor_bytes = arm.input_bytes(len(candidates))
        if tensor_bytes > self._max_tensor_bytes:
            raise ResourceExhausted(
                f"the features of {len(candidates)} rows take {tensor_bytes} bytes, more than a message may hold ({self._max_tensor_bytes}): "
                "send fewer rows at a time",
                reason="MESSAGE_TOO_LARGE",
            )
        watch.resolved = watch.stamp()
        return Question(
            route=route,
            arm=arm,
            request=request,
            ids=ids,
            candidates=candidates,
            rows=rows,
            inline={tensor.name: tensor for tensor in request.inline_features},
            outputs=outputs,
            request_id=request.request_id or call.request_id or uuid.uuid4().hex,
            tenant=call.tenant,
            deadline=call.deadline.at_most(route.timeout_s),
            watch=watch,
            revision=table.revision,
        )
