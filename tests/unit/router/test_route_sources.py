"""Only what changed is compiled anew, and what comes out is what a fresh start would give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.router_world import route, snapshot

from plait.registry.policies import Buckets, ExperimentArm, Tier
from plait.registry.records import Experiment, Model, Snapshot, Variant
from router.route_table import compile_table

NAMES = ("a", "b", "c")
LADDER = (Tier(tier="popularity", feature="item-view:f0"),)


def world() -> Snapshot:
    first = snapshot(*(route(name, ladder=LADDER) for name in NAMES))
    other = replace(first.models["ranker"], name="other")
    return replace(first, models={**first.models, "other": other}, routes={**first.routes, "d": route("d", variants=variants("other"))})


def variants(model: str, use: str = "1") -> tuple[Variant, ...]:
    return (Variant(name="main", model=model, use=use),)


def changed(now: Snapshot, kind: str, name: str, n: int) -> Snapshot:  # noqa: PLR0911  (one line for each kind of change)
    """The snapshot after one change; what is not touched stays the same object, as with the watcher."""
    match kind:
        case "route":
            return replace(now, routes={**now.routes, name: replace(now.routes[name], timeout_s=1.0 + n)})
        case "remove":
            return replace(now, routes={other: r for other, r in now.routes.items() if other != name or name == "a"})
        case "broken":
            return replace(now, routes={**now.routes, name: route(name, variants=variants("ranker", "broken" if n % 2 else "2"))})
        case "alias":
            return replace(now, models={**now.models, "other": with_champion(now.models["other"], "1" if n % 2 else "2")})
        case "view":
            view = now.feature_views["item-view"]
            features = (replace(view.features[0], default=float(n)), *view.features[1:])
            return replace(now, feature_views={**now.feature_views, "item-view": replace(view, features=features)})
        case "gone":
            return replace(now, feature_views={k: v for k, v in now.feature_views.items() if k != "user-view" or n % 2})
        case _:
            arms = (ExperimentArm(variant="main"),)
            made = Experiment(name=f"x-{name}", route=name, arms=arms, layer=name, buckets=Buckets(count=1 + n))
            return replace(now, experiments={**now.experiments, made.name: made})


def with_champion(model: Model, version: str) -> Model:
    return replace(model, aliases={**model.aliases, "champion": version})


CHANGES = st.tuples(
    st.sampled_from(["route", "remove", "broken", "alias", "view", "gone", "experiment"]), st.sampled_from(NAMES), st.integers(0, 5)
)


@given(st.lists(CHANGES, max_size=12))
def test_a_table_that_followed_every_change_is_the_table_of_a_fresh_start(changes: list[tuple[str, str, int]]) -> None:
    now = world()
    table = compile_table(now)
    for kind, name, n in changes:
        if name not in now.routes:
            continue
        now = replace(changed(now, kind, name, n), revision=now.revision + 1)
        table = compile_table(now, table)
        fresh = compile_table(now)
        assert dict(table.routes) == dict(fresh.routes)
        assert table.revision == fresh.revision


def kept(before: Snapshot, after: Snapshot) -> set[str]:
    first = compile_table(before)
    second = compile_table(after, first)
    return {name for name, found in second.routes.items() if found is first.routes.get(name)}


def test_a_change_of_one_route_makes_one_anew() -> None:
    start = world()
    assert kept(start, replace(start, revision=9)) == {"a", "b", "c", "d"}
    assert kept(start, changed(start, "route", "b", 3)) == {"a", "c", "d"}
    assert kept(start, changed(start, "experiment", "b", 3)) == {"a", "c", "d"}
    assert kept(start, changed(start, "alias", "b", 1)) == {"a", "b", "c"}
    assert kept(start, changed(start, "view", "b", 3)) == set()


def test_a_route_that_cannot_serve_is_looked_at_again() -> None:
    broken: Any = changed(world(), "broken", "b", 1)
    assert kept(broken, replace(broken, revision=9)) == {"a", "c", "d"}
