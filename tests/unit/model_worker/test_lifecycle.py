"""Which versions are held, as tables."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_worker.lifecycle import NEVER, Entry, State, next_step, retry_after_s, wanted
from model_worker.memory import Claim, Need
from plait.errors import Internal
from plait.registry.records import Model, ModelVersion, Route, Snapshot, Variant, VersionPolicy

V1, V2, V3 = (ModelVersion(version=v, artifact=f"/m/{v}", digest=f"sha256:{v}") for v in "123")


def snapshot(*models: Model, uses: tuple[tuple[str, str], ...] = ()) -> Snapshot:
    variants = tuple(Variant(name=f"v{i}", model=m, use=use) for i, (m, use) in enumerate(uses))
    return Snapshot(models={m.name: m for m in models}, routes={"home": Route(name="home", variants=variants)} if uses else {})


def entry(version: ModelVersion, state: State = State.READY, **more: Any) -> Entry:
    return Entry(version=version, state=state, **more)


@pytest.mark.parametrize(
    ("world", "only", "paused", "expected"),
    [
        (snapshot(), (), (), []),
        (snapshot(Model(name="a", versions=(V1, V2, V3))), (), (), [("a", "3")]),
        (snapshot(Model(name="a", versions=(V1, V2, V3), aliases={"champion": "1"})), (), (), [("a", "1"), ("a", "3")]),
        (snapshot(Model(name="a", versions=(V1, V2, V3)), uses=(("a", "2"),)), (), (), [("a", "2"), ("a", "3")]),
        (snapshot(Model(name="a", versions=(V1, V2), aliases={"c": "1"}), uses=(("a", "c"),)), (), (), [("a", "1"), ("a", "2")]),
        (snapshot(Model(name="a", versions=(V1,), aliases={"c": "9"}), uses=(("a", "8"),)), (), (), [("a", "1")]),
        (snapshot(Model(name="a", versions=(V1,)), Model(name="b", versions=(V1,))), ("b",), (), [("b", "1")]),
        (snapshot(Model(name="a", versions=(V1,)), Model(name="b", versions=(V1,))), (), ("b",), [("a", "1")]),
        (snapshot(Model(name="a", versions=())), (), (), []),
        (
            snapshot(Model(name="a", versions=(V1,)), Model(name="b", versions=(V1, V2)), uses=(("b", "1"),)),
            (),
            (),
            [("b", "1"), ("a", "1"), ("b", "2")],
        ),
    ],
    ids=["nothing", "newest", "alias", "route", "route by alias", "dangling", "only", "paused", "no versions", "in use first"],
)
def test_what_is_wanted(world: Snapshot, only: Any, paused: Any, expected: Any) -> None:
    assert list(wanted(world, only, paused)) == expected


def test_a_worker_wants_the_models_of_its_pool_only() -> None:
    world = snapshot(
        Model(name="a", versions=(V1,)), Model(name="b", versions=(V1,), pool="gpu"), Model(name="c", versions=(V1,), pool="triton")
    )
    assert list(wanted(world, (), ())) == [("a", "1")]
    assert list(wanted(world, (), (), "gpu")) == [("b", "1")]


def test_what_is_missing_is_loaded_one_by_one() -> None:
    step = next_step({("a", "1"): V1, ("a", "2"): V2}, {("a", "1"): entry(V1)}, 100.0, 30.0)
    assert (step.load, step.unload) == ((("a", "2"),), ())


def test_what_is_as_it_should_be_is_left_alone() -> None:
    step = next_step({("a", "1"): V1}, {("a", "1"): entry(V1)}, 100.0, 30.0)
    assert (step.load, step.unload, step.again_s) == ((), (), NEVER)


def test_what_nobody_refers_to_is_kept_for_a_while() -> None:
    entries = {("a", "1"): entry(V1), ("a", "2"): entry(V2)}
    step = next_step({("a", "2"): V2}, entries, 100.0, 30.0)
    assert (step.unload, step.again_s) == ((), 130.0)
    assert next_step({("a", "2"): V2}, entries, 129.0, 30.0).unload == ()
    assert next_step({("a", "2"): V2}, entries, 130.0, 30.0).unload == (("a", "1"),)


def test_what_is_wanted_again_starts_anew() -> None:
    entries = {("a", "1"): entry(V1), ("a", "2"): entry(V2)}
    next_step({("a", "2"): V2}, entries, 100.0, 30.0)
    next_step({("a", "1"): V1, ("a", "2"): V2}, entries, 120.0, 30.0)
    assert next_step({("a", "2"): V2}, entries, 131.0, 30.0).unload == ()


@pytest.mark.parametrize("state", [State.LOADING, State.FAILED])
def test_a_version_is_kept_until_its_successor_is_ready(state: State) -> None:
    entries = {("a", "1"): entry(V1), ("a", "2"): entry(V2, state, due_s=1e9)}
    assert next_step({("a", "2"): V2}, entries, 100.0, 0.0).unload == ()
    assert next_step({("a", "2"): V2}, entries, 1000.0, 0.0).unload == ()
    entries["a", "2"].state = State.READY
    assert next_step({("a", "2"): V2}, entries, 1000.0, 30.0).again_s == 1030.0
    assert next_step({("a", "2"): V2}, entries, 1030.0, 30.0).unload == (("a", "1"),)


def test_another_models_failure_keeps_nothing() -> None:
    entries = {("a", "1"): entry(V1), ("b", "1"): entry(V1, State.FAILED, due_s=1e9)}
    assert next_step({("b", "1"): V1}, entries, 100.0, 0.0).unload == (("a", "1"),)


def test_what_failed_and_nobody_wants_goes_at_once() -> None:
    assert next_step({}, {("a", "1"): entry(V1, State.FAILED)}, 100.0, 30.0).unload == (("a", "1"),)


def test_what_failed_is_tried_when_it_is_due_and_hinders_no_other() -> None:
    entries = {("a", "1"): entry(V1, State.FAILED, due_s=105.0)}
    both = {("a", "1"): V1, ("b", "1"): V1}
    assert next_step(both, entries, 100.0, 30.0).load == (("b", "1"),)
    entries["b", "1"] = entry(V1)
    step = next_step(both, entries, 100.0, 30.0)
    assert (step.load, step.again_s) == ((), 105.0)
    assert next_step(both, entries, 105.0, 30.0).load == (("a", "1"),)


def test_what_failed_is_tried_at_once_when_the_registry_says_something_new_of_it() -> None:
    moved = ModelVersion(version="1", artifact="/elsewhere", digest=V1.digest)
    step = next_step({("a", "1"): moved}, {("a", "1"): entry(V1, State.FAILED, due_s=1e9)}, 100.0, 30.0)
    assert (step.load, step.unload) == ((("a", "1"),), ())


def test_what_serves_and_was_only_moved_is_left_alone() -> None:
    moved = ModelVersion(version="1", artifact="/elsewhere", digest=V1.digest)
    assert next_step({("a", "1"): moved}, {("a", "1"): entry(V1)}, 100.0, 30.0).load == ()


def test_another_digest_is_another_model() -> None:
    other = ModelVersion(version="1", artifact="/m/1", digest="sha256:other")
    step = next_step({("a", "1"): other}, {("a", "1"): entry(V1)}, 100.0, 30.0)
    assert (step.load, step.unload) == ((("a", "1"),), (("a", "1"),))


@pytest.mark.parametrize(("attempts", "expected"), [(1, 5), (2, 10), (3, 20), (7, 300), (10_000, 300)])
def test_retries_double_up_to_a_limit(attempts: int, expected: float) -> None:
    assert retry_after_s(attempts, 5.0, 300.0) == expected


def test_an_entry_says_where_it_stands() -> None:
    failed = entry(V1, State.FAILED, attempts=2, error=Internal("no", reason="WHY"))
    assert repr(failed) == "<Entry 1 FAILED attempts=2 error=WHY>"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (VersionPolicy(), ["3"]),
        (VersionPolicy(latest=2), ["3", "2"]),
        (VersionPolicy(latest=0), []),
        (VersionPolicy(specific=("1", "2")), ["2", "1"]),
        (VersionPolicy(all=True), ["3", "2", "1"]),
    ],
)
def test_the_version_policy_is_honoured(policy: VersionPolicy, expected: list[str]) -> None:
    model = Model(name="a", versions=(V1, V2, V3), version_policy=policy)
    assert [version for _, version in wanted(snapshot(model), (), ())] == expected


@given(st.lists(st.tuples(st.sets(st.sampled_from("123"), min_size=1), st.booleans(), st.integers(0, 2)), min_size=1, max_size=40))
def test_a_wanted_model_never_loses_its_last_ready_version_and_everything_is_tried(steps: list[tuple[set[str], bool, int]]) -> None:
    versions = {v.version: v for v in (V1, V2, V3)}
    entries: dict[tuple[str, str], Entry] = {}
    for now, (names, loads, missing) in enumerate(steps):
        want = {("a", name): versions[name] for name in sorted(names)}
        before = {key for key, e in entries.items() if e.state is State.READY}
        room = (Need(device="cpu", size_bytes=missing),) if missing else ()
        step = next_step(want, entries, float(now), 1.0, slots=2, shortfalls=room)
        for key in step.unload:
            del entries[key]
        assert not before or any(e.state is State.READY for e in entries.values())
        untried = [key for key in want if key not in entries]
        assert set(step.load) >= set(untried[:2])
        for key in step.load:
            claim = Claim(name=key, device="cpu", size_bytes=1)
            state = State.READY if loads else State.FAILED
            entries[key] = entry(versions[key[1]], state, due_s=now + 1.0, attempts=1, claim=claim)


def test_room_on_a_gpu_is_made_by_who_holds_of_that_gpu() -> None:
    several = Claim(name=("a", "1"), device="cuda:1", size_bytes=5, beside=Claim(name=("a", "1"), device="cuda:0", size_bytes=5))
    other = Claim(name=("a", "2"), device="cuda:2", size_bytes=50)
    entries = {
        ("a", "1"): entry(V1, State.READY, unwanted_since_s=1.0, claim=several),
        ("a", "2"): entry(V2, State.READY, unwanted_since_s=0.0, claim=other),
        ("a", "3"): entry(V3, State.READY),
    }
    for missing, expected in ((5, (("a", "1"),)), (6, ())):
        need = Need(device="cuda:0", size_bytes=missing)
        assert next_step({("a", "3"): V3}, entries, 2.0, 100.0, shortfalls=(need,)).unload == expected
