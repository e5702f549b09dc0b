"""Metrics of reads: plain numbers while requests are answered, read when Prometheus asks, so that counting costs a request nothing it would notice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from feature_retrieval.coalescing import CoalescedReads
from feature_retrieval.near_cache import NearCache
from plait.api.types.v1 import types_pb2
from plait.telemetry.metrics import Metrics

_WORDS: Final = [name.removeprefix("ROW_STATUS_").lower() for name in types_pb2.RowStatus.keys()]  # noqa: SIM118  (an enum, no dict)


class ReadCounts:
    """What answers held, by view."""

    def __init__(self) -> None:
        self.rows: Counter[tuple[str, int]] = Counter()  # by view and status
        self.defaulted_cells: Counter[str] = Counter()  # by view

    def __repr__(self) -> str:
        return f"<ReadCounts rows={self.rows.total()}>"

    def add(self, view: str, counts: list[int], defaulted_cells: int) -> None:
        """Count one view of one answer; `counts` by status."""
        for status, count in enumerate(counts):
            if count:
                self.rows[view, status] += count
        if defaulted_cells:
            self.defaulted_cells[view] += defaulted_cells


class ReadMetrics:
    """Tells Prometheus what reads counted."""

    def __init__(self, metrics: Metrics, counts: ReadCounts, cache: NearCache, reads: CoalescedReads, skew: Mapping[str, int]) -> None:
        self._counts = counts
        self._cache = cache
        self._reads = reads
        self._skew = skew
        metrics.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Return every metric as it stands."""
        rows = CounterMetricFamily("plait_features_rows", "(row, view) pairs answered, by status", labels=["view", "status"])
        for (view, status), count in list(self._counts.rows.items()):
            rows.add_metric([view, _WORDS[status]], count)
        cells = CounterMetricFamily(
            "plait_features_defaulted_cells", "tensor cells that held a default in place of a value", labels=["view"]
        )
        for view, count in list(self._counts.defaulted_cells.items()):
            cells.add_metric([view], count)
        yield rows
        yield cells
        yield from self._near_cache()
        skew = CounterMetricFamily("plait_features_skew_rows", "rows for the skew log: written, dropped, failed", labels=["outcome"])
        for outcome, count in list(self._skew.items()):
            skew.add_metric([outcome], count)
        yield skew
        yield CounterMetricFamily(
            "plait_features_coalesced_keys",
            "keys that were not asked from the store because another read had asked",
            self._reads.shared_keys,
        )

    def _near_cache(self) -> Iterator[Metric]:
        cache = self._cache
        yield GaugeMetricFamily("plait_features_near_cache_bytes", "memory held by the near cache, bytes", cache.size_bytes)
        found = CounterMetricFamily(
            "plait_features_near_cache_lookups", "(row, view) pairs looked up: hit, miss (known to have no row), unknown", labels=["result"]
        )
        for result, count in list(cache.lookups.items()):
            found.add_metric([result], count)
        resets = CounterMetricFamily("plait_features_near_cache_resets", "times that much or all was forgotten", labels=["reason"])
        for reason, count in list(cache.resets.items()):
            resets.add_metric([reason], count)
        yield found
        yield resets
        yield CounterMetricFamily("plait_features_near_cache_invalidations", "keys that were told to have changed", cache.invalidations)
