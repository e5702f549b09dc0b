"""Who gets in, who waits and who is sent away; on a loop whose clock is moved by hand."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from plait.errors import DeadlineExceeded, PlaitError, ResourceExhausted
from plait.rpc.deadline import Deadline
from router.admission import Admission
from router.settings import AdmissionSettings


class Timers:
    """Stands in for `loop.call_later`: what was asked for is kept, and goes off when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[float, Any, tuple[Any, ...]]] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._call_later)

    def _call_later(self, delay_s: float, callback: Any, *arguments: Any) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        self.asked.append((delay_s, callback, arguments))
        return asyncio.TimerHandle(loop.time() + delay_s, callback, arguments, loop)

    @property
    def delays_s(self) -> list[float]:
        return [delay_s for delay_s, _, _ in self.asked]

    def go_off(self, index: int = 0) -> None:
        _, callback, arguments = self.asked[index]
        callback(*arguments)


def admission(limit: int = 1, queue: int = 8, **more: Any) -> Admission:
    return Admission(AdmissionSettings(limit=limit, queue=queue, **{"max_wait_s": 30.0, **more}))


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def waiting(door: Admission, count: int, deadline: Deadline | None = None) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(door.enter(deadline or Deadline.never()), name=f"guest {n}") for n in range(count)]
    await settle()
    return tasks


def inside(tasks: list[asyncio.Task[None]]) -> list[int]:
    return [n for n, task in enumerate(tasks) if task.done() and not task.cancelled() and task.exception() is None]


async def refused(door: Admission, deadline: Deadline | None = None) -> PlaitError:
    with pytest.raises(PlaitError) as caught:
        await door.enter(deadline or Deadline.never())
    return caught.value


async def test_as_many_as_the_limit_get_in_at_once() -> None:
    door = admission(limit=3)
    for _ in range(3):
        await asyncio.wait_for(door.enter(Deadline.never()), 5)
    assert repr(door) == "<Admission in_flight=3/3 waiting=0/8>"
    [task] = await waiting(door, 1)
    assert not task.done()
    assert repr(door) == "<Admission in_flight=3/3 waiting=1/8>"
    door.leave()
    await task
    assert repr(door) == "<Admission in_flight=3/3 waiting=0/8>"
    for _ in range(3):
        door.leave()
    assert repr(door) == "<Admission in_flight=0/3 waiting=0/8>"


async def test_first_come_first_served() -> None:
    door = admission()
    await door.enter(Deadline.never())
    guests = await waiting(door, 3)
    for served in range(3):
        assert inside(guests) == list(range(served))
        door.leave()
        await settle()
    assert inside(guests) == [0, 1, 2]


async def test_who_comes_while_others_wait_does_not_overtake_them() -> None:
    door = admission()
    await door.enter(Deadline.never())
    guests = await waiting(door, 1)
    door.leave()  # the place is the guest's, who has not yet run
    guests += await waiting(door, 1)
    assert inside(guests) == [0]
    door.leave()
    await settle()
    assert inside(guests) == [0, 1]


@pytest.mark.parametrize("queue", [0, 2])
async def test_beyond_the_queue_everyone_is_sent_away_at_once_with_a_time_to_come_back(queue: int) -> None:
    door = admission(queue=queue, retry_after_s=0.25)
    await door.enter(Deadline.never())
    guests = await waiting(door, queue)
    error = await refused(door)
    assert isinstance(error, ResourceExhausted)
    assert (error.reason, error.retry_after_s) == ("OVERLOADED", 0.25)
    assert error.message == f"the router is at its limit of 1 requests and {queue} are waiting already: retry in 250 ms"
    assert repr(door) == f"<Admission in_flight=1/1 waiting={queue}/{queue}>"
    for _ in range(queue):
        door.leave()
    await asyncio.gather(*guests)


async def test_too_long_a_wait_is_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    door = admission(max_wait_s=0.5)
    await door.enter(Deadline.never())
    timers = Timers(monkeypatch)
    [guest] = await waiting(door, 1)
    assert timers.delays_s == [0.5]
    timers.go_off()
    with pytest.raises(ResourceExhausted, match="the wait took too long") as caught:
        await guest
    assert caught.value.reason == "OVERLOADED"
    assert caught.value.retry_after_s is not None
    assert repr(door) == "<Admission in_flight=1/1 waiting=0/8>"


