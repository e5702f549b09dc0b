"""Percentiles are true to a bucket, need enough samples, and follow a change."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.latency import MIN_SAMPLES, Histogram, Latencies


@given(st.lists(st.floats(50e-6, 60.0), min_size=MIN_SAMPLES, max_size=200), st.sampled_from([50.0, 90.0, 95.0, 99.0]))
def test_a_percentile_is_the_true_one_rounded_up_to_its_bucket(took: list[float], percent: float) -> None:
    histogram = Histogram(0.0)
    for took_s in took:
        histogram.observe(took_s, 1.0)
    true_s = sorted(took)[math.ceil(len(took) * percent / 100) - 1]
    found_s = histogram.percentile(percent)
    assert found_s is not None
    assert true_s * (1 - 1e-6) <= found_s <= true_s * 1.26


def test_it_says_nothing_before_fifty_calls() -> None:
    histogram = Histogram(0.0)
    for _ in range(MIN_SAMPLES - 1):
        histogram.observe(0.001, 0.0)
    assert histogram.percentile(95) is None
    histogram.observe(0.001, 0.0)
    assert histogram.percentile(95) == pytest.approx(0.001, rel=0.26)


@pytest.mark.parametrize("took_s", [0.0, 1e-9, 1e6])
def test_what_is_off_the_scale_counts_at_its_end(took_s: float) -> None:
    histogram = Histogram(0.0)
    for _ in range(MIN_SAMPLES):
        histogram.observe(took_s, 0.0)
    assert histogram.percentile(50) == pytest.approx(50e-6 if took_s < 1 else 60.0)


def test_a_model_that_got_slower_is_learnt_again() -> None:
    histogram = Histogram(0.0)
    for second in range(10):
        for _ in range(100):
            histogram.observe(0.001, second)
    for second in range(10, 60):
        for _ in range(100):
            histogram.observe(0.1, second)
    slower_s = histogram.percentile(50)
    assert slower_s is not None
    assert slower_s >= 0.1


def test_keys_are_apart_and_bounded() -> None:
    latencies = Latencies(most=2)
    for key in ("a", "b", "c"):
        for _ in range(MIN_SAMPLES):
            latencies.observe(key, 0.001, 0.0)
    assert [latencies.percentile(key, 95) is None for key in "abc"] == [True, False, False]
    assert repr(latencies) == "<Latencies of 2>"
