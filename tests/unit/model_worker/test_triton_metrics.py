"""The names that existing dashboards ask for."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from model_worker.statistics import Statistics
from model_worker.triton_metrics import TritonMetrics


@pytest.fixture
def impatient_threads() -> Iterator[None]:
    """Threads take turns far more often than usual."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before_s)


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


def test_scraping_from_another_thread_sees_only_whole_values_that_grow(impatient_threads: None) -> None:
    statistics = Statistics()
    metrics = TritonMetrics(statistics)
    ended = threading.Event()
    seen: dict[tuple[str, str], list[float]] = defaultdict(list)
    faults: list[BaseException] = []

    def scrape() -> None:
        try:
            while not ended.is_set():
                for family in metrics.collect():
                    for sample in family.samples:
                        seen[sample.name, sample.labels["model"]].append(sample.value)
        except BaseException as error:  # it is looked at below
            faults.append(error)

    scraper = threading.Thread(target=scrape)
    scraper.start()
    for n in range(4000):
        statistics.of(f"m{n}", "1")  # versions come while they are read
        counters = statistics.of(f"m{n % 7}", "1")
        counters.batch(n % 100, 0.001)
        counters.answered(3, 1.0, queue_s=0.25, input_s=0.125, compute_s=0.5, output_s=0.0625)
    ended.set()
    scraper.join()
    assert not faults
    assert len(seen) > 9
    assert all(values == sorted(values) for values in seen.values())
    assert all(value % 3 == 0 for value in seen["nv_inference_count", "m0"])
