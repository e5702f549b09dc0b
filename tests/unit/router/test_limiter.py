"""The limit against a worker that batches, on a clock of its own; and its bounds whatever is heard."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.simulated_worker import Simulation, Stream, Worker

from router.admission import Admission
from router.limiter import MIN_SAMPLES, STEP_S, Limiter, Window
from router.settings import AdmissionSettings


def simulated(worker: Worker, *streams: Stream, until_ms: float = 10_000, from_ms: float = 4_000, seed: int = 1) -> Simulation:
    return Simulation(Admission(AdmissionSettings()), worker, *streams, seed=seed).run(until_ms, from_ms)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("load", "goodput"), [(1.0, 0.95), (1.2, 0.97), (2.0, 0.97), (4.0, 0.97)])
def test_from_the_first_moment_goodput_stays_and_waits_are_bounded(load: float, goodput: float, seed: int) -> None:
    calm, busy = Stream(load=lambda _: 0.7), Stream(load=lambda _: load)
    quiet = simulated(Worker(), calm, seed=seed)
    overloaded = simulated(Worker(), busy, seed=seed)
    assert quiet.goodput(calm) > 0.66
    assert calm.refused == 0
    assert overloaded.goodput(busy) >= goodput
    assert overloaded.p99_ms(busy) <= 2.6 * quiet.p99_ms(calm)


def test_a_calm_time_before_the_flood_changes_nothing() -> None:
    stream = Stream(load=lambda now: 0.05 if now < 5_000 else 4.0)
    result = simulated(Worker(), stream, until_ms=12_000, from_ms=8_000)
    assert result.goodput(stream) >= 0.97
    assert result.p99_ms(stream) <= 30


def test_a_worker_that_slows_down_and_recovers_keeps_busy_and_its_queue_short() -> None:
    slow = Worker(slowness=lambda now: 2.0 if 4_000 < now < 8_000 else 1.0)
    stream = Stream(load=lambda _: 2.0)
    half = simulated(slow, stream, until_ms=8_000, from_ms=5_000)
    assert half.goodput(stream) >= 0.47
    assert half.p99_ms(stream) <= 60
    again = Stream(load=lambda _: 2.0)
    whole = simulated(slow, again, until_ms=14_000, from_ms=9_000)
    assert whole.goodput(again) >= 0.95


@pytest.mark.parametrize(("each", "limit"), [(10.0, 4), (1.0, 12)])
def test_a_worker_that_takes_one_at_a_time_is_given_few(each: float, limit: int) -> None:
    stream = Stream(load=lambda _: 4.0)
    result = simulated(Worker(fixed_ms=each, each_ms=0.0, batch=1), stream, until_ms=30_000, from_ms=15_000)
    assert result.goodput(stream) >= 0.95
    assert 2 <= statistics.median(found for when, found in result.limits if when > 15_000) <= limit


def test_batches_that_could_grow_without_end_are_held() -> None:
    stream = Stream(load=lambda _: 4.0)
    result = simulated(Worker(batch=2048), stream, until_ms=10_000, from_ms=5_000)
    assert result.admission.limiter.limit < 1024
    assert result.p99_ms(stream) < 195


def test_a_flood_of_one_tenant_leaves_the_other_its_share() -> None:
    flood, polite = Stream(load=lambda _: 4.0, tenant="flood"), Stream(load=lambda _: 0.45, tenant="polite")
    result = simulated(Worker(), flood, polite)
    assert result.goodput(polite) >= 0.9 * 0.45
    assert result.goodput(flood) >= 0.5  # and what the other leaves
    assert max(result.p99_ms(flood), result.p99_ms(polite)) <= 45


def test_two_floods_share_by_weight_and_classes_have_floors() -> None:
    heavy, light = Stream(load=lambda _: 3.0, tenant="a", weight=3.0), Stream(load=lambda _: 3.0, tenant="b")
    result = simulated(Worker(), heavy, light)
    assert result.goodput(heavy) == pytest.approx(0.75, abs=0.05)
    assert result.goodput(light) == pytest.approx(0.25, abs=0.05)
    classes = [Stream(load=lambda _: 2.0, rank=rank) for rank in range(3)]
    result = simulated(Worker(), *classes)
    for stream, share in zip(classes, (8 / 13, 4 / 13, 1 / 13), strict=True):
        assert result.goodput(stream) == pytest.approx(share, abs=0.05)


def heard(limiter: Limiter, now_s: float, queue_ms: float, compute_ms: float, *, count: int = MIN_SAMPLES, peak: float = 1e9) -> int:
    window = Window()
    for _ in range(count):
        limiter.sample(window, queue_ms, compute_ms)
    if limiter.due(now_s):
        limiter.step(now_s, peak)
    return limiter.limit


def test_it_grows_fast_until_a_queue_was_seen_then_slowly() -> None:
    limiter = Limiter(start=32, least=2, most=1024)
    assert [heard(limiter, second, 1.0, 4.0) for second in range(3)] == [40, 50, 62]
    assert heard(limiter, 3, 40.0, 4.0) < 62
    before = limiter.limit
    assert before <= heard(limiter, 4, 1.0, 4.0) <= before + 1


def test_what_is_not_used_does_not_grow() -> None:
    limiter = Limiter(start=32, least=2, most=1024)
    assert [heard(limiter, second, 0.0, 4.0, peak=15) for second in range(5)] == [32] * 5


def test_few_answers_say_nothing() -> None:
    limiter = Limiter(start=32, least=2, most=1024)
    assert heard(limiter, 0, 1e4, 1.0, count=MIN_SAMPLES - 1) == 32


def test_a_step_takes_its_time() -> None:
    limiter = Limiter(start=32, least=2, most=1024)
    assert heard(limiter, 0, 0.0, 1.0) == 40
    assert heard(limiter, STEP_S / 2, 0.0, 1.0) == 40
    assert heard(limiter, STEP_S, 0.0, 1.0) == 50


def test_a_worker_that_says_it_is_too_busy_lowers_the_limit() -> None:
    limiter = Limiter(start=100, least=2, most=1024)
    for _ in range(2 * MIN_SAMPLES):
        limiter.dropped()
    assert limiter.due(0)
    limiter.step(0, 100)
    assert limiter.limit < 100


def test_a_workers_own_wait_for_fuller_batches_is_no_overload() -> None:
    limiter = Limiter(start=4, least=2, most=1024)
    window = Window()
    for second in range(20):
        for _ in range(MIN_SAMPLES):
            limiter.sample(window, 5.0, 0.5)
        limiter.step(second, 1e9)
    assert limiter.limit > 100


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 30), st.integers(0, 30), st.floats(0, 1e4)), max_size=60))
def test_the_bounds_hold_whatever_is_heard(steps: list[tuple[float, float, int, int, float]]) -> None:
    limiter = Limiter(start=5, least=3, most=50)
    for number, (queue_ms, compute_ms, answers, drops, peak) in enumerate(steps):
        for _ in range(drops):
            limiter.dropped()
        heard(limiter, number, queue_ms, compute_ms, count=answers, peak=peak)
        assert 3 <= limiter.limit <= 50


def test_where_most_fail_the_limit_is_halved_at_once_and_not_again_for_what_was_let_in_before() -> None:
    limiter = Limiter(start=64, least=2, most=1024)
    seen = []
    for step in range(1, 9):  # 0.1 s each; nobody is answered
        for _ in range(12):
            limiter.dropped()
        limiter.step(step * 0.1, 60.0)
        seen.append(limiter.limit)
    assert seen[:3] == [30, 30, 30]  # of the 60 under way, not of the 64 allowed
    assert sorted(set(seen), reverse=True) == [30, 15, 7]  # three cuts in 0.8 s, not eight
    window = Window()
    for step in range(9, 40):
        for _ in range(12):
            limiter.sample(window, 1.0, 10.0)
        limiter.step(step * 0.1, float(limiter.limit))
    assert limiter.limit > 7
