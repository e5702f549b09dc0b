"""Who runs next, decided without I/O and without a clock of its own: every method takes `now_s`, so tests need no time to pass.

- Work-conserving: while the runner is busy, arrivals gather; when it is free it waits for company only where `queue_delay` has learnt that
  company comes and costs nobody anything. Preferred sizes are as Triton's: reached, nobody waits any more; above one, the rest goes next.
- Earliest deadline first, in rows rather than requests (Triton and MLServer count requests, so one caller's thousand rows weigh like one).
- Admission by prediction: what could not meet its deadline, or would make those already let in miss theirs, is refused at once
  (Clockwork, OSDI '20). What expired while waiting is dropped before it runs, and a batch stops growing where its most urgent
  member would be late (Nexus, SOSP '19).
- A request larger than a batch runs in pieces, between which more urgent ones run (the idea of Orca, OSDI '22).
- A batch that fails is halved until the request at fault is alone.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final, Generic, TypeVar

from model_worker.latency import LatencyModel
from model_worker.queue_delay import GAP_S, QueueDelay
from plait.errors import DeadlineExceeded, InvalidArgument, PlaitError, ResourceExhausted

_PATIENCE_S: Final = 60.0  # a request without a deadline is ordered as if it had this one, so that it cannot starve
_MIN_RETRY_S: Final = 0.01
_MAX_RETRY_S: Final = 5.0
_ENOUGH: Final = 9.0  # rows that take nine times the fixed time of a batch: more company could save a tenth at most
_ORDER: Final = attrgetter("order")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`margin_s` is added to every predicted duration at admission. `joins`: requests may share a batch; `splits`: one may run in pieces.

    `max_bytes`: most bytes of input tensors in a batch of several requests (0 = any). `instances`: batches that run at once.
    `headroom`: share (0..1) of a request's time left that must remain by prediction where it has to wait: an answer that is ready at the
    deadline is late at the caller, and under overload every answer would be.
    `max_delay_s`: longest time a free instance waits for company (0 = never); `preferred_rows`: ascending sizes of batches that are as good as
    larger ones.
    `static_rows`: wait for that many rows before anything runs, however long it takes (0 = never wait); made for measuring.
    """

    max_rows: int
    max_queue_rows: int
    margin_s: float = 0.0005
    joins: bool = True
    splits: bool = True
    max_bytes: int = 0
    instances: int = 1
    static_rows: int = 0
    headroom: float = 0.0
    max_delay_s: float = 0.0
    preferred_rows: tuple[int, ...] = ()


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """One request from arrival to answer. Only requests of one `kind` (their fixed dimensions) can share a batch.

    `taken` rows were handed to batches so far; `over`: it was answered, or its caller has gone. `size_bytes`: of its input tensors.
    `priority`: 0 is the default, 1 goes ahead of what is not older, n > 1 waits as if it had come n - 1 seconds later; since that is a fixed
    point in time, nothing starves.
    """

    rows: int
    deadline_s: float
    kind: Hashable = None
    size_bytes: int = 0
    priority: int = 0
    order: tuple[float, int] = field(default=(0.0, 0), init=False)
    arrived_s: float = field(default=0.0, init=False)
    taken: int = field(default=0, init=False)
    over: bool = field(default=False, init=False)


T = TypeVar("T", bound=Ticket)


@dataclass(slots=True)  # nobody changes it; frozen would triple the cost of making one, and one is made per request
class Share(Generic[T]):
    """Rows [start, stop) of a ticket. `half`: of what was too large for the device as a whole."""

    ticket: T
    start: int
    stop: int
    half: bool = False

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch(Generic[T]):
    """What one forward pass computes."""

    shares: tuple[Share[T], ...]
    rows: int
    started_s: float


