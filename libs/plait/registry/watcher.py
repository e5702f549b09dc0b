"""Keeps one process's snapshot true: LISTEN, reload, swap; and goes on from the last good one when Postgres is away.

Nothing here ever reaches a request: a snapshot is swapped whole behind one attribute, the loop outlives every fault of Postgres, and a
restart without Postgres starts from a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from plait.errors import PlaitError, Unavailable
from plait.registry import last_known_good
from plait.registry.queries import Known
from plait.registry.records import EMPTY, Snapshot
from plait.registry.store import Listener
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 10.0

Source = Literal["none", "file", "postgres"]
Subscriber = Callable[[Snapshot], None]


def backoff_s(failures: int, uniform: Callable[[float, float], float] = random.uniform) -> float:
    """Return how long to wait after so many failures in a row: doubling up to a limit, with "equal jitter" so that a fleet spreads out.

    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    ceiling = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 30))
    return ceiling / 2 + uniform(0, ceiling / 2)


class Watcher:
    """Holds `snapshot`, the registry as last seen. Run it with `async with`, or give `run()` to whoever owns the process's loops.

    `last_known_good` is written after every change and read once, when Postgres is away at the start. `poll_s`: how often the
    revision is compared besides listening, in case a notification is lost (for example behind a pooler).
    """

    def __init__(self, dsn: str, last_known_good: Path | None = None, poll_s: float = 30.0) -> None:
        self.snapshot: Snapshot = EMPTY
        self.source: Source = "none"
        self.connected = False
        self._dsn = dsn
        self._file = last_known_good
        self._poll_s = poll_s
        self._subscribers: list[Subscriber] = []
        self._ready = asyncio.Event()
        self._file_tried = False
        self._known: Known = {}
        self._failures = 0
        self._changed_at = time.monotonic()
        self._unsaved = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "connected" if self.connected else "disconnected"
        age_s = time.monotonic() - self._changed_at
        return (
            f"<Watcher {state} source={self.source} revision={self.snapshot.revision} changed={age_s:.1f}s ago failures={self._failures}>"
        )

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.run(), name="registry-watcher")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call back with every new snapshot, and at once if there is one; return how to stop.

        Callbacks run on the event loop, one after the other: they must be quick. One that raises is logged, the others still run.
        """
        self._subscribers.append(callback)
        if self.source != "none":
            self._tell(callback)
        return lambda: self._subscribers.remove(callback)

    async def first(self, timeout_s: float) -> Snapshot:
        """Return the first snapshot: from Postgres, or from the file once Postgres proves to be away or the time is up.

        Raises Unavailable (REGISTRY_UNAVAILABLE) when there is neither.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            await self._fall_back()
        if self.source == "none":
            raise Unavailable(
                f"no snapshot of the registry after {timeout_s:g} s: Postgres is away and there is no last-known-good file; check the DSN",
                reason="REGISTRY_UNAVAILABLE",
            )
        return self.snapshot

    async def run(self) -> None:
        """Watch until cancelled; no fault ends it."""
        saver = asyncio.create_task(self._save_changes(), name="registry-last-known-good")
        try:
            while True:
                await self._watch_until_it_breaks()
                await self._fall_back()
                await asyncio.sleep(backoff_s(self._failures))
        finally:
            self.connected = False
            saver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await saver

    async def _watch_until_it_breaks(self) -> None:
        try:
            async with Listener.open(self._dsn, self._known) as listener:
                await self._watch(listener)
        except PlaitError as error:
            self._failed(error.reason, error.message)
        except Exception as error:
            self._failed("REGISTRY_WATCH_FAULT", f"unexpected {type(error).__name__}", with_trace=True)
        finally:
            self.connected = False

    async def _watch(self, listener: Listener) -> None:
        self._swap(await listener.snapshot())  # after LISTEN: nothing can be missed in between
        self.connected = True
        if self._failures:
            log.info("registry is back", revision=self.snapshot.revision)
        self._failures = 0
        while True:
            heard = await listener.wait(self._poll_s)
            if not heard and await listener.revision() == self.snapshot.revision:
                continue
            self._swap(await listener.snapshot())  # however many notifications there were, once

    def _failed(self, reason: str, message: str, *, with_trace: bool = False) -> None:
        self._failures += 1
        if self._failures == 1 or self._failures % 30 == 0:  # an outage is said once, then now and then
            log.warning(
                "registry cannot be watched",
                reason=reason,
                error=message,
                serving_revision=self.snapshot.revision,
                failures=self._failures,
                exc_info=with_trace,
            )

    def _swap(self, snapshot: Snapshot, source: Source = "postgres") -> None:
        unchanged = self.source != "none" and snapshot == self.snapshot
        if not unchanged and snapshot.revision < self.snapshot.revision:
            log.warning("registry went back", from_revision=self.snapshot.revision, to_revision=snapshot.revision)
        self.source = source
        if unchanged:
            return
        self.snapshot = snapshot
        self._changed_at = time.monotonic()
        self._ready.set()
        log.info("registry snapshot", revision=snapshot.revision, source=source)
        for callback in [*self._subscribers]:
            self._tell(callback)
        if source == "postgres":
            self._unsaved.set()

    def _tell(self, callback: Subscriber) -> None:
        try:
            callback(self.snapshot)
        except Exception:
            log.exception("a subscriber to the registry failed", subscriber=getattr(callback, "__qualname__", repr(callback)))

    async def _fall_back(self) -> None:
        """Start from the file, if there is nothing yet."""
        if self.source != "none" or self._file is None or self._file_tried:
            return
        self._file_tried = True
        try:
            found = await asyncio.to_thread(last_known_good.read, self._file)
        except last_known_good.Unusable as error:
            log.error("last-known-good file is ignored", file=str(self._file), error=str(error))  # noqa: TRY400 - the cause is said
            return
        if found is not None and self.source == "none":
            self._swap(found, "file")

    async def _save_changes(self) -> None:
        """Keep the file up to date, off the loop and behind: a slow disk delays nobody."""
        while self._file is not None:
            await self._unsaved.wait()
            self._unsaved.clear()
            try:
                await asyncio.to_thread(last_known_good.write, self._file, self.snapshot)
            except OSError as error:
                log.warning("last-known-good file cannot be written", file=str(self._file), error=error.strerror)
