"""Choices, on a clock and dice of our own, and what they add up to over thousands of calls to endpoints that queue, fail and recover."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.balancer import Balancer
from router.replica import Replica


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def balancer(*in_flight: int, dice: Iterator[float] | None = None, clock: Clock | None = None, zone: str = "") -> Balancer:
    seams = {"random_": dice.__next__} if dice else {}
    made = Balancer(ejection_s=1.0, max_ejection_s=5.0, clock=clock or Clock(), zone=zone, **seams)
    for n, load in enumerate(in_flight):
        made.add(f"r{n}", warm=True).in_flight = load
    return made


def picks(of: Balancer, times: int = 60, avoid: Collection[Replica] = ()) -> set[str]:
    return {picked.name for _ in range(times) if (picked := of.pick(1, avoid))}


def fail(of: Balancer, replica: Replica, times: int = 20) -> list[float]:
    return [of.failed(replica) for _ in range(times)]


@given(loads=st.lists(st.integers(0, 9), min_size=1, max_size=6), dice=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2))
def test_of_two_drawn_the_less_loaded_wins_and_never_the_busiest_of_all(loads: list[int], dice: tuple[float, float]) -> None:
    picked = balancer(*loads, dice=iter(dice)).pick()
    assert picked is not None
    if len(loads) > 1 and loads.count(max(loads)) == 1:
        assert picked.in_flight < max(loads)  # two different ones were drawn


def test_nobody_is_picked_where_there_is_nobody() -> None:
    of = balancer(0)
    of.remove(of.replicas[0])
    assert of.pick() is None
    assert of.pick(avoid=of.replicas) is None


def test_every_replica_is_drawn_alike() -> None:
    even = balancer(0, 0, 0, 0)
    seen = Counter(picked.name for _ in range(4_000) if (picked := even.pick()))
    assert len(seen) == 4
    assert all(800 < count < 1_200 for count in seen.values())


@given(loads=st.lists(st.integers(0, 9), min_size=1, max_size=5), data=st.data())
def test_avoid_is_picked_only_where_there_is_nobody_else(loads: list[int], data: st.DataObject) -> None:
    b = balancer(*loads)
    avoid = data.draw(st.sampled_from(b.replicas))
    for replica in data.draw(st.lists(st.sampled_from(b.replicas), unique_by=id)):
        b.lost(replica)
    assert (b.pick(avoid=(avoid,)) is avoid) == (len(loads) == 1)


def test_a_lost_replica_is_avoided_twice_as_long_each_time_up_to_a_limit() -> None:
    clock = Clock()
    b = balancer(0, 9, clock=clock)
    bad, good = b.replicas
    for expected_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert b.lost(bad) == expected_s
        clock.now_s += expected_s - 0.01
        assert picks(b) == {good.name}
        clock.now_s += 0.01
        good.in_flight = 99  # (it starts slowly)
        assert picks(b) == {bad.name}
    assert b.answered(bad, 0.001, 1)
    assert not b.answered(bad, 0.001, 1), "told once"
    assert b.lost(bad) == 1.0


def test_one_that_is_reached_again_need_not_sit_out_its_time() -> None:
    clock = Clock()
    b = balancer(0, 9, clock=clock)
    for _ in range(4):
        clock.now_s += b.lost(b.replicas[0])
    b.lost(b.replicas[0])
    assert picks(b) == {"r1"}
    b.reached(b.replicas[0])
    clock.now_s += 2.0  # (it starts slowly)
    assert picks(b) == {"r0"}
    assert not b.replicas[0].suspect
    fail(b, b.replicas[0])
    b.reached(b.replicas[0])
    assert picks(b) == {"r1"}, "that it is there does not say that it works"


def test_calls_that_are_lost_together_are_one_loss() -> None:
    b = balancer(0, 0)
    assert [b.lost(b.replicas[0]) for _ in range(5)] == [1.0, 0, 0, 0, 0]
    assert repr(b.replicas[0]) == "<r0 in_flight=0 failing (1 in a row)>"


def test_where_all_are_avoided_none_is() -> None:
    clock = Clock()
    b = balancer(0, 0, 0, clock=clock)
    for replica in b.replicas:
        b.lost(replica)
    assert picks(b) == {"r0", "r1", "r2"}
    b.answered(b.replicas[1], 0.001, 1)
    assert picks(b) == {"r1"}
    clock.now_s += 1.0
    assert picks(b) == {"r0", "r1", "r2"}


def test_ten_thousand_losses_in_a_row_do_not_overflow() -> None:
    clock = Clock()
    b = balancer(0, clock=clock)
    for _ in range(10_000):
        clock.now_s += b.lost(b.replicas[0])
    assert b.lost(b.replicas[0]) == 5.0


def test_who_fails_half_of_twenty_calls_is_ejected_and_stands_the_test_of_new_ones() -> None:
    clock = Clock()
    b = balancer(0, 0, clock=clock)
    bad = b.replicas[0]
    assert fail(b, bad, 19) == [0] * 19
    assert b.failed(bad) == 1.0
    assert picks(b) == {"r1"}
    assert not b.answered(bad, 0.001, 1), "an answer to a call from before ends no ejection"
    assert picks(b) == {"r1"}
    clock.now_s += 1.0
    assert b.answered(bad, 0.001, 1)
    b.replicas[1].in_flight = 20  # (it starts slowly)
    assert picks(b) == {"r0"}


@given(failing=st.lists(st.integers(0, 9), min_size=1, max_size=200), size=st.integers(1, 10), passed_s=st.floats(0, 1))
def test_never_more_than_half_are_ejected(failing: list[int], size: int, passed_s: float) -> None:
    clock = Clock()
    b = balancer(*[0] * size, clock=clock)
    for n in failing:
        fail(b, b.replicas[n % size])
        clock.now_s += passed_s
        assert 2 * sum(r.avoided(clock.now_s) for r in b.replicas) <= size


def test_of_two_equally_loaded_the_faster_wins_and_the_rows_count() -> None:
    b = balancer(1, 1)
    steady, quick = b.replicas
    steady.reported(1, 1e-6, 100.0)
    quick.reported(1, 1e-4, 100.0)
    b.answered(steady, 0.005, 10)
    b.answered(quick, 0.002, 10)
    assert picks(b) == {"r1"}
    assert {b.pick(1000) for _ in range(20)} == {steady}, "1 000 rows take 6 ms on one and 101 ms on the other"
    assert b.expected_s(quick, 1000) == pytest.approx(0.101)


def test_what_nobody_answered_for_two_seconds_is_forgotten() -> None:
    clock = Clock()
    b = balancer(0, 0, clock=clock)
    slow, fast = b.replicas
    b.answered(slow, 1.0, 1)
    b.answered(fast, 0.001, 1)
    assert picks(b) == {"r1"}
    clock.now_s += 2.1
    b.answered(fast, 0.001, 1)
    assert picks(b) == {"r0", "r1"}


def test_a_call_given_up_makes_an_estimate_worse_and_never_better() -> None:
    b = balancer(0, 0)
    replica = b.replicas[0]
    b.answered(replica, 0.1, 1)
    b.overdue(replica, 0.01, 1)
    assert b.expected_s(replica, 1) == pytest.approx(0.1)
    b.overdue(replica, 1.1, 1)
    assert b.expected_s(replica, 1) == pytest.approx(0.4)


def test_other_routers_calls_count_and_fade() -> None:
    clock = Clock()
    b = balancer(0, 3, clock=clock)
    crowded = b.replicas[0]
    crowded.reported(40, 0.0, clock.now_s)
    assert picks(b) == {"r1"}
    clock.now_s += 0.4
    assert crowded.load(clock.now_s) == pytest.approx(40 / 16)
    assert picks(b) == {"r0"}
    clock.now_s += 3.0
    assert crowded.load(clock.now_s) == 0


def test_who_refuses_at_once_attracts_nothing() -> None:
    b = balancer(0, 4)
    for _ in range(10):
        b.refused(b.replicas[0])
    assert picks(b) == {"r1"}
    assert not b.replicas[0].suspect


def test_who_takes_no_calls_gets_none_while_there_is_another() -> None:
    b = balancer(0, 9)
    draining, other = b.replicas
    draining.accepts = False
    b.changed()
    assert picks(b) == {"r1"}
    assert repr(draining) == "<r0 in_flight=0 not taking calls>"
    b.remove(other)
    assert picks(b) == {"r0"}


def test_a_new_one_gets_its_share_slowly() -> None:
    clock = Clock()
    b = balancer(3, clock=clock)
    new = b.add("new")
    new.in_flight = 1
    assert picks(b) == {"r0"}, "two calls at a tenth weigh as twenty"
    clock.now_s += 6.0
    assert picks(b) == {"new"}


def test_the_own_zone_is_kept_to_while_it_has_room() -> None:
    b = balancer(zone="a")
    near = [b.add(f"a{n}", "a", warm=True) for n in range(4)]
    far = [b.add(f"b{n}", "b", warm=True) for n in range(4)]
    assert picks(b) == {r.name for r in near}
    for replica in near:
        replica.in_flight = 9
    b.changed()
    assert picks(b) & {r.name for r in far}, "it is three times as busy as the rest"
    for replica in near:
        replica.in_flight = 0
    for replica in near[:2]:
        b.lost(replica)
    assert picks(b) & {r.name for r in far}, "half of it is away"


# ---- simulations: endpoints with eight slots each, exponential service, Poisson arrivals


def simulate(
    seed: int, *, size: int = 10, rate: float = 2000.0, calls: int = 12_000, slow: Mapping[int, float] = {}, failing_until_s: float = 0.0
) -> tuple[list[list[int]], list[float]]:
    """Return the calls of each endpoint in the first and in the second half, and the sorted seconds of answers; number 0 may fail."""
    clock, rng = Clock(), random.Random(seed)  # noqa: S311
    b = Balancer(random_=rng.random, clock=clock)
    replicas = [b.add(str(n), warm=True) for n in range(size)]
    slots = [[clock.now_s] * 8 for _ in replicas]
    counts, took_s = [[0] * size, [0] * size], []
    ends: list[tuple[float, int, int, float, bool]] = []
    arrives_s = began_s = clock.now_s
    for call in range(calls):
        arrives_s += rng.expovariate(rate)
        while ends and ends[0][0] <= arrives_s:
            clock.now_s, _, n, start_s, well = heapq.heappop(ends)
            replicas[n].in_flight -= 1
            if well:
                b.answered(replicas[n], clock.now_s - start_s, 1)
                took_s.append(clock.now_s - start_s)
            else:
                b.failed(replicas[n])
        clock.now_s = arrives_s
        picked = b.pick()
        assert picked is not None
        n = replicas.index(picked)
        counts[2 * call // calls][n] += 1
        picked.in_flight += 1
        well = not (n == 0 and arrives_s - began_s < failing_until_s)
        begins_s = max(heapq.heappop(slots[n]), arrives_s)
        ends_s = begins_s + (rng.expovariate(1 / (0.004 * slow.get(n, 1.0))) if well else 0.0005)
        heapq.heappush(slots[n], ends_s)
        heapq.heappush(ends, (ends_s, call, n, arrives_s, well))
    return counts, sorted(took_s)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 12))
def test_equal_endpoints_get_equal_shares(seed: int, size: int) -> None:
    [first, second], _ = simulate(seed, size=size, rate=200.0 * size)
    total = [a + b for a, b in zip(first, second, strict=True)]
    assert max(total) <= 1.3 * sum(total) / size


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), rate=st.sampled_from([300.0, 2000.0, 10_000.0]))
def test_one_that_is_ten_times_slower_gets_less_than_three_percent(seed: int, rate: float) -> None:
    [first, second], _ = simulate(seed, rate=rate, slow={0: 10.0})
    assert first[0] + second[0] <= 0.03 * 12_000


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_one_that_fails_at_once_attracts_nothing_and_is_taken_back(seed: int) -> None:
    [first, second], _ = simulate(seed, rate=400.0, failing_until_s=15.0)  # 30 s in all
    assert first[0] <= 0.02 * 6_000
    assert second[0] >= 0.01 * 6_000  # of the 10 % that it would have, after its last ejection and a slow start of 10 s
