"""Every aggregate function: any order and batching of the same events leaves the same bytes, and is worth what a plain recount says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_retrieval.aggregation.distinct import hash_of
from feature_retrieval.aggregation.windows import MAX_VALUE, Taken, Window, window_of
from plait.registry.aggregate_rules import state_bytes
from plait.registry.records import Aggregate

T0 = 1_700_000_000_000_000  # µs
HOUR_US = 3_600_000_000


@dataclass(frozen=True)
class Fact:
    row: int
    time_us: int
    value: float
    mark: int  # unique

    @property
    def hash(self) -> int:
        return hash_of(np.float64(self.value).tobytes())


ROWS = 3
WINDOWED = {"window_s": 3600.0, "tile_s": 600.0}
AGGREGATES = {
    "count": Aggregate(function="count", events=("view",), **WINDOWED),
    "count for ever": Aggregate(function="count", events=("view",)),
    "sum": Aggregate(function="sum", events=("view",), value="value", **WINDOWED),
    "sum for ever": Aggregate(function="sum", events=("view",), value="value"),
    "mean": Aggregate(function="mean", events=("view",), value="value", **WINDOWED),
    "mean for ever": Aggregate(function="mean", events=("view",), value="value"),
    "min": Aggregate(function="min", events=("view",), value="value", **WINDOWED),
    "max for ever": Aggregate(function="max", events=("view",), value="value"),
    "last": Aggregate(function="last", events=("view",), value="value", window_s=3600.0),
    "last for ever": Aggregate(function="last", events=("view",), value="value"),
    "distinct": Aggregate(function="distinct", events=("view",), value="value", precision=10, **WINDOWED),
    "decayed": Aggregate(function="sum", events=("view",), value="value", half_life_s=3600.0),
}
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.5, 0.1, 1e-7, 5e-7, -5e-7, MAX_VALUE, -MAX_VALUE]), st.floats(-1e6, 1e6, allow_nan=False)
)
times = st.integers(T0, T0 + 4 * HOUR_US) | st.sampled_from([T0, T0 + 600_000_000, T0 + 600_000_000 - 1, T0 + 12 * HOUR_US])
facts = st.lists(st.tuples(st.integers(0, ROWS - 1), times, values), max_size=24).map(
    lambda found: [Fact(row, time_us, value, n + 1) for n, (row, time_us, value) in enumerate(found)]
)


def blank(window: Window) -> np.ndarray:
    """Rows with something before and after the state, so that a merge out of bounds shows."""
    block = np.full((ROWS, window.size_bytes + 24), 0xAB, np.uint8)
    block[:, 16 : 16 + window.size_bytes] = np.frombuffer(window.blank(), np.uint8)
    return block


def merge(window: Window, block: np.ndarray, found: Sequence[Fact], *, counts: bool) -> None:
    window.merge(
        block[:, 16 : 16 + window.size_bytes],
        Taken(
            np.array([f.row for f in found], np.intp),
            np.array([f.time_us for f in found], np.int64),
            np.ones(len(found)) if counts else np.array([f.value for f in found], np.float64),
            np.array([f.hash for f in found], np.uint64),
            np.array([f.mark for f in found], np.int64),
        ),
    )


def recount(aggregate: Aggregate, found: Sequence[Fact], now_us: int) -> float | None:  # noqa: PLR0911  (one per function)
    """What one row is worth, in plain Python and exact arithmetic; None = null."""
    tile_us = int(aggregate.tile_s * 1e6)
    if aggregate.half_life_s:
        tile_us, tiles = int(aggregate.half_life_s * 1e6 / 8), 64
    else:
        tiles = round(aggregate.window_s / aggregate.tile_s) if tile_us else 0
    if aggregate.function == "last":
        if not found:
            return None
        newest = max(found, key=lambda f: (f.time_us, f.mark))
        return newest.value if not aggregate.window_s or newest.time_us > now_us - aggregate.window_s * 1e6 else None
    if tile_us and found:
        newest_tile = max(f.time_us // tile_us for f in found)
        found = [f for f in found if f.time_us // tile_us > max(newest_tile, now_us // tile_us) - tiles]
    if aggregate.half_life_s:
        return math.fsum(f.value * 2 ** (-(now_us - f.time_us) / 1e6 / aggregate.half_life_s) for f in found)
    whole = [round(Fraction(f.value * 1e6)) for f in found]
    if aggregate.function == "count":
        return len(found)
    if aggregate.function == "sum":
        return float(Fraction(sum(whole), 10**6))
    if aggregate.function == "distinct":
        return len({f.hash for f in found})
    if not found:
        return None
    if aggregate.function == "mean":
        return float(Fraction(sum(whole), 10**6 * len(found)))
    return (min if aggregate.function == "min" else max)(f.value for f in found)


@pytest.mark.parametrize("name", AGGREGATES)
@settings(max_examples=80, deadline=None)
@given(found=facts, data=st.data(), now_us=st.integers(T0, T0 + 24 * HOUR_US))
def test_any_order_and_batching_leaves_the_same_bytes_and_a_plain_recounts_value(
    name: str, found: list[Fact], data: st.DataObject, now_us: int
) -> None:
    aggregate = AGGREGATES[name]
    window, counts = window_of(aggregate), aggregate.function == "count"
    whole, piecewise = blank(window), blank(window)
    merge(window, whole, found, counts=counts)
    left = data.draw(st.permutations(found))
    while left:
        size = data.draw(st.integers(1, len(left)))
        merge(window, piecewise, left[:size], counts=counts)
        left = left[size:]
    assert whole.tobytes() == piecewise.tobytes()
    assert (whole[:, :16] == 0xAB).all()
    assert (whole[:, 16 + window.size_bytes :] == 0xAB).all()

    if name == "decayed":  # what has yet to happen weighs about as much as what just did, not more
        now_us = max([now_us, *(f.time_us for f in found)])
    got, known = window.evaluate(whole[:, 16 : 16 + window.size_bytes], now_us)
    for row in range(ROWS):
        mine = [f for f in found if f.row == row]
        wanted = recount(aggregate, mine, now_us)
        if wanted is None:
            assert known is not None
            assert not known[row]
        else:
            assert known is None or known[row]
            # A decayed weight is in 256 steps per tile; a distinct count of few is nearly exact; a float64 sum of whole millionths rounds.
            size = math.fsum(abs(f.value) for f in mine)
            slack = {"decayed": 2.1e-4 * size + 1e-6 * len(mine) + size * 2.0**-7.9, "distinct": 1}.get(name, 1e-9 + size * 1e-12)
            assert got[row] == pytest.approx(wanted, rel=1e-12, abs=slack)


@pytest.mark.parametrize("name", AGGREGATES)
def test_a_state_is_as_large_as_the_rules_count_it(name: str) -> None:
    window = window_of(AGGREGATES[name])
    assert len(window.blank()) == window.size_bytes == state_bytes(AGGREGATES[name])


@pytest.mark.parametrize("name", AGGREGATES)
def test_a_window_moves_on_although_no_event_comes(name: str) -> None:
    aggregate = AGGREGATES[name]
    window = window_of(aggregate)
    block = blank(window)
    merge(window, block, [Fact(0, T0, 4.0, 1), Fact(0, T0 + 1, 4.0, 2)], counts=aggregate.function == "count")
    state = block[:, 16 : 16 + window.size_bytes]
    before = state.tobytes()
    (now, *_), known_now = window.evaluate(state, T0 + 2)
    (later, *_), known_later = window.evaluate(state, T0 + 24 * HOUR_US)
    assert state.tobytes() == before
    assert known_now is None or known_now[0]
    assert round(now, 2) == {"count": 2, "count for ever": 2, "sum": 8, "sum for ever": 8, "distinct": 1, "decayed": 8}.get(name, 4)
    if aggregate.window_s or aggregate.half_life_s:
        assert later == 0
        assert (known_later is None) == (aggregate.function in {"count", "sum", "distinct"})
    else:
        assert later == now


def test_a_sum_beyond_int64_is_null_and_not_wrong() -> None:
    window = window_of(AGGREGATES["sum for ever"])
    block = blank(window)
    for n in range(3):
        merge(window, block, [Fact(0, T0, MAX_VALUE, n) for n in range(500)], counts=False)
        _, known = window.evaluate(block[:, 16 : 16 + window.size_bytes], T0)
        assert (known is None) == (n < 2)
    assert known is not None
    assert known.tolist() == [False, True, True]
    merge(window, block, [Fact(0, T0, -MAX_VALUE, n) for n in range(1500)], counts=False)
    assert window.evaluate(block[:, 16 : 16 + window.size_bytes], T0)[1].tolist() == [False, True, True]  # type: ignore[union-attr]


def test_a_decayed_count_is_true_to_its_stated_error() -> None:
    half_life_s = 7200.0
    window = window_of(Aggregate(function="sum", events=("view",), value="value", half_life_s=half_life_s))
    rng = np.random.default_rng(5)
    found = [Fact(0, int(T0 + at), 1.0, n) for n, at in enumerate(rng.integers(0, 24 * HOUR_US, 5_000))]
    block = blank(window)
    merge(window, block, found, counts=False)
    now_us = T0 + 24 * HOUR_US
    true = math.fsum(2 ** (-(now_us - f.time_us) / 1e6 / half_life_s) for f in found)
    assert window.evaluate(block[:, 16 : 16 + window.size_bytes], now_us)[0][0] == pytest.approx(true, rel=0.005)
    for fact in found[:50]:  # each alone, as young as it can be
        alone = blank(window)
        merge(window, alone, [fact], counts=False)
        got = window.evaluate(alone[:, 16 : 16 + window.size_bytes], fact.time_us)[0][0]
        assert got == pytest.approx(1.0, rel=2.1e-4)
