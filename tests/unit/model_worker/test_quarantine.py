"""When a version is taken out and how it comes back, on a clock of our own."""

from __future__ import annotations

from model_worker.quarantine import Breaker, Fault, Phase, Rule

RULE = Rule(faults=4, severe=2, window=8, window_s=60.0, backoff_s=5.0, max_backoff_s=40.0)


def tripped(breaker: Breaker, now_s: float, kind: Fault = Fault.EXECUTION) -> bool:
    return any(breaker.fault(kind, now_s) for _ in range(4))


def test_half_of_the_last_batches_must_fail() -> None:
    breaker = Breaker(RULE)
    for _ in range(100):  # three of eight, for ever
        assert not any(breaker.fault(Fault.EXECUTION, 0.0) for _ in range(3))
        for _ in range(5):
            breaker.success()
    assert tripped(breaker, 0.0)


def test_old_faults_are_forgotten() -> None:
    breaker = Breaker(RULE)
    assert not any(breaker.fault(Fault.EXECUTION, 30.0 * n) for n in range(100))


def test_hangs_weigh_more() -> None:
    breaker = Breaker(RULE)
    assert [breaker.fault(Fault.HANG, 0.0), breaker.fault(Fault.INSTANCE_LOST, 0.0)] == [False, True]
    assert not breaker.fault(Fault.HANG, 0.0)


def test_a_relapse_doubles_the_time_out_and_good_behaviour_ends_that() -> None:
    breaker = Breaker(RULE)
    now_s = 0.0
    for expected in (5.0, 10.0, 20.0, 40.0, 40.0):
        assert tripped(breaker, now_s)
        assert breaker.until_s - now_s == expected
        now_s = breaker.until_s
        breaker.test()
        assert breaker.phase is Phase.HALF_OPEN
        breaker.restored(now_s)
    assert tripped(breaker, now_s + 40.0)
    assert breaker.until_s - now_s == 45.0
    breaker.test_failed(now_s)
    assert breaker.until_s - now_s == 10.0


def test_it_can_be_switched_off() -> None:
    assert not any(tripped(Breaker(Rule(faults=0)), 0.0, kind) for kind in Fault)
