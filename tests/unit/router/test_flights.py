"""One piece of work for all who ask the same: nobody's leaving, deadline or failure reaches another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from plait.rpc.deadline import Deadline
from router.flights import Flights

NEVER = Deadline.never()


class Work:
    """Work that ends when the test says so."""

    def __init__(self) -> None:
        self.runs = 0
        self.cancelled = 0
        self.ends: list[asyncio.Future[str]] = []

    async def __call__(self) -> str:
        self.runs += 1
        end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ends.append(end)
        try:
            return await end
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def callers(flights: Flights[str], work: Callable[[], object], count: int) -> list[asyncio.Task[tuple[str, bool]]]:
    tasks = [asyncio.create_task(flights.fly("k", work, NEVER), name=f"caller {n}") for n in range(count)]  # type: ignore[arg-type]
    await settle()
    return tasks


@given(
    leaving=st.lists(st.integers(0, 7), unique=True, max_size=8),
    fails=st.booleans(),
)
async def test_work_runs_once_whoever_leaves(leaving: list[int], fails: bool) -> None:
    flights: Flights[str] = Flights()
    work = Work()
    tasks = await callers(flights, work, 8)
    assert work.runs == 1
    for index in leaving:
        tasks[index].cancel()
    await settle()

    staying = [task for n, task in enumerate(tasks) if n not in leaving]
    assert work.cancelled == (not staying)
    if staying:
        if fails:
            work.ends[0].set_exception(Unavailable("away"))
        else:
            work.ends[0].set_result("made")
    ended = await asyncio.gather(*tasks, return_exceptions=True)

    for n, outcome in enumerate(ended):
        if n in leaving:
            assert isinstance(outcome, asyncio.CancelledError)
        elif fails:
            assert isinstance(outcome, Unavailable)
        else:
            assert outcome == ("made", n != 0)
    assert work.runs == 1
    assert repr(flights) == "<Flights under_way=0 waiting=0>"


async def test_a_caller_waits_in_its_own_time() -> None:
    flights: Flights[str] = Flights()
    work = Work()
    patient = asyncio.create_task(flights.fly("k", work, NEVER))
    await settle()
    with pytest.raises(DeadlineExceeded, match="deadline passed"):
        await flights.fly("k", work, Deadline.after(0.001))
    work.ends[0].set_result("made")
    assert await patient == ("made", False)


async def test_a_first_caller_short_of_time_does_not_fail_the_others() -> None:
    """Its work runs in its budget; who has more tries again, all together and once."""
    flights: Flights[str] = Flights()
    work = Work()
    tasks = await callers(flights, work, 4)
    work.ends[0].set_exception(DeadlineExceeded("too late"))
    await settle()
    assert work.runs == 2
    work.ends[1].set_result("made")
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[0], DeadlineExceeded)
    assert [o for o in outcomes if not isinstance(o, BaseException)] == [("made", False), ("made", True), ("made", True)]


async def test_refused_work_is_tried_twice_at_most() -> None:
    """Else each of a thousand callers of an overloaded model would ask it in turn."""
    flights: Flights[str] = Flights()
    work = Work()
    tasks = await callers(flights, work, 20)
    for turn in range(2):
        work.ends[turn].set_exception(ResourceExhausted("full", reason="OVERLOADED"))
        await settle()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert work.runs == 2
    assert all(isinstance(outcome, ResourceExhausted) for outcome in outcomes)


async def test_a_failure_is_not_kept() -> None:
    flights: Flights[str] = Flights()
    work = Work()
    tasks = await callers(flights, work, 1)
    work.ends[0].set_exception(Unavailable("away"))
    await asyncio.gather(*tasks, return_exceptions=True)
    again = await callers(flights, work, 1)
    work.ends[1].set_result("made")
    assert await again[0] == ("made", False)


async def test_what_is_made_anew_goes_on_though_nobody_waits() -> None:
    flights: Flights[str] = Flights()
    work = Work()
    flights.refresh("k", work)
    flights.refresh("k", work)
    await settle()
    guest = asyncio.create_task(flights.fly("k", work, NEVER))
    await settle()
    guest.cancel()
    await settle()
    assert (work.runs, work.cancelled) == (1, 0)
    assert "k" in flights
    work.ends[0].set_result("made")
    await settle()
    assert "k" not in flights


async def test_who_comes_while_abandoned_work_ends_starts_anew() -> None:
    """The task is cancelled, but not over yet: nobody may board it."""
    flights: Flights[str] = Flights()
    work = Work()
    first = (await callers(flights, work, 1))[0]
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = (await callers(flights, work, 1))[0]
    work.ends[1].set_result("made")
    assert await second == ("made", False)


async def test_close_ends_what_is_under_way() -> None:
    flights: Flights[str] = Flights()
    work = Work()
    flights.refresh("k", work)
    await settle()
    await flights.close()
    assert work.cancelled == 1
    assert "k" not in flights
