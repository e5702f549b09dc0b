"""Series by model and version: there from the first on, gone with the version."""

from __future__ import annotations

from model_worker.instruments import Instruments
from plait.telemetry.metrics import Metrics

LABELS = {"model": "m", "version": "1"}
SERIES = (
    "plait_model_worker_batch_rows_count",
    "plait_model_worker_queue_seconds_count",
    "plait_model_worker_compute_seconds_count",
    "plait_model_worker_dropped_total",
    "plait_model_worker_ready",
)


def test_series_are_zero_from_the_first_on_and_the_same_each_time() -> None:
    metrics = Metrics()
    instruments = Instruments(metrics)
    instruments.of("m", "1")
    assert [metrics.registry.get_sample_value(name, LABELS) for name in SERIES] == [0.0] * 5
    instruments.of("m", "1").dropped.inc()
    instruments.of("m", "1").dropped.inc()
    assert metrics.registry.get_sample_value("plait_model_worker_dropped_total", LABELS) == 2


def test_a_version_that_left_leaves_no_series() -> None:
    metrics = Metrics()
    instruments = Instruments(metrics)
    for version in "12":
        instruments.of("m", version)
    instruments.forget("m", "1")
    instruments.forget("m", "never there")
    assert [metrics.registry.get_sample_value(name, LABELS) for name in SERIES] == [None] * 5
    assert metrics.registry.get_sample_value("plait_model_worker_ready", {"model": "m", "version": "2"}) == 0


def test_loads_are_counted_by_outcome() -> None:
    metrics = Metrics()
    instruments = Instruments(metrics)
    instruments.loaded("m", "READY")
    instruments.loaded("m", "ARTIFACT_CORRUPT")
    assert metrics.registry.get_sample_value("plait_model_worker_loads_total", {"model": "m", "outcome": "ARTIFACT_CORRUPT"}) == 1
