from __future__ import annotations

import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.reranking import Cap, Test, boosted, dropped, spread

GROUPS = st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), min_size=1, max_size=40)
CAPS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=2).map(
    lambda found: [Cap(name=f"c{n}", place=n, at_most=most, within=most + more) for n, (most, more) in enumerate(found)]
)


def test_a_filter_holds_within_its_bounds_and_never_for_what_is_unknown() -> None:
    columns = np.array([[0], [1], [2], [math.nan]], np.float32)
    gone, by_rule = dropped(columns, [Test(name="one", place=0, at_least=1, at_most=1), Test(name="some", place=0, at_least=1)])
    assert gone.tolist() == [False, True, True, False]
    assert by_rule == {"one": 1, "some": 1}


def test_a_boost_lifts_whatever_the_sign() -> None:
    scores = np.array([2, -2, 0, 2, math.nan], np.float32)
    columns = np.array([[1], [1], [1], [0], [1]], np.float32)
    lifted, by_rule = boosted(scores, columns, [Test(name="promoted", place=0, at_least=1, at_most=1, multiply=2)])
    np.testing.assert_array_equal(lifted, np.array([4, -1, 0, 2, math.nan], np.float32))
    assert by_rule == {"promoted": 4}
    assert scores[0] == 2


@given(groups=st.data(), caps=CAPS, size=st.integers(1, 40))
def test_the_cap_holds_at_the_top_as_far_as_there_are_others(groups: st.DataObject, caps: list[Cap], size: int) -> None:
    columns = np.array([groups.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), min_size=size, max_size=size)) for _ in caps]).T
    order = np.array(groups.draw(st.permutations(range(size))), np.intp)
    found, by_rule = spread(order, columns, caps)
    assert sorted(found.tolist()) == list(range(size))
    assert by_rule.keys() == {cap.name for cap in caps}
    ranks = {int(item): rank for rank, item in enumerate(order)}
    counts = [Counter[float]() for _ in caps]
    for position, item in enumerate(found.tolist()):

        def forbidden(other: int, position: int = position) -> bool:
            return any(
                position < cap.within and not math.isnan(columns[other, cap.place]) and count[columns[other, cap.place]] >= cap.at_most
                for cap, count in zip(caps, counts, strict=True)
            )

        left = found.tolist()[position:]
        allowed = [other for other in left if not forbidden(other)]
        expected = min(allowed or left, key=ranks.__getitem__)  # the best that no cap forbids here, else the best of all
        assert item == expected
        for cap, count in zip(caps, counts, strict=True):
            count[columns[item, cap.place]] += 1


@given(groups=GROUPS)
def test_without_a_cap_the_order_stays(groups: list[float]) -> None:
    order = np.arange(len(groups))[::-1]
    assert spread(order, np.array([groups]).T, [])[0].tolist() == order.tolist()
