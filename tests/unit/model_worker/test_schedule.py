"""The batcher's decisions on a fake clock: order, bounds, admission, early drop, no loss, no starvation."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model_worker.latency import LatencyModel
from model_worker.schedule import Batch, Limits, Schedule, Ticket
from plait.errors import DeadlineExceeded, InvalidArgument, PlaitError, ResourceExhausted

MS = 1e-3


def schedule(**limits: Any) -> Schedule:
    return Schedule(Limits(**{"max_rows": 10, "max_queue_rows": 100, "margin_s": 0.0, **limits}), LatencyModel())


def ticket(rows: int = 1, deadline_s: float = math.inf, kind: str = "") -> Ticket:
    return Ticket(rows=rows, deadline_s=deadline_s, kind=kind)


def taught(per_row_s: float, per_batch_s: float, now_s: float = 0.0, **limits: Any) -> Schedule:
    """Return a schedule that knows how long batches take."""
    s = schedule(**limits)
    for rows in (1, 2, 5, 10, 3):
        s.latency.observe(rows, per_row_s * rows + per_batch_s, now_s)
    return s


def run(s: Schedule, now_s: float) -> list[Ticket]:
    """Run one batch to its end and return whose rows were in it."""
    batch, _ = s.next(now_s)
    s.finished(now_s)
    return [share.ticket for share in batch.shares] if batch else []


def test_an_idle_runner_never_waits_for_company() -> None:
    s, lone = schedule(), ticket()
    s.offer(lone, 0.0)
    assert run(s, 0.0) == [lone]
    assert s.idle


def test_arrivals_gather_while_the_runner_is_busy_and_rows_are_counted() -> None:
    s = schedule()
    s.offer(ticket(), 0.0)
    s.next(0.0)
    tickets = [ticket(rows) for rows in (4, 4, 4)]
    for t in tickets:
        s.offer(t, 0.0)
    assert s.next(0.0) == (None, [])
    s.finished(0.0)
    assert run(s, 0.0) == tickets[:2]
    assert run(s, 0.0) == tickets[2:]


def test_the_earliest_deadline_goes_first_and_equal_ones_in_order_of_arrival() -> None:
    s = schedule(max_rows=1)
    late, early, same, never = ticket(deadline_s=9), ticket(deadline_s=3), ticket(deadline_s=3), ticket()
    for t in (never, late, early, same):
        s.offer(t, 0.0)
    assert [run(s, 0.0)[0] for _ in range(4)] == [early, same, late, never]


def test_a_request_without_a_deadline_does_not_starve() -> None:
    s, patient = schedule(max_rows=1), ticket()
    s.offer(patient, 0.0)
    for second in range(1000):
        s.offer(ticket(deadline_s=second + 1), float(second))
        if patient in run(s, float(second)):
            break
    assert patient.taken == 1


def test_the_queue_is_bounded_in_rows_and_says_when_to_come_back() -> None:
    s = taught(1 * MS, 0.0)
    s.offer(ticket(100), 0.0)
    with pytest.raises(ResourceExhausted) as full:
        s.offer(ticket(1), 0.0)
    assert full.value.reason == "QUEUE_FULL"
    assert full.value.retry_after_s == pytest.approx(0.1, rel=0.2)
    with pytest.raises(InvalidArgument):
        s.offer(ticket(101), 0.0)


def test_what_has_expired_or_cannot_be_in_time_is_refused_at_the_door() -> None:
    s = taught(1 * MS, 2 * MS)
    with pytest.raises(DeadlineExceeded):
        s.offer(ticket(deadline_s=0.0), 0.0)
    with pytest.raises(DeadlineExceeded) as refused:
        s.offer(ticket(10, deadline_s=11 * MS), 0.0)
    assert refused.value.reason == "DEADLINE_CANNOT_BE_MET"
    s.offer(ticket(10, deadline_s=13 * MS), 0.0)
    s.next(0.0)
    with pytest.raises(DeadlineExceeded):
        s.offer(ticket(1, deadline_s=14 * MS), 0.0)  # the batch under way takes 12 ms, this one 3 more


def test_a_stale_estimate_refuses_nobody() -> None:
    s = taught(1.0, 10.0, now_s=0.0)
    s.offer(ticket(5, deadline_s=100.1), 100.0)
    assert len(run(s, 100.0)) == 1


def test_what_expired_while_it_waited_is_dropped_before_it_runs() -> None:
    s = schedule()
    s.offer(ticket(), 0.0)
    s.next(0.0)
    dead, alive = ticket(deadline_s=1.0), ticket(deadline_s=9.0)
    s.offer(dead, 0.0)
    s.offer(alive, 0.0)
    s.finished(2.0)
    batch, late = s.next(2.0)
    assert late == [dead]
    assert batch is not None
    assert [share.ticket for share in batch.shares] == [alive]
    assert s.queued_rows == 0


def test_a_batch_stops_growing_where_its_most_urgent_member_would_be_late() -> None:
    s = taught(1 * MS, 0.0)
    s.offer(ticket(), 0.0)
    s.next(0.0)
    urgent, patient = ticket(2, deadline_s=6 * MS), ticket(8, deadline_s=1.0)
    s.offer(urgent, 0.0)
    s.offer(patient, 0.0)
    s.finished(1 * MS)
    assert run(s, 1 * MS) == [urgent]
    assert run(s, 3 * MS) == [patient]


def after_sixteen(**limits: Any) -> Schedule:
    """Return a schedule whose last batches, the last of which ended at 0, had sixteen requests each; a batch takes 1 ms and 1 us a row."""
    s = taught(1e-6, 1 * MS, max_rows=100, max_delay_s=5 * MS, **limits)
    for _ in range(8):
        for _ in range(16):
            s.offer(ticket(), -2 * MS)
        while not s.idle:
            run(s, 0.0)
        s.latency.observe(16, 1.016 * MS, 0.0)
    return s


def test_a_free_runner_waits_for_company_that_tends_to_come() -> None:
    s = after_sixteen()
    tickets = [ticket() for _ in range(16)]
    for t in tickets[:15]:
        s.offer(t, 0.1 * MS)
        assert s.next(0.1 * MS) == (None, [])
    s.offer(tickets[15], 0.2 * MS)
    assert run(s, 0.2 * MS) == tickets


def test_nobody_waits_who_is_urgent_or_would_be_late() -> None:
    for t in (Ticket(rows=1, deadline_s=math.inf, priority=1), ticket(deadline_s=2 * MS)):
        s = after_sixteen()
        s.offer(t, 0.1 * MS)
        assert run(s, 0.1 * MS) == [t]


def test_nobody_waits_whose_rows_are_enough() -> None:
    s, many = after_sixteen(), ticket(100)
    s.offer(many, 0.1 * MS)
    assert run(s, 0.1 * MS) == [many]
    s, few = after_sixteen(preferred_rows=(4, 8)), ticket(4)
    s.offer(few, 0.1 * MS)
    assert run(s, 0.1 * MS) == [few]


def test_a_batch_is_cut_to_the_largest_preferred_size_it_fills() -> None:
    s = schedule(preferred_rows=(4, 8))
    s.offer(ticket(), 0.0)
    s.next(0.0)
    for _ in range(15):
        s.offer(ticket(), 0.0)
    s.finished(0.0)
    assert [len(run(s, 0.0)) for _ in range(3)] == [8, 4, 3]


def test_a_long_request_runs_in_pieces_between_which_urgent_ones_run() -> None:
    s, long = schedule(), ticket(25)
    s.offer(long, 0.0)
    first, _ = s.next(0.0)
    assert first is not None
    assert [(x.start, x.stop) for x in first.shares] == [(0, 10)]
    urgent = ticket(deadline_s=1.0)
    s.offer(urgent, 0.0)
    s.finished(0.0)
    assert run(s, 0.0)[0] is urgent
    rows = []
    while not s.idle:
        batch, _ = s.next(0.0)
        assert batch is not None
        rows += [(x.start, x.stop) for x in batch.shares]
        s.finished(0.0)
    assert long.taken == 25
    assert rows[-1][1] == 25


def test_only_one_kind_shares_a_batch() -> None:
    s = schedule()
    a, b, c = ticket(kind="wide"), ticket(kind="narrow"), ticket(kind="wide")
    for t in (a, b, c):
        s.offer(t, 0.0)
    assert run(s, 0.0) == [a, c]
    assert run(s, 0.0) == [b]


def test_requests_that_cannot_be_joined_run_one_by_one() -> None:
    s = schedule(joins=False, splits=False)
    tickets = [ticket(), ticket()]
    for t in tickets:
        s.offer(t, 0.0)
    assert [run(s, 0.0), run(s, 0.0)] == [tickets[:1], tickets[1:]]
    with pytest.raises(InvalidArgument):
        s.offer(ticket(11), 0.0)


def test_the_one_at_fault_is_found_and_the_others_run_again() -> None:
    s = schedule()
    s.offer(ticket(), 0.0)
    tickets = [ticket() for _ in range(7)]
    s.next(0.0)
    for t in tickets:
        s.offer(t, 0.0)
    s.finished(0.0)
    guilty, served, blamed = tickets[4], [], []
    while not s.idle:
        batch, _ = s.next(0.0)
        assert batch is not None
        inside = [share.ticket for share in batch.shares]
        if guilty in inside:
            blamed += [t for t in [s.failed()] if t is not None]
        else:
            served += inside
            s.finished(0.0)
    assert blamed == [guilty]
    assert sorted(map(id, served)) == sorted(id(t) for t in tickets if t is not guilty)


class Traffic(RuleBasedStateMachine):
    """Any interleaving of arrivals, departures, failures and time."""

    def __init__(self) -> None:
        super().__init__()
        self.s = schedule(max_rows=8, max_queue_rows=40, max_delay_s=0.5)
        self.now_s = 0.0
        self.waiting: dict[int, Ticket] = {}
        self.rows: dict[int, int] = {}
        self.batch: Batch | None = None

    @rule(rows=st.integers(1, 45), left_s=st.one_of(st.just(math.inf), st.floats(-0.1, 3.0)), kind=st.sampled_from("ab"))
    def arrive(self, rows: int, left_s: float, kind: str) -> None:
        before = self.s.queued_rows
        t = ticket(rows, self.now_s + left_s, kind)
        try:
            self.s.offer(t, self.now_s)
        except PlaitError:
            assert self.s.queued_rows == before
        else:
            self.waiting[id(t)] = t
            self.rows[id(t)] = 0

    @precondition(lambda self: self.waiting)
    @rule(pick=st.integers(0, 1000))
    def leave(self, pick: int) -> None:
        t = self.waiting.pop(list(self.waiting)[pick % len(self.waiting)])
        self.s.withdraw(t)

    @rule(seconds=st.floats(0.0, 1.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def expire(self) -> None:
        self.s.delay.expire()

    @rule()
    def start(self) -> None:
        busy = self.s.running
        batch, late = self.s.next(self.now_s)
        for t in late:
            assert t.over
            assert self.waiting.pop(id(t)) is t
        if busy is not None:
            assert (batch, late) == (None, [])
            return
        if batch is None:
            if not self.s.idle:  # it waits for company, which ends when nobody comes
                self.s.delay.expire()
                self.start()
                assert self.s.idle or self.s.running, "an idle runner left work waiting"
            return
        assert 1 <= batch.rows <= 8
        assert len({share.ticket.kind for share in batch.shares}) == 1
        assert all(not share.ticket.over and share.ticket.deadline_s > self.now_s for share in batch.shares)
        self.batch = batch

    @precondition(lambda self: self.batch)
    @rule()
    def finish(self) -> None:
        batch, self.batch = self.batch, None
        assert batch is not None
        self.s.finished(self.now_s)
        for share in batch.shares:
            t = share.ticket
            self.rows[id(t)] += share.rows
            assert self.rows[id(t)] <= t.rows
            if id(t) in self.waiting and self.rows[id(t)] == t.rows:
                del self.waiting[id(t)]
                self.s.withdraw(t)

    @precondition(lambda self: self.batch)
    @rule()
    def fail(self) -> None:
        batch, self.batch = self.batch, None
        assert batch is not None
        culprit = self.s.failed()
        assert (culprit is None) == (len(batch.shares) > 1)
        if culprit is not None:
            self.waiting.pop(id(culprit), None)

    @invariant()
    def bounds_hold(self) -> None:
        assert 0 <= self.s.queued_rows <= 40
        assert self.s.queued_rows == sum(t.rows - t.taken for t in self.waiting.values())

    def teardown(self) -> None:
        """Nothing is ever lost: whoever still waits is served, or told, once time goes on."""
        while not self.s.idle:
            if self.batch is None:
                self.start()
            else:
                self.finish()
            assert not self.s.idle or not self.waiting


Traffic.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestTraffic = Traffic.TestCase


def test_who_has_to_wait_must_be_done_with_time_to_spare() -> None:
    for headroom, let_in in ((0.0, True), (0.5, False)):
        s = schedule(headroom=headroom)
        for i in range(3):
            s.latency.observe(1 + i, 10 * MS, 0.0)
        s.offer(Ticket(rows=1, deadline_s=15 * MS), 0.0)  # nobody to wait for: all of the time may be used
        s.next(0.0)
        if let_in:
            s.offer(Ticket(rows=1, deadline_s=25 * MS), 0.0)
        else:
            with pytest.raises(DeadlineExceeded):
                s.offer(Ticket(rows=1, deadline_s=25 * MS), 0.0)
            s.offer(Ticket(rows=1, deadline_s=41 * MS), 0.0)
