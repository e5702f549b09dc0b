"""Which endpoint does so badly that it is left alone for a while. Pure: outcomes and times in, seconds out.

After gRFC A50 (outlier detection by failure percentage) and, for connections that broke, the backoff of a channel in TRANSIENT_FAILURE.
"""

from __future__ import annotations

from typing import Final

_BUCKETS: Final = 10
MIN_CALLS: Final = 20  # fewer say nothing about a share
FAILURE_SHARE: Final = 0.5


class Window:
    """Calls and failures of one endpoint over the last `window_s` seconds, in ten buckets."""

    __slots__ = ("_bucket_s", "_calls", "_failures", "_tick")

    def __init__(self, window_s: float = 10.0) -> None:
        self._bucket_s = window_s / _BUCKETS
        self._calls = [0] * _BUCKETS
        self._failures = [0] * _BUCKETS
        self._tick = 0

    def count(self, now_s: float, *, failed: bool) -> None:
        """Count one call that ended now."""
        slot = self._advance(now_s)
        self._calls[slot] += 1
        self._failures[slot] += failed

    def bad(self, now_s: float) -> bool:
        """Whether at least half of at least 20 calls failed."""
        self._advance(now_s)
        calls = sum(self._calls)
        return calls >= MIN_CALLS and sum(self._failures) >= FAILURE_SHARE * calls

    def clear(self) -> None:
        """Forget everything: what comes after an ejection is judged by itself."""
        self._calls = [0] * _BUCKETS
        self._failures = [0] * _BUCKETS

    def _advance(self, now_s: float) -> int:
        tick = int(now_s / self._bucket_s)
        if tick == self._tick:
            return tick % _BUCKETS
        for passed in range(max(self._tick + 1, tick - _BUCKETS + 1), tick + 1):
            self._calls[passed % _BUCKETS] = self._failures[passed % _BUCKETS] = 0
        self._tick = max(self._tick, tick)
        return self._tick % _BUCKETS


class Ejection:
    """For how long one endpoint is avoided: `base_s`, twice as long each time in a row, up to `max_s`."""

    __slots__ = ("in_a_row", "until_s")

    def __init__(self) -> None:
        self.in_a_row = 0
        self.until_s = 0.0

    def eject(self, now_s: float, base_s: float, max_s: float) -> float:
        """Avoid it from now on; return for how many seconds, 0 when it is avoided already: calls that fail together are one failure."""
        if now_s < self.until_s:
            return 0.0
        for_s: float = min(base_s * 2.0 ** min(self.in_a_row, 30), max_s)
        self.in_a_row += 1
        self.until_s = now_s + for_s
        return for_s

    def end(self) -> None:
        """It does well again."""
        self.in_a_row = 0
        self.until_s = 0.0
