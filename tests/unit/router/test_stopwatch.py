"""Timings and counts of one request, from moments set by hand."""

from __future__ import annotations

import pytest

from plait.api.inference.v2 import inference_pb2
from plait.api.router.v1 import router_service_pb2 as pb
from plait.telemetry.metrics import Metrics
from router.stopwatch import RankingMetrics, Stopwatch


class Scripted(Stopwatch):
    """A watch that stands still: it started at 10 s, and it is 10.064 s now."""

    def __init__(self) -> None:
        super().__init__()
        self.started = 10.0
        self.admitted = 10.001
        self.resolved = 10.003
        self.featured = 10.019
        self.predicted = 10.051

    def stamp(self) -> float:
        return 10.064


def answer(**parameters: int) -> inference_pb2.ModelInferResponse:
    response = inference_pb2.ModelInferResponse()
    for name, value in parameters.items():
        response.parameters[name].int64_param = value
    return response


def test_each_stage_is_told_in_microseconds() -> None:
    timings = pb.RankResponse().timings
    Scripted().write(timings, answer(queue_us=11, compute_us=22), 333)
    told = {field.name: value for field, value in timings.ListFields()}
    expected = {
        "total_us": 64_000,
        "resolve_us": 2_000,
        "features_us": 16_000,
        "store_us": 333,
        "predict_us": 32_000,
        "queue_us": 11,
        "compute_us": 22,
        "order_us": 13_000,
    }
    assert told.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(told[name] - value) <= 1, name  # (a microsecond is lost where a float is cut off)


def test_stages_that_were_skipped_took_no_time() -> None:
    watch = Stopwatch()
    timings = pb.RankResponse().timings
    watch.write(timings, answer(), 0)
    assert (timings.resolve_us, timings.features_us, timings.predict_us, timings.queue_us, timings.compute_us) == (0, 0, 0, 0, 0)
    assert timings.total_us == timings.order_us


def test_time_does_not_run_backwards() -> None:
    watch = Stopwatch()
    assert watch.stamp() >= watch.started


@pytest.mark.parametrize("reasons", [[], ["features_stale"], ["features_defaulted", "scores_not_finite"]])
def test_an_answer_is_counted_once_and_each_of_its_reasons(reasons: list[str]) -> None:
    metrics = Metrics()
    counts = RankingMetrics(metrics)
    counts.answered("home", "main", reasons, Scripted())
    counts.answered("home", "main", [], Scripted())
    sample = metrics.registry.get_sample_value
    assert sample("plait_router_answers_total", {"route": "home", "variant": "main"}) == 2
    counted = {
        s.labels["reason"]: s.value for m in metrics.registry.collect() for s in m.samples if s.name == "plait_router_degraded_total"
    }
    assert counted == dict.fromkeys(reasons, 1.0)


def test_the_stages_seconds_add_up_to_the_whole() -> None:
    metrics = Metrics()
    RankingMetrics(metrics).answered("home", "main", [], Scripted())
    seconds = {s: metrics.registry.get_sample_value("plait_router_stage_seconds_sum", {"stage": s}) for s in ("own", "features", "predict")}
    assert seconds == pytest.approx({"own": 0.016, "features": 0.016, "predict": 0.032})
    assert sum(value or 0.0 for value in seconds.values()) == pytest.approx(0.064)
