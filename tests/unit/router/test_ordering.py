"""The order of an answer, against the obvious sort."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.ordering import best_first

# Few distinct values, so that most places are tied.
SCORES = st.sampled_from([math.nan, -math.inf, math.inf, -0.0, 0.0, 1.0, 2.0, 3.0]) | st.floats(width=32)


def obvious(scores: list[float], top_k: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda at: (math.isnan(scores[at]), 0.0 if math.isnan(scores[at]) else -scores[at], at))
    return order[: top_k or None]


@given(scores=st.lists(SCORES, min_size=1, max_size=200), top_k=st.integers(0, 210))
def test_best_first_equal_scores_in_the_callers_order_nan_last(scores: list[float], top_k: int) -> None:
    assert best_first(np.array(scores, np.float32), top_k).tolist() == obvious(scores, top_k)


@given(seed=st.integers(0, 2**32 - 1), top_k=st.integers(1, 60), distinct=st.integers(1, 50), nans=st.integers(0, 500))
def test_the_short_way_for_a_small_top_k_gives_the_same(seed: int, top_k: int, distinct: int, nans: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, distinct, 500).astype(np.float32)
    scores[random.permutation(500)[:nans]] = np.nan
    assert best_first(scores, top_k).tolist() == obvious(scores.tolist(), top_k)


@pytest.mark.parametrize(("top_k", "expected"), [(0, [1, 2, 0, 3]), (2, [1, 2]), (4, [1, 2, 0, 3]), (9, [1, 2, 0, 3])])
def test_top_k(top_k: int, expected: list[int]) -> None:
    assert best_first(np.array([1, 5, 5, np.nan], np.float32), top_k).tolist() == expected


def test_the_scores_are_left_alone() -> None:
    scores = np.frombuffer(np.array([1.0, 2.0], np.float32).tobytes(), np.float32)  # read only, as they come off the wire
    assert best_first(scores, 0).tolist() == [1, 0]
    assert scores.tolist() == [1.0, 2.0]


def test_more_places_than_numbers_are_filled_with_nan_in_the_callers_order() -> None:
    scores = np.array([math.nan] * 39 + [-math.inf], np.float32)
    assert best_first(scores, 2).tolist() == [39, 0]
