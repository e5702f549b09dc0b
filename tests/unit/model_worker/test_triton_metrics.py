"""The names that existing dashboards ask for."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from model_worker.statistics import Statistics
from model_worker.triton_metrics import TritonMetrics


def test_counters_have_tritons_names_and_units() -> None:
    statistics, registry = Statistics(), CollectorRegistry()
    registry.register(TritonMetrics(statistics))
    counters = statistics.of("m", "1")
    counters.batch(3, 0.5)
    counters.answered(3, 1.0, queue_s=0.25, input_s=0.125, compute_s=0.5, output_s=0.0625)
    counters.failed(1.0)
    sample = registry.get_sample_value
    labels = {"model": "m", "version": "1"}
    found = {name: sample(f"nv_inference_{name}", labels) for name in ("request_success", "request_failure", "count", "exec_count")}
    assert found == {"request_success": 1, "request_failure": 1, "count": 3, "exec_count": 1}
    durations = {
        n: sample(f"nv_inference_{n}_duration_us", labels) for n in ("request", "queue", "compute_input", "compute_infer", "compute_output")
    }
    assert durations == {"request": 1e6, "queue": 250_000, "compute_input": 125_000, "compute_infer": 500_000, "compute_output": 62_500}
    assert b'nv_inference_count{model="m",version="1"} 3.0' in generate_latest(registry)
