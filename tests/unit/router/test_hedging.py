"""One answer comes back, whoever gives it; the other call is cancelled; and second calls stay a share."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.hedging import HedgeBudget, first_of


@given(share=st.floats(0.001, 0.2), calls=st.integers(1, 3000))
def test_second_calls_are_at_most_the_share_and_one(share: float, calls: int) -> None:
    budget, spent = HedgeBudget(), 0
    for _ in range(calls):
        budget.earn(share)
        spent += budget.spend()
    assert spent <= 1 + share * calls


def test_ten_are_saved_up_at_most() -> None:
    budget = HedgeBudget()
    for _ in range(100_000):
        budget.earn(0.2)
    assert sum(budget.spend() for _ in range(100)) == 10
    assert repr(budget) == "<HedgeBudget 0.00>"


class Call:
    """A call that ends when told to."""

    def __init__(self) -> None:
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.cancelled = False

    async def __call__(self) -> str:
        try:
            return await self.end
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def test_an_answer_in_time_makes_no_second_call() -> None:
    first = Call()
    first.end.set_result("first")
    assert await first_of(first(), 10.0, lambda: pytest.fail("nobody was late")) == "first"


@pytest.mark.parametrize("winner", [0, 1])
async def test_the_first_answer_wins_and_the_other_is_cancelled(winner: int) -> None:
    calls = Call(), Call()

    def second() -> Coroutine[Any, Any, str]:
        calls[winner].end.set_result("won")
        return calls[1]()

    assert await first_of(calls[0](), 0.0, second) == "won"
    if winner == 1:
        assert calls[0].cancelled


async def both(calls: tuple[Call, Call]) -> asyncio.Task[str]:
    """Return the race once both calls are under way."""
    begun = asyncio.Event()

    def second() -> Coroutine[Any, Any, str]:
        begun.set()
        return calls[1]()

    running = asyncio.create_task(first_of(calls[0](), 0.0, second))
    await begun.wait()
    await asyncio.sleep(0)
    return running


async def test_one_that_fails_loses_to_one_that_answers() -> None:
    calls = Call(), Call()
    running = await both(calls)
    calls[0].end.set_exception(ValueError("first"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not running.done()
    calls[1].end.set_result("second")
    assert await running == "second"


async def test_when_both_fail_the_first_ones_reason_is_told() -> None:
    calls = Call(), Call()
    running = await both(calls)
    calls[1].end.set_exception(KeyError("second"))
    calls[0].end.set_exception(ValueError("first"))
    with pytest.raises(ValueError, match="first"):
        await running


async def test_one_that_fails_before_it_is_late_is_not_asked_again_here() -> None:
    first = Call()
    first.end.set_exception(ValueError("first"))
    with pytest.raises(ValueError, match="first"):
        await first_of(first(), 10.0, lambda: pytest.fail("that is for retries"))


async def test_without_a_second_call_the_first_is_waited_for() -> None:
    first = Call()
    running = asyncio.create_task(first_of(first(), 0.0, lambda: None))
    for _ in range(5):
        await asyncio.sleep(0)
    first.end.set_result("late")
    assert await running == "late"


async def test_a_caller_that_leaves_takes_both_along() -> None:
    calls = Call(), Call()
    running = await both(calls)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert calls[0].cancelled
    assert calls[1].end.cancelled()
