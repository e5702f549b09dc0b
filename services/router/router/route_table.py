"""What each route means under one snapshot, worked out once: variants, versions, inputs, feature sets, kinds of ids.

Pure: a snapshot in, an immutable table out. A route that cannot serve becomes an entry that says why, and hurts no other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

import numpy as np

from plait.api.router.v1 import explanation_pb2
from plait.api.types.v1 import types_pb2
from plait.dtypes import BY_NAME
from plait.errors import FailedPrecondition, NotFound, PermissionDenied
from plait.registry.crosschecks import misfits, retriever, rules_of
from plait.registry.entity_ids import Id
from plait.registry.places import Place, place_of
from plait.registry.policies import CachePolicy, Comparison, Hedge, Stages
from plait.registry.records import EMPTY, Entity, Experiment, FeatureSet, Route, Signature, Snapshot, TensorSpec, Variant
from plait.registry.rule_columns import columns_named
from plait.registry.shapes import SetShape
from router.experiments import ServingExperiment, assign, compile_experiments
from router.reranking import Cap, Test
from router.route_sources import Reading, Sources
from router.rules import ServingRule, compile_condition

_POLICIES: Final = {
    "fail": types_pb2.MISSING_POLICY_FAIL,
    "default": types_pb2.MISSING_POLICY_DEFAULT,
    "stale_ok": types_pb2.MISSING_POLICY_STALE_OK,
}
NO_BUCKET: Final = -1  # of a unit that the weights of the route assigned
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
    `view_versions`: which version of each view it reads.
    """

    name: str
    weight: float
    model: str
    version: str
    feature_set: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    keys: Mapping[str, Entity | None]
    view_versions: Mapping[str, int]

    def input_bytes(self, rows: int) -> int:
        """Return how many bytes the tensors of `rows` candidates take."""
        return sum(i.item_bytes * math.prod(i.spec.shape[1:]) * (rows if i.per_row else 1) for i in self.inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingStages:
    """The cascade around a route's model.

    `retriever` gives candidates, by its output `output`, at most `limit`; None where callers give them. `rules_set` is the feature set whose
    input `rules_input` [candidates, columns] of `rules_dtype` the filters, boosts and caps look at, `rules_entities` whose ids it takes; empty
    where there is none. `rules_sent` and `retriever_sent`: the request-time features that each knows.
    """

    retriever: Arm | None = None
    output: str = ""
    limit: int = 0
    retriever_sent: frozenset[str] = frozenset()
    rules_set: str = ""
    rules_input: str = ""
    rules_dtype: str = ""
    rules_entities: tuple[str, ...] = ()
    rules_sent: frozenset[str] = frozenset()
    filters: tuple[Test, ...] = ()
    boosts: tuple[Test, ...] = ()
    caps: tuple[Cap, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Popularity:
    """Where the popularity of candidates is read: an input of one of the route's variants, and the place in it."""

    arm: Arm
    input: Input
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One tier of a ladder: a lighter `arm`, known scores of at most `max_age_s`, or `popularity`; none of them is the route's own variant."""

    tier: str
    arm: Arm | None = None
    popularity: Popularity | None = None
    max_age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingShadow:
    """A variant that sees a share of the requests, and whose answers nobody does."""

    arm: Arm
    share: float
    max_in_flight: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRoute:
    """A route as requests meet it. `by_name` holds the variants that can serve; where none of them has a weight, `fault` says why.

    `policy` and `max_defaulted_share` are as in GetFeaturesRequest. `attempts` and `hedge` say how models are called. `by_weight` is what an answer says of a unit that weights assigned,
    where there is more than one to choose from.
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
    required_views: frozenset[str]
    tenants: frozenset[str]
    by_name: Mapping[str, Arm]
    cache: CachePolicy | None
    repeat_window_s: float
    weighted: tuple[Arm, ...]
    by_weight: Mapping[str, tuple[explanation_pb2.Assignment, ...]]
    sticky: str
    rules: tuple[ServingRule, ...]
    experiments: tuple[ServingExperiment, ...]
    ladder: tuple[Rung, ...]
    shadows: tuple[ServingShadow, ...]
    fault: Fault | None = None
    left_out: Mapping[str, Fault] = field(default_factory=dict)
    stages: ServingStages | None = None

    @property
    def takes_defaults(self) -> bool:
        """Whether defaults may stand in for every feature of an answer."""
        return self.policy != types_pb2.MISSING_POLICY_FAIL and self.max_defaulted_share == 0 and not self.required_views

    @property
    def plain(self) -> bool:
        """Whether nothing of a request but its subject says which variant it gets."""
        return not self.rules and not self.experiments and self.sticky == "subject"

    def assign(self, unit: Id) -> Arm:
        """Return the unit's variant, by weight, among those that can serve."""
        return assign(self.name, unit, self.weighted)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """All routes of one snapshot, and what they were made of."""

    revision: int
    routes: Mapping[str, ServingRoute]
    sources: Mapping[str, Sources]
    reading: Reading

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


def compile_table(snapshot: Snapshot, before: RouteTable | None = None) -> RouteTable:
    """Return the table of a snapshot. Routes of the table `before` of which nothing changed are taken over; one that cannot serve is not."""
    experiments: dict[str, list[Experiment]] = defaultdict(list)
    for experiment in snapshot.experiments.values():
        experiments[experiment.route].append(experiment)
    reading = Reading(snapshot, None if before is None else before.reading)
    sources = {name: reading.sources(route, experiments[name]) for name, route in snapshot.routes.items()}
    kept = {} if before is None else {name: before.routes[name] for name, found in sources.items() if before.sources.get(name) == found}
    routes = {
        name: kept[name]
        if name in kept and not kept[name].left_out and kept[name].fault is None
        else _route(route, experiments[name], snapshot)
        for name, route in snapshot.routes.items()
    }
    return RouteTable(revision=snapshot.revision, routes=MappingProxyType(routes), sources=sources, reading=reading)


def _route(route: Route, experiments: Sequence[Experiment], snapshot: Snapshot) -> ServingRoute:
    arms: list[Arm] = []
    left_out: dict[str, Fault] = {}
    for variant in route.variants:
        made = _arm(route, variant, snapshot)
        if isinstance(made, Fault):
            left_out[variant.name] = made
        else:
            arms.append(made)
    share = route.max_defaulted_share
    by_name = {arm.name: arm for arm in arms}
    weighted = tuple(arm for arm in arms if arm.weight > 0)
    stages = None if route.stages is None else _stages(route, route.stages, snapshot)
    fault = stages if isinstance(stages, Fault) else None if weighted else _fault_of_all(route, left_out)
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
        required_views=frozenset(route.required_views),
        tenants=frozenset(route.tenants),
        by_name=MappingProxyType(by_name),
        cache=route.cache,
        repeat_window_s=route.repeat_window_s,
        weighted=weighted,
        by_weight=MappingProxyType(_by_weight(weighted)),
        sticky=route.sticky,
        rules=tuple(ServingRule(name=rule.name, variant=rule.variant, tests=compile_condition(rule.when)) for rule in route.rules),
        experiments=compile_experiments(experiments),
        ladder=tuple(_ladder(route, weighted or arms, by_name, snapshot)),
        shadows=tuple(
            ServingShadow(arm=by_name[shadow.variant], share=shadow.share, max_in_flight=shadow.max_in_flight, timeout_s=shadow.timeout_s)
            for shadow in route.shadow
            if shadow.variant in by_name
        ),
        fault=fault,
        left_out=MappingProxyType(left_out),
        stages=None if isinstance(stages, Fault) else stages,
    )


def _ladder(route: Route, arms: Sequence[Arm], by_name: Mapping[str, Arm], snapshot: Snapshot) -> Iterator[Rung]:
    """A rung whose variant cannot serve is left out, as the variant is."""
    for tier in route.ladder:
        if tier.tier == "light" and tier.variant in by_name:
            yield Rung(tier=tier.tier, arm=by_name[tier.variant])
        elif tier.tier == "cached":
            yield Rung(tier=tier.tier, max_age_s=tier.max_age_s)
        elif tier.tier == "popularity":
            found = next((p for arm in arms if (p := _popularity(tier.feature, route, arm, snapshot)) is not None), None)
            if found is not None:
                yield Rung(tier=tier.tier, popularity=found)


def _popularity(feature: str, route: Route, arm: Arm, snapshot: Snapshot) -> Popularity | None:
    feature_set = snapshot.feature_sets[arm.feature_set]
    place = place_of(feature, route.candidate, feature_set, SetShape(feature_set, snapshot.feature_views))
    item = None if place is None else next((item for item in arm.inputs if item.name == place.name), None)
    return None if place is None or item is None else Popularity(arm=arm, input=item, place=place)


def _by_weight(arms: Sequence[Arm]) -> dict[str, tuple[explanation_pb2.Assignment, ...]]:
    if len(arms) == 1:
        return {}  # nobody was assigned anything
    return {arm.name: (explanation_pb2.Assignment(variant=arm.name, bucket=NO_BUCKET),) for arm in arms}


def _fault_of_all(route: Route, left_out: Mapping[str, Fault]) -> Fault:
    if not left_out:
        return Fault(reason="ROUTE_EMPTY", message=f"route {route.name!r} has no variant with a weight: give it one and apply it again")
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
    return _made(variant, version.version, version.signature, snapshot)


def _made(variant: Variant, version: str, signature: Signature, snapshot: Snapshot) -> Arm:
    feature_set = snapshot.feature_sets[signature.feature_set]
    shape = SetShape(feature_set, snapshot.feature_views)
    return Arm(
        name=variant.name,
        weight=variant.weight,
        model=variant.model,
        version=version,
        feature_set=signature.feature_set,
        inputs=_inputs(signature, feature_set, shape),
        outputs=tuple(tensor.name for tensor in signature.outputs),
        keys=_keys(feature_set, shape),
        view_versions=MappingProxyType({view.name: view.version for item in feature_set.inputs for view in shape.views_of(item)}),
    )


def _stages(route: Route, stages: Stages, snapshot: Snapshot) -> ServingStages | Fault:
    made = ServingStages()
    if stages.retrieve is not None:
        found = retriever(route, stages.retrieve, snapshot)
        if isinstance(found, str) or found.signature is None:
            return Fault(reason="SIGNATURE_MISMATCH", message=f"route {route.name!r} cannot retrieve candidates: {found}")
        arm = _made(Variant(name="retrieve", model=stages.retrieve.model, use=""), found.version, found.signature, snapshot)
        sent = _sent(snapshot.feature_sets[arm.feature_set])
        made = replace(made, retriever=arm, output=stages.retrieve.output, limit=stages.retrieve.limit, retriever_sent=sent)
    if not stages.rules:
        return made
    columns = rules_of(route, snapshot)
    if isinstance(columns, str) or any(column not in columns.places for _, column in columns_named(stages)):
        why = columns if isinstance(columns, str) else f"feature set {stages.rules!r} lacks a column that they look at"
        return Fault(reason="RULES_MISFIT", message=f"route {route.name!r} cannot apply its rules: {why}: change the set, or the route")
    rules = snapshot.feature_sets[stages.rules]
    shape = SetShape(rules, snapshot.feature_views)
    return replace(
        made,
        rules_set=stages.rules,
        rules_input=columns.item.name,
        rules_dtype=BY_NAME[columns.item.dtype].numpy,
        rules_entities=shape.entities_of(columns.item),
        rules_sent=_sent(rules),
        filters=tuple(_test(entry, columns.places) for entry in stages.filter),
        boosts=tuple(_test(entry, columns.places) for entry in stages.boost),
        caps=tuple(Cap(name=c.name, place=columns.places[c.column], at_most=c.at_most, within=c.within) for c in stages.diversity),
    )


def _sent(feature_set: FeatureSet) -> frozenset[str]:
    return frozenset(feature.name for feature in feature_set.request)


def _test(entry: Comparison, places: Mapping[str, int]) -> Test:
    low, high = (entry.at_least, entry.at_most) if entry.equals is None else (entry.equals, entry.equals)
    return Test(
        name=entry.name,
        place=places[entry.column],
        at_least=-math.inf if low is None else low,
        at_most=math.inf if high is None else high,
        multiply=entry.multiply,
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
