"""One quota for several routers: each holds a lease on a part of it, renewed in the background, so that no request asks Redis.

After Doorman (https://github.com/youtube/doorman): who uses a quota says how much it wants, and gets its max-min fair part of it and an equal
part of what nobody wants. Parts that are leased never add up to more than the whole. Leases stand in a hash per tenant, `q1{tenant}`, and run
out by the clock of Redis. While Redis is away each router goes on with an equal part, by the number of routers that were there last.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from plait.errors import PlaitError
from plait.redis.dispatch import Dispatch, all_here, late
from plait.redis.script import Script
from plait.telemetry.logging import get_logger
from plait.telemetry.metrics import Metrics
from router.quotas import ALL, Parts, Quotas, TenantQuota
from router.settings import QuotaSettings

log = get_logger(__name__)

_RENEWALS: Final = 5  # in the time of a lease
_FADING: Final = 0.7  # of what was wanted before is still wanted: callers come in waves

# KEYS[1]: the leases of a tenant, router -> "until_ms" and for each bound what it wants and has. ARGV: the router, how long its lease is (ms),
# what it wants of each bound; all as parts of the whole. Answers with the number of routers and what this one has of each.
_LEASE: Final = Script(b"""
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local me, bounds, routers = ARGV[1], #ARGV - 2, 1
local wants, free = {}, {}
for b = 1, bounds do
  wants[b], free[b] = { tonumber(ARGV[b + 2]) }, 1
end
local leases = redis.call('HGETALL', KEYS[1])
for i = 1, #leases, 2 do
  local lease = {}
  for number in string.gmatch(leases[i + 1], '%S+') do
    lease[#lease + 1] = tonumber(number)
  end
  if lease[1] <= now or #lease ~= 1 + 2 * bounds then
    redis.call('HDEL', KEYS[1], leases[i])
  elseif leases[i] ~= me then
    routers = routers + 1
    for b = 1, bounds do
      wants[b][routers] = lease[2 * b]
      free[b] = free[b] - lease[2 * b + 1]
    end
  end
end
local answer = { routers }
local lease = string.format('%.0f', now + tonumber(ARGV[2]))
for b = 1, bounds do
  local want, left, mine = wants[b][1], 1, nil
  table.sort(wants[b])
  for i = 1, routers do
    local given = math.min(wants[b][i], left / (routers - i + 1))
    left = left - given
    if wants[b][i] == want then
      mine = mine or given
    end
  end
  mine = string.format('%.9f', math.max(0, math.min(mine + left / routers, free[b])))
  answer[b + 1] = mine
  lease = lease .. ' ' .. string.format('%.9f', want) .. ' ' .. mine
end
redis.call('HSET', KEYS[1], me, lease)
redis.call('PEXPIRE', KEYS[1], 2 * ARGV[2])
return answer
""")


class _Held:
    """What this router knows of one tenant's leases."""

    __slots__ = ("quota", "routers", "until_s", "used_s", "wants")

    def __init__(self, quota: TenantQuota, now_s: float) -> None:
        self.quota = quota
        self.routers = 1
        self.wants = Parts(0.0, 0.0, 0.0)
        self.used_s = now_s  # when it was last in use
        self.until_s = 0.0  # when the lease ends


class QuotaLeases:
    """Run `run` for as long as the process lives. `name` is this router's, and nobody else's."""

    def __init__(
        self, quotas: Quotas, dispatch: Dispatch, settings: QuotaSettings, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quotas = quotas
        self._dispatch = dispatch
        self._settings = settings
        self._clock = clock
        self._name = secrets.token_hex(8).encode()
        self._held: dict[str, _Held] = {}
        self._asked_s = clock()
        self._alone = metrics.gauge("plait_router_quota_local", "1 while quotas are not shared with other routers because Redis is away")
        self._away = False

    def __repr__(self) -> str:
        return f"<QuotaLeases tenants={len(self._held)} {'away' if self._away else 'there'}>"

    async def run(self) -> None:
        """Renew the leases, for ever."""
        while True:
            await asyncio.sleep(self._settings.lease_s / _RENEWALS)
            await self.renew()

    async def renew(self) -> None:
        """Ask for every quota that is in use, and go on with what was given."""
        now_s = self._clock()
        passed_s, self._asked_s = max(now_s - self._asked_s, 1e-3), now_s
        in_use = self._in_use(passed_s, now_s)
        if not in_use:
            return
        try:
            async with asyncio.timeout(self._settings.lease_s):
                answers = await self._ask(in_use)
        except (TimeoutError, PlaitError) as error:
            self._go_alone(in_use, error)
            return
        self._tell(away=False)
        for held, answer in zip(in_use.values(), answers, strict=True):
            held.routers = int(answer[0])
            held.until_s = self._clock() + self._settings.lease_s
            held.quota.grant(Parts(*map(float, answer[1:])))

    def _in_use(self, passed_s: float, now_s: float) -> dict[str, _Held]:
        """Return the tenants that used their quota within the time of a lease; nobody else's lease is renewed, and so it is given back."""
        held = {}
        for tenant, quota in self._quotas.of.items():
            known = self._held.get(tenant)
            if known is None or known.quota is not quota:
                known = _Held(quota, now_s)
            wants = quota.wants(passed_s)
            if any(wants):
                known.used_s = now_s
            known.wants = Parts(*(max(new, old * _FADING) for new, old in zip(wants, known.wants, strict=True)))
            held[tenant] = known
        self._held = held
        return {tenant: known for tenant, known in held.items() if now_s - known.used_s < self._settings.lease_s}

    async def _ask(self, in_use: dict[str, _Held]) -> Sequence[Any]:
        keys = [b"q1{%b}" % tenant.encode() for tenant in in_use]
        lease_ms = b"%d" % max(1, int(self._settings.lease_s * 1000))
        commands = [
            _LEASE.call([key], [self._name, lease_ms, *(b"%.9f" % want for want in held.wants)])
            for key, held in zip(keys, in_use.values(), strict=True)
        ]
        replies = late(len(commands))
        await self._dispatch.run(keys, commands, replies, script=_LEASE)
        all_here(replies)
        return replies

    def _go_alone(self, in_use: dict[str, _Held], error: Exception) -> None:
        if not self._away:
            log.warning("quotas are not shared now: each router keeps to an equal part", error=str(error) or "too slow")
        self._tell(away=True)
        for held in in_use.values():
            if self._clock() >= held.until_s:
                held.quota.grant(Parts(*(part / held.routers for part in ALL)))

    def _tell(self, *, away: bool) -> None:
        self._away = away
        self._alone.set(away)
