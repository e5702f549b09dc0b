"""What a model-worker measures, made once per process; by model and version, of which the registry bounds the number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from model_worker.statistics import ModelStatistics, Statistics
from plait.telemetry.metrics import Metrics

_LABELS: Final = ("model", "version")
_ROWS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInstruments:
    """The series of one model version. `ready` is 1 where it serves, else 0; `memory`: bytes it is accounted with."""

    rows: Histogram
    queue_s: Histogram
    compute_s: Histogram
    dropped: Counter
    busy_s: Counter
    restarts: Counter
    queued_rows: Gauge
    ready: Gauge
    statistics: ModelStatistics
    memory: Gauge
    quarantined: Counter


class Instruments:
    """Families of series, by model and version. `statistics`: what the protocol's ModelStatistics tells, which outlives the series."""

    def __init__(self, metrics: Metrics) -> None:
        self.statistics = Statistics()
        self._rows = metrics.histogram("plait_model_worker_batch_rows", "rows in one forward pass", _LABELS, _ROWS)
        self._queue_s = metrics.histogram(
            "plait_model_worker_queue_seconds", "time a request waited for its batch, seconds", _LABELS, _SECONDS
        )
        self._compute_s = metrics.histogram(
            "plait_model_worker_compute_seconds", "one batch: joining, forward pass, dividing, seconds", _LABELS, _SECONDS
        )
        self._dropped = metrics.counter("plait_model_worker_dropped", "requests let in and dropped because of their deadline", _LABELS)
        self._busy_s = metrics.counter(
            "plait_model_worker_busy_seconds", "time spent computing batches, seconds; equals what is attributed to requests", _LABELS
        )
        self._restarts = metrics.counter(
            "plait_model_worker_instance_restarts", "instances given up because they hung or their process ended", _LABELS
        )
        self._queued_rows = metrics.gauge("plait_model_worker_queued_rows", "rows waiting for a batch", _LABELS)
        self._failures = metrics.counter(
            "plait_model_worker_request_failures", "requests that ended in an error, by reason", (*_LABELS, "reason")
        )
        self._ready = metrics.gauge("plait_model_worker_ready", "1 where the version is ready to serve, else 0", _LABELS)
        self._memory = metrics.gauge("plait_model_worker_memory_bytes", "memory a version is accounted with, bytes", _LABELS)
        self._quarantined = metrics.counter(
            "plait_model_worker_quarantined", "times a version was taken out because it kept failing", _LABELS
        )
        self.overdue = metrics.gauge("plait_model_worker_overdue_loads", "loads past their time whose threads are still running", ())
        self._loads = metrics.counter("plait_model_worker_loads", "attempts to load a version, by outcome", ("model", "outcome"))

    def of(self, model: str, version: str) -> ModelInstruments:
        """Return the series of one version; the same ones each time, zero from the first on."""
        return ModelInstruments(
            rows=self._rows.labels(model, version),
            queue_s=self._queue_s.labels(model, version),
            compute_s=self._compute_s.labels(model, version),
            dropped=self._dropped.labels(model, version),
            busy_s=self._busy_s.labels(model, version),
            restarts=self._restarts.labels(model, version),
            queued_rows=self._queued_rows.labels(model, version),
            ready=self._ready.labels(model, version),
            statistics=self.statistics.of(model, version),
            memory=self._memory.labels(model, version),
            quarantined=self._quarantined.labels(model, version),
        )

    def forget(self, model: str, version: str) -> None:
        """Drop the series of a version that is no longer here."""
        families = (self._rows, self._queue_s, self._compute_s, self._dropped, self._ready, self._memory, self._quarantined)
        for family in (*families, self._busy_s, self._restarts, self._queued_rows):
            family.remove(model, version)

    def failed(self, model: str, version: str, reason: str) -> None:
        """Count a request that ended in an error; `reason` is one of ours, so their number is bounded."""
        self._failures.labels(model, version, reason).inc()

    def loaded(self, model: str, outcome: str) -> None:
        """Count an attempt; `outcome` is READY or the reason it failed."""
        self._loads.labels(model, outcome).inc()
