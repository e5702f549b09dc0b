"""Where the time of one request went, and the metrics made of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plait.telemetry.metrics import Metrics
from router.tensors import parameter

if TYPE_CHECKING:
    from plait.api.inference.v2 import inference_pb2


class Stopwatch:
    """Moments of one request, in seconds of `time.perf_counter`: resolved, let in, features read, scores there, answered.

    A stage that was not reached took no time.
    """

    __slots__ = ("admitted", "done", "featured", "predicted", "resolved", "started")

    def __init__(self) -> None:
        self.started = self.admitted = self.resolved = self.featured = self.predicted = self.done = time.perf_counter()

    def stamp(self) -> float:
        """Return now."""
        return time.perf_counter()

    def write(self, timings: Any, answer: inference_pb2.ModelInferResponse, store_us: int) -> None:
        """Fill a `Timings` message, in microseconds."""
        now = self.stamp()
        timings.total_us = _us(self.started, now)
        timings.resolve_us = _us(self.started, self.resolved)
        timings.features_us = _us(self.admitted, self.featured)
        timings.store_us = store_us
        timings.predict_us = _us(self.featured, self.predicted)
        timings.queue_us = parameter(answer, "queue_us")
        timings.compute_us = parameter(answer, "compute_us")
        timings.order_us = _us(self.predicted, now)


class RankingMetrics:
    """What the router counts. Labels are names from the registry and stable words, never ids."""

    def __init__(self, metrics: Metrics) -> None:
        self._answers = metrics.counter("plait_router_answers", "requests answered, by route and variant", ("route", "variant"))
        self._degraded = metrics.counter("plait_router_degraded", "answers that were not the best possible, by reason", ("route", "reason"))
        self._by_rule = metrics.counter(
            "plait_router_rule_items", "candidates that a business rule dropped, boosted or held back", ("route", "rule")
        )
        stages = metrics.histogram("plait_router_stage_seconds", "time a stage of an answered request took, seconds", ("stage",))
        self._own = stages.labels("own")
        self._features = stages.labels("features")
        self._predict = stages.labels("predict")

    def ruled(self, route: str, by_rule: Mapping[str, int]) -> None:
        """Count what business rules did to one answer."""
        for rule, items in by_rule.items():
            self._by_rule.labels(route, rule).inc(items)

    def answered(self, route: str, variant: str, reasons: list[str], watch: Stopwatch) -> None:
        """Count one answer."""
        self._answers.labels(route, variant).inc()
        for reason in reasons:
            self._degraded.labels(route, reason).inc()
        behind_s = watch.predicted - watch.admitted
        self._own.observe(watch.done - watch.started - behind_s)
        self._features.observe(watch.featured - watch.admitted)
        self._predict.observe(watch.predicted - watch.featured)


def _us(begin: float, end: float) -> int:
    return int((end - begin) * 1e6)
