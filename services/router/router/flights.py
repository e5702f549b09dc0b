"""Callers who ask the same at the same time are answered by one piece of work, which belongs to none of them.

Without it, an answer that many wait for and that has just run out is made anew by each of them at once (a stampede).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Final, Generic, TypeVar

from plait.errors import DeadlineExceeded, PlaitError, ResourceExhausted
from plait.rpc.deadline import Deadline
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

V = TypeVar("V")
_ROUNDS: Final = 2  # flights that one caller sees fail for want of another caller's time: where all fail, work is doubled, not multiplied


class _Flight(Generic[V]):
    """Work under way, and who waits for it; one that is `wanted` goes on although nobody does."""

    __slots__ = ("task", "waiting", "wanted")

    def __init__(self, task: asyncio.Task[V], *, wanted: bool) -> None:
        self.task = task
        self.wanted = wanted
        self.waiting: dict[asyncio.Future[V], None] = {}  # in the order they came


class Flights(Generic[V]):
    """Work under way, by what is asked. It runs in a task of its own with the budget that its first caller gives it.

    Whoever comes later waits for it in its own time. A caller that leaves takes nothing with it; when nobody waits any more the work is
    cancelled. A failure is told to all who wait and is not kept.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[V]] = {}
        self._tasks: set[asyncio.Task[V]] = set()  # those that were cancelled included, until they are over

    def __repr__(self) -> str:
        return f"<Flights under_way={len(self._flights)} waiting={sum(len(flight.waiting) for flight in self._flights.values())}>"

    async def fly(self, key: Hashable, make: Callable[[], Awaitable[V]], deadline: Deadline) -> tuple[V, bool]:
        """Return what `make` makes, and whether another caller had it made.

        Raises what `make` raises, and DeadlineExceeded when the caller's own time is up. A flight that ran out of its first caller's time,
        or was refused for that caller's sake, says nothing of those who have more: they try once more, again together.
        """
        for round_ in range(1, _ROUNDS + 1):
            flight = self._flights.get(key)
            led = flight is None
            if flight is None:
                flight = self._start(key, make, wanted=False)
            try:
                return await self._wait(key, flight, deadline), not led
            except (DeadlineExceeded, ResourceExhausted):
                if led or round_ == _ROUNDS or deadline.expired:
                    raise
        raise AssertionError  # the last round returns or raises

    def refresh(self, key: Hashable, make: Callable[[], Awaitable[V]]) -> None:
        """Have `make` run for whoever asks next, unless it is under way; its failure is logged."""
        if key not in self._flights:
            self._start(key, make, wanted=True)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._flights

    async def close(self) -> None:
        """Cancel what is under way, and wait until it is over."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, key: Hashable, make: Callable[[], Awaitable[V]], *, wanted: bool) -> _Flight[V]:
        task = asyncio.get_running_loop().create_task(_run(make), name="shared answer")
        flight = _Flight(task, wanted=wanted)
        self._flights[key] = flight
        self._tasks.add(task)
        task.add_done_callback(lambda _: self._land(key, flight))
        return flight

    async def _wait(self, key: Hashable, flight: _Flight[V], deadline: Deadline) -> V:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[V] = loop.create_future()
        flight.waiting[turn] = None
        timer = None if deadline.at_s == float("inf") else loop.call_later(deadline.remaining_s(), _too_late, turn)
        try:
            return await turn
        finally:
            if timer is not None:
                timer.cancel()
            del flight.waiting[turn]
            if not (flight.waiting or flight.wanted or flight.task.done()):
                self._leave(key, flight)
                flight.task.cancel()

    def _land(self, key: Hashable, flight: _Flight[V]) -> None:
        task = flight.task
        self._tasks.discard(task)
        self._leave(key, flight)
        error = None if task.cancelled() else task.exception()
        if error is not None and not flight.waiting and flight.wanted:
            # What the caller must not be told twice, an operator may want to know once.
            log.warning("an answer could not be made anew", error=error.reason if isinstance(error, PlaitError) else type(error).__name__)
        for turn in flight.waiting:
            if turn.done():
                continue
            if task.cancelled():
                turn.cancel()
            elif error is not None:
                turn.set_exception(error)
            else:
                turn.set_result(task.result())

    def _leave(self, key: Hashable, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


async def _run(make: Callable[[], Awaitable[V]]) -> V:
    return await make()


def _too_late(turn: asyncio.Future[V]) -> None:
    if not turn.done():
        turn.set_exception(DeadlineExceeded("the deadline passed while the answer was being made: allow the call more time"))
