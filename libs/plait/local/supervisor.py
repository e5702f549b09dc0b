"""Keeping a process running: started again when it ends unasked, later and later, and not for ever."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NoReturn

from plait.errors import PlaitError
from plait.local.child import Child
from plait.local.readiness import start_failed

Report = Callable[[str, str], None]  # (name of the part, what became of it)


@dataclass(slots=True)
class Restarts:
    """Decides when to try again: pauses double from the first to the longest; more than `limit` ends within `within_s` are too many."""

    limit: int = 5
    within_s: float = 60.0
    first_pause_s: float = 0.2
    longest_pause_s: float = 5.0
    _ends: deque[float] = field(default_factory=deque)

    def after_end(self, now_s: float) -> float | None:
        """Return how long to wait before the next start, or None to give up; `now_s` on a clock that never goes back."""
        self._ends.append(now_s)
        while self._ends[0] < now_s - self.within_s:
            self._ends.popleft()
        if len(self._ends) > self.limit:
            return None
        return min(self.longest_pause_s, self.first_pause_s * 2.0 ** (len(self._ends) - 1))


async def supervise(
    name: str, child: Child, start: Callable[[], Awaitable[Child]], report: Report, restarts: Restarts | None = None
) -> NoReturn:
    """Watch `child` and start it again with `start` whenever it ends; cancel this before you end the child yourself.

    Raises Unavailable (LOCAL_START_FAILED) with the end of its log once it ends too often.
    """
    restarts = restarts or Restarts()
    while True:
        status = await child.wait()
        pause_s = restarts.after_end(time.monotonic())
        if pause_s is None:
            raise start_failed(child, f"ended with status {status}, again and again")
        report(name, f"ended with status {status}; starting it again in {pause_s:g} s")
        await asyncio.sleep(pause_s)
        try:
            child = await start()
        except PlaitError as error:
            report(name, error.message)  # what was started is gone again; the next turn counts it as one more end
        else:
            report(name, "is up again")
