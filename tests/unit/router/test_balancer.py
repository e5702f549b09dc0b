"""Choices and ejections, on a clock and dice of our own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.balancer import Balancer, Replica


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def replicas(*in_flight: int) -> list[Replica]:
    made = [Replica(f"r{n}") for n in range(len(in_flight))]
    for replica, load in zip(made, in_flight, strict=True):
        replica.in_flight = load
    return made


def balancer(of: list[Replica], dice: Iterator[float] | None = None, clock: Clock | None = None) -> Balancer:
    seams = {"random_": dice.__next__} if dice else {}
    return Balancer(of, ejection_s=1.0, max_ejection_s=5.0, clock=clock or Clock(), **seams)


@given(loads=st.lists(st.integers(0, 9), min_size=1, max_size=6), dice=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2))
def test_of_two_drawn_the_less_loaded_wins_and_never_the_busiest_of_all(loads: list[int], dice: tuple[float, float]) -> None:
    of = replicas(*loads)
    picked = balancer(of, iter(dice)).pick()
    assert picked in of
    if len(loads) > 1 and loads.count(max(loads)) == 1:
        assert picked.in_flight < max(loads)  # two different ones were drawn


def test_every_replica_is_drawn_alike() -> None:
    of = replicas(0, 0, 0, 0)
    even = balancer(of)
    seen = Counter(even.pick().name for _ in range(4_000))
    assert all(800 < seen[r.name] < 1_200 for r in of)


@given(loads=st.lists(st.integers(0, 9), min_size=1, max_size=5), data=st.data())
def test_avoid_is_picked_only_where_there_is_nobody_else(loads: list[int], data: st.DataObject) -> None:
    of = replicas(*loads)
    b = balancer(of)
    avoid = data.draw(st.sampled_from(of))
    for replica in data.draw(st.lists(st.sampled_from(of), unique_by=id)):
        b.failed(replica)
    assert (b.pick(avoid) is avoid) == (len(of) == 1)


def test_a_failed_replica_is_avoided_twice_as_long_each_time_up_to_a_limit() -> None:
    clock = Clock()
    bad, good = of = replicas(0, 9)
    b = balancer(of, clock=clock)
    for expected_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert b.failed(bad) == expected_s
        clock.now_s += expected_s - 0.01
        assert {b.pick() for _ in range(20)} == {good}
        clock.now_s += 0.01
        assert {b.pick() for _ in range(20)} == {bad}  # the less loaded of the two
    b.succeeded(bad)
    assert b.failed(bad) == 1.0


def test_calls_that_fail_together_are_one_failure() -> None:
    of = replicas(0, 0)
    b = balancer(of)
    assert [b.failed(of[0]) for _ in range(5)] == [1.0, 0, 0, 0, 0]
    assert of[0].failures == 1


def test_where_all_are_ejected_none_is() -> None:
    clock = Clock()
    of = replicas(0, 0, 0)
    b = balancer(of, clock=clock)
    for replica in of:
        b.failed(replica)
    assert {b.pick() for _ in range(60)} == set(of)
    b.succeeded(of[1])
    assert {b.pick() for _ in range(20)} == {of[1]}
    clock.now_s += 1.0
    assert {b.pick() for _ in range(60)} == set(of)


def test_ten_thousand_failures_in_a_row_do_not_overflow() -> None:
    clock = Clock()
    of = replicas(0)
    b = balancer(of, clock=clock)
    for _ in range(10_000):
        clock.now_s += b.failed(of[0])
    assert b.failed(of[0]) == 5.0


@pytest.mark.parametrize(("failed", "shown"), [(False, "<r0 in_flight=3 up>"), (True, "<r0 in_flight=3 failing (1 in a row)>")])
def test_repr_says_load_and_state(failed: bool, shown: str) -> None:
    of = replicas(3)
    b = balancer(of)
    if failed:
        b.failed(of[0])
    assert repr(b) == f"<Balancer [{shown}]>"


def test_a_second_try_goes_to_one_that_is_up_rather_than_to_an_ejected_one() -> None:
    of = replicas(0, 0, 9)
    b = balancer(of)
    b.failed(of[1])
    assert {b.pick(avoid=of[0]).name for _ in range(50)} == {"r2"}
