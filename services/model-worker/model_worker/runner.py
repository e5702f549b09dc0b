"""The thread in which one model computes, and the cheapest way there and back.

A `concurrent.futures` executor locks and notifies a condition per hand-over; a `SimpleQueue` is one C call on this side, and
`call_soon_threadsafe` one write to the loop's wake-up pipe on that side.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

_STOP: Final = None
_Job = tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]


class Runner:
    """One thread that runs jobs in order. `prepare` runs first in it (thread-local settings of the backend)."""

    def __init__(self, name: str, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Runner {self._thread.name} {'running' if self._thread.is_alive() else 'stopped'} jobs={self._jobs.qsize()}>"

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._thread.is_alive()

    def abandon(self) -> None:
        """Let the thread end whenever what it computes comes back, which it may never do; nobody waits for it."""
        self._jobs.put(_STOP)

    def start(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run `work` in the thread, then `done(result, None)` or `done(None, error)` on the event loop."""
        self._jobs.put((work, done))

    async def stop(self) -> None:
        """End the thread after the jobs it was given."""
        self._jobs.put(_STOP)
        await asyncio.shield(self._stopped)
        self._thread.join()

    def _run(self) -> None:
        self._prepare()
        while (job := self._jobs.get()) is not _STOP:
            work, done = job
            try:
                result, error = work(), None
            except Exception as raised:
                result, error = None, raised
            self._tell(done, result, error)
            del job, work, done, result, error  # a thread that waits must not keep the last batch's tensors alive
        self._tell(self._ended, None, None)

    def _tell(self, done: Callable[[Any, BaseException | None], None], result: Any, error: BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed under us: nobody is left to tell
            self._loop.call_soon_threadsafe(done, result, error)

    def _ended(self, _result: Any, _error: BaseException | None) -> None:
        if not self._stopped.done():
            self._stopped.set_result(None)
