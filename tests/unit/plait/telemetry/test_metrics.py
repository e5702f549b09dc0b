"""Metrics belong to one process object and are scraped over HTTP."""

from __future__ import annotations

import urllib.request

from plait.telemetry.metrics import LATENCY_BUCKETS_S, Metrics, observe_all


def test_two_processes_worth_of_metrics_do_not_clash_and_are_scraped() -> None:
    first, second = Metrics(), Metrics()
    for metrics, amount in ((first, 1), (second, 5)):
        metrics.counter("plait_things", "things", ("kind",)).labels("a").inc(amount)
    endpoint = second.serve("127.0.0.1", 0)
    try:
        text = urllib.request.urlopen(f"http://{endpoint.address}/metrics", timeout=10).read().decode()
    finally:
        endpoint.close()
    assert 'plait_things_total{kind="a"} 5.0' in text


def test_latency_buckets_start_below_a_millisecond() -> None:
    assert LATENCY_BUCKETS_S[0] < 0.001
    assert list(LATENCY_BUCKETS_S) == sorted(LATENCY_BUCKETS_S)


def test_many_values_at_once_count_as_each_alone() -> None:
    metrics = Metrics()
    alone, together = metrics.histogram("alone_seconds", "x"), metrics.histogram("together_seconds", "x")
    values = [0.0, 0.0005, 0.00051, 0.2, 0.2, 10.0, 11.0, 1e9]
    for value in values:
        alone.observe(value)
    observe_all(together, values)
    observe_all(together, [])
    counts = [[(s.labels.get("le"), s.value) for s in m.collect()[0].samples if not s.name.endswith("created")] for m in (alone, together)]
    assert counts[0] == counts[1]
