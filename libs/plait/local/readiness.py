"""Waiting until a server that we started answers, or saying why it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from plait.errors import Unavailable
from plait.local.child import Child

START_FAILED: Final = "LOCAL_START_FAILED"
_FIRST_PAUSE_S: Final = 0.005
_LONGEST_PAUSE_S: Final = 0.1


async def until_ready(child: Child, probe: Callable[[], Awaitable[bool]], *, timeout_s: float) -> None:
    """Ask `probe` until it says yes.

    Raises Unavailable (LOCAL_START_FAILED) with the end of the log if the child dies or time is up; then it is killed.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await _poll(child, probe)
    except TimeoutError:
        await child.stop(grace_s=0)
        raise start_failed(child, f"was not ready within {timeout_s:g} s") from None
    except BaseException:
        await child.stop(grace_s=0)
        raise


async def _poll(child: Child, probe: Callable[[], Awaitable[bool]]) -> None:
    pause_s = _FIRST_PAUSE_S
    while not await probe():
        if not child.running:
            raise start_failed(child, f"ended with status {child.returncode} before it was ready")
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)


def start_failed(child: Child, what: str) -> Unavailable:
    """Return the error for a child that did not come up: what happened, the end of its log, where the rest is."""
    tail = child.log_tail()
    said = f"; it said:\n{tail}" if tail else " and said nothing"
    return Unavailable(f"{child.name} {what}{said}\n(log: {child.log})", reason=START_FAILED)
