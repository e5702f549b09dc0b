"""What a tenant may use: requests and rows a second, and requests at once. Asked on every request, so it only counts in memory here.

Several routers share one quota by leases (`quota_leases`): each gets a part of it for a while, and keeps to that part alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from plait.errors import QuotaViolation, ResourceExhausted
from plait.registry.policies import Quota
from plait.registry.records import Snapshot

_LEASE_S: Final = 1.0  # after which a router that has no part of a quota now may have one
_RETRY_S: Final = 0.1  # when one of many under way may have ended
_LONGEST_RETRY_S: Final = 60.0


class Parts(NamedTuple):
    """Parts of a quota's bounds, 1 being the whole: requests a second, rows a second, requests at once."""

    requests: float
    rows: float
    in_flight: float


ALL: Final = Parts(1.0, 1.0, 1.0)


class Bucket:
    """A token bucket: `rate` a second, and at most `burst` kept."""

    __slots__ = ("_at_s", "_burst", "_rate", "_tokens", "used")

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at_s = now_s
        self.used = 0.0  # asked for since somebody last looked, given or not

    def take(self, count: float, now_s: float) -> float:
        """Take tokens and return 0, or return after how many seconds they are there.

        More than the burst can only be had from a full bucket, which then owes them.
        """
        self.used += count
        self._refill(now_s)
        missing = min(count, self._burst) - self._tokens
        if missing > 1e-9:
            return missing / self._rate if self._rate else _LEASE_S
        self._tokens -= count
        return 0.0

    def resize(self, rate: float, burst: float, now_s: float) -> None:
        """Go on with another rate; what is over the new burst is lost."""
        self._refill(now_s)
        self._rate, self._burst = rate, burst
        self._tokens = min(self._tokens, burst)

    def _refill(self, now_s: float) -> None:
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._rate)
        self._at_s = now_s


class TenantQuota:
    """One tenant's use, in this router."""

    def __init__(self, tenant: str, quota: Quota, clock: Callable[[], float]) -> None:
        self.quota = quota
        self._tenant = tenant
        self._clock = clock
        now_s = clock()
        self._requests = Bucket(quota.requests_per_s, _burst(quota), now_s) if quota.requests_per_s else None
        self._rows = Bucket(quota.rows_per_s, max(1.0, quota.rows_per_s), now_s) if quota.rows_per_s else None
        self.parts = ALL  # that this router may have
        self._most = float(quota.in_flight)
        self._in_flight = 0
        self._peak = 0

    def __repr__(self) -> str:
        return f"<TenantQuota {self._tenant} in_flight={self._in_flight}>"

    def request(self) -> None:
        """Count a request. Raises ResourceExhausted (QUOTA_EXCEEDED)."""
        if self._requests is not None:
            wait_s = self._requests.take(1, self._clock())
            if wait_s:
                raise self._exceeded(f"{self.quota.requests_per_s:g} requests a second, {_burst(self.quota):g} at once", wait_s)

    def begin(self, rows: int) -> None:
        """Count a request's rows and itself as under way, until `end`. Raises as `request`."""
        if self.quota.in_flight:
            self._peak = max(self._peak, self._in_flight + 1)
            if self._in_flight + 1 > max(1.0, self._most):
                raise self._exceeded(f"{self.quota.in_flight} requests under way at once", _RETRY_S)
        if self._rows is not None:
            wait_s = self._rows.take(rows, self._clock())
            if wait_s:
                raise self._exceeded(f"{self.quota.rows_per_s:g} rows a second", wait_s)
        self._in_flight += 1

    def end(self) -> None:
        """A request that began is over."""
        self._in_flight -= 1

    def wants(self, passed_s: float) -> Parts:
        """Return what was asked for since the last call, `passed_s` ago, given or not."""
        quota, asked = self.quota, []
        for bucket, rate in ((self._requests, quota.requests_per_s), (self._rows, quota.rows_per_s)):
            asked.append(bucket.used / passed_s / rate if bucket is not None else 0.0)
            if bucket is not None:
                bucket.used = 0.0
        peak, self._peak = self._peak, self._in_flight
        return Parts(asked[0], asked[1], peak / quota.in_flight if quota.in_flight else 0.0)

    def grant(self, parts: Parts) -> None:
        """Go on with these parts of the quota. One request at once, and one after a while, is always let through."""
        now_s, quota = self._clock(), self.quota
        if self._requests is not None:
            self._requests.resize(quota.requests_per_s * parts.requests, max(1.0, _burst(quota) * parts.requests), now_s)
        if self._rows is not None:
            self._rows.resize(quota.rows_per_s * parts.rows, max(1.0, quota.rows_per_s * parts.rows), now_s)
        self._most = quota.in_flight * parts.in_flight
        self.parts = parts

    def _exceeded(self, what: str, wait_s: float) -> ResourceExhausted:
        retry_s = min(wait_s, _LONGEST_RETRY_S)
        return ResourceExhausted(
            f"the tenant's quota is used up: {what}; retry in {retry_s * 1e3:.0f} ms, or have the tenant's quota raised",
            reason="QUOTA_EXCEEDED",
            retry_after_s=retry_s,
            quota=[QuotaViolation(f"tenant:{self._tenant}", what)],
        )


class Quotas:
    """The quotas of all tenants that have one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.of: Mapping[str, TenantQuota] = {}

    def __repr__(self) -> str:
        return f"<Quotas tenants={len(self.of)}>"

    def adopt(self, snapshot: Snapshot) -> None:
        """Take quotas from a new snapshot; one that did not change goes on as it was."""
        self.of = MappingProxyType(dict(self._of(snapshot)))

    def _of(self, snapshot: Snapshot) -> Iterator[tuple[str, TenantQuota]]:
        for name, tenant in snapshot.tenants.items():
            if tenant.quota == Quota():
                continue
            known = self.of.get(name)
            yield name, known if known is not None and known.quota == tenant.quota else TenantQuota(name, tenant.quota, self._clock)


def _burst(quota: Quota) -> float:
    return max(1.0, quota.burst or quota.requests_per_s)
