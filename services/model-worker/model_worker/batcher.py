"""The page: what happens to one inference request between its tensors and its answer.

    submit ─ offer ─► schedule ─ next ─► runner thread: join → model → divide ─► deliver to each caller ─ next ─► …
              │ refused: too large, queue full, cannot be in time        └► failed: halves, until the one at fault is alone

Decisions are `schedule`'s, arrays are `ragged`'s, the thread is `runner`'s. Here they are tied to callers: whoever waits gets its own
rows or its own error, whoever goes away takes its rows along, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model_worker.instruments import ModelInstruments
from model_worker.packed import Array
from model_worker.quarantine import Fault, Health
from model_worker.ragged import Layout, Piece
from model_worker.runner import Runner
from model_worker.schedule import Batch, Schedule, Share, Ticket
from plait.errors import DeadlineExceeded, Internal, PlaitError, Unavailable
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

Model = Callable[[Sequence[Array]], Sequence[Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request's outputs in the signature's order, and what it cost: seconds waited, seconds computed, rows of the batch it was in."""

    outputs: tuple[Array, ...]
    queue_s: float
    compute_s: float
    batch_rows: int


@dataclass(slots=True, eq=False, kw_only=True)
class Request(Ticket):
    """A ticket with somebody waiting for it. `parts`: outputs by first row, of the pieces computed so far."""

    inputs: tuple[Array, ...]
    answer: asyncio.Future[Answer]
    parts: dict[int, tuple[Array, ...]] = field(default_factory=dict)
    done_rows: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0


class Batcher:
    """Batches the requests of different callers for one model. Lives on the event loop; only `model` runs in the runner's thread."""

    def __init__(
        self,
        name: str,
        model: Model,
        layout: Layout,
        schedule: Schedule[Request],
        runner: Runner,
        instruments: ModelInstruments,
        *,
        health: Health | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._health = health
        self._model = model
        self._layout = layout
        self._schedule = schedule
        self._runner = runner
        self._instruments = instruments
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._woken = False
        self._closing = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    def __repr__(self) -> str:
        return f"<Batcher {self._name} {self._schedule!r}{' closing' if self._closing else ''}>"

    async def submit(self, inputs: tuple[Array, ...], rows: int, deadline_s: float) -> Answer:
        """Return the answer to one request: `inputs` in the signature's order, `deadline_s` on the batcher's clock.

        Raises InvalidArgument (TOO_MANY_ROWS), ResourceExhausted (QUEUE_FULL), DeadlineExceeded, Unavailable (MODEL_UNLOADING), Internal
        (MODEL_EXECUTION_FAILED, MODEL_OUTPUT_WRONG). Cancelling the caller takes its rows out of the queue.
        """
        if self._closing:
            raise Unavailable(f"{self._name} is being unloaded: retry", reason="MODEL_UNLOADING", retry_after_s=0.1)
        request = Request(
            rows=rows, deadline_s=deadline_s, kind=self._layout.kind(inputs), inputs=inputs, answer=self._loop.create_future()
        )
        self._schedule.offer(request, self._clock())
        self._quiet.clear()
        self._wake()
        try:
            return await request.answer
        finally:
            self._schedule.withdraw(request)

    async def close(self) -> None:
        """Take nothing new, and return once everything held was answered."""
        self._closing = True
        await self._quiet.wait()

    def _wake(self) -> None:
        """Look at the queue after what is ready on the loop has run: requests that arrived together then start together."""
        if not self._woken and self._schedule.running is None:
            self._woken = True
            self._loop.call_soon(self._start_next)

    def _start_next(self) -> None:
        self._woken = False
        batch, late = self._schedule.next(self._clock())
        for ticket in late:
            self._fail(ticket, DeadlineExceeded("the deadline passed, or would have, before the model could run: allow the call more time"))
        if late:
            self._instruments.dropped.inc(len(late))
        if batch is not None:
            self._run(batch)
        elif self._schedule.idle:
            self._quiet.set()

    def _run(self, batch: Batch[Request]) -> None:
        pieces = [_piece(share) for share in batch.shares]

        def work() -> tuple[list[tuple[Array, ...]], float]:
            started_s = time.perf_counter()
            parts = self._layout.divide(self._model(self._layout.join(pieces)), pieces)
            return parts, time.perf_counter() - started_s

        self._runner.start(work, lambda result, error: self._done(batch, result, error))

    def _done(self, batch: Batch[Request], result: tuple[list[tuple[Array, ...]], float] | None, error: BaseException | None) -> None:
        """The runner is back. First give it the next batch, then answer: the callers' work overlaps with the model's."""
        if result is None:
            self._blame(batch, error)
            self._start_next()
            return
        parts, compute_s = result
        self._schedule.finished(self._clock())
        if self._health is not None:
            self._health.success()
        self._start_next()
        for share, part in zip(batch.shares, parts, strict=True):
            self._deliver(batch, share, part, compute_s)
        self._loop.call_soon(self._measure, batch, compute_s)  # after the callers, who wait

    def _deliver(self, batch: Batch[Request], share: Share[Request], part: tuple[Array, ...], compute_s: float) -> None:
        request = share.ticket
        if request.over:
            return
        if share.start == 0:
            request.queue_s = batch.started_s - request.arrived_s
        request.compute_s += compute_s
        request.done_rows += share.rows
        if share.rows < request.rows:
            request.parts[share.start] = part
        if request.done_rows < request.rows or request.answer.done():
            return
        outputs = self._rejoined(request) if request.parts else part
        if outputs is None:
            self._fail(request, Internal(f"{self._name} answered pieces that do not fit together", reason="MODEL_OUTPUT_WRONG"))
            return
        request.answer.set_result(Answer(outputs=outputs, queue_s=request.queue_s, compute_s=request.compute_s, batch_rows=batch.rows))

    def _rejoined(self, request: Request) -> tuple[Array, ...] | None:
        try:
            return self._layout.rejoin([part for _, part in sorted(request.parts.items(), key=_first_row)])
        except ValueError:  # pieces of different width
            log.exception("the model answered pieces that do not fit together", model=self._name)
            return None

    def _measure(self, batch: Batch[Request], compute_s: float) -> None:
        self._instruments.rows.observe(batch.rows)
        self._instruments.compute_s.observe(compute_s)
        self._instruments.statistics.batch(batch.rows, compute_s)
        for share in batch.shares:
            if share.start == 0:
                self._instruments.queue_s.observe(batch.started_s - share.ticket.arrived_s)

    def _blame(self, batch: Batch[Request], error: BaseException | None) -> None:
        culprit = self._schedule.failed()
        if culprit is None:
            log.warning("a batch failed and runs again by halves", model=self._name, requests=len(batch.shares), rows=batch.rows)
            return
        log.error("the model failed on a request", model=self._name, rows=culprit.rows, exc_info=error)
        typed = error if isinstance(error, PlaitError) else None
        if self._health is not None:
            self._health.fault(Fault.WRONG_OUTPUT if typed is not None and typed.reason == "MODEL_OUTPUT_WRONG" else Fault.EXECUTION)
        self._fail(culprit, typed or Internal(f"{self._name} failed on this request", reason="MODEL_EXECUTION_FAILED"))

    @staticmethod
    def _fail(request: Request, error: PlaitError) -> None:
        if not request.answer.done():
            request.answer.set_exception(error)
            request.answer.exception()  # seen: should the caller go away this very moment, nobody misses it


def _piece(share: Share[Request]) -> Piece:
    return Piece(share.ticket.inputs, share.start, share.stop)


def _first_row(item: tuple[int, tuple[Array, ...]]) -> int:
    return item[0]
