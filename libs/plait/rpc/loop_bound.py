"""How many calls a process may have under way so that its event loop keeps up, found by watching the loop.

Where CPU is what is short, calls wait in the loop before anybody looks at them, and no limit that they meet later helps: all of them are late.
So fewer are let in, and the others are refused before they cost anything.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Final

_EVERY_S: Final = 0.02
_SAMPLES: Final = 5  # a step, or as many as were late for so long in all:
_STEP_S: Final = 0.1
_LATE_S: Final = 0.02  # that a turn of the loop may take before fewer calls are let in
_SOON_S: Final = 0.01  # below which more are
_MOST_SHRUNK: Final = 0.5
_GROW: Final = 1.1
_LEAST: Final = 32


class LoopBound:
    """Run `run` on the loop that is watched; `takes` says whether one more call is let in, `most` how many may be under way now.

    Multiplicative decrease, by how late it is, from what is under way, and increase while turns are short, whether or not it is used: a calm time forgets.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._least = min(_LEAST, limit)
        self._late_s: list[float] = []
        self._most = float(limit)
        self._in_flight = 0

    def __repr__(self) -> str:
        return f"<LoopBound {self.most} of {self._limit}>"

    @property
    def most(self) -> int:
        """How many calls may be under way now."""
        return int(self._most)

    def takes(self, in_flight: int) -> bool:
        """Whether one more call is let in where so many are under way. From any thread."""
        self._in_flight = in_flight
        return in_flight < self._most

    async def run(self) -> None:
        """Watch the loop, for ever."""
        while True:
            asked_s = time.perf_counter()
            await asyncio.sleep(_EVERY_S)
            self.hear(time.perf_counter() - asked_s - _EVERY_S)

    def hear(self, late_s: float) -> None:
        """Hear how late a timer went off, which is about as long as a turn of the loop takes."""
        self._late_s.append(late_s)
        if len(self._late_s) < _SAMPLES and sum(self._late_s) < _STEP_S:
            return
        late_s = statistics.median(self._late_s)  # (one short stall is no overload)
        self._late_s.clear()
        if late_s > _LATE_S:
            shrunk = max(_MOST_SHRUNK, _LATE_S / late_s) * min(self._most, float(self._in_flight))
            self._most = max(float(self._least), shrunk)
        elif late_s < _SOON_S:
            self._most = min(float(self._limit), _GROW * self._most)
