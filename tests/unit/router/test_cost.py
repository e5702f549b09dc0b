"""What rows cost, found from answers; never below nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.cost import Costs, Line


@pytest.mark.parametrize(("a", "b"), [(2.0, 0.01), (0.0, 0.5), (3.0, 0.0)])
def test_a_line_is_found(a: float, b: float) -> None:
    line = Line(columns=80)
    for rows in [1, 10, 100, 1000] * 20:
        line.learn(rows, a + b * rows)
    for rows in (1, 50, 2000):
        assert line.of(rows) == pytest.approx(a + b * rows, rel=0.01, abs=0.01)


def test_what_was_true_once_is_forgotten() -> None:
    line = Line(columns=80)
    for slow in (1.0, 3.0):
        for rows in [10, 100] * 200:
            line.learn(rows, slow * (1 + 0.1 * rows))
    assert line.of(100) == pytest.approx(33, rel=0.02)


def test_one_size_alone_moves_the_whole_line() -> None:
    line = Line(columns=1000)
    share = line.of(200) / line.of(100)
    for _ in range(50):
        line.learn(100, 7.0)
    assert line.of(100) == pytest.approx(7.0)
    assert line.of(200) / line.of(100) == pytest.approx(share)


@given(st.lists(st.tuples(st.integers(0, 100_000), st.floats(0, 1e7)), max_size=80), st.integers(0, 100_000))
def test_a_cost_is_a_positive_number_and_more_rows_cost_no_less(answers: list[tuple[int, float]], rows: int) -> None:
    line = Line(columns=0)
    for known, took_ms in answers:
        line.learn(known, took_ms)
        assert 0 < line.of(rows) < math.inf
        assert line.of(rows) <= line.of(rows + 1)


def test_versions_that_are_gone_are_forgotten() -> None:
    costs = Costs()
    kept, gone = costs.line("m", "1", 3), costs.line("m", "2", 3)
    costs.keep({("m", "1")})
    assert costs.line("m", "1", 3) is kept
    assert costs.line("m", "2", 3) is not gone


def test_requests_of_about_one_size_are_compared() -> None:
    line = Line(columns=3)
    assert line.window(100) is line.window(127)
    assert line.window(100) is not line.window(128)
    assert line.window(0) is not line.window(1)
    assert line.window(1 << 40) is line.window(1 << 50)
