"""Events out of Redis Streams: one stream per tenant, one consumer group over all replicas of this service.

What a dead consumer held is claimed by the others once it has lain still for a while; claiming too early is harmless, as applying is
idempotent. Applied events stay for a while and are then trimmed: never one that is not acknowledged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from feature_retrieval.aggregation.events import Refusal
from feature_retrieval.dead_letters import DeadLetters
from feature_retrieval.row_codec import tenant_key
from feature_retrieval.sources import Backlog, Message
from feature_retrieval.store.streams import Entry, Streams
from plait.redis.commands import pack
from plait.redis.dispatch import all_here

GROUP: Final = b"plait"
_UPKEEP_S: Final = 5.0  # between looks for what the dead left, and trims
_FORGET_EVERY_S: Final = 600.0  # between looks for names of the dead
_FORGOTTEN: Final = 100  # names at once, so that a look never blocks Redis for long


class RedisStreamSource:
    """The streams of all tenants as one source. `tenants` gives those there are now."""

    name = "redis"

    def __init__(
        self,
        streams: Streams,
        dead_letters: DeadLetters,
        tenants: Callable[[], Sequence[str]],
        *,
        consumer: str,
        claim_after_s: float = 30.0,
        keep_s: float = 3600.0,
        forget_after_s: float = 3600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._streams = streams
        self._dead_letters = dead_letters
        self._tenants = tenants
        self._consumer = consumer.encode()
        self._claim_after_s = claim_after_s
        self._keep_s = keep_s
        self._forget_after_s = forget_after_s
        self._clock = clock
        self._upkeep_at = 0.0
        self._forget_at = 0.0

    def __repr__(self) -> str:
        return f"<RedisStreamSource tenants={len(self._tenants())}>"

    async def read(self, limit: int, timeout_s: float) -> Sequence[Message]:
        """Return up to `limit` messages of each tenant; first of all what dead consumers left."""
        tenants = list(self._tenants())
        if self._clock() >= self._upkeep_at:
            left = await self._claim(tenants, limit)
            if left:
                return left
            await self._trim(tenants)
            await self._forget(tenants)
            self._upkeep_at = self._clock() + min(_UPKEEP_S, self._claim_after_s)
        by_key = {tenant_key(b"e1", tenant): tenant for tenant in tenants}
        found = await self._streams.read_group(list(by_key), GROUP, self._consumer, count=limit, timeout_s=timeout_s)
        return [_message(by_key[key], entry) for key, entries in found.items() for entry in entries]

    async def acknowledge(self, messages: Sequence[Message]) -> None:
        """Acknowledge each in its tenant's stream."""
        by_tenant: dict[str, list[bytes]] = {}
        for message in messages:
            by_tenant.setdefault(message.tenant, []).append(message.token)
        for tenant, ids in by_tenant.items():
            await self._streams.acknowledge(tenant_key(b"e1", tenant), GROUP, ids)

    async def refuse(self, message: Message, refusal: Refusal) -> None:
        """Move it to the dead letters and acknowledge it, in one script."""
        await self._dead_letters.bury(message, refusal, GROUP, message.token)

    async def backlog_of(self, tenant: str) -> Backlog:
        """Return what waits for one tenant over all replicas; exact, unless somebody deleted an event that nobody had read."""
        key = tenant_key(b"e1", tenant)
        now_us = int(self._clock() * 1e6)
        state = await self._streams.state(key, GROUP)
        oldest, _ = await self._oldest(key)
        waiting = -1 if state.lag is None else state.lag + state.pending
        return Backlog(waiting, now_us if oldest is None else _ms(oldest) * 1000 - 1, state.most)

    async def close(self) -> None:
        """Leave the group where nothing is held; what is held is for others to claim."""
        for tenant in self._tenants():
            key = tenant_key(b"e1", tenant)
            (held,) = await self._streams.ask(key, [pack(b"XPENDING", [key, GROUP, b"-", b"+", b"1", self._consumer])])
            if held == []:
                await self._streams.ask(key, [pack(b"XGROUP", [b"DELCONSUMER", key, GROUP, self._consumer])])

    async def _claim(self, tenants: Sequence[str], limit: int) -> list[Message]:
        found: list[Message] = []
        for tenant in tenants:
            entries = await self._streams.claim(tenant_key(b"e1", tenant), GROUP, self._consumer, idle_s=self._claim_after_s, count=limit)
            found += [_message(tenant, entry) for entry in entries]
        return found

    async def _trim(self, tenants: Sequence[str]) -> None:
        for tenant in tenants:
            key = tenant_key(b"e1", tenant)
            oldest, delivered = await self._oldest(key)
            until_ms = int((self._clock() - self._keep_s) * 1000)
            # What is appended from here on is after `delivered`, whatever the clocks of this machine and Redis'.
            first_kept = oldest or delivered
            minimum = b"%d" % max(0, until_ms) if _ms(first_kept) > until_ms else first_kept
            all_here(await self._streams.ask(key, [pack(b"XTRIM", [key, b"MINID", b"~", minimum])]))

    async def _forget(self, tenants: Sequence[str]) -> None:
        """Remove names of consumers that were killed, once nothing is theirs any more; those that ended well have left by themselves."""
        if self._clock() < self._forget_at:
            return
        for tenant in tenants:
            key = tenant_key(b"e1", tenant)
            await self._streams.forget_consumers(key, GROUP, self._consumer, idle_s=self._forget_after_s, limit=_FORGOTTEN)
        self._forget_at = self._clock() + _FORGET_EVERY_S

    async def _oldest(self, key: bytes) -> tuple[bytes | None, bytes]:
        """Return the id of the oldest entry that is not acknowledged, delivered or not (None where there is none), and that of the last one
        that was delivered."""
        pending, groups = await self._streams.ask(key, [pack(b"XPENDING", [key, GROUP]), pack(b"XINFO", [b"GROUPS", key])])
        delivered = _last_delivered(groups) if isinstance(groups, list) else b""
        if isinstance(pending, list) and pending[0]:
            first: bytes = pending[1]
            return first, delivered or b"0-0"
        waiting = await self._streams.range(key, after=delivered, count=1)
        return waiting[0].id if waiting else None, delivered or b"0-0"


def _last_delivered(groups: Sequence[Any]) -> bytes:
    for fields in groups:
        known = dict(zip(fields[::2], fields[1::2], strict=True))
        if known[b"name"] == GROUP:
            found: bytes = known[b"last-delivered-id"]
            return found
    return b""


def _ms(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])


def _message(tenant: str, entry: Entry) -> Message:
    redrives = entry.fields.get(b"n", b"0")
    return Message(
        tenant=tenant,
        payload=entry.fields.get(b"e", b""),
        traceparent=entry.fields.get(b"t", b"").decode(errors="replace"),
        origin=f"redis:events:{entry.id.decode()}",
        token=entry.id,
        published_us=_ms(entry.id) * 1000,
        redrives=int(redrives) if redrives.isdigit() and len(redrives) < 10 else 0,  # anybody may append
        publisher=entry.fields.get(b"w", b"").decode(errors="replace"),
    )
