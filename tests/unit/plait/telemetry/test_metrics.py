"""Metrics belong to one process object and are scraped over HTTP."""

from __future__ import annotations

import urllib.request

from plait.telemetry.metrics import LATENCY_BUCKETS_S, Metrics


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
