"""What rules and experiments name is there, and experiments of a layer share nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.fakes.router_world import route, snapshot

from plait.registry.crosschecks import check, users_of
from plait.registry.policies import Buckets, Condition, ExperimentArm, Range, Rule, Tier
from plait.registry.records import Experiment, RequestFeature, Snapshot, Tenant


def experiment(name: str = "x", **fields: Any) -> Experiment:
    return Experiment(**{"name": name, "route": "home", "arms": (ExperimentArm(variant="main"),), **fields})


def world(*experiments: Experiment, **fields: Any) -> Snapshot:
    return replace(snapshot(route(**fields)), experiments={e.name: e for e in experiments})


def ruled(**condition: Any) -> Snapshot:
    return world(rules=(Rule(name="r", variant="main", when=Condition(**condition)),))


def problems(found: Snapshot) -> list[tuple[str, str]]:
    return [(f"{p.where} {p.field}", p.message) for p in check(found) if p.where.startswith(("Route", "Experiment"))]


def test_what_fits_has_no_problems() -> None:
    first, second = experiment("a", buckets=Buckets(count=5000)), experiment("b", buckets=Buckets(first=5000, count=5000))
    others = experiment("c", layer="other", unit="tenant"), experiment("d", status="draft"), experiment("e", status="stopped")
    assert problems(world(first, second, *others)) == []
    assert problems(world(ladder=(Tier(tier="popularity", feature="item-view:f0"),))) == []


@pytest.mark.parametrize(
    ("registry", "where", "phrase"),
    [
        (world(experiment(route="hom")), "Experiment x spec.route", "did you mean 'home'"),
        (world(experiment(arms=(ExperimentArm(variant="gone"),))), "Experiment x spec.arms[0].variant", "it has main"),
        (world(experiment(when=Condition(tenants=("sho",)))), "Experiment x spec.when.tenants[0]", "no tenant 'sho'"),
        (world(experiment(), experiment("y", buckets=Buckets(first=9_999, count=1))), "Experiment x spec.buckets", "9999 to 9999"),
        (world(experiment(), experiment("y", unit="tenant")), "Experiment y spec.unit", "deals by subject"),
        (world(ladder=(Tier(tier="popularity", feature="item-view:f9"),)), "Route home spec.ladder[0].feature", "reads 'item-view:f9'"),
        (world(ladder=(Tier(tier="popularity", feature="user-view:f0"),)), "Route home spec.ladder[0].feature", "one number of 'item'"),
        (world(required_views=("item-vew",)), "Route home spec.required_views[0]", "did you mean 'item-view'"),
        (ruled(tenants=("nobody",)), "Route home spec.rules[0].when.tenants[0]", "no tenant"),
        (ruled(request_features={"hour": Range(at_least=1)}), "Route home spec.rules[0].when.request_features.hour", "declares it"),
    ],
)
def test_what_does_not_fit_is_told_where_it_is(registry: Snapshot, where: str, phrase: str) -> None:
    found = dict(problems(registry))
    assert phrase in found[where]


def test_a_request_feature_that_is_declared_may_be_looked_at() -> None:
    registry = ruled(request_features={"hour": Range(at_least=1)})
    one = replace(registry.feature_sets["ranker"], request=(RequestFeature(name="hour"),))
    assert problems(replace(registry, feature_sets={"ranker": one})) == []
    many = replace(one, request=(RequestFeature(name="hour", entity="item"),))
    assert len(problems(replace(registry, feature_sets={"ranker": many}))) == 1


def test_a_route_is_kept_by_its_experiments_and_a_tenant_by_the_conditions_that_name_it() -> None:
    named = Condition(tenants=("shop",))
    registry = world(experiment(when=named), rules=(Rule(name="r", variant="main", when=named),))
    assert users_of(registry, ("Route", "home")) == ("Experiment x",)
    alone = replace(registry, keys={}, tenants={"shop": Tenant(name="shop")})
    assert users_of(alone, ("Tenant", "shop")) == ("Route home", "Experiment x")
