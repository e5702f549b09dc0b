"""One thread per loaded model that runs its forward passes, so that the event loop never waits for arithmetic.

The way there is a SimpleQueue, the way back `call_soon_threadsafe`: two wake-ups per batch and nothing else. An executor's futures
would cost twice as much.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from model_worker.packed import Array
from model_worker.ragged import Arrays, Ragged
from plait.errors import Internal, PlaitError
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

Forward = Callable[[Sequence[Array]], list[Array]]

_STOP: Final = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a batch: each request's outputs, or the error they share. `seconds`: joining, forward pass and splitting."""

    answers: Sequence[Arrays] = ()
    error: PlaitError | None = None
    seconds: float


Done = Callable[[Outcome], None]
_Job = tuple[Sequence[Arrays], Sequence[int], Done]


class Runner:
    """Runs batches of one model one after the other. `forward` is only ever called on the thread."""

    def __init__(self, name: str, forward: Forward, ragged: Ragged, *, loop: asyncio.AbstractEventLoop) -> None:
        self._name = name
        self._forward = forward
        self._ragged = ragged
        self._loop = loop
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"run {name}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Runner {self._name} {'alive' if self._thread.is_alive() else 'ended'}>"

    def start(self, requests: Sequence[Arrays], rows: Sequence[int], done: Done) -> None:
        """Run the requests as one batch and call `done` on the event loop."""
        self._jobs.put((requests, rows, done))

    async def close(self) -> None:
        """End the thread after what it was given."""
        self._jobs.put(_STOP)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not _STOP:
            requests, rows, done = job
            outcome = self._run(requests, rows)
            try:
                self._loop.call_soon_threadsafe(done, outcome)
            except RuntimeError:
                return  # the loop is closed: nobody is left to answer

    def _run(self, requests: Sequence[Arrays], rows: Sequence[int]) -> Outcome:
        started = time.perf_counter()
        try:
            answers = self._ragged.split(self._forward(self._ragged.join(requests, rows)), rows)
        except PlaitError as error:
            return Outcome(error=error, seconds=time.perf_counter() - started)
        except Exception:  # (a model may raise anything, and the thread must live)
            log.exception("the model failed", model=self._name, requests=len(requests), rows=sum(rows))
            failure = Internal(f"the model {self._name} failed on this input; the worker logged why", reason="MODEL_EXECUTION_FAILED")
            return Outcome(error=failure, seconds=time.perf_counter() - started)
        return Outcome(answers=answers, seconds=time.perf_counter() - started)