async def test_nobody_waits_into_the_time_the_answer_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    door = admission(min_budget_s=1.0)
    await door.enter(Deadline.never())
    timers = Timers(monkeypatch)
    [guest] = await waiting(door, 1, Deadline.after(6.0))
    assert 0 < timers.delays_s[0] <= 5.0
    timers.go_off()
    with pytest.raises(DeadlineExceeded) as caught:
        await guest
    assert caught.value.reason == "BUDGET_TOO_SMALL"


@pytest.mark.parametrize("left_s", [-1.0, 0.0, 0.9])
async def test_a_budget_that_is_too_small_is_refused_though_there_is_a_place(left_s: float) -> None:
    door = admission(min_budget_s=1.0)
    error = await refused(door, Deadline.after(left_s))
    assert isinstance(error, DeadlineExceeded)
    assert error.reason == "BUDGET_TOO_SMALL"
    assert "1000 ms" in error.message
    assert error.retry_after_s is None
    assert repr(door) == "<Admission in_flight=0/1 waiting=0/8>"


async def test_a_large_enough_budget_is_let_in() -> None:
    door = admission(min_budget_s=1.0)
    await door.enter(Deadline.after(30.0))
    assert repr(door) == "<Admission in_flight=1/1 waiting=0/8>"


async def test_without_a_floor_only_a_passed_deadline_is_refused() -> None:
    door = admission(limit=2, min_budget_s=0.0)
    await door.enter(Deadline(math.inf))
    assert isinstance(await refused(door, Deadline.after(-0.001)), DeadlineExceeded)


async def test_who_gives_up_waiting_leaves_the_queue() -> None:
    door = admission()
    await door.enter(Deadline.never())
    first, second = await waiting(door, 2)
    first.cancel()
    await settle()
    assert repr(door) == "<Admission in_flight=1/1 waiting=1/8>"
    door.leave()
    await second


async def test_a_turn_that_comes_in_the_moment_its_guest_leaves_goes_to_the_next() -> None:
    door = admission()
    await door.enter(Deadline.never())
    first, second = await waiting(door, 2)
    door.leave()
    first.cancel()  # has its turn, and has not run yet
    await settle()
    assert first.cancelled()
    assert inside([first, second]) == [1]
    door.leave()
    assert repr(door) == "<Admission in_flight=0/1 waiting=0/8>"


async def test_a_turn_is_not_given_to_who_was_told_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    door = admission()
    await door.enter(Deadline.never())
    timers = Timers(monkeypatch)
    first, second = await waiting(door, 2)
    timers.go_off(0)
    door.leave()  # in the same turn of the loop
    await settle()
    assert isinstance(first.exception(), ResourceExhausted)
    assert inside([first, second]) == [1]


async def test_a_time_limit_that_passes_after_the_turn_came_takes_nothing_away(monkeypatch: pytest.MonkeyPatch) -> None:
    door = admission()
    await door.enter(Deadline.never())
    timers = Timers(monkeypatch)
    [guest] = await waiting(door, 1)
    door.leave()
    timers.go_off()
    await guest
    assert repr(door) == "<Admission in_flight=1/1 waiting=0/8>"


async def test_whatever_happens_no_place_is_lost() -> None:
    door = admission(limit=3, queue=50)
    guests: list[asyncio.Task[None]] = []

    async def stay(turns: int) -> None:
        await door.enter(Deadline.never())
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
        finally:
            door.leave()

    for n in range(50):
        guests.append(asyncio.create_task(stay(20), name=f"guest {n}"))
        await asyncio.sleep(0)
        if n % 3 == 0:
            guests[n // 2].cancel()  # most of them wait
            guests[n // 8].cancel()  # most of them are inside
    await asyncio.gather(*guests, return_exceptions=True)
    assert any(g.cancelled() for g in guests)
    assert repr(door) == "<Admission in_flight=0/3 waiting=0/50>"


async def test_knocking_takes_no_place_and_refuses_what_could_not_enter() -> None:
    door = admission(limit=1, queue=1)
    door.knock(Deadline.never())
    await door.enter(Deadline.never())
    door.knock(Deadline.never())  # somebody may still wait
    tasks = await waiting(door, 1)
    with pytest.raises(ResourceExhausted, match="1 are waiting already"):
        door.knock(Deadline.never())
    with pytest.raises(DeadlineExceeded):
        door.knock(Deadline.after(0))
    door.leave()
    await settle()
    assert inside(tasks) == [0]
    door.knock(Deadline.never())
