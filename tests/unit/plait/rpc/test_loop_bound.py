"""Fewer calls while the loop is late, more once it is not; and a real loop that is kept busy is found out."""

from __future__ import annotations

import asyncio
import time

from hypothesis import given
from hypothesis import strategies as st

from plait.rpc.loop_bound import LoopBound


def heard(bound: LoopBound, late_s: float, times: int = 5) -> int:
    for _ in range(times):
        bound.hear(late_s)
    return bound.most


def test_while_turns_are_short_as_many_are_let_in_as_settings_say() -> None:
    bound = LoopBound(100)
    assert heard(bound, 0.0, 100) == 100
    assert bound.takes(99)
    assert not bound.takes(100)
    assert repr(bound) == "<LoopBound 100 of 100>"


def test_a_late_loop_lets_in_fewer_than_are_under_way() -> None:
    bound = LoopBound(1000)
    bound.takes(200)
    assert heard(bound, 0.025) == 160
    bound.takes(150)
    assert heard(bound, 0.2, 1) == 75  # as late as that nobody asks five times
    assert not bound.takes(75)
    assert bound.takes(74)


def test_one_stall_changes_nothing_and_a_turn_in_between_neither() -> None:
    bound = LoopBound(1000)
    bound.takes(200)
    for late_s in (0.0, 0.08, 0.0, 0.0, 0.0):
        bound.hear(late_s)
    assert bound.most == 1000
    assert heard(bound, 0.015) == 1000


def test_calm_forgets() -> None:
    bound = LoopBound(1000)
    bound.takes(100)
    assert heard(bound, 1.0, 1) == 50
    assert heard(bound, 0.0, 5 * 35) == 1000


@given(st.integers(1, 2000), st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 10)), max_size=100))
def test_the_bounds_hold(limit: int, steps: list[tuple[int, float]]) -> None:
    bound = LoopBound(limit)
    for in_flight, late_s in steps:
        bound.takes(in_flight)
        bound.hear(late_s)
        assert min(32, limit) <= bound.most <= limit


async def test_a_loop_that_is_kept_busy_is_found_out() -> None:
    bound = LoopBound(1000)
    watching = asyncio.create_task(bound.run(), name="loop bound")
    bound.takes(500)
    async with asyncio.timeout(30):
        while bound.most == 1000:
            until_s = time.perf_counter() + 0.2
            while time.perf_counter() < until_s:
                pass
            await asyncio.sleep(0)
    assert bound.most == 250
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
