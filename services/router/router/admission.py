"""How much work the router takes on: a limit, a short queue, and an early, cheap answer to everything beyond.

gRPC's own `maximum_concurrent_rpcs` refuses without a reason or a time to come back, and never lets a short burst wait.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from plait.errors import DeadlineExceeded, ResourceExhausted
from plait.rpc.deadline import Deadline
from router.settings import AdmissionSettings


class Admission:
    """Lets `limit` requests in at once; up to `queue` more wait their turn, first come first served, at most `max_wait_s` each.

    Every `enter` that returned is followed by one `leave`.
    """

    def __init__(self, settings: AdmissionSettings) -> None:
        self._settings = settings
        self._free = settings.limit
        self._waiting: deque[asyncio.Future[None]] = deque()

    def __repr__(self) -> str:
        taken = self._settings.limit - self._free
        return f"<Admission in_flight={taken}/{self._settings.limit} waiting={len(self._waiting)}/{self._settings.queue}>"

    @property
    def load(self) -> float:
        """The share of the places that are taken."""
        return 1 - self._free / self._settings.limit

    def knock(self, deadline: Deadline) -> None:
        """Raise at once what `enter` would raise without a wait."""
        if deadline.remaining_s() < self._settings.min_budget_s:
            raise self._too_late()
        if not self._free and len(self._waiting) >= self._settings.queue:
            raise self._full()

    async def enter(self, deadline: Deadline) -> None:
        """Take a place; returns at once where there is one.

        Raises DeadlineExceeded (BUDGET_TOO_SMALL) when less than `min_budget_s` is left, now or after the wait, and ResourceExhausted
        (OVERLOADED, with when to come back) when the queue is full or the wait takes too long.
        """
        budget_s = deadline.remaining_s() - self._settings.min_budget_s
        if budget_s < 0:
            raise self._too_late()
        if self._free:
            self._free -= 1
        else:
            await self._wait(budget_s)

    def leave(self) -> None:
        """Give the place back: to whoever waits longest, if anybody does."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    async def _wait(self, budget_s: float) -> None:
        if len(self._waiting) >= self._settings.queue:
            raise self._full()
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        error = self._too_late() if budget_s < self._settings.max_wait_s else self._overloaded("the wait took too long")
        timer = loop.call_later(min(budget_s, self._settings.max_wait_s), _give_up, turn, error)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave()  # the turn came in the very moment the caller left
            raise
        finally:
            timer.cancel()
            if turn in self._waiting:
                self._waiting.remove(turn)

    def _too_late(self) -> DeadlineExceeded:
        floor_ms = self._settings.min_budget_s * 1e3
        return DeadlineExceeded(
            f"less than {floor_ms:g} ms of the deadline was left, too little to answer in: allow the call more time",
            reason="BUDGET_TOO_SMALL",
        )

    def _full(self) -> ResourceExhausted:
        return self._overloaded(f"{len(self._waiting)} are waiting already")

    def _overloaded(self, why: str) -> ResourceExhausted:
        retry_s = self._settings.retry_after_s
        return ResourceExhausted(
            f"the router is at its limit of {self._settings.limit} requests and {why}: retry in {math.ceil(retry_s * 1e3)} ms",
            reason="OVERLOADED",
            retry_after_s=retry_s,
        )


def _give_up(turn: asyncio.Future[None], error: Exception) -> None:
    if not turn.done():
        turn.set_exception(error)
