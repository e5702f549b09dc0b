"""The page: what happens to one inference request between its tensors and its answer.

    submit ─ offer ─► schedule ─ next ─► an instance's thread: join → model → divide ─► deliver to each caller ─ next ─► …
              │ refused: too large, queue full, cannot be in time        ├► failed: halves, until the one at fault is alone
              │                                                          ├► its process died: once more, elsewhere
              │                                                          └► hung: its callers are told, the instance is replaced

Decisions are `schedule`'s, arrays are `ragged`'s, threads are `instances`'. Here they are tied to callers: whoever waits gets its own
rows or its own error, whoever goes away takes its rows along, and nobody else notices. Time in the model is attributed to requests by
rows, so what they are told adds up to the time the instances were busy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np
from opentelemetry import trace
from opentelemetry.trace import Span, SpanContext

from model_worker.backends import buckets
from model_worker.busy_clock import busy_clock
from model_worker.instances import Instance, Instances
from model_worker.instruments import ModelInstruments
from model_worker.packed import Array
from model_worker.quarantine import Fault, Health
from model_worker.queue_delay import GAP_S
from model_worker.ragged import Layout, Piece
from model_worker.schedule import Batch, Schedule, Share, Ticket
from plait.errors import DeadlineExceeded, FailedPrecondition, Internal, InvalidArgument, PlaitError, Unavailable
from plait.telemetry.logging import get_logger
from plait.telemetry.metrics import observe_all
from plait.telemetry.tracing import Tracing, off

log = get_logger(__name__)

_NOT_FINITE: Final = "MODEL_OUTPUT_NOT_FINITE"
# What a failure that is the request's or the device's says nothing about is no fault of the model.
_FAULTS: Final[Mapping[str, Fault | None]] = MappingProxyType(
    {
        "MODEL_OUTPUT_WRONG": Fault.WRONG_OUTPUT,
        _NOT_FINITE: Fault.NOT_FINITE,
        "INPUT_NOT_FINITE": None,
        "INSTANCE_LOST": Fault.INSTANCE_LOST,
        "OUT_OF_DEVICE_MEMORY": None,
        "BYTES_NOT_UTF8": None,
    }
)
_RESTART_LOOK_S: Final = 0.05  # how often to look whether a process is back, while none is and requests wait

Parts = list[tuple[Array, ...]]


@dataclass(slots=True, kw_only=True)  # not frozen: one is made per request, and that triples the cost
class Answer:
    """One request's outputs in the signature's order, and what it cost: seconds waited, its share by rows of the seconds computed, rows of
    the batch it was in, and its own."""

    outputs: tuple[Array, ...]
    queue_s: float
    compute_s: float
    batch_rows: int
    rows: int = 1


@dataclass(slots=True, eq=False, kw_only=True)
class Request(Ticket):
    """A ticket with somebody waiting for it. `parts`: outputs by first row, of the pieces computed so far."""

    inputs: tuple[Array, ...]
    answer: asyncio.Future[Answer]
    parts: dict[int, tuple[Array, ...]] = field(default_factory=dict)
    done_rows: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    retried: bool = False
    span: SpanContext | None = None


class Batcher:
    """Batches the requests of different callers for one model. Lives on the event loop; only the model runs in the instances' threads.

    `budget_s`: time one forward pass may take before its instance counts as hung (0 = for ever). `finite`: NaN or infinity is a failure.
    `sizes`: ascending row counts up to which batches are padded.
    """

    def __init__(
        self,
        name: str,
        instances: Instances,
        layout: Layout,
        schedule: Schedule[Request],
        instruments: ModelInstruments,
        *,
        budget_s: float = 0.0,
        finite: bool = False,
        sizes: Sequence[int] = (),
        health: Health | None = None,
        tracing: Tracing | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._health = health
        self._instances = instances
        self._layout = layout
        self._budget_s = budget_s
        self._finite = finite
        self._sizes = tuple(sizes) if schedule.limits.joins else ()
        self._tracing = tracing or off()
        self._schedule = schedule
        self._instruments = instruments
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._busy = busy_clock()
        self._woken = self._watching = False
        self._closing = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    def __repr__(self) -> str:
        return f"<Batcher {self._name} {self._schedule!r}{' closing' if self._closing else ''}>"

    @property
    def queued_rows(self) -> int:
        """Rows waiting for a batch."""
        return self._schedule.queued_rows

    async def submit(self, inputs: tuple[Array, ...], rows: int, deadline_s: float, priority: int = 0, *, watched: bool = False) -> Answer:
        """Return the answer to one request: `inputs` in the signature's order, `deadline_s` on the batcher's clock, `priority` as `Ticket` has it.

        A call's deadline is gRPC's to watch, which cancels the caller. With `watched` it is watched here, whatever the instances are doing.

        Raises InvalidArgument (TOO_MANY_ROWS), ResourceExhausted (QUEUE_FULL, OUT_OF_DEVICE_MEMORY), DeadlineExceeded (also MODEL_HUNG),
        Unavailable (MODEL_UNLOADING, INSTANCE_LOST), Internal (MODEL_EXECUTION_FAILED, MODEL_OUTPUT_WRONG),
        FailedPrecondition (MODEL_OUTPUT_NOT_FINITE), InvalidArgument (INPUT_NOT_FINITE).
        Cancelling the caller takes its rows out of the queue.
        """
        if self._closing:
            raise Unavailable(f"{self._name} is being unloaded: retry", reason="MODEL_UNLOADING", retry_after_s=0.1)
        request = Request(
            rows=rows,
            deadline_s=deadline_s,
            kind=self._layout.kind(inputs),
            size_bytes=sum([array.nbytes for array in inputs]),
            priority=priority,
            inputs=inputs,
            answer=self._loop.create_future(),
        )
        if self._tracing.enabled:
            request.span = trace.get_current_span().get_span_context()
        self._schedule.offer(request, self._clock())
        self._quiet.clear()
        self._wake()
        watch = self._loop.call_later(max(0.0, deadline_s - self._clock()), self._expire, request) if watched else None
        try:
            return await request.answer
        finally:
            self._schedule.withdraw(request)
            if watch is not None:
                watch.cancel()

    def _expire(self, request: Request) -> None:
        self._schedule.withdraw(request)
        self._fail(request, _late())

    async def close(self) -> None:
        """Take nothing new, and return once everything held was answered."""
        self._closing = True
        await self._quiet.wait()

    def _wake(self) -> None:
        """Look at the queue after what is ready on the loop has run: requests that arrived together then start together."""
        if not self._woken and not self._schedule.full:
            self._woken = True
            self._loop.call_soon(self._start_next)

    def _start_next(self) -> None:
        """Give every free instance its batch."""
        self._woken = False
        while True:
            instance = self._instances.free()
            if instance is None:
                self._wait_for_an_instance()
                return
            batch, late = self._schedule.next(self._clock(), self._busy())
            for ticket in late:
                self._fail(ticket, _late())
            if late:
                self._instruments.dropped.inc(len(late))
            if batch is None:
                break
            self._run(instance, batch)
        if self._schedule.idle:
            self._quiet.set()

    def _wait_for_an_instance(self) -> None:
        """All are busy, and whichever ends starts the next; or their processes are being started again, and somebody has to look."""
        if not len(self._instances):
            batch, late = self._schedule.next(self._clock())
            while batch is not None or late:
                for ticket in late:
                    self._fail(ticket, self._hung())
                if batch is not None:
                    self._fail_all(batch, self._hung())
                batch, late = self._schedule.next(self._clock())
        if self._schedule.idle:
            self._quiet.set()
        elif len(self._instances) and self._schedule.running is None and not self._woken:
            self._woken = True
            self._loop.call_later(_RESTART_LOOK_S, self._start_next)

    def _run(self, instance: Instance, batch: Batch[Request]) -> None:
        pieces = [_piece(share) for share in batch.shares]
        span = self._tracing.linked_span("batch.execute", [share.ticket.span for share in batch.shares]) if self._tracing.enabled else None

        def work() -> tuple[Parts, float]:
            started_s = time.perf_counter()
            parts = self._computed(instance, pieces, batch.rows)
            return parts, time.perf_counter() - started_s

        instance.batch = batch
        watch = self._loop.call_later(self._budget_s, self._give_up, instance, batch) if self._budget_s else None
        instance.start(work, lambda result, error: self._done(instance, batch, watch, span, result, error))

    def _computed(self, instance: Instance, pieces: Sequence[Piece], rows: int) -> Parts:
        """In the instance's thread: from the requests' arrays to each one's part of the answer."""
        inputs = self._layout.join(pieces)
        size = buckets.choose(self._sizes, rows) if self._sizes else rows
        if size == rows:
            outputs = instance.model(inputs)
        else:
            padded = instance.model(buckets.pad(inputs, self._layout, rows, size))
            outputs = buckets.cut(padded, self._layout, rows, len(pieces))
        if self._finite:
            _check_finite(outputs)
        return self._layout.divide(outputs, pieces)

    def _done(
        self,
        instance: Instance,
        batch: Batch[Request],
        watch: asyncio.TimerHandle | None,
        span: Span | None,
        result: tuple[Parts, float] | None,
        error: BaseException | None,
    ) -> None:
        """An instance is back. First give it the next batch, then answer: the callers' work overlaps with the model's."""
        if span is not None:
            span.set_attributes({"plait.batch.rows": batch.rows, "plait.batch.requests": len(batch.shares)})
            span.end()
        if instance.batch is not batch:  # it was given up meanwhile, and its callers were told
            return
        if watch is not None:
            watch.cancel()
        instance.batch = None
        if result is None:
            self._blame(batch, error)
            self._start_next()
            return
        parts, compute_s = result
        self._schedule.finished(self._clock(), batch, self._busy())
        self._watch_the_gap()
        if self._health is not None:
            self._health.success()
        self._start_next()
        per_row_s = compute_s / batch.rows
        for share, part in zip(batch.shares, parts, strict=True):
            self._deliver(batch, share, part, per_row_s * share.rows)
        self._loop.call_soon(self._measure, batch, compute_s)  # after the callers, who wait

    def _watch_the_gap(self) -> None:
        """While company may still come, look every millisecond whether it does."""
        if self._schedule.delay.open and not self._watching:
            self._watching = True
            self._loop.call_later(GAP_S, self._look, self._schedule.arrivals, self._clock() - self._busy())

    def _look(self, arrivals: int, slept_s: float) -> None:
        self._watching = False
        if not self._schedule.delay.open:
            return
        slept_s = self._clock() - self._busy() - slept_s
        if self._schedule.arrivals == arrivals and slept_s >= GAP_S / 2:  # else who came may only not have been heard yet
            self._schedule.delay.expire()
        self._watch_the_gap()
        self._start_next()

    def _give_up(self, instance: Instance, batch: Batch[Request]) -> None:
        """A forward pass has used up its budget. A process is ended by `ProcessModel` itself; a thread can only be left behind."""
        if instance.batch is not batch:
            return
        instance.batch = None
        self._instances.give_up(instance)
        self._blame(batch, self._hung())
        self._start_next()

    def _hung(self) -> PlaitError:
        return DeadlineExceeded(
            f"{self._name} did not come back within its budget of {self._budget_s * 1e3:g} ms: retry elsewhere", reason="MODEL_HUNG"
        )

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
        request.answer.set_result(
            Answer(outputs=outputs, queue_s=request.queue_s, compute_s=request.compute_s, batch_rows=batch.rows, rows=request.rows)
        )

    def _rejoined(self, request: Request) -> tuple[Array, ...] | None:
        try:
            return self._layout.rejoin([part for _, part in sorted(request.parts.items(), key=_first_row)])
        except ValueError:  # pieces of different width
            log.exception("the model answered pieces that do not fit together", model=self._name)
            return None

    def _measure(self, batch: Batch[Request], compute_s: float) -> None:
        self._instruments.rows.observe(batch.rows)
        self._instruments.compute_s.observe(compute_s)
        self._instruments.busy_s.inc(compute_s)
        self._instruments.queued_rows.set(self._schedule.queued_rows)
        self._instruments.statistics.batch(batch.rows, compute_s)
        waited_s = [batch.started_s - share.ticket.arrived_s for share in batch.shares if share.start == 0]
        observe_all(self._instruments.queue_s, waited_s)

    def _blame(self, batch: Batch[Request], error: BaseException | None) -> None:
        reason = error.reason if isinstance(error, PlaitError) else ""
        if reason == "MODEL_HUNG":
            self._fail_all(batch, error)
            self._fault(Fault.HANG)
            return
        if reason == "INSTANCE_LOST" and not any(share.ticket.retried for share in batch.shares):
            self._fault(Fault.INSTANCE_LOST)
            for share in batch.shares:
                share.ticket.retried = True
            self._schedule.again(batch)
            log.warning("a batch whose instance was lost runs again", model=self._name, requests=len(batch.shares), rows=batch.rows)
            return
        culprit = self._schedule.failed(batch, too_large=reason == "OUT_OF_DEVICE_MEMORY")
        if culprit is None:
            log.warning("a batch failed and runs again by halves", model=self._name, requests=len(batch.shares), rows=batch.rows)
            return
        log.error("the model failed on a request", model=self._name, rows=culprit.rows, exc_info=error)
        typed = error if isinstance(error, PlaitError) else None
        if reason == _NOT_FINITE:
            typed = self._not_finite(culprit)
            reason = typed.reason
        if fault := _FAULTS.get(reason, Fault.EXECUTION):
            self._fault(fault)
        self._fail(culprit, typed or Internal(f"{self._name} failed on this request", reason="MODEL_EXECUTION_FAILED"))

    def _not_finite(self, request: Request) -> PlaitError:
        if not all(map(_finite, request.inputs)):
            return InvalidArgument(
                f"{self._name} answers NaN or infinity, as the request holds it: send finite values", reason="INPUT_NOT_FINITE"
            )
        return FailedPrecondition(
            f"{self._name} answers this request with NaN or infinity: check its values, or publish the model with execution.finite false",
            reason=_NOT_FINITE,
        )

    def _fault(self, fault: Fault) -> None:
        if fault.severe:
            self._instruments.restarts.inc()
        if self._health is not None:
            self._health.fault(fault)

    def _fail_all(self, batch: Batch[Request], error: BaseException | None) -> None:
        for ticket in self._schedule.abandoned(batch):
            self._fail(ticket, error if isinstance(error, PlaitError) else self._hung())
        log.error("the model hangs", model=self._name, requests=len(batch.shares), rows=batch.rows)

    @staticmethod
    def _fail(request: Request, error: PlaitError) -> None:
        if not request.answer.done():
            request.answer.set_exception(error)
            request.answer.exception()  # seen: should the caller go away this very moment, nobody misses it


def _late() -> PlaitError:
    return DeadlineExceeded("the deadline passed, or would have, before the model could run: allow the call more time")


def _finite(array: Array) -> bool:
    return array.dtype.kind not in "fV" or bool(np.isfinite(array).all())  # bfloat16 is of kind V


def _check_finite(outputs: Sequence[Array]) -> None:
    for i, output in enumerate(outputs):
        if not _finite(output):
            raise FailedPrecondition(f"NaN or infinity in output {i}", reason=_NOT_FINITE)


def _piece(share: Share[Request]) -> Piece:
    return Piece(share.ticket.inputs, share.start, share.stop)


def _first_row(item: tuple[int, tuple[Array, ...]]) -> int:
    return item[0]
