"""Holds a long piece of work to so many rows a second, so that it takes what is left over and nobody waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


class Pace:
    """Hands out rows at `rows_per_s`, 0 = as fast as they are asked for. One second's worth may be taken at once after a pause."""

    def __init__(
        self,
        rows_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rows_per_s = rows_per_s
        self._clock = clock
        self._sleep = sleep
        self._paid_until = 0.0  # when the rows handed out so far will have been due

    def __repr__(self) -> str:
        return f"<Pace {self._rows_per_s:g} rows/s>"

    async def take(self, rows: int) -> None:
        """Wait until so many more rows are due. For one task."""
        if self._rows_per_s <= 0:
            return
        now = self._clock()
        self._paid_until = max(self._paid_until, now - 1.0) + rows / self._rows_per_s
        if self._paid_until > now:
            await self._sleep(self._paid_until - now)
