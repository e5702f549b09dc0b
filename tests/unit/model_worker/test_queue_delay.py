"""When a free instance waits for company: never for a lone caller, never where it does not pay, and never for long."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest

from model_worker.latency import LatencyModel
from model_worker.queue_delay import GAP_S, QueueDelay
from model_worker.schedule import Batch, Limits, Schedule, Ticket

MS = 1e-3


def used_to(held: int, most_s: float = 5 * MS) -> QueueDelay:
    """Return a delay that has seen that many requests at once, batch after batch; the last batch ended at 0."""
    delay = QueueDelay(most_s)
    for _ in range(8):
        delay.arrived(held)
        delay.ended(0.0, 0.0)
    return delay


def test_it_waits_for_as_many_as_are_usually_held() -> None:
    delay = used_to(16)
    assert delay.expected == 16
    assert delay.holds(15, 1 * MS, 0.1 * MS)
    assert not delay.holds(16, 1 * MS, 0.1 * MS)


def test_a_lone_caller_never_waits() -> None:
    delay = used_to(1)
    assert not delay.open
    assert not delay.holds(1, 1.0, 0.0)


def test_nobody_waits_longer_than_allowed() -> None:
    assert not used_to(16, most_s=0.0).holds(1, 1 * MS, 0.0)
    delay = used_to(16, most_s=2 * MS)
    assert delay.holds(1, 1 * MS, 1.9 * MS)
    assert not delay.holds(1, 1 * MS, 2 * MS)


def test_nobody_waits_where_nobody_came() -> None:
    delay = used_to(16)
    delay.expire()
    assert not delay.holds(1, 1 * MS, 0.1 * MS)
    delay.ended(1 * MS, 0.0)
    assert delay.holds(1, 1 * MS, 1.1 * MS)


def waits(delay: QueueDelay, at_s: float, wait_s: float, busy_s: float) -> bool:
    """Let a batch end at `at_s`, its company be waited for so long, with so much of it busy; say whether anybody waited."""
    delay.arrived(16)
    delay.ended(at_s, 0.0)
    waited = delay.holds(1, 0.2 * MS, at_s + 0.01 * MS)
    delay.started(at_s + wait_s, busy_s)
    return waited


def test_waiting_stops_where_it_costs_more_than_it_saves_and_is_tried_again() -> None:
    delay = used_to(16)
    outcomes = [waits(delay, i * 10 * MS, 1 * MS, 0.0) for i in range(50)]
    assert outcomes[0]
    assert not any(outcomes[1:])
    assert waits(delay, 2.0, 1 * MS, 0.0)
    assert not waits(delay, 2.1, 1 * MS, 0.0)


def test_one_try_that_was_cheap_is_enough_to_wait_again() -> None:
    delay = used_to(16)
    for i in range(20):
        waits(delay, i * 10 * MS, 1 * MS, 0.0)
    assert all(waits(delay, 2.0 + i * 10 * MS, 1 * MS, 1 * MS) for i in range(20))


def test_waiting_goes_on_where_the_time_is_used() -> None:
    delay = used_to(16)
    assert all(waits(delay, i * 10 * MS, 3 * MS, 2.9 * MS) for i in range(50))


def test_one_wait_that_took_long_changes_nothing() -> None:
    delay = used_to(16)
    for i in range(20):
        waits(delay, i * 10 * MS, 1 * MS, 1 * MS)
    waits(delay, 0.3, 50 * MS, 0.0)
    assert waits(delay, 0.4, 1 * MS, 1 * MS)


def test_it_follows_who_has_gone() -> None:
    delay = used_to(16)
    for _ in range(8):
        delay.arrived(1)
        delay.ended(1.0, 1.0)
    assert not delay.holds(1, 1 * MS, 1.0)


class ClosedLoop:
    """Callers that call again `think_s` after each answer, a model, and an event loop that needs `answer_s` for each answer and its successor:
    on the same CPU as the model, so that nothing overlaps, or beside it."""

    def __init__(self, callers: int, *, most_s: float, per_batch_s: float, answer_s: float, think_s: float, one_cpu: bool) -> None:
        self.schedule: Schedule[Ticket] = Schedule(Limits(max_rows=1000, max_queue_rows=10_000, max_delay_s=most_s), LatencyModel())
        self.per_batch_s, self.answer_s, self.think_s, self.one_cpu = per_batch_s, answer_s, think_s, one_cpu
        self.now_s = self.busy_s = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = iter(range(1 << 40))
        self.batches: list[int] = []
        self.taken_s: list[float] = []
        for _ in range(callers):
            self.at(0.0, self.arrive)

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when_s, next(self.numbers), what))

    def arrive(self) -> None:
        self.schedule.offer(Ticket(rows=1, deadline_s=1e9), self.now_s)
        self.start()

    def start(self) -> None:
        batch, _ = self.schedule.next(self.now_s, self.busy_s)
        if batch is not None:
            took_s = self.per_batch_s + batch.rows * 1e-6
            self.at(self.now_s + took_s, lambda: self.end(batch))

    def end(self, batch: Batch[Ticket]) -> None:
        self.batches.append(batch.rows)
        self.schedule.finished(self.now_s, batch, self.busy_s)
        if not self.one_cpu:
            self.start()
        for share in batch.shares:  # one after the other: the loop is busy meanwhile
            self.now_s += self.answer_s
            self.busy_s += self.answer_s
            self.taken_s.append(self.now_s - share.ticket.arrived_s)
            self.at(self.now_s + self.think_s, self.arrive)
        self.start()
        self.watch()

    def watch(self) -> None:
        if self.schedule.delay.open:
            seen, slept_s = self.schedule.arrivals, self.now_s - self.busy_s
            self.at(self.now_s + GAP_S, lambda: self.look(seen, slept_s))

    def look(self, seen: int, slept_s: float) -> None:
        if self.schedule.delay.open:
            if self.schedule.arrivals == seen and self.now_s - self.busy_s - slept_s >= GAP_S / 2:
                self.schedule.delay.expire()
            self.start()
            self.watch()

    def run(self, seconds: float) -> ClosedLoop:
        while self.events and self.events[0][0] < seconds:
            when_s, _, what = heapq.heappop(self.events)
            self.now_s = max(self.now_s, when_s)
            what()
        return self

    @property
    def median_s(self) -> float:
        return sorted(self.taken_s)[len(self.taken_s) // 2]


def loop(callers: int, most_s: float, *, per_batch_s: float, think_s: float, one_cpu: bool = True) -> ClosedLoop:
    return ClosedLoop(callers, most_s=most_s, per_batch_s=per_batch_s, answer_s=0.02 * MS, think_s=think_s, one_cpu=one_cpu).run(2.0)


def test_batches_are_filled_where_the_cpu_answers_anyway() -> None:
    eager, patient = (loop(64, most_s, per_batch_s=0.5 * MS, think_s=0.05 * MS) for most_s in (0.0, 5 * MS))
    assert sorted(patient.batches)[len(patient.batches) // 2] >= 60
    assert len(patient.taken_s) > 1.2 * len(eager.taken_s)


@pytest.mark.parametrize("callers", [1, 2, 3, 8])
@pytest.mark.parametrize("think_s", [0.3 * MS, 0.9 * MS, 5 * MS])
@pytest.mark.parametrize("one_cpu", [True, False])
def test_callers_who_take_their_time_do_not_slow_each_other(callers: int, think_s: float, one_cpu: bool) -> None:
    eager, patient = (loop(callers, most_s, per_batch_s=0.1 * MS, think_s=think_s, one_cpu=one_cpu) for most_s in (0.0, 5 * MS))
    assert patient.median_s <= 1.1 * eager.median_s
    assert len(patient.taken_s) >= 0.97 * len(eager.taken_s)


def test_a_lone_caller_takes_as_long_as_without_it() -> None:
    eager, patient = (loop(1, most_s, per_batch_s=1 * MS, think_s=0.05 * MS) for most_s in (0.0, 5 * MS))
    assert patient.taken_s == eager.taken_s
