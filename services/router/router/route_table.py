"""What each route means under one snapshot, worked out once: variants, versions, inputs, feature sets, kinds of ids.

Pure: a snapshot in, an immutable table out. A route that cannot serve becomes an entry that says why, and hurts no other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np

from plait.api.types.v1 import types_pb2
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, NotFound, PermissionDenied
from plait.registry.crosschecks import misfits
from plait.registry.entity_ids import Id
from plait.registry.policies import Hedge
from plait.registry.records import EMPTY, Entity, FeatureSet, Route, Signature, Snapshot, TensorSpec, Variant
from plait.registry.shapes import SetShape
from router.experiments import assign

_POLICIES: Final = {
    "fail": types_pb2.MISSING_POLICY_FAIL,
    "default": types_pb2.MISSING_POLICY_DEFAULT,
    "stale_ok": types_pb2.MISSING_POLICY_STALE_OK,
}
_NO_DEFAULTS: Final = 1e-9  # on the wire 0 means "no bound"; this is less than one row in any request


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a variant, or a whole route, cannot serve; `reason` is the ErrorInfo reason of the FAILED_PRECONDITION it answers."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a model: its tensor, the entity type its features are about, and how its dtype is called on both wires.

    `views`: the feature views it comes from, and the entity type of each. `entities`: the types whose ids it takes to read it, its own
    first; a transform may read others' features. `default_row`: one row of defaults, in the bytes of its dtype.
    """

    name: str
    spec: TensorSpec
    entity: str
    number: int
    oip: str
    item_bytes: int
    views: Mapping[str, str]
    entities: tuple[str, ...]
    default_row: bytes

    @property
    def per_row(self) -> bool:
        """Whether it grows with the candidates."""
        return self.spec.per == "row"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A variant that can serve: the model version it resolved to, and how to fill its inputs (in signature order).

    `keys`: how ids of each entity type of the feature set are typed, None where no view says so. `outputs`: names, in signature order.
    """

    name: str
    weight: float
    model: str
    version: str
    feature_set: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    keys: Mapping[str, Entity | None]

    def input_bytes(self, rows: int) -> int:
        """Return how many bytes the tensors of `rows` candidates take."""
        return sum(i.item_bytes * math.prod(i.spec.shape[1:]) * (rows if i.per_row else 1) for i in self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRoute:
    """A route as requests meet it. `arms` are the variants that can serve; where none has a weight, `fault` says why.

    `policy` and `max_defaulted_share` are as in GetFeaturesRequest. `attempts` and `hedge` say how its model is called.
    """

    name: str
    subject: str
    candidate: str
    score: str
    timeout_s: float
    attempts: int
    hedge: Hedge | None
    max_candidates: int
    policy: types_pb2.MissingPolicy.ValueType
    max_defaulted_share: float
    tenants: frozenset[str]
    arms: tuple[Arm, ...]
    weighted: tuple[Arm, ...]
    fault: Fault | None = None
    left_out: Mapping[str, Fault] = field(default_factory=dict)

    @property
    def takes_defaults(self) -> bool:
        """Whether defaults may stand in for every feature of an answer."""
        return self.policy != types_pb2.MISSING_POLICY_FAIL and self.max_defaulted_share == 0

    def assign(self, subject: Id) -> Arm:
        """Return the subject's variant among those that can serve."""
        return assign(self.name, subject, self.weighted)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """All routes of one snapshot."""

    revision: int
    routes: Mapping[str, ServingRoute]

    def __repr__(self) -> str:
        faulty = sum(route.fault is not None for route in self.routes.values())
        return f"<RouteTable revision={self.revision} routes={len(self.routes)} faulty={faulty}>"

    def find(self, name: str, tenant: str) -> ServingRoute:
        """Return the route for a tenant.

        Raises NotFound (ROUTE_NOT_FOUND), PermissionDenied (ROUTE_NOT_OPEN), and FailedPrecondition with the reason of its fault
        (SIGNATURE_MISMATCH, MODEL_NOT_FOUND) where it cannot serve.
        """
        route = self.routes.get(name)
        if route is None:
            raise NotFound(f"no route {name!r}: 'plait get routes' lists what there is", reason="ROUTE_NOT_FOUND")
        if route.tenants and tenant not in route.tenants:
            raise PermissionDenied(
                f"route {name!r} is not open to the tenant of your key: ask its owner to add the tenant", reason="ROUTE_NOT_OPEN"
            )
        if route.fault is not None:
            raise FailedPrecondition(route.fault.message, reason=route.fault.reason)
        return route


