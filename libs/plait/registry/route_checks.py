"""Does what a route says beyond its variants, and what experiments say of it, fit the rest of the registry?

Pure: a record and its snapshot in, findings out. Where a part of the route does not hold by itself, `crosschecks` says so; here it is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

from plait.registry.explain import suggestion
from plait.registry.findings import Finding, Steps
from plait.registry.places import place_of
from plait.registry.policies import Condition
from plait.registry.records import Experiment, FeatureSet, Route, Snapshot, Variant
from plait.registry.shapes import SetShape


def check_route(route: Route, snapshot: Snapshot) -> Iterator[Finding]:
    """Yield what rules name and nobody knows."""
    for index, rule in enumerate(route.rules):
        yield from _condition(("rules", index, "when"), rule.when, route, snapshot)
    for index, view in enumerate(route.required_views):
        yield from _required(("required_views", index), view, route, snapshot)
    for index, tier in enumerate(route.ladder):
        if tier.tier == "popularity":
            yield from _popularity(("ladder", index, "feature"), tier.feature, route, snapshot)


def check_experiment(experiment: Experiment, snapshot: Snapshot) -> Iterator[Finding]:
    """Yield what keeps an experiment from being dealt: its route, its arms, and others of its layer."""
    route = snapshot.routes.get(experiment.route)
    if route is None:
        yield ("route",), f"there is no route {experiment.route!r}{suggestion(experiment.route, list(snapshot.routes))}"
    else:
        known = [variant.name for variant in route.variants]
        for index, arm in enumerate(experiment.arms):
            if arm.variant not in known:
                yield ("arms", index, "variant"), f"route {route.name!r} has no variant {arm.variant!r}; it has {', '.join(known[:10])}"
        yield from _condition(("when",), experiment.when, route, snapshot)
    if experiment.status == "running":
        yield from _layer(experiment, snapshot)


def feature_set_of(variant: Variant, snapshot: Snapshot) -> FeatureSet | None:
    """Return the feature set that feeds a variant, None where there is none (yet)."""
    model = snapshot.models.get(variant.model)
    version = model.resolve(variant.use) if model is not None else None
    if version is None or version.signature is None:
        return None
    return snapshot.feature_sets.get(version.signature.feature_set)


def _required(at: Steps, view: str, route: Route, snapshot: Snapshot) -> Iterator[Finding]:
    """Required of a variant that does not read it, it would be ignored."""
    for variant in route.variants:
        feature_set = feature_set_of(variant, snapshot)
        if variant.weight > 0 and feature_set is not None:
            shape = SetShape(feature_set, snapshot.feature_views)
            read = {v.name for item in feature_set.inputs for v in shape.views_of(item)}
            if view not in read:
                yield at, f"variant {variant.name!r} does not read feature view {view!r}{suggestion(view, sorted(read))}"


def _popularity(at: Steps, feature: str, route: Route, snapshot: Snapshot) -> Iterator[Finding]:
    """A variant that gets requests by weight has to read it, as one number of the candidates: what was read for it is ordered by."""
    found = [feature_set_of(variant, snapshot) for variant in route.variants if variant.weight > 0]
    for feature_set in found:
        if feature_set is None:
            return  # told elsewhere
        if place_of(feature, route.candidate, feature_set, SetShape(feature_set, snapshot.feature_views)) is not None:
            return
    yield at, f"no variant with a weight reads {feature!r} as one number of {route.candidate!r}: add it to the feature set, or take another"


def _layer(experiment: Experiment, snapshot: Snapshot) -> Iterator[Finding]:
    """One unit is in at most one experiment of a layer: so they look at the same unit, and share no bucket."""
    mine = experiment.buckets
    for other in snapshot.experiments.values():
        if other.name == experiment.name or other.layer != experiment.layer or other.status != "running":
            continue
        theirs = other.buckets
        if other.unit != experiment.unit:
            yield ("unit",), f"experiment {other.name!r} of the same layer deals by {other.unit}: take another layer, or the same unit"
        elif mine.first < theirs.first + theirs.count and theirs.first < mine.first + mine.count:
            last = theirs.first + theirs.count - 1
            message = (
                f"overlap {theirs.first} to {last} of experiment {other.name!r} in layer {other.layer!r}: take others, or another layer"
            )
            yield ("buckets",), message


def _condition(at: Steps, given: Condition, route: Route, snapshot: Snapshot) -> Iterator[Finding]:
    for index, tenant in enumerate(given.tenants):
        if tenant not in snapshot.tenants:
            yield (*at, "tenants", index), f"there is no tenant {tenant!r}{suggestion(tenant, list(snapshot.tenants))}"
    if not given.request_features:
        return
    found = [feature_set_of(variant, snapshot) for variant in route.variants]
    declared = {feature.name for feature_set in found if feature_set for feature in feature_set.request if not feature.entity}
    for name in given.request_features:
        if name not in declared and None not in found:
            listed = f"; there are {', '.join(sorted(declared)[:10])}" if declared else ""
            yield (*at, "request_features", name), f"no variant's feature set declares it as one number per request{listed}"
