"""THE PAGE: how requests of different callers become forward passes of one model, and their results answers.

    infer → cut into chunks → admit (or refuse, early) → wait → next batch → runner → split → answer

What runs next is decided by `schedule`, a plain state machine; this is the shell that asks it whenever something arrived or finished and
acts on what it says. The loop's thread owns everything here. Nobody's fault is anybody else's: callers that go leave the batch, and when
a batch of several fails its members run again, each alone. `max_queue_delay_ms` of a model holds trivially: nothing waits for company.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from model_worker.ragged import Arrays, Ragged
from model_worker.runner import Done, Outcome
from model_worker.schedule import Entry, Schedule
from plait.errors import DeadlineExceeded, Internal, Unavailable
from plait.rpc.deadline import Deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One request's outputs, in the signature's order, and where its time went. A request that was cut tells the sum of its chunks'
    forward passes, the longest of their waits, and the largest batch."""

    outputs: Arrays
    queue_s: float
    compute_s: float
    batch_rows: int


class Starts(Protocol):
    """What the batcher needs of a runner: take one batch, and call back on the event loop."""

    def start(self, requests: Sequence[Arrays], rows: Sequence[int], done: Done) -> None: ...


Observe = Callable[[int, float, float], None]  # rows of a batch, the longest wait in it and its forward pass, seconds


class Batcher:
    """Serves one loaded model."""

    def __init__(
        self,
        schedule: Schedule,
        ragged: Ragged,
        runner: Starts,
        *,
        max_rows: int,
        clock: Callable[[], float] = time.monotonic,
        observe: Observe = lambda _rows, _queue_s, _compute_s: None,
    ) -> None:
        self._schedule = schedule
        self._ragged = ragged
        self._runner = runner
        self._max_rows = max_rows
        self._clock = clock
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._woken = False
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        return f"<Batcher{' closing' if self._closing else ''} {self._schedule!r}>"

    @property
    def queued_rows(self) -> int:
        """Rows that wait, of which the queue holds a bounded number."""
        return self._schedule.queued_rows

    async def infer(self, inputs: Arrays, rows: int, deadline: Deadline) -> Result:
        """Return the model's outputs for one request. Cancelling it takes its rows out of the queue.

        Raises what `Schedule.admit` raises, DeadlineExceeded when the time is up before it runs, Unavailable while the model is being
        unloaded, Internal when the model fails on it.
        """
        if self._closing:
            raise Unavailable(
                "the model is being unloaded here: retry, another worker may have it", reason="MODEL_UNLOADING", retry_after_s=0.1
            )
        entries = self._entries(inputs, rows, deadline)
        self._schedule.admit(entries, entries[0].arrived_s)
        self._idle.clear()
        self._wake()
        try:
            results = [await entry.answer for entry in entries]
        except BaseException:
            self._withdraw(entries)
            raise
        return results[0] if len(results) == 1 else self._rejoin(results)

    async def close(self) -> None:
        """Refuse what comes, finish what is held."""
        self._closing = True
        await self._idle.wait()

    def _entries(self, inputs: Arrays, rows: int, deadline: Deadline) -> list[Entry]:
        now_s, kind = self._clock(), self._ragged.kind(inputs)
        return [
            Entry(rows=n, deadline_s=deadline.at_s, arrived_s=now_s, kind=kind, work=work, answer=self._loop.create_future())
            for work, n in self._ragged.chunks(inputs, rows, self._max_rows)
        ]

    def _withdraw(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._schedule.withdraw(entry)
            if not entry.answer.cancel() and not entry.answer.cancelled():
                entry.answer.exception()  # seen: another chunk told the caller
        self._settle()

    def _wake(self) -> None:
        """Decide once per turn of the loop, after everything that arrived in it: that gathers company without waiting for any."""
        if not self._woken and not self._schedule.busy:
            self._woken = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._woken = False
        while not self._schedule.busy:
            now_s = self._clock()
            decision = self._schedule.next(now_s)
            for entry in decision.late:
                _fail(entry, DeadlineExceeded("the time was up before the model could run: allow the call more time, or add workers"))
            if decision.batch:
                self._start(decision.batch, now_s)
            elif not decision.late:
                break
        self._settle()

    def _start(self, batch: tuple[Entry, ...], now_s: float) -> None:
        def done(outcome: Outcome) -> None:
            self._done(batch, now_s, outcome)

        self._runner.start([entry.work for entry in batch], [entry.rows for entry in batch], done)

    def _done(self, batch: tuple[Entry, ...], started_s: float, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._failed(batch, outcome)
            return
        self._schedule.finished(self._clock(), outcome.seconds)
        self._dispatch()  # the runner first: it works while this thread hands out answers
        rows = sum(entry.rows for entry in batch)
        for entry, outputs in zip(batch, outcome.answers, strict=True):
            if not entry.answer.done():
                queue_s = started_s - entry.arrived_s
                entry.answer.set_result(Result(outputs=outputs, queue_s=queue_s, compute_s=outcome.seconds, batch_rows=rows))
        self._observe(rows, started_s - min(entry.arrived_s for entry in batch), outcome.seconds)

    def _failed(self, batch: tuple[Entry, ...], outcome: Outcome) -> None:
        several = len(batch) > 1
        self._schedule.failed([entry for entry in batch if several and not entry.answer.done()])
        if not several and outcome.error is not None:
            _fail(batch[0], outcome.error)
        self._dispatch()

    def _rejoin(self, results: Sequence[Result]) -> Result:
        return Result(
            outputs=self._ragged.rejoin([result.outputs for result in results]),
            queue_s=max(result.queue_s for result in results),
            compute_s=sum(result.compute_s for result in results),
            batch_rows=max(result.batch_rows for result in results),
        )

    def _settle(self) -> None:
        if self._schedule.empty:
            self._idle.set()


def _fail(entry: Entry, error: DeadlineExceeded | Internal | Exception) -> None:
    if not entry.answer.done():
        entry.answer.set_exception(error)