def compile_table(snapshot: Snapshot) -> RouteTable:
    """Return the table of a snapshot."""
    routes = {name: _route(route, snapshot) for name, route in snapshot.routes.items()}
    return RouteTable(revision=snapshot.revision, routes=MappingProxyType(routes))


def _route(route: Route, snapshot: Snapshot) -> ServingRoute:
    arms: list[Arm] = []
    left_out: dict[str, Fault] = {}
    for variant in route.variants:
        made = _arm(route, variant, snapshot)
        if isinstance(made, Fault):
            left_out[variant.name] = made
        else:
            arms.append(made)
    share = route.max_defaulted_share
    weighted = tuple(arm for arm in arms if arm.weight > 0)
    return ServingRoute(
        name=route.name,
        subject=route.subject,
        candidate=route.candidate,
        score=route.score,
        timeout_s=route.timeout_s,
        attempts=route.retry.attempts,
        hedge=route.hedge,
        max_candidates=route.max_candidates,
        policy=_POLICIES[route.on_missing],
        max_defaulted_share=0.0 if share >= 1 else max(share, _NO_DEFAULTS),
        tenants=frozenset(route.tenants),
        arms=tuple(arms),
        weighted=weighted,
        fault=None if weighted else _fault_of_all(route, left_out),
        left_out=MappingProxyType(left_out),
    )


def _fault_of_all(route: Route, left_out: Mapping[str, Fault]) -> Fault:
    if not left_out:
        return Fault(reason="ROUTE_EMPTY", message=f"route {route.name!r} has no variant: give it one and apply it again")
    variant, fault = next(iter(left_out.items()))
    more = f" (and {len(left_out) - 1} more variants cannot serve)" if len(left_out) > 1 else ""
    return Fault(reason=fault.reason, message=f"route {route.name!r} cannot serve: variant {variant!r}: {fault.message}{more}")


def _arm(route: Route, variant: Variant, snapshot: Snapshot) -> Arm | Fault:
    model = snapshot.models.get(variant.model)
    version = model.resolve(variant.use) if model else None
    if model is None or version is None:
        missing = f"model {variant.model!r} has no version or alias {variant.use!r}" if model else f"there is no model {variant.model!r}"
        return Fault(reason="MODEL_NOT_FOUND", message=f"{missing}: publish it, or change the route")
    problems = misfits(route, model, version, snapshot)
    if problems or version.signature is None:
        listed = "; ".join(problems)
        return Fault(reason="SIGNATURE_MISMATCH", message=f"{listed}: publish a version that fits, or change the feature set")
    feature_set = snapshot.feature_sets[version.signature.feature_set]
    shape = SetShape(feature_set, snapshot.feature_views)
    return Arm(
        name=variant.name,
        weight=variant.weight,
        model=model.name,
        version=version.version,
        feature_set=version.signature.feature_set,
        inputs=_inputs(version.signature, feature_set, shape),
        outputs=tuple(tensor.name for tensor in version.signature.outputs),
        keys=_keys(feature_set, shape),
    )


def _inputs(signature: Signature, feature_set: FeatureSet, shape: SetShape) -> tuple[Input, ...]:
    items = {item.name: item for item in feature_set.inputs}
    made = []
    for spec in signature.inputs:
        dtype, item = BY_NAME[spec.dtype], items[spec.name]
        # The very row that feature-retrieval puts where no value is known; what a transform of defaults would be is its default here.
        default_row = np.array(shape.default_columns(item)).astype(dtype.numpy).tobytes()
        made.append(
            Input(
                name=spec.name,
                spec=spec,
                entity=item.entity,
                number=dtype.number,
                oip=dtype.oip,
                item_bytes=dtype.size_bytes,
                views=MappingProxyType({view.name: view.entity.type for view in shape.views_of(item)}),
                entities=shape.entities_of(item),
                default_row=default_row,
            )
        )
    return tuple(made)


def _keys(feature_set: FeatureSet, shape: SetShape) -> Mapping[str, Entity | None]:
    keys: dict[str, Entity | None] = {item.entity: None for item in feature_set.inputs}
    for item in feature_set.inputs:
        for view in shape.views_of(item):
            keys[view.entity.type] = view.entity
    return MappingProxyType(keys)


NO_ROUTES: Final = compile_table(EMPTY)
