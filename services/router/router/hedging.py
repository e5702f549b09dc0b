"""Asking a second endpoint when the first one is late (Dean and Barroso, "The Tail at Scale", CACM 2013), within a share of all calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")
_MOST_TOKENS: Final = 10.0


class HedgeBudget:
    """How many second calls are allowed: `share` of a call for each call, and ten saved up at most."""

    __slots__ = ("_tokens",)

    def __init__(self) -> None:
        self._tokens = 1.0

    def __repr__(self) -> str:
        return f"<HedgeBudget {self._tokens:.2f}>"

    def earn(self, share: float) -> None:
        """A call begins."""
        self._tokens = min(_MOST_TOKENS, self._tokens + share)

    def spend(self) -> bool:
        """Take a second call out of the budget; False when there is none left."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


async def first_of(first: Coroutine[Any, Any, T], after_s: float, second: Callable[[], Coroutine[Any, Any, T] | None]) -> T:
    """Return the answer of `first`, or, when it has not come after `after_s`, of whichever of it and `second()` is answered first.

    `second` may say None: no second call. One that fails loses to one that answers; when both fail, what the first raised is raised. The loser
    is cancelled, and waited for, before this returns.
    """
    tasks = [asyncio.create_task(first, name="first call")]
    try:
        await asyncio.wait(tasks, timeout=after_s)
        other = None if tasks[0].done() else second()
        if other is not None:
            tasks.append(asyncio.create_task(other, name="second call"))
        waiting = set(tasks)
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task in done and not task.cancelled() and task.exception() is None:
                    return task.result()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
