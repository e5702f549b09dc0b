"""Figures from rounds, and answers that are compared before they count."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from plait.errors import Internal
from plait_bench.load import Tally, Target
from plait_bench.measure import Contender, Measured, check_answers, percentile_ms, ratios
from plait_bench.models import Rows


def tally(calls: int, seconds: float = 1.0, **more: Any) -> Tally:
    return Tally(seconds=seconds, taken_s=[0.001 * (n + 1) for n in range(calls)], statuses=Counter({0: calls}), **more)


def measured(*rates: int, cpu_s: float = 1.0) -> Measured:
    found = Measured(rows_per_call=10, callers=2)
    for rate in rates:
        found.add(tally(rate, server_cpu_s=cpu_s, cpu_s=0.5), ok=0)
    return found


def test_figures_are_medians_over_rounds() -> None:
    figures = measured(100, 50, 80).figures()
    assert (figures["calls_per_s"], figures["rows_per_s"], figures["calls"]) == (80, 800, 230)
    assert figures["calls_per_s_rounds"] == [100, 50, 80]
    assert figures["server_cpu_ms_per_call"] == 12.5
    assert figures["load_cpu_us_per_call"] == 6250
    assert 0 < figures["p50_ms"] < figures["p99_ms"]
    assert figures["other_statuses"] == {}


def test_failures_are_told_and_cost_cpu_but_are_no_rate() -> None:
    found = Measured(rows_per_call=1, callers=1)
    found.add(Tally(seconds=2, taken_s=[0.1] * 4, statuses=Counter({0: 4, 8: 6}), server_cpu_s=1), ok=0)
    assert found.figures()["other_statuses"] == {"8": 6}
    assert found.rate == 2
    assert found.server_cpu_ms == [100]


def test_ratios_compare_round_with_round() -> None:
    found = ratios(measured(100, 60, 90), measured(50, 60, 30, cpu_s=2.0))
    assert (found["calls_per_s"], found["calls_per_s_lowest"], found["calls_per_s_highest"]) == (2, 1, 3)
    assert found["server_cpu_per_call"] == pytest.approx((2 / 50) / (1 / 90))
    assert found["p50"] < 1


def test_percentiles_of_nothing_are_no_number() -> None:
    assert math.isnan(percentile_ms([], 50))
    assert percentile_ms([0.001, 0.002, 0.003], 50) == pytest.approx(2)


def contender(expected: Rows) -> Contender:
    server: Any = None  # nobody is asked
    return Contender(
        name="one",
        server=server,
        target=Target(port=1, request=b""),
        callers=1,
        rows_per_call=2,
        scores=lambda body: np.frombuffer(body, np.float32),
        expected=expected,
    )


def test_answers_must_be_the_models() -> None:
    expected = np.array([1, -2], np.float32)
    good = tally(1, first_bodies=[(expected + 1e-6).astype(np.float32).tobytes()])
    check_answers(contender(expected), good)
    for wrong in ((expected + 0.01).astype(np.float32), expected[:1]):
        with pytest.raises(Internal, match="other scores") as caught:
            check_answers(contender(expected), tally(1, first_bodies=[expected.tobytes(), wrong.tobytes()]))
        assert caught.value.reason == "BENCH_ANSWER_WRONG"
    with pytest.raises(Internal, match="answered no call"):
        check_answers(contender(expected), Tally(statuses=Counter({14: 3})))
