"""What one request is, once it was found good: made in `asking`, answered by its route's road."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.rpc.deadline import Deadline
from router.route_table import Arm, ServingRoute
from router.stopwatch import Stopwatch
from router.validation import Ids

if TYPE_CHECKING:
    from plait.api.inference.v2 import inference_pb2

TIER_FULL = "full"


@dataclass(slots=True, kw_only=True)  # (frozen would triple the cost of making one)
class Question:
    """What to read, what to run, for whom, and in whose time.

    `candidates` are the ids of the route's candidate type, in the caller's order; `rows` says how many rows the model gets. `ids` holds the
    ids of every entity type as they came. What the road learns on its way stands here too: `tier`, and `reasons` why the answer is not the
    best possible, and `scored`, a worker's last answer, which says what it took.
    """

    route: ServingRoute
    arm: Arm
    request: pb.RankRequest | pb.PredictRequest
    ids: Mapping[str, types_pb2.EntityIds]
    candidates: Ids
    rows: int
    inline: Mapping[str, types_pb2.Tensor]
    outputs: Sequence[str]
    request_id: str
    tenant: str
    deadline: Deadline
    watch: Stopwatch
    tier: str = TIER_FULL
    reasons: list[str] = field(default_factory=list)
    scored: inference_pb2.ModelInferResponse | None = None


Response = pb.RankResponse | pb.PredictResponse
Road = Callable[[Question], Awaitable[Response]]
