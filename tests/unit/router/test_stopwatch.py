"""Where the time went: stages add up, in the units the contract says."""

from __future__ import annotations

import time

import pytest

from plait.api.inference.v2 import inference_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.telemetry.metrics import Metrics
from router.stopwatch import RankingMetrics, Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def a_request(clock: Clock) -> Stopwatch:
    """1 ms waiting to be admitted, 2 ms resolving, 4 ms features, 8 ms predicting, 16 ms ordering."""
    watch = Stopwatch()
    clock.now_s += 0.001
    watch.resolved = watch.stamp()
    clock.now_s += 0.002
    watch.admitted = watch.stamp()
    clock.now_s += 0.004
    watch.featured = watch.stamp()
    clock.now_s += 0.008
    watch.predicted = watch.stamp()
    clock.now_s += 0.016
    return watch


def test_timings_are_microseconds_per_stage(clock: Clock) -> None:
    answer = inference_pb2.ModelInferResponse()
    answer.parameters["queue_us"].int64_param = 11
    answer.parameters["compute_us"].int64_param = 22
    response = pb.RankResponse()
    a_request(clock).write(response.timings, answer, 33)
    timings = response.timings
    assert timings.total_us == pytest.approx(31_000, abs=1)
    stages = [timings.resolve_us, timings.features_us, timings.predict_us, timings.order_us]
    assert stages == pytest.approx([1_000, 4_000, 8_000, 16_000], abs=1)
    assert (timings.store_us, timings.queue_us, timings.compute_us) == (33, 11, 22)


def test_a_stage_that_was_skipped_took_no_time(clock: Clock) -> None:
    response = pb.RankResponse()
    Stopwatch().write(response.timings, inference_pb2.ModelInferResponse(), 0)
    assert response.timings == pb.Timings()


def test_answers_are_counted_by_route_variant_reason_and_stage(clock: Clock) -> None:
    metrics = Metrics()
    counted = RankingMetrics(metrics)
    for variant, reasons in (("a", ["features_stale", "scores_not_finite"]), ("b", [])):
        watch = a_request(clock)
        watch.done = watch.stamp()
        clock.now_s += 100  # counted later, of which nothing may be seen
        counted.answered("home", variant, reasons, watch)
    value = metrics.registry.get_sample_value
    assert value("plait_router_answers_total", {"route": "home", "variant": "a"}) == 1
    assert value("plait_router_answers_total", {"route": "home", "variant": "b"}) == 1
    assert value("plait_router_degraded_total", {"route": "home", "reason": "features_stale"}) == 1
    assert value("plait_router_degraded_total", {"route": "home", "reason": "scores_not_finite"}) == 1
    seconds = {stage: value("plait_router_stage_seconds_sum", {"stage": stage}) for stage in ("own", "features", "predict")}
    assert seconds == pytest.approx({"own": 2 * 0.019, "features": 2 * 0.004, "predict": 2 * 0.008})
    assert value("plait_router_stage_seconds_count", {"stage": "own"}) == 2
