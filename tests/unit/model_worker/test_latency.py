"""The line durations are predicted by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_worker.latency import TRUST_S, WINDOW, LatencyModel


def taught(*batches: tuple[int, float]) -> LatencyModel:
    latency = LatencyModel()
    for rows, seconds in batches:
        latency.observe(rows, seconds, 0.0)
    return latency


def test_it_learns_the_line() -> None:
    latency = taught(*((rows, 2e-6 * rows + 1e-3) for rows in (1, 10, 100, 1000)))
    assert latency.per_row_s == pytest.approx(2e-6)
    assert latency.per_batch_s == pytest.approx(1e-3)
    assert latency.predict_s(500) == pytest.approx(2e-3)
    assert latency.predict_s(500, 3) == pytest.approx(4e-3)
    assert "2 us/row + 1 ms over 4 batches" in repr(latency)


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(1e-6, 10)), min_size=3, max_size=3 * WINDOW))
def test_it_is_the_least_squares_line_of_the_last_batches(batches: list[tuple[int, float]]) -> None:
    latency = taught(*batches)
    rows, seconds = (np.array(column, np.float64) for column in zip(*batches[-WINDOW:], strict=True))
    if len(set(rows)) > 1:
        slope = max(0.0, float(np.polyfit(rows, seconds, 1)[0]))
        assert latency.per_row_s == pytest.approx(slope, rel=1e-3, abs=1e-7)
    assert latency.per_row_s >= 0
    assert latency.per_batch_s >= 0


def test_batches_of_one_size_are_a_constant() -> None:
    latency = taught((5, 1e-3), (5, 2e-3), (5, 3e-3))
    assert (latency.per_row_s, latency.per_batch_s) == (0.0, pytest.approx(2e-3))


def test_what_left_the_window_is_forgotten() -> None:
    latency = taught((1, 100.0), *((rows, 1e-3) for rows in range(1, WINDOW + 1)))
    assert latency.predict_s(1) == pytest.approx(1e-3)


def test_before_three_batches_nothing_is_predicted_or_trusted() -> None:
    latency = taught((1, 1.0), (2, 2.0))
    assert latency.predict_s(100) == 0.0
    assert not latency.trusted(0.0)


def test_an_estimate_nobody_confirmed_for_a_second_is_not_trusted() -> None:
    latency = taught((1, 1.0), (2, 2.0), (3, 3.0))
    assert latency.trusted(TRUST_S)
    assert not latency.trusted(TRUST_S + 0.001)