class Schedule(Generic[T]):
    """The queue of one model in front of one runner."""

    def __init__(self, limits: Limits, latency: LatencyModel | None = None) -> None:
        self.limits = limits
        self.latency = latency or LatencyModel()
        self.delay = QueueDelay(limits.max_delay_s)
        self._running_requests = 0
        self._running: list[Batch[T]] = []
        self.queued_rows = 0
        self._queue: list[T] = []  # sorted: most urgent first
        self._halves: deque[tuple[Share[T], ...]] = deque()  # of failed batches; they go first
        self.arrivals = 0

    def __repr__(self) -> str:
        running = sum(batch.rows for batch in self._running)
        return (
            f"<Schedule queued={len(self._queue)} rows={self.queued_rows}/{self.limits.max_queue_rows} running={running} {self.latency!r}>"
        )

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._running and not self._queue and not self._halves

    @property
    def running(self) -> Batch[T] | None:
        """The batch that has run longest, if any runs."""
        return self._running[0] if self._running else None

    @property
    def full(self) -> bool:
        """Whether every instance is busy."""
        return len(self._running) >= self.limits.instances

    def offer(self, ticket: T, now_s: float) -> None:
        """Let a request in, or raise InvalidArgument (too large), ResourceExhausted (queue full) or DeadlineExceeded."""
        self._check_size(ticket)
        if ticket.deadline_s <= now_s:
            raise _expired()
        if self.queued_rows + ticket.rows > self.limits.max_queue_rows:
            raise self._full()
        ticket.arrived_s = now_s
        ticket.order = (_virtual_deadline_s(ticket, now_s), self.arrivals)
        self.arrivals += 1
        at = bisect.bisect(self._queue, ticket.order, key=_ORDER)
        if self.latency.trusted(now_s):
            self._check_deadlines(ticket, at, now_s)
        self._queue.insert(at, ticket)
        self.queued_rows += ticket.rows
        self.delay.arrived(len(self._queue) + self._running_requests)

    def next(self, now_s: float, busy_s: float = 0.0) -> tuple[Batch[T] | None, list[T]]:
        """Return the batch to run now, if the runner is free, anything waits and not for company, and the requests dropped for being too late.

        `busy_s`: the event loop's `busy_clock`.
        """
        if self.full:
            return None, []
        late: list[T] = []
        if self.limits.static_rows and not self._halves and self.queued_rows < self.limits.static_rows:
            self._drop_late(now_s, late)
            return None, late
        if self._holds(now_s):
            self._drop_late(now_s, late)
            return None, late
        shares = self._half(now_s, late) or self._fill(now_s, late)
        if not shares:
            return None, late
        self.delay.started(now_s, busy_s)
        self._running_requests += len(shares)
        batch = Batch(shares=shares, rows=sum(s.rows for s in shares), started_s=now_s)
        self._running.append(batch)
        return batch, late

    def finished(self, now_s: float, batch: Batch[T] | None = None, busy_s: float = 0.0) -> None:
        """A batch (by default the oldest) was computed: learn from it."""
        batch = self._end(batch)
        if batch is not None:
            self.latency.observe(batch.rows, now_s - batch.started_s, now_s)
            self.delay.ended(now_s, busy_s)

    def abandoned(self, batch: Batch[T]) -> tuple[T, ...]:
        """A batch will not come back: forget its requests and return those that still wait for an answer."""
        self._end(batch)
        lost = tuple(share.ticket for share in batch.shares if not share.ticket.over)
        for ticket in lost:
            self.withdraw(ticket)
        return lost

    def failed(self, batch: Batch[T] | None = None, *, too_large: bool = False) -> T | None:
        """A batch (by default the oldest) failed: return the request at fault, or None where there were several, which run again by halves.

        `too_large`: the device's memory did not suffice. Then a request that is alone runs again in halves too, once, where it may be split.
        """
        batch = self._end(batch)
        if batch is None:
            return None
        if len(batch.shares) > 1:
            middle = len(batch.shares) // 2
            self._halves.extendleft((batch.shares[middle:], batch.shares[:middle]))
            return None
        [share] = batch.shares
        if too_large and self.limits.splits and share.rows > 1 and not share.half:
            between = (share.start + share.stop) // 2
            first, second = ((share.start, between), (between, share.stop))
            self._halves.extendleft(((Share(share.ticket, *second, half=True),), (Share(share.ticket, *first, half=True),)))
            return None
        self.withdraw(share.ticket)
        return share.ticket

    def withdraw(self, ticket: T) -> None:
        """Forget a request: its caller has gone, or it was answered otherwise. What already runs is not stopped, only not delivered."""
        if ticket.over:
            return
        ticket.over = True
        if ticket.taken < ticket.rows:
            del self._queue[bisect.bisect_left(self._queue, ticket.order, key=_ORDER)]
            self.queued_rows -= ticket.rows - ticket.taken

    def again(self, batch: Batch[T]) -> None:
        """A batch was lost through no fault of its requests: it runs again, next."""
        self._end(batch)
        self._halves.appendleft(batch.shares)

    def _end(self, batch: Batch[T] | None) -> Batch[T] | None:
        batch = batch or self.running
        if batch is not None:
            self._running.remove(batch)
            self._running_requests -= len(batch.shares)
        return batch

    # --- composing a batch

    def _holds(self, now_s: float) -> bool:
        """Say whether to wait for company, with an instance free: as `QueueDelay` has it, for no more rows than pay, nobody made late by it."""
        if self._halves or not self._queue or not self.delay.open or self.queued_rows >= self._enough_rows():
            return False
        first = self._queue[0]
        if first.priority == 1:
            return False
        slack_s = first.deadline_s - now_s - self.limits.margin_s - self._duration_s(self.queued_rows)
        return slack_s > 2 * GAP_S and self.delay.holds(len(self._queue) + self._running_requests, self.latency.per_batch_s, now_s)

    def _enough_rows(self) -> float:
        """Rows for which nobody waits any more: the smallest preferred size, or where most of a batch's time is its rows'."""
        if self.limits.preferred_rows:
            return self.limits.preferred_rows[0]
        most = self.limits.max_rows
        return min(most, _ENOUGH * self.latency.per_batch_s / self.latency.per_row_s) if self.latency.per_row_s else most

    def _half(self, now_s: float, late: list[T]) -> tuple[Share[T], ...]:
        while self._halves:
            half = self._halves.popleft()
            for share in half:
                if not share.ticket.over and share.ticket.deadline_s <= now_s:
                    self.withdraw(share.ticket)
                    late.append(share.ticket)
            living = tuple(share for share in half if not share.ticket.over)
            if living:
                return living
        return ()

    def _fill(self, now_s: float, late: list[T]) -> tuple[Share[T], ...]:
        """Take requests by urgency, of the first one's kind, until the batch is full or would make the first one late."""
        self._drop_late(now_s, late)
        if not self._queue:
            return ()
        first = self._queue[0]
        rows = min(first.rows - first.taken, self.limits.max_rows if self.limits.splits else first.rows)
        shares = [self._take(first, rows)]
        most = self._most_rows(first, now_s) if self.limits.joins else 0
        most = self._preferred(min(most, self.queued_rows + rows)) if self.limits.preferred_rows else most
        passed: list[T] = []
        left_bytes = (self.limits.max_bytes or math.inf) - first.size_bytes
        seen = 1
        for ticket in itertools.islice(self._queue, 1, None):
            if rows >= most:
                break
            seen += 1
            if ticket.deadline_s <= now_s:
                self._give_up(ticket, late)
            elif ticket.kind != first.kind:
                passed.append(ticket)
            elif rows + ticket.rows - ticket.taken > most or ticket.size_bytes > left_bytes:
                passed.append(ticket)
                break
            else:
                left_bytes -= ticket.size_bytes
                shares.append(self._take(ticket, ticket.rows - ticket.taken))
                rows += shares[-1].rows
        rest = [first] if first.taken < first.rows else []
        self._queue[:seen] = rest + passed
        return tuple(shares)

    def _give_up(self, ticket: T, late: list[T]) -> None:
        ticket.over = True
        self.queued_rows -= ticket.rows - ticket.taken
        late.append(ticket)

    def _take(self, ticket: T, rows: int) -> Share[T]:
        share = Share(ticket, ticket.taken, ticket.taken + rows)
        ticket.taken += rows
        self.queued_rows -= rows
        return share

    def _drop_late(self, now_s: float, late: list[T]) -> None:
        """Drop from the head what has expired or, by a fresh estimate, cannot finish in time even if it ran now."""
        trusted = self.latency.trusted(now_s)
        while self._queue:
            head = self._queue[0]
            if head.deadline_s > now_s and not (trusted and now_s + self._duration_s(head.rows - head.taken) > head.deadline_s):
                return
            del self._queue[0]
            self._give_up(head, late)

    def _most_rows(self, first: T, now_s: float) -> int:
        per_row_s = self.latency.per_row_s
        if not per_row_s:
            return self.limits.max_rows
        slack_s = first.deadline_s - now_s - self.limits.margin_s - self.latency.per_batch_s
        return int(min(self.limits.max_rows, slack_s / per_row_s))

    def _preferred(self, rows: int) -> int:
        """Return the largest preferred size that so many rows fill, or the rows themselves where they fill none."""
        return next((size for size in reversed(self.limits.preferred_rows) if size <= rows), rows)

    # --- admission

    def _check_size(self, ticket: T) -> None:
        most = self.limits.max_queue_rows if self.limits.splits else min(self.limits.max_rows, self.limits.max_queue_rows)
        if ticket.rows > most:
            raise InvalidArgument(
                f"the request has {ticket.rows} rows and this model takes at most {most} at once: split it", reason="TOO_MANY_ROWS"
            )

    def _check_deadlines(self, ticket: T, at: int, now_s: float) -> None:
        """Refuse where, by prediction, the request or one already let in would be late. Mostly one comparison: everybody in time?"""
        free_s = self._free_s(now_s) + self.limits.margin_s
        all_done_s = free_s + self._duration_s(self.queued_rows + ticket.rows)
        most_urgent = self._queue[0] if at else ticket
        latest_s = ticket.deadline_s
        if self.full and self.limits.headroom:
            latest_s -= self.limits.headroom * (ticket.deadline_s - now_s)
        if all_done_s <= min(most_urgent.deadline_s, latest_s):
            return
        before = sum(t.rows - t.taken for t in itertools.islice(self._queue, at))
        done_s = free_s + self._duration_s(before + ticket.rows)
        if done_s > latest_s:
            raise self._too_late(done_s - now_s, ticket.deadline_s - now_s)
        rows = before
        for other in itertools.islice(self._queue, at, None):
            rows += other.rows - other.taken
            in_time_without = free_s + self._duration_s(rows) <= other.deadline_s
            if in_time_without and free_s + self._duration_s(rows + ticket.rows) > other.deadline_s:
                raise self._full("requests already let in would miss their deadlines")

    def _free_s(self, now_s: float) -> float:
        if not self.full:
            return now_s
        return max(now_s, min(batch.started_s + self.latency.predict_s(batch.rows) for batch in self._running))

    def _duration_s(self, rows: int) -> float:
        """Return how long rows take that wait in one queue before all instances: they take from it side by side, batch by batch."""
        batches = -(-rows // self.limits.max_rows)
        return self.latency.predict_s(rows, batches) / min(self.limits.instances, max(1, batches))

    def _full(self, why: str = "") -> PlaitError:
        wait_s = min(max(self._duration_s(self.queued_rows), _MIN_RETRY_S), _MAX_RETRY_S)
        why = why or f"{self.queued_rows} of {self.limits.max_queue_rows} rows wait"
        return ResourceExhausted(f"the model's queue is full ({why}): retry later or elsewhere", reason="QUEUE_FULL", retry_after_s=wait_s)

    @staticmethod
    def _too_late(needs_s: float, left_s: float) -> PlaitError:
        return DeadlineExceeded(
            f"an answer would take about {needs_s * 1e3:.1f} ms and {left_s * 1e3:.1f} ms are left: allow the call more time",
            reason="DEADLINE_CANNOT_BE_MET",
        )


def _virtual_deadline_s(ticket: Ticket, now_s: float) -> float:
    if ticket.priority == 1:
        return min(ticket.deadline_s, now_s)
    later_s = min(ticket.priority - 1, _PATIENCE_S) if ticket.priority > 1 else 0.0
    return min(ticket.deadline_s, now_s + _PATIENCE_S) + later_s


def _expired() -> PlaitError:
    return DeadlineExceeded("the deadline had passed when the request arrived: allow the call more time")
