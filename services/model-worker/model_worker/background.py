"""Threads that load models beside those that serve: at a lower CPU priority, and never waited for by the process's end.

asyncio's own executor would do neither: its threads are shared, keep their priority from job to job, and are joined at exit, so that one
artifact store that hangs would hold SIGTERM up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeVar, cast

NICENESS: Final = 10  # of 19: a busy core gives such a thread about a tenth of what it gives one that serves

T = TypeVar("T")

_local = threading.local()


def start(name: str, work: Callable[[], T]) -> asyncio.Future[T]:
    """Run `work` once in a thread of its own with NICENESS; the future is settled on the running loop, or never where it was cancelled."""
    loop = asyncio.get_running_loop()
    settled: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        with _Errands(name) as _local.errands:
            _lower_priority()
            try:
                result, error = work(), None
            except BaseException as raised:  # it is raised where the future is awaited
                result, error = cast("T", None), raised
        with contextlib.suppress(RuntimeError):  # the loop was closed under us: nobody is left to tell
            loop.call_soon_threadsafe(_settle, settled, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return settled


def at_normal_priority(work: Callable[[], T]) -> T:
    """Run `work` at the priority the process started with, and return what it returns or raise what it raises.

    Linux hands a thread's niceness down to the threads and processes it starts, for life, and only the privileged can raise it again. So
    what a load leaves behind (an instance process, a library's thread pool) has to be started through this. Outside of a thread of `start`
    it is a plain call.
    """
    errands: _Errands | None = getattr(_local, "errands", None)
    return work() if errands is None else errands.run(work)


class _Errands:
    """A helper thread, started before its owner lowered its own priority."""

    def __init__(self, name: str) -> None:
        self._asked: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._answered: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=f"{name} errands", daemon=True)

    def __enter__(self) -> _Errands:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._asked.put(None)

    def run(self, work: Callable[[], T]) -> T:
        self._asked.put(work)
        result, error = self._answered.get()
        if error is not None:
            raise error
        return cast("T", result)

    def _serve(self) -> None:
        while (work := self._asked.get()) is not None:
            try:
                self._answered.put((work(), None))
            except BaseException as error:  # it is raised in the thread that asked
                self._answered.put((None, error))
            del work


def _lower_priority() -> None:
    if sys.platform == "linux":  # where a niceness belongs to a thread; elsewhere it would be the whole process's
        with contextlib.suppress(OSError):  # a sandbox may forbid it: then loading is only less considerate
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _settle(settled: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    if settled.done():
        return
    if error is None:
        settled.set_result(result)
    else:
        settled.set_exception(error)
