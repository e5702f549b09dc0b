"""Metrics of writes and erasures: what became of rows, how long callers waited until those were safe, how many entities were erased."""

from __future__ import annotations

from typing import Final

from plait.telemetry.metrics import Metrics

# Up to where a wait for replicas or a slow disk ends.
_ACK_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class WriteMetrics:
    """Counts what `Ingestion` and `Erasing` report, over all tenants (a tenant is no label: there may be many)."""

    def __init__(self, metrics: Metrics) -> None:
        self._rows = metrics.counter(
            "plait_features_writes_total", "rows by what became of them: applied, ignored (not newer), refused", ("view", "outcome")
        )
        self._ack = metrics.histogram(
            "plait_features_ack_seconds", "from a batch's arrival to its acknowledgement, seconds", ("view",), _ACK_BUCKETS_S
        )
        self._erasures = metrics.counter("plait_features_erasures_total", "entities erased")

    def wrote(self, view: str, *, applied: int, ignored: int, refused: int, took_s: float) -> None:
        """Count a batch that is acknowledged."""
        for outcome, count in (("applied", applied), ("ignored", ignored), ("refused", refused)):
            if count:
                self._rows.labels(view, outcome).inc(count)
        self._ack.labels(view).observe(took_s)

    def erased(self, entities: int) -> None:
        """Count entities that are erased everywhere."""
        self._erasures.inc(entities)
