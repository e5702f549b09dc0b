"""How long calls usually take, learnt from those that were answered: when a second one is worth its cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Final

_BUCKETS: Final = 64
_LOW_S: Final = 50e-6
_HIGH_S: Final = 60.0
_STEP: Final = math.log(_HIGH_S / _LOW_S) / (_BUCKETS - 1)
_HALVE_S: Final = 10.0
MIN_SAMPLES: Final = 50


class Histogram:
    """Durations in 64 logarithmic buckets from 50 us to 60 s (a quarter wider each); what was seen weighs half every 10 s."""

    __slots__ = ("_counts", "_halved_s", "_total")

    def __init__(self, now_s: float) -> None:
        self._counts = [0.0] * _BUCKETS
        self._total = 0.0
        self._halved_s = now_s

    def observe(self, took_s: float, now_s: float) -> None:
        """Count one call."""
        if now_s - self._halved_s >= _HALVE_S:
            self._halve(now_s)
        self._counts[_bucket(took_s)] += 1.0
        self._total += 1.0

    def percentile(self, percent: float) -> float | None:
        """Return the duration that `percent` of calls stay within, rounded up to its bucket; None while fewer than 50 are remembered."""
        if self._total < MIN_SAMPLES:
            return None
        wanted, seen = self._total * percent / 100, 0.0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return _LOW_S * math.exp(_STEP * bucket)
        return _HIGH_S

    def _halve(self, now_s: float) -> None:
        weight = 0.5 ** int((now_s - self._halved_s) / _HALVE_S)
        self._counts = [count * weight for count in self._counts]
        self._total = sum(self._counts)
        self._halved_s = now_s


class Latencies:
    """One histogram per key, at most `most` of them: the one that was begun first goes."""

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._of: dict[Hashable, Histogram] = {}

    def __repr__(self) -> str:
        return f"<Latencies of {len(self._of)}>"

    def observe(self, key: Hashable, took_s: float, now_s: float) -> None:
        """Count one call."""
        found = self._of.get(key)
        if found is None:
            if len(self._of) >= self._most:
                del self._of[next(iter(self._of))]
            found = self._of[key] = Histogram(now_s)
        found.observe(took_s, now_s)

    def percentile(self, key: Hashable, percent: float) -> float | None:
        """Return the percentile in seconds, None while too little is known."""
        found = self._of.get(key)
        return None if found is None else found.percentile(percent)


def _bucket(took_s: float) -> int:
    if took_s <= _LOW_S:
        return 0
    return min(_BUCKETS - 1, math.ceil(math.log(took_s / _LOW_S) / _STEP - 1e-9))
