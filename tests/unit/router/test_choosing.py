"""Rules before experiments before weights; layers exclude; what cannot serve gives way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.router_world import route, snapshot
from tests.unit.router.test_rules import facts

from plait.registry.policies import Buckets, Condition, ExperimentArm, Rule
from plait.registry.records import Experiment, Variant
from router.choosing import NOT_READY, Choice, choose, give_way
from router.experiments import bucket_of
from router.route_table import ServingRoute, compile_table
from router.trail import Trail

VARIANTS = (
    Variant(name="main", model="ranker", use="1", weight=3),
    Variant(name="canary", model="ranker", use="2", weight=1),
    Variant(name="light", model="ranker", use="1", weight=0),
    Variant(name="gone", model="ranker", use="broken", weight=1),
)
STAFF = Rule(name="staff", variant="light", when=Condition(headers={"x-staff": ("1",)}))
GERMANS = Rule(name="germans", variant="canary", when=Condition(labels={"country": ("de",)}))


def experiment(name: str, **fields: Any) -> Experiment:
    arms = (ExperimentArm(variant="main"), ExperimentArm(variant="light"))
    return Experiment(**{"name": name, "route": "home", "arms": arms, **fields})


def serving(*experiments: Experiment, **fields: Any) -> ServingRoute:
    registry = snapshot(route(**{"variants": VARIANTS, **fields}))
    return compile_table(replace(registry, experiments={e.name: e for e in experiments})).routes["home"]


def names(choice: Choice) -> tuple[str, list[tuple[str, str, str, int]]]:
    return choice.arm.name, [(a.experiment, a.layer, a.variant, a.bucket) for a in choice.assignments]


def nobody(**fields: Any) -> Any:
    return facts(metadata=(), labels={}, **fields)


def test_the_first_rule_that_matches_decides() -> None:
    home = serving(experiment("x"), rules=(STAFF, GERMANS))
    assert names(choose(home, facts())) == ("light", [])
    assert names(choose(home, facts(metadata=()))) == ("canary", [])
    assert choose(home, nobody()).assignments[0].experiment == "x"
    trail = Trail()
    choose(home, facts(metadata=()), trail)
    assert [(r.rule, r.matched, r.failed_condition) for r in trail.rules] == [("staff", False, "headers.x-staff"), ("germans", True, "")]
    assert trail.not_in == {"x": "rule"}


def test_a_variant_that_cannot_serve_gives_way_to_the_weights_and_says_so() -> None:
    home = serving(rules=(Rule(name="all", variant="gone"),))
    choice = choose(home, facts())
    assert (choice.arm.name in {"main", "canary"}, choice.assignments, choice.reasons) == (True, (), ("variant_not_ready",))
    trail = Trail()
    choice = choose(serving(experiment("x", arms=(ExperimentArm(variant="gone"),))), facts(), trail)
    assert (choice.arm.name in {"main", "canary"}, choice.assignments, choice.reasons) == (True, (), ("variant_not_ready",))
    assert trail.not_in == {"x": "not_ready"}


def test_weights_say_what_they_assigned_where_there_is_a_choice() -> None:
    home = serving()
    arm = home.assign("u1").name
    assert names(choose(home, facts())) == (arm, [("", "", arm, -1)])
    assert names(choose(serving(variants=VARIANTS[2:3] + VARIANTS[:1]), facts())) == ("main", [])


@pytest.mark.parametrize("sticky", ["subject", "tenant", "label:country", "header:x-staff"])
def test_a_unit_stays_whatever_else_changes(sticky: str) -> None:
    home = serving(sticky=sticky)
    wanted: dict[str, Any] = {"subject": {"subject": "s"}, "tenant": {"tenant": "t"}}.get(sticky, {})
    for n in range(20):
        wanted = {**wanted, "labels": {"country": f"c{n}"}, "metadata": (("x-staff", f"h{n}"),)} if ":" in sticky else wanted
        seen = {choose(home, facts(**{"request_id": f"r{m}", "candidates": m, **wanted})).arm.name for m in range(20)}
        assert len(seen) == 1


def test_without_a_unit_every_request_is_dealt_anew() -> None:
    home = serving(sticky="header:x-session")
    assert {choose(home, facts(request_id=f"r{n}")).arm.name for n in range(50)} == {"main", "canary"}


@given(cut=st.integers(1, 9_999), subjects=st.lists(st.text(max_size=8) | st.integers(0, 1 << 40), min_size=1, max_size=30))
def test_a_unit_is_in_exactly_one_of_the_experiments_that_share_a_layer(cut: int, subjects: list[Any]) -> None:
    home = serving(experiment("a", buckets=Buckets(first=0, count=cut)), experiment("b", buckets=Buckets(first=cut, count=10_000 - cut)))
    for subject in subjects:
        trail = Trail()
        [assignment] = choose(home, facts(subject=subject), trail).assignments
        assert assignment.experiment == ("a" if bucket_of("default", subject) < cut else "b")
        assert trail.not_in == {"b" if assignment.experiment == "a" else "a": "layer"}


@given(count=st.integers(1, 10_000), grown=st.integers(1, 10_000), subject=st.text(max_size=8))
def test_a_range_that_grows_keeps_its_units_where_they_are(count: int, grown: int, subject: str) -> None:
    smaller, larger = sorted((count, grown))
    was = choose(serving(experiment("x", buckets=Buckets(count=smaller))), facts(subject=subject))
    now = choose(serving(experiment("x", buckets=Buckets(count=larger))), facts(subject=subject))
    if was.assignments[0].experiment:
        assert names(was) == names(now)


def test_the_experiment_of_the_first_layer_decides_and_the_other_is_told_it_did_not() -> None:
    home = serving(experiment("z", layer="a"), experiment("a", layer="b"))
    trail = Trail()
    assert [a.experiment for a in choose(home, facts(), trail).assignments] == ["z"]
    assert trail.not_in == {"a": "layer"}
    assert names(choose(home, facts())) == names(choose(home, facts(), Trail()))


def test_who_does_not_meet_the_condition_is_not_in() -> None:
    home = serving(experiment("x", when=Condition(labels={"country": ("fr",)})))
    trail = Trail()
    assert choose(home, facts(), trail).assignments[0].experiment == ""
    assert trail.not_in == {"x": "condition"}


def test_only_running_experiments_of_the_route_take_part() -> None:
    home = serving(experiment("d", status="draft"), experiment("s", status="stopped"), experiment("o", route="other"))
    assert home.experiments == ()


def test_shares_are_the_weights_and_a_new_salt_deals_anew() -> None:
    arms = (ExperimentArm(variant="main", weight=3), ExperimentArm(variant="light", weight=1))
    first, again = serving(experiment("x", arms=arms)), serving(experiment("x", arms=arms, salt="again"))
    dealt = [(choose(first, facts(subject=n)).arm.name, choose(again, facts(subject=n)).arm.name) for n in range(4000)]
    assert Counter(a for a, _ in dealt)["main"] == pytest.approx(3000, abs=3 * (4000 * 0.75 * 0.25) ** 0.5)
    assert sum(a == b for a, b in dealt) == pytest.approx(4000 * (0.75**2 + 0.25**2), abs=150)


def test_layers_deal_independently_of_each_other() -> None:
    half = [n for n in range(4000) if bucket_of("a", n) < 5000]
    assert sum(bucket_of("b", n) < 5000 for n in half) == pytest.approx(len(half) / 2, abs=150)


def test_a_release_moves_no_unit() -> None:
    """Written down once: whoever changes these moves every unit of every running experiment."""
    assert [bucket_of("default", n) for n in range(4)] == [4829, 8477, 6469, 3848]
    assert [bucket_of("default", f"user-{n}") for n in range(4)] == [2020, 1078, 2283, 784]


def test_a_version_that_no_worker_holds_gives_way_to_one_that_is_held() -> None:
    home = serving(experiment("x"), rules=(STAFF, GERMANS))
    canary, taken = choose(home, facts(metadata=())), choose(home, nobody())
    assert give_way(home, "u1", canary, lambda *_: True) is canary
    moved = give_way(home, "u1", canary, lambda _, version: version == "1")
    assert (moved.arm.name, moved.assignments, moved.reasons) == ("main", (), (NOT_READY,))
    assert give_way(home, "u1", canary, lambda *_: False) is canary, "the call will say what is missing"
    trail = Trail()
    moved = give_way(home, "u1", taken, lambda _, version: version == "2", trail)
    assert (moved.arm.name, moved.assignments, trail.not_in) == ("canary", (), {"x": "not_ready"})


@given(st.lists(st.text(max_size=5), min_size=1, max_size=50))
def test_only_units_of_the_version_that_is_missing_move(units: list[str]) -> None:
    home = serving()
    for unit in units:
        meant = Choice(arm=home.assign(unit))
        moved = give_way(home, unit, meant, lambda _, version: version != "2")
        assert (moved is meant) == (meant.arm.name != "canary")
