"""What routers keep for each other: values in Redis, read in a few milliseconds or not at all, written beside the answer.

A second level and never a need: while Redis is away, or slow, a router does as if it were alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from plait.errors import Unavailable
from plait.redis.commands import pack
from plait.redis.connections import Refusal, refused, unavailable
from plait.redis.dispatch import Dispatch, Missing, late
from plait.redis.script import Script
from plait.telemetry.logging import get_logger
from plait.telemetry.metrics import Metrics

log = get_logger(__name__)

AWAY_S: Final = 1.0  # after a failure nothing is asked for so long
_MOST_WRITES: Final = 256  # under way at once; more are left out
_WRITE_TIMEOUT_S: Final = 1.0
_RELEASE: Final = Script(b"if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0")


class RedisLevel:
    """Values by key, each with a time to live. `budget_s` bounds a read that somebody waits for."""

    def __init__(self, dispatch: Dispatch, metrics: Metrics, budget_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._dispatch = dispatch
        self._budget_s = budget_s
        self._clock = clock
        self._away_until_s = 0.0
        self._writes: set[asyncio.Task[None]] = set()
        self._failed = metrics.counter("plait_router_redis_failures", "reads and writes of shared values that did not work", ("what",))

    def __repr__(self) -> str:
        return f"<RedisLevel {'away' if self._clock() < self._away_until_s else 'there'} writes={len(self._writes)}>"

    async def get(self, key: bytes) -> tuple[bytes, float] | None:
        """Return a value and how long it still lives, seconds; None where there is none or Redis does not answer in time."""
        try:
            value, left_ms = await self._ask(key, [pack(b"GET", [key]), pack(b"PTTL", [key])], self._budget_s)
        except Unavailable:
            return None
        return (value, left_ms / 1000) if isinstance(value, bytes) and left_ms > 0 else None

    async def claim(self, key: bytes, value: bytes, ttl_s: float) -> bytes | None:
        """Put a value where there is none; return the one that is there already, None where this one is there now. Raises Unavailable."""
        arguments = [key, value, b"NX", b"GET", b"PX", _milliseconds(ttl_s)]
        (found,) = await self._ask(key, [pack(b"SET", arguments)], self._budget_s)
        return found if isinstance(found, bytes) else None

    def put(self, key: bytes, value: bytes, ttl_s: float) -> None:
        """Put a value beside what is being done; one that cannot be written is left out."""
        self._later(key, pack(b"SET", [key, value, b"PX", _milliseconds(ttl_s)]))

    def release(self, key: bytes, value: bytes) -> None:
        """Remove a value beside what is being done, where it is still this one."""
        self._later(key, _RELEASE.call([key], [value]), _RELEASE)

    async def close(self) -> None:
        """Let what is being written be written."""
        await asyncio.gather(*self._writes, return_exceptions=True)

    def _later(self, key: bytes, command: bytes, script: Script | None = None) -> None:
        if len(self._writes) >= _MOST_WRITES or self._clock() < self._away_until_s:
            self._failed.labels("write").inc()
            return
        task = asyncio.get_running_loop().create_task(self._write(key, command, script), name="shared value")
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _write(self, key: bytes, command: bytes, script: Script | None) -> None:
        try:
            await self._ask(key, [command], _WRITE_TIMEOUT_S, script)
        except Unavailable:
            self._failed.labels("write").inc()

    async def _ask(self, key: bytes, commands: Sequence[bytes], budget_s: float, script: Script | None = None) -> list[Any]:
        if self._clock() < self._away_until_s:
            raise unavailable()
        replies = late(len(commands))
        try:
            async with asyncio.timeout(budget_s):
                await self._dispatch.run([key] * len(commands), commands, replies, script=script)
        except TimeoutError as error:
            raise self._gone() from error
        except Unavailable as error:
            raise self._gone() from error
        for reply in replies:
            if isinstance(reply, Missing):
                raise self._gone()
            if isinstance(reply, Refusal):
                raise refused(reply)
        return replies

    def _gone(self) -> Unavailable:
        if self._clock() >= self._away_until_s:
            self._failed.labels("away").inc()
            log.warning("what routers share cannot be had: each does as if it were alone")
        self._away_until_s = self._clock() + AWAY_S
        return unavailable()


def _milliseconds(seconds: float) -> bytes:
    return b"%d" % max(1, int(seconds * 1000))
