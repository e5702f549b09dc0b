"""The worker's counters once more under the names that dashboards made for Triton know.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from model_worker.statistics import ModelStatistics, Statistics

_US: Final = 1000  # nanoseconds


class TritonMetrics(Collector):
    """Register it with a process's registry; it reads `Statistics` when scraped, in the scraping thread (see there why that is safe)."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        """Yield every family with a sample per model and version."""
        known = self._statistics.all()
        for name, meaning, value in _FAMILIES:
            family = Metric(name, meaning, "unknown")  # not "counter": that would append _total, which Triton's names lack
            for (model, version), counters in known.items():
                family.add_sample(name, {"model": model, "version": version}, value(counters))
            yield family


_FAMILIES: Final[tuple[tuple[str, str, Callable[[ModelStatistics], float]], ...]] = (
    ("nv_inference_request_success", "requests answered", lambda c: c.success.count),
    ("nv_inference_request_failure", "requests that ended in an error", lambda c: c.fail.count),
    ("nv_inference_count", "rows computed for answered requests", lambda c: c.rows),
    ("nv_inference_exec_count", "forward passes", lambda c: c.executions),
    ("nv_inference_request_duration_us", "time of answered requests, microseconds", lambda c: c.success.ns // _US),
    ("nv_inference_queue_duration_us", "time answered requests waited for their batch, microseconds", lambda c: c.queue.ns // _US),
    ("nv_inference_compute_input_duration_us", "time spent reading inputs, microseconds", lambda c: c.compute_input.ns // _US),
    ("nv_inference_compute_infer_duration_us", "time in the model, attributed by rows, microseconds", lambda c: c.compute_infer.ns // _US),
    ("nv_inference_compute_output_duration_us", "time spent writing outputs, microseconds", lambda c: c.compute_output.ns // _US),
)
