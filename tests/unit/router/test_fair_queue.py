"""Turns among classes and tenants, whatever comes: shares, order, bounds, and that nobody is lost."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fair_queue import SHARES, FairQueue, Guest

COSTS = st.floats(0.001, 50.0)
WEIGHTS = {"a": 1.0, "b": 3.0, "c": 0.25, "": 1.0}
GUESTS = st.builds(
    lambda rank, tenant, cost: Guest(rank, tenant, WEIGHTS[tenant], cost), st.integers(0, 2), st.sampled_from(sorted(WEIGHTS)), COSTS
)


def filled(guests: list[Guest]) -> FairQueue[Guest]:
    queue: FairQueue[Guest] = FairQueue(10_000)
    for guest in guests:
        queue.push(guest)
    return queue


@given(st.lists(GUESTS, max_size=60))
def test_everybody_gets_a_turn_and_those_of_one_flow_in_the_order_they_came(guests: list[Guest]) -> None:
    queue = filled(guests)
    served = []
    while len(queue):
        head = queue.head()
        assert queue.pop() is head
        served.append(head)
    flows: dict[tuple[int, str], list[Guest]] = defaultdict(list)
    for guest in served:
        flows[guest.rank, guest.tenant].append(guest)
    for (rank, tenant), of_flow in flows.items():
        assert of_flow == [g for g in guests if (g.rank, g.tenant) == (rank, tenant)]
    assert len(served) == len(guests)
    assert repr(queue) == "<FairQueue 0/10000>"
    assert queue.ahead(0, "a", 1.0) == 0


@given(st.lists(st.lists(COSTS, min_size=40, max_size=40), min_size=4, max_size=4), st.integers(1, 60))
def test_while_all_wait_no_tenant_is_more_than_a_request_from_its_share(costs: list[list[float]], turns: int) -> None:
    names = sorted(WEIGHTS)
    queue = filled([Guest(1, name, WEIGHTS[name], cost) for name, flow in zip(names, costs, strict=True) for cost in flow])
    served = dict.fromkeys(names, 0.0)
    for _ in range(turns):
        if any(len(queue._classes[1].tenants[name].guests) < 2 for name in names):
            break
        guest = queue.pop()
        served[guest.tenant] += guest.cost
    shares = {name: served[name] / WEIGHTS[name] for name in names}
    most = max(max(flow) for flow in costs)
    for one in names:
        for other in names:  # Shreedhar and Varghese, lemma 2: a round of credit and the largest request of each
            assert shares[one] - shares[other] <= 1 + most / WEIGHTS[one] + most / WEIGHTS[other] + 1e-6


@given(st.lists(COSTS, min_size=200, max_size=200))
def test_each_class_gets_its_floor_while_all_wait(costs: list[float]) -> None:
    queue = filled([Guest(rank, "a", 1.0, cost) for rank in range(3) for cost in costs])
    served = [0.0, 0.0, 0.0]
    while all(queue.waiting(rank) > 1 for rank in range(3)):
        guest = queue.pop()
        served[guest.rank] += guest.cost
    total, most = sum(served), max(costs)
    for rank, share in enumerate(SHARES):
        assert served[rank] >= total * share / sum(SHARES) - (share + 3 * most)


def test_a_tenant_that_comes_back_each_time_does_not_keep_the_other_from_its_turn() -> None:
    queue = filled([Guest(1, "b", 1.0, 5.0) for _ in range(10)])
    served = []
    for _ in range(30):
        if not queue._classes[1].tenants.get("a"):
            queue.push(Guest(1, "a", 1.0, 1.0))
        served.append(queue.pop().tenant)
    assert served.count("b") == 5


@pytest.mark.parametrize("weight", [1e-6, 1e6])
def test_the_work_of_a_turn_does_not_depend_on_how_large_weights_are(weight: float) -> None:
    queue = filled([Guest(1, "a", weight, 1e4), Guest(1, "b", weight, 1e4)])
    assert [queue.pop().tenant, queue.pop().tenant] == ["a", "b"]


@given(st.lists(st.one_of(GUESTS, st.integers(0, 30), st.none()), max_size=80))
def test_whoever_comes_goes_or_is_served_the_sums_hold(steps: list[Guest | int | None]) -> None:
    queue: FairQueue[Guest] = FairQueue(20)
    inside: list[Guest] = []
    for step in steps:
        if step is None:
            if inside:
                inside.remove(queue.pop())
        elif isinstance(step, int):
            if step < len(inside):
                leaver = inside.pop(step)
                assert queue.remove(leaver)
                assert not queue.remove(leaver)
        else:
            if queue.full:
                victim = queue.victim(step.rank, step.tenant, step.weight)
                if victim is None:
                    continue
                assert victim.rank >= step.rank
                assert victim is [g for g in inside if (g.rank, g.tenant) == (victim.rank, victim.tenant)][-1]
                assert queue.remove(victim)
                inside.remove(victim)
            queue.push(step)
            inside.append(step)
        assert len(queue) == len(inside) <= 20
        assert [queue.waiting(rank) for rank in range(3)] == [sum(g.rank == rank for g in inside) for rank in range(3)]
        assert queue._cost == pytest.approx(sum(g.cost for g in inside), abs=1e-6)
        for level in queue._classes:
            assert level.shares == pytest.approx(sum(tenant.weight for tenant in level.tenants.values()), abs=1e-6)


def test_a_flood_makes_room_for_others_and_not_for_itself() -> None:
    queue: FairQueue[Guest] = FairQueue(4)
    flood = [Guest(1, "flood", 1.0, 1.0) for _ in range(4)]
    for guest in flood:
        queue.push(guest)
    assert queue.victim(1, "flood", 1.0) is None
    assert queue.victim(2, "polite", 1.0) is None  # a lower class waits for places
    assert queue.victim(1, "polite", 1.0) is flood[-1]
    assert queue.victim(0, "flood", 1.0) is flood[-1]


def test_a_lower_class_keeps_its_share_of_the_places() -> None:
    queue: FairQueue[Guest] = FairQueue(13)
    for rank in [0] * 8 + [1] * 4 + [2]:
        queue.push(Guest(rank, "a", 1.0, 1.0))
    assert queue.victim(0, "a", 1.0) is None
    assert queue.victim(1, "a", 1.0) is None


def test_without_places_nobody_waits() -> None:
    queue: FairQueue[Guest] = FairQueue(0)
    assert queue.full
    assert queue.victim(0, "a", 1.0) is None


def test_what_is_served_before_a_newcomer_depends_on_its_own_flow() -> None:
    queue = filled([Guest(1, "flood", 1.0, 2.0) for _ in range(10)] + [Guest(1, "polite", 1.0, 1.0)])
    assert queue.ahead(1, "flood", 1.0) == 21.0  # everybody
    assert queue.ahead(1, "polite", 1.0) == 2.0  # its own one, and as much of the other
    assert queue.ahead(1, "new", 1.0) == 0.0
    assert queue.ahead(0, "flood", 1.0) == 0.0
