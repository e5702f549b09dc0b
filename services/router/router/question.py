"""What one request is, once it was found good: made in `asking`, answered by its route's road."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.api.router.v1 import explanation_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.registry.entity_ids import Id
from plait.rpc.deadline import Deadline
from router.route_table import Arm, ServingRoute
from router.rules import Metadata
from router.stopwatch import Stopwatch
from router.trail import Trail
from router.validation import Ids

if TYPE_CHECKING:
    from plait.api.inference.v2 import inference_pb2

TIER_FULL = "full"
TIER_POPULARITY = "popularity"  # no model answered


@dataclass(slots=True, kw_only=True)  # (frozen would triple the cost of making one)
class Question:
    """What to read, what to run, for whom, and in whose time.

    `subject` is the one id it is about, if there is one. `candidates` are the ids of the route's candidate type, in the caller's order;
    `rows` says how many rows the model gets. `ids` holds the ids of every entity type as they came. `metadata` and `scopes` are the call's,
    `revision` is the registry's. `assignments`: what the experiments, or the weights, made of its `unit`. What the road learns on its way stands
    here too: `tier`, `reasons` why the answer is not the best possible, `by_rule` how many candidates each business rule dropped, boosted or held
    back, the `features` that were read (for the inputs of `features_for`), the `trail` of an Explain, and `scored`, the last answer of a worker,
    which says what it took.
    """

    route: ServingRoute
    arm: Arm
    request: pb.RankRequest | pb.PredictRequest
    ids: Mapping[str, types_pb2.EntityIds]
    subject: Id | None
    candidates: Ids
    rows: int
    inline: Mapping[str, types_pb2.Tensor]
    outputs: Sequence[str]
    request_id: str
    tenant: str
    caller: str
    scopes: frozenset[str]
    metadata: Metadata
    deadline: Deadline
    watch: Stopwatch
    revision: int
    tier: str = TIER_FULL
    reasons: list[str] = field(default_factory=list)
    by_rule: Mapping[str, int] = field(default_factory=dict)
    assignments: Sequence[explanation_pb2.Assignment] = ()
    unit: Id | None = None
    features: features_pb.GetFeaturesResponse | None = None
    features_for: Arm | None = None
    trail: Trail | None = None
    scored: inference_pb2.ModelInferResponse | None = None

    def suits(self, arm: Arm) -> bool:
        """Whether another variant can answer this request at all: it was checked against the one that was chosen for it."""
        meant = {item.name: item.spec for item in self.arm.inputs}
        for item in arm.inputs:
            if item.name in self.inline:
                if meant.get(item.name) != item.spec:
                    return False
            elif any(entity not in self.ids for entity in item.entities):
                return False
        return all(name in arm.outputs for name in self.outputs)


Response = pb.RankResponse | pb.PredictResponse
Road = Callable[[Question], Awaitable[Response]]
