"""Reads as Prometheus sees them."""

from __future__ import annotations

from typing import Any

from prometheus_client import generate_latest

from feature_retrieval.coalescing import CoalescedReads
from feature_retrieval.near_cache import NearCache
from feature_retrieval.read_metrics import ReadCounts, ReadMetrics
from feature_retrieval.row_codec import KeySpace, RowCodec
from plait.registry.records import Feature, FeatureSchema
from plait.telemetry.metrics import Metrics

SPACE = KeySpace.of("default", "item", "stats", 1)
CODEC = RowCodec(FeatureSchema(id=1, features=(Feature(name="a"),)))


def test_what_was_counted_is_told() -> None:
    store: Any = None
    metrics, counts, cache, reads = Metrics(), ReadCounts(), NearCache(1 << 20, 60), CoalescedReads(store)
    ReadMetrics(metrics, counts, cache, reads, {"dropped": 3})
    counts.add("stats", [0, 5, 0, 0, 2, 0, 0, 0], 4)
    counts.add("stats", [0, 1, 0, 0, 0, 0, 0, 0], 0)
    cache.connected([SPACE.prefix])
    reading = cache.begin(SPACE, CODEC)
    assert reading is not None
    cache.end(reading, ["none"], [None])
    places = cache.places(SPACE.prefix, ["none", "x"])
    assert places is not None
    cache.count(cache.find(SPACE, CODEC, places, 0), 2)
    cache.changed(SPACE.keys(["none"]))
    cache.disconnected()
    reads.shared_keys += 9
    told = generate_latest(metrics.registry).decode().splitlines()
    assert {
        'plait_features_rows_total{status="present",view="stats"} 6.0',
        'plait_features_rows_total{status="not_found",view="stats"} 2.0',
        'plait_features_defaulted_cells_total{view="stats"} 4.0',
        'plait_features_near_cache_lookups_total{result="miss"} 1.0',
        'plait_features_near_cache_lookups_total{result="unknown"} 1.0',
        'plait_features_near_cache_resets_total{reason="disconnected"} 1.0',
        "plait_features_near_cache_invalidations_total 1.0",
        "plait_features_near_cache_bytes 0.0",
        'plait_features_skew_rows_total{outcome="dropped"} 3.0',
        "plait_features_coalesced_keys_total 9.0",
    } <= set(told)
    assert repr(counts) == "<ReadCounts rows=8>"
