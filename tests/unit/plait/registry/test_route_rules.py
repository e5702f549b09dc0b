from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from plait.registry import rules
from plait.registry.findings import Steps
from plait.registry.policies import (
    Buckets,
    CachePolicy,
    Comparison,
    Condition,
    Diversity,
    ExperimentArm,
    Hedge,
    Quota,
    Range,
    Retrieve,
    Retry,
    Rule,
    Shadow,
    Stages,
    Tier,
)
from plait.registry.records import Experiment, Route, Tenant, Variant

ROUTE = Route(
    name="home",
    variants=(Variant(name="main", model="m", use="1"), Variant(name="light", model="s", use="1", weight=0)),
    sticky="header:x-session",
    rules=(Rule(name="staff", variant="light", when=Condition(headers={"x-staff": ("1",)}, fields={"candidates": Range(at_most=10)})),),
    ladder=(Tier(tier="light", variant="light"), Tier(tier="cached", max_age_s=60), Tier(tier="popularity", feature="stats:views")),
    shadow=(Shadow(variant="light"),),
    cache=CachePolicy(ttl_s=5, stale_s=10, scores_ttl_s=60),
    repeat_window_s=30,
    retry=Retry(attempts=3),
    hedge=Hedge(),
    required_views=("stats",),
)
STAGED = dataclasses.replace(
    ROUTE,
    cache=CachePolicy(ttl_s=5),
    ladder=(Tier(tier="popularity", feature="stats:views"),),
    stages=Stages(
        retrieve=Retrieve(model="two-tower", use="champion"),
        rules="listing",
        filter=(Comparison(name="sold-out", column="sold", at_least=1),),
        boost=(Comparison(name="promoted", column="promoted", equals=1, multiply=1.2),),
        diversity=(Diversity(name="seller", column="seller", at_most=3, within=20),),
    ),
)
EXPERIMENT = Experiment(name="x", route="home", arms=(ExperimentArm(variant="main"), ExperimentArm(variant="light")), unit="label:shop")


def route(**fields: Any) -> Route:
    return dataclasses.replace(ROUTE, **fields)


def stages(**fields: Any) -> Route:
    assert STAGED.stages is not None
    return dataclasses.replace(STAGED, stages=dataclasses.replace(STAGED.stages, **fields))


def rule(**condition: Any) -> Route:
    return route(rules=(Rule(name="r", variant="main", when=Condition(**condition)),))


def experiment(**fields: Any) -> Experiment:
    return dataclasses.replace(EXPERIMENT, **fields)


def findings(record: Any) -> dict[Steps, str]:
    return dict(rules.check(record))


@pytest.mark.parametrize("record", [ROUTE, STAGED, EXPERIMENT, Tenant(name="t", weight=2, quota=Quota(requests_per_s=5, burst=10))])
def test_what_uses_everything_is_fine(record: Any) -> None:
    assert findings(record) == {}


@pytest.mark.parametrize(
    ("record", "steps", "phrase"),
    [
        (route(sticky="moon"), ("sticky",), "names nobody"),
        (route(sticky="header:"), ("sticky",), "names nobody"),
        (route(rules=(Rule(name="r", variant="gone"),)), ("rules", 0, "variant"), "no variant 'gone'"),
        (route(rules=ROUTE.rules * 2), ("rules", 1, "name"), "twice"),
        (rule(headers={"X-Staff": ("1",)}), ("rules", 0, "when", "headers", "X-Staff"), "lower case"),
        (rule(headers={"authorization": ("x",)}), ("rules", 0, "when", "headers", "authorization"), "a credential"),
        (rule(headers={"x-raw-bin": ("x",)}), ("rules", 0, "when", "headers", "x-raw-bin"), "or bytes"),
        (route(sticky="header:x-api-key"), ("sticky",), "neither a credential"),
        (route(sticky="header:X-Session"), ("sticky",), "lower case"),
        (rule(labels={"country": ()}), ("rules", 0, "when", "labels", "country"), "at least one value"),
        (rule(fields={"moon": Range(at_least=1)}), ("rules", 0, "when", "fields", "moon"), "no field"),
        (rule(fields={"top_k": Range()}), ("rules", 0, "when", "fields", "top_k"), "at_least, at_most or both"),
        (
            rule(request_features={"hour": Range(at_least=2, at_most=1)}),
            ("rules", 0, "when", "request_features", "hour"),
            "holds for nothing",
        ),
        (rule(tenants=("A B",)), ("rules", 0, "when", "tenants", 0), "not a name"),
        (route(ladder=tuple(reversed(ROUTE.ladder))), ("ladder", 1, "tier"), "the order is"),
        (route(ladder=(Tier(tier="light", variant="main", max_age_s=1),)), ("ladder", 0, "max_age_s"), "belongs to tier cached"),
        (route(ladder=(Tier(tier="light"),)), ("ladder", 0, "variant"), "no variant"),
        (route(ladder=(Tier(tier="popularity", feature="views"),)), ("ladder", 0, "feature"), "view:feature"),
        (route(cache=None), ("ladder", 1), "scores_ttl_s"),
        (route(shadow=(Shadow(variant="light", share=0),)), ("shadow", 0, "share"), "more than 0"),
        (route(cache=CachePolicy(stale_s=1, scores_ttl_s=1)), ("cache", "stale_s"), "without ttl_s"),
        (route(cache=CachePolicy(), ladder=()), ("cache",), "keeps nothing"),
        (route(stages=STAGED.stages), ("cache", "scores_ttl_s"), "with stages"),
        (route(retry=Retry(attempts=4)), ("retry", "attempts"), "at most 3"),
        (route(hedge=Hedge(share=0.9)), ("hedge", "share"), "at most 0.5"),
        (stages(rules=""), ("stages", "rules"), "is required"),
        (stages(filter=(), boost=(), diversity=()), ("stages", "rules"), "not looked at"),
        (stages(filter=(), boost=(), diversity=(), rules="", retrieve=None), ("stages",), "no stage"),
        (stages(retrieve=Retrieve(model="", use="1")), ("stages", "retrieve", "model"), "not a name"),
        (stages(filter=(Comparison(name="f", column="c"),)), ("stages", "filter", 0), "needs either equals"),
        (stages(filter=(Comparison(name="f", column="c", equals=1, at_most=2),)), ("stages", "filter", 0), "needs either equals"),
        (stages(filter=(Comparison(name="f", column="c", equals=1, multiply=2),)), ("stages", "filter", 0, "multiply"), "only drops"),
        (stages(diversity=(Diversity(name="d", column="c", at_most=5, within=3),)), ("stages", "diversity", 0, "within"), "at least 5"),
        (experiment(arms=()), ("arms",), "at least one arm"),
        (experiment(arms=(ExperimentArm(variant="main", weight=0),)), ("arms", 0, "weight"), "more than 0"),
        (experiment(buckets=Buckets(first=9_999, count=2)), ("buckets", "count"), "beyond the last"),
        (experiment(unit="x"), ("unit",), "names nobody"),
        (Tenant(name="t", weight=0), ("weight",), "more than 0"),
        (Tenant(name="t", quota=Quota(burst=1)), ("quota", "burst"), "without requests_per_s"),
    ],
)
def test_each_rule_points_at_its_field(record: Any, steps: Steps, phrase: str) -> None:
    assert phrase in findings(record)[steps]
