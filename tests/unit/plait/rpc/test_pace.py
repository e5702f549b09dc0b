from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.rpc.pace import Pace


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


async def paced(rows_per_s: float, pieces: list[int]) -> float:
    """Return how long it took to be given these many rows each."""
    clock = Clock()
    pace = Pace(rows_per_s, lambda: clock.now_s, clock.sleep)
    for rows in pieces:
        await pace.take(rows)
    return clock.now_s - 100.0


async def test_rows_come_at_their_rate_after_the_first_second() -> None:
    assert await paced(100, [100] * 11) == pytest.approx(10)
    assert await paced(0, [10**9] * 3) == 0


async def test_a_pause_earns_one_second_and_no_more() -> None:
    clock = Clock()
    pace = Pace(100, lambda: clock.now_s, clock.sleep)
    await pace.take(100)
    clock.now_s += 3600
    before = clock.now_s
    for _ in range(3):
        await pace.take(100)
    assert clock.now_s - before == pytest.approx(2)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=20), st.integers(1, 1000))
async def test_never_faster_than_it_may(pieces: list[int], rows_per_s: int) -> None:
    assert await paced(rows_per_s, pieces) >= (sum(pieces) - rows_per_s) / rows_per_s - 1e-6
