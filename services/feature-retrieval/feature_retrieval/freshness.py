"""How fresh views are: the newest event time each replica wrote, what waits to be applied, and until when everything was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from feature_retrieval.sources import Backlog
from plait.telemetry.metrics import Metrics, observe_all

# Seconds from an event's append to its being in the rows.
_VISIBLE_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)


class Freshness:
    """Keeps the newest event times and publishes all of it as metrics, by view over all tenants (a tenant is no label: there may be many)."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._newest_us: dict[tuple[str, str], int] = {}
        self._lag = metrics.gauge(
            "plait_features_event_lag",
            "events waiting to be applied, over all tenants and replicas; NaN while that is not known",
            ("source",),
        )
        self._watermark = metrics.gauge(
            "plait_features_watermark_seconds",
            "every event appended up to this time is applied, of the tenant furthest behind; seconds since the epoch",
            ("view",),
        )
        self._freshness = metrics.gauge(
            "plait_features_freshness_seconds", "age of the newest event this replica wrote to the view, seconds", ("view",)
        )
        self._visible = metrics.histogram(
            "plait_features_event_visible_seconds", "from an event's append to its being in the rows", ("source",), _VISIBLE_BUCKETS_S
        )
        self._events = metrics.counter(
            "plait_features_events_total",
            "events by what became of them: applied, unused (no view takes them), refused",
            ("source", "outcome"),
        )
        self._retries = metrics.counter(
            "plait_features_swap_retries_total", "rows that another consumer changed first, and that were tried again"
        )
        self._dead = metrics.counter("plait_features_dead_letters_total", "events moved to the dead letters", ("reason",))

    def wrote(self, tenant: str, view: str, newest_us: int) -> None:
        """Note the newest event time of some rows that were written."""
        key = (tenant, view)
        if newest_us > self._newest_us.get(key, 0):
            if key not in self._newest_us:
                self._freshness.labels(view).set_function(lambda: self._age_s(view))
            self._newest_us[key] = newest_us

    def newest_us(self, tenant: str, view: str) -> int:
        """Return the newest event time this replica wrote, µs since the epoch; 0 = none yet."""
        return self._newest_us.get((tenant, view), 0)

    def applied(self, source: str, published_us: Sequence[int], *, unused: int, retries: int) -> None:
        """Note a batch as applied: when each of its events that were not refused was appended."""
        now_us = int(self._clock() * 1e6)
        observe_all(self._visible.labels(source), [max(0, now_us - at) / 1e6 for at in published_us])
        self._events.labels(source, "applied").inc(len(published_us) - unused)
        self._events.labels(source, "unused").inc(unused)
        self._retries.inc(retries)

    def refused(self, source: str, reason: str) -> None:
        """Note an event as a dead letter."""
        self._events.labels(source, "refused").inc()
        self._dead.labels(reason).inc()

    def waits(self, source: str, backlog: Mapping[str, Backlog], views: Sequence[str]) -> None:
        """Publish what a source says of its backlog, by tenant, for the views that it feeds."""
        events = [each.events for each in backlog.values()]
        self._lag.labels(source).set(math.nan if -1 in events else sum(events))
        known = [each.watermark_us for each in backlog.values() if each.watermark_us]
        for view in views if known else ():
            self._watermark.labels(view).set(min(known) / 1e6)

    def unknown(self, source: str) -> None:
        """What waits in a source cannot be asked; a watermark of before stays true."""
        self._lag.labels(source).set(math.nan)

    def _age_s(self, view: str) -> float:
        newest = max((at for (_, name), at in self._newest_us.items() if name == view), default=0)
        return max(0.0, self._clock() - newest / 1e6)
