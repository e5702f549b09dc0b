"""How long an answer is good, how often it is renewed, and that memory is bounded."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.registry.policies import CachePolicy
from router.entries import OVERHEAD_BYTES, Entries, standing

POLICY = CachePolicy(ttl_s=5, stale_s=60)


@pytest.mark.parametrize(
    ("age_s", "chance", "expected"),
    [
        (0, 1, "fresh"),
        (5, 1, "fresh"),
        (5.001, 1, "stale"),
        (65, 1, "stale"),
        (65.001, 1, "gone"),
        (4.95, 0.3, "early"),  # 0.1 s · −ln 0.3 = 0.12 s before its time
        (4.85, 0.3, "fresh"),
    ],
)
def test_standing(age_s: float, chance: float, expected: str) -> None:
    assert standing(age_s, 0.1, POLICY, chance) == expected


def test_no_early_refresh_where_the_route_wants_none() -> None:
    plain = CachePolicy(ttl_s=5, early_refresh=0)
    assert standing(5, 10.0, plain, 1e-300) == "fresh"


@given(st.floats(0, 1e4), st.floats(0, 10), st.floats(0, 100), st.floats(0, 100), st.floats(0, 10), st.floats(1e-300, 1))
def test_the_hard_bound_holds(age_s: float, took_s: float, ttl_s: float, stale_s: float, beta: float, chance: float) -> None:
    policy = CachePolicy(ttl_s=ttl_s, stale_s=stale_s, early_refresh=beta)
    served = standing(age_s, took_s, policy, chance) != "gone"
    assert served == (age_s <= ttl_s + stale_s or age_s <= ttl_s)


@pytest.mark.parametrize(("took_s", "in_time"), [(0.003, 0.9), (0.01, 0.99), (0.1, 0.999)])
def test_a_popular_answer_is_renewed_before_it_runs_out(took_s: float, in_time: float) -> None:
    """1 000 callers a second, 1 000 lives of an answer on a seeded clock: hardly ever does one meet an answer that has run out, and none is
    renewed much before its time. That only one of them renews it is for flights to see to."""
    chance, lives, early, ages = random.Random(1), 1000, 0, []  # noqa: S311
    policy = CachePolicy(ttl_s=1)
    for _ in range(lives):
        age_s = 0.0
        while (found := standing(age_s, took_s, policy, 1 - chance.random())) == "fresh":
            age_s += 0.001
        early += found == "early"
        ages.append(age_s)
    assert early / lives >= in_time
    assert sum(ages) / lives > 1 - took_s * 7


keys = st.binary(min_size=1, max_size=1)
steps = st.lists(st.tuples(st.sampled_from(["put", "get", "drop"]), keys, st.integers(0, 400)), max_size=60)


@given(steps)
def test_it_is_a_bounded_lru(script: list[tuple[str, bytes, int]]) -> None:
    """Against a model that recounts everything."""
    entries: Entries[int] = Entries(2000, 500)
    model: OrderedDict[bytes, int] = OrderedDict()
    for action, key, size in script:
        if action == "put":
            model.pop(key, None)
            fits = size + OVERHEAD_BYTES <= 500
            assert entries.put(key, size, size) == fits
            if fits:
                model[key] = size
                while sum(s + OVERHEAD_BYTES for s in model.values()) > 2000:
                    model.popitem(last=False)
        elif action == "get":
            assert entries.get(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
        else:
            entries.drop(key)
            model.pop(key, None)
        assert entries.size_bytes == sum(s + OVERHEAD_BYTES for s in model.values()) <= 2000
        assert len(entries) == len(model)
