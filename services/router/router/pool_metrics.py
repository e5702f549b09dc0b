"""What operators see of the endpoints behind the router."""

from __future__ import annotations

from plait.telemetry.metrics import Metrics


class PoolMetrics:
    """Metrics of all pools, `plait_router_…{pool}`."""

    def __init__(self, metrics: Metrics) -> None:
        pool = ("pool",)
        self._in_flight = metrics.gauge("plait_router_endpoint_in_flight", "calls under way to the endpoints of a pool", pool)
        self._endpoints = metrics.gauge("plait_router_endpoints", "endpoints of a pool, avoided ones included", pool)
        self._avoided = metrics.gauge("plait_router_endpoints_avoided", "endpoints avoided because they failed or were lost", pool)
        self._stale_s = metrics.gauge(
            "plait_router_discovery_stale_seconds", "time since the endpoints of a pool were last heard of, seconds", pool
        )
        self._retries = metrics.counter("plait_router_retries", "calls worth another try, by whether there was one", ("pool", "outcome"))
        self._hedges = metrics.counter("plait_router_hedges", "second calls made because the first was late", pool)

    def state(self, pool: str, in_flight: int, endpoints: int, avoided: int) -> None:
        """Set how a pool is now."""
        self._in_flight.labels(pool).set(in_flight)
        self._endpoints.labels(pool).set(endpoints)
        self._avoided.labels(pool).set(avoided)

    def heard(self, pool: str, ago_s: float) -> None:
        """Set how long ago the search for a pool's endpoints had an answer."""
        self._stale_s.labels(pool).set(ago_s)

    def retried(self, pool: str) -> None:
        """Count a call that is tried again."""
        self._retries.labels(pool, "tried").inc()

    def not_retried(self, pool: str) -> None:
        """Count a call that was worth another try, for which the budget had nothing left."""
        self._retries.labels(pool, "out_of_budget").inc()

    def hedged(self, pool: str) -> None:
        """Count a second call."""
        self._hedges.labels(pool).inc()

    def gone(self, pool: str) -> None:
        """Forget a pool that is no more."""
        for gauge in (self._in_flight, self._endpoints, self._avoided, self._stale_s):
            gauge.remove_by_labels({"pool": pool})
