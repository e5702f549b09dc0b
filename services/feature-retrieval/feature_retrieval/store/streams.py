"""Redis Streams as logs: entries appended, read by a consumer group that takes each at least once, and looked through by id.

A stream that was lost with its group is begun again from its start by the next reader: entries may come twice, never not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from plait.redis.commands import pack
from plait.redis.connections import Refusal, refused, unavailable
from plait.redis.dispatch import Dispatch, Receipt, all_here, late
from plait.redis.script import Script

# KEYS: a stream. ARGV: group, the consumer that asks, idle for longer than these ms, at most how many. Removes consumers that hold nothing,
# in one step: one that got an entry in between would lose it. A living one that is removed is there again as soon as it reads.
_FORGET: Final = Script(b"""
local found = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if found.err then return 0 end
local removed = 0
for _, fields in ipairs(found) do
  local known = {}
  for at = 1, #fields, 2 do known[fields[at]] = fields[at + 1] end
  if known['pending'] == 0 and known['idle'] > tonumber(ARGV[3]) and known['name'] ~= ARGV[2] and removed < tonumber(ARGV[4]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], known['name'])
    removed = removed + 1
  end
end
return removed
""")
_POLL_S: Final = 0.05  # between looks at streams that no single command can wait for


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: its id (`<ms>-<n>`, ascending) and its fields."""

    id: bytes
    fields: Mapping[bytes, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """What a group still has to do: entries not delivered to anybody, and delivered but not acknowledged.

    Redis cannot tell `lag` (None) from when somebody deletes an entry ahead of the group until the group has read them all; `most`: what
    both together are at most.
    """

    lag: int | None
    pending: int
    most: int


class Streams:
    """Streams by key. Every failure to reach Redis, and every refusal, is Unavailable (STORE_UNAVAILABLE)."""

    def __init__(self, dispatch: Dispatch, *, timeout_s: float = 5.0) -> None:
        self._dispatch = dispatch
        self._timeout_s = timeout_s

    async def append(
        self, keys: Sequence[bytes], entries: Sequence[Mapping[bytes, bytes]], *, max_length: int = 0, receipt: Receipt | None = None
    ) -> list[bytes]:
        """Append each entry to the stream of its key; return their ids. Beyond about `max_length` (0 = none) the oldest are dropped."""
        limit = [b"MAXLEN", b"~", b"%d" % max_length] if max_length else []
        commands = [
            pack(b"XADD", [key, *limit, b"*", *(part for item in entry.items() for part in item)])
            for key, entry in zip(keys, entries, strict=True)
        ]
        return await self._run(keys, commands, receipt)

    async def read_group(
        self, keys: Sequence[bytes], group: bytes, consumer: bytes, *, count: int, timeout_s: float
    ) -> dict[bytes, list[Entry]]:
        """Return up to `count` new entries of each stream, now this consumer's; after `timeout_s` without any, an empty answer.

        Makes the group where a stream has none, from the stream's start.
        """
        if not keys:
            await asyncio.sleep(timeout_s)
            return {}
        if len(keys) == 1 or not self._dispatch.topology.slotted:
            return await self._read(keys, group, consumer, count, int(timeout_s * 1000))
        loop = asyncio.get_running_loop()
        give_up = loop.time() + timeout_s
        while True:  # streams of several slots: no one command can wait for all of them
            found: dict[bytes, list[Entry]] = {}
            for part in await asyncio.gather(*(self._read([key], group, consumer, count, 0) for key in keys)):
                found |= part
            if found or loop.time() >= give_up:
                return found
            await asyncio.sleep(min(_POLL_S, max(0.0, give_up - loop.time())))

    async def claim(self, key: bytes, group: bytes, consumer: bytes, *, idle_s: float, count: int) -> list[Entry]:
        """Take over up to `count` entries that some consumer got and left unacknowledged for `idle_s`."""
        arguments = [key, group, consumer, b"%d" % int(idle_s * 1000), b"0-0", b"COUNT", b"%d" % count]
        reply = await self._one(key, b"XAUTOCLAIM", arguments)
        if isinstance(reply, Refusal) and _no_group(reply):
            return []
        return _entries(_good(reply)[1])

    async def forget_consumers(self, key: bytes, group: bytes, consumer: bytes, *, idle_s: float, limit: int) -> int:
        """Remove up to `limit` other consumers that hold nothing and have not asked for `idle_s`; return how many."""
        call = _FORGET.call([key], [group, consumer, b"%d" % int(idle_s * 1000), b"%d" % limit])
        replies = await self.ask(key, [call], _FORGET)
        all_here(replies)
        return int(replies[0])

    async def acknowledge(self, key: bytes, group: bytes, ids: Sequence[bytes]) -> int:
        """Say that these entries are done; return how many were not yet."""
        if not ids:
            return 0
        return int(_good(await self._one(key, b"XACK", [key, group, *ids])))

    async def state(self, key: bytes, group: bytes) -> GroupState:
        """Return what the group still has to do; without a group, all of the stream is."""
        reply = await self._one(key, b"XINFO", [b"GROUPS", key])
        for fields in [] if isinstance(reply, Refusal) and "no such key" in reply.text else _good(reply):
            known = dict(zip(fields[::2], fields[1::2], strict=True))
            if known[b"name"] == group:
                lag = known.get(b"lag")
                pending = int(known[b"pending"])
                if lag is None:
                    return GroupState(lag=None, pending=pending, most=await self.length(key))
                return GroupState(lag=int(lag), pending=pending, most=int(lag) + pending)
        length = await self.length(key)
        return GroupState(lag=length, pending=0, most=length)

    async def range(self, key: bytes, *, after: bytes = b"", before: bytes = b"", count: int, newest_first: bool = False) -> list[Entry]:
        """Return up to `count` entries strictly between two ids (empty = no bound), oldest or newest first."""
        low = b"(" + after if after else b"-"
        high = b"(" + before if before else b"+"
        command, ends = (b"XREVRANGE", [high, low]) if newest_first else (b"XRANGE", [low, high])
        return _entries(_good(await self._one(key, command, [key, *ends, b"COUNT", b"%d" % count])))

    async def entries(self, key: bytes, ids: Sequence[bytes]) -> list[Entry | None]:
        """Return the entries with these ids, None where there is none."""
        replies = await self._run([key] * len(ids), [pack(b"XRANGE", [key, one, one]) for one in ids], None)
        return [found[0] if (found := _entries(reply)) else None for reply in replies]

    async def delete(self, key: bytes, ids: Sequence[bytes], receipt: Receipt | None = None) -> int:
        """Remove entries; return how many were there."""
        return int(_good(await self._one(key, b"XDEL", [key, *ids], receipt))) if ids else 0

    async def length(self, key: bytes) -> int:
        """Return how many entries there are."""
        return int(_good(await self._one(key, b"XLEN", [key])))

    async def ask(self, key: bytes, commands: Sequence[bytes], script: Script | None = None) -> list[Any]:
        """Return what packed commands of one key's slot answer, a Refusal included. `script`: the one that they call."""
        replies = late(len(commands))
        await self._in_time(self._dispatch.run([key] * len(commands), commands, replies, script=script))
        all_here([reply for reply in replies if not isinstance(reply, Refusal)])
        return replies

    async def _read(self, keys: Sequence[bytes], group: bytes, consumer: bytes, count: int, block_ms: int) -> dict[bytes, list[Entry]]:
        block = [b"BLOCK", b"%d" % block_ms] if block_ms else []
        arguments = [b"GROUP", group, consumer, b"COUNT", b"%d" % count, *block, b"STREAMS", *keys, *[b">"] * len(keys)]
        reply = await self._one(keys[0], b"XREADGROUP", arguments, waits_s=block_ms / 1000)
        if isinstance(reply, Refusal) and _no_group(reply):
            await self._make_groups(keys, group)
            reply = await self._one(keys[0], b"XREADGROUP", arguments, waits_s=block_ms / 1000)
        return {key: _entries(found) for key, found in _good(reply) or ()}

    async def _make_groups(self, keys: Sequence[bytes], group: bytes) -> None:
        replies = late(len(keys))
        commands = [pack(b"XGROUP", [b"CREATE", key, group, b"0", b"MKSTREAM"]) for key in keys]
        await self._in_time(self._dispatch.run(keys, commands, replies))
        for reply in replies:
            if not (isinstance(reply, Refusal) and reply.text.startswith("BUSYGROUP")):  # it is there already
                all_here([reply])

    async def _run(self, keys: Sequence[bytes], commands: Sequence[bytes], receipt: Receipt | None) -> list[Any]:
        replies = late(len(commands))
        if commands:
            await self._in_time(self._dispatch.run(keys, commands, replies, receipt=receipt))
        all_here(replies)
        return replies

    async def _one(
        self, key: bytes, command: bytes, arguments: Sequence[bytes], receipt: Receipt | None = None, *, waits_s: float = 0.0
    ) -> Any:
        return await self._in_time(self._dispatch.one(key, command, arguments, receipt=receipt), waits_s)

    async def _in_time(self, work: Any, waits_s: float = 0.0) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s + waits_s):
                return await work
        except TimeoutError as error:
            raise unavailable() from error


def _no_group(refusal: Refusal) -> bool:
    return refusal.text.startswith("NOGROUP")


def _good(reply: Any) -> Any:
    if isinstance(reply, Refusal):
        raise refused(reply)
    return reply


def _entries(reply: Any) -> list[Entry]:
    """Take Redis' [id, [field, value, …]] pairs; an entry that was deleted since has no fields and is left out."""
    return [Entry(one, dict(zip(fields[::2], fields[1::2], strict=True))) for one, fields in reply if fields is not None]
