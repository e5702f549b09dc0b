"""Redis as the row store: what callers ask for, as few packed commands as it takes, on whatever topology there is.

Rows only ever move forward in time (`scripts.WRITE`), aggregates are swapped where nobody was faster (`SWAP`), and an erased entity's rows
stay away (`ERASE`).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from feature_retrieval.store import scanning, tracking
from feature_retrieval.store.acknowledging import Ack, Acknowledging
from feature_retrieval.store.rows import Read
from feature_retrieval.store.scanning import Page
from feature_retrieval.store.scripts import ERASE, SWAP, WRITE
from feature_retrieval.store.streams import Streams
from feature_retrieval.store.tracking import Listener
from plait.redis.commands import pack, pack_gets, slot_of
from plait.redis.connections import Access, Refusal, unavailable
from plait.redis.dispatch import Dispatch, Missing, Receipt, all_here, late
from plait.redis.script import Script
from plait.redis.topologies import Single, Topology

READ_CHUNK: Final = 1024  # keys of one MGET; large reads are several, so that a deadline keeps what has arrived
WRITE_CHUNK: Final = 32  # rows of one script call, each with its mark, so that it never blocks Redis for long
ERASE_CHUNK: Final = 63  # rows of one script call, and their mark
OLDER, APPLIED, ERASED = b"012"  # what became of a row that was written
_NO_MARKS: Final[Mapping[bytes, Sequence[int]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One row to be replaced where it and its entity's erasure mark are still what was read; `applied` is remembered with it.

    `applied`: fingerprints (int64) by the key of the set they go to. Times to live are in ms, 0 = for ever.
    """

    key: bytes
    mark_key: bytes
    old: bytes | None
    mark: bytes | None
    new: bytes
    ttl_ms: int = 0
    applied: Mapping[bytes, Sequence[int]] = field(default_factory=lambda: _NO_MARKS)
    applied_ttl_ms: int = 0


def _unobserved(operation: str, seconds: float) -> None:
    """For who keeps no metrics."""


class RedisStore:
    """Reads and writes rows by key. Every failure to reach Redis is Unavailable (STORE_UNAVAILABLE).

    `where` is a topology, or the URL of one server. `ttl_jitter` lengthens times to live by up to this share, so that rows written
    together do not expire together. Writes may be given a receipt to `settle`; `ack` and
    `replicas` say what that waits for (`acknowledging`). `observe` hears how long each operation took, seconds.
    """

    def __init__(
        self,
        where: Topology | str,
        *,
        connections: int = 32,
        connect_timeout_s: float = 1.0,
        write_timeout_s: float = 5.0,
        ttl_jitter: float = 0.1,
        ack: Ack = "auto",
        replicas: int = 1,
        observe: Callable[[str, float], None] = _unobserved,
    ) -> None:
        if isinstance(where, str):
            where = Single(Access(url=where, connections=connections, connect_timeout_s=connect_timeout_s))
        self.topology: Topology = where
        self.dispatch = Dispatch(where)
        self._write_timeout_s = write_timeout_s
        self._ttl_jitter = ttl_jitter
        self._observe = observe
        self.streams = Streams(self.dispatch, timeout_s=write_timeout_s)
        self._acknowledging = Acknowledging(where, ack=ack, replicas=replicas, timeout_s=write_timeout_s)

    def __repr__(self) -> str:
        nodes = self.topology.primaries()
        in_use, idle = sum(node.in_use for node in nodes), sum(node.idle for node in nodes)
        return f"<RedisStore {'down' if self.down else 'up'} connections={in_use}+{idle}>"

    @property
    def down(self) -> bool:
        """Whether no server could be reached a moment ago."""
        nodes = self.topology.primaries()
        return bool(nodes) and all(node.down for node in nodes)

    async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        """Return the rows of `keys`, in one round trip to each server. At the time-out what has arrived is kept.

        Raises Unavailable where nothing was answered because no server could be reached.
        """
        if self.topology.slotted:  # GET by GET: keys of one MGET would have to lie in one slot
            asked, commands, size = keys, pack_gets(keys), 1
        else:
            size = READ_CHUNK
            asked = keys[::size]
            commands = [pack(b"MGET", keys[at : at + size]) for at in range(0, len(keys), size)]
        replies = late(len(commands))
        began = time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                await self.dispatch.run(asked, commands, replies)
        except TimeoutError:
            pass
        finally:
            self._observe("read", time.perf_counter() - began)
        return _rows(replies, len(keys), size)

    async def write(
        self, keys: Sequence[bytes], marks: Sequence[bytes], rows: Sequence[bytes], ttl_ms: int, receipt: Receipt | None = None
    ) -> bytes:
        """Write rows where they are newer than what is stored and than their entity's erasure; return one verdict per row.

        `marks`: the key of each entity's erasure mark. `ttl_ms` 0 = kept for ever.
        """
        groups = self._groups(keys, WRITE_CHUNK)
        jitter = int(ttl_ms * self._ttl_jitter)
        fixed = [b"%d" % ttl_ms, b"%d" % jitter]
        commands = [
            WRITE.call(
                [*(keys[at] for at in group), *(marks[at] for at in group)],
                [*fixed, b"%d" % random.randrange(jitter + 1), *(rows[at] for at in group)],  # noqa: S311  (spreads, hides nothing)
            )
            for group in groups
        ]
        replies = await self._written("write", [keys[group[0]] for group in groups], commands, WRITE, receipt)
        verdicts = bytearray(len(keys))
        for group, reply in zip(groups, replies, strict=True):
            for at, verdict in zip(group, reply, strict=True):
                verdicts[at] = verdict
        return bytes(verdicts)

    async def swap(self, swaps: Sequence[Swap], receipt: Receipt | None = None) -> list[bool]:
        """Replace rows where nobody was faster; return for each whether it was. False: read row, mark, then fingerprints again."""
        replies = await self._written("swap", [swap.key for swap in swaps], [_pack_swap(swap) for swap in swaps], SWAP, receipt)
        return [reply == 1 for reply in replies]

    async def erase(
        self, marks: Sequence[bytes], keys: Sequence[Sequence[bytes]], until_us: Sequence[int], receipt: Receipt | None = None
    ) -> list[int]:
        """Remove each entity's keys and refuse its events up to a time (an older erasure never lowers it); return how many were there.

        Parallel per entity: the key of its mark, all its keys (rows and sets of fingerprints), microseconds since the epoch. All keys of an
        entity lie in the slot of its mark.
        """
        asked: list[bytes] = []
        owners: list[int] = []
        commands: list[bytes] = []
        for owner, (mark, mine, until) in enumerate(zip(marks, keys, until_us, strict=True)):
            for at in range(0, max(1, len(mine)), ERASE_CHUNK):
                asked.append(mark)
                owners.append(owner)
                commands.append(ERASE.call([mark, *mine[at : at + ERASE_CHUNK]], [struct.pack("<q", until)]))
        removed = [0] * len(marks)
        for owner, reply in zip(owners, await self._written("erase", asked, commands, ERASE, receipt), strict=True):
            removed[owner] += reply
        return removed

    async def remove(self, keys: Sequence[bytes]) -> int:
        """Remove keys that nobody uses any more; return how many were there. Their memory is given back in the background."""
        replies = await self._written("remove", keys, [pack(b"UNLINK", [key]) for key in keys], None, None)
        return sum(replies)

    async def applied(
        self, keys: Sequence[bytes], fingerprints: Sequence[Sequence[int]], receipt: Receipt | None = None
    ) -> list[list[bool]]:
        """Return for each set which of its fingerprints (int64, at least one) are in it. `receipt`: what is found may have yet to be settled.

        Read the row first: fingerprints that are older than the row would make `swap` take an event twice.
        """
        commands = [pack(b"SMISMEMBER", [key, *(b"%d" % one for one in wanted)]) for key, wanted in zip(keys, fingerprints, strict=True)]
        replies = late(len(keys))
        await self._in_time(self.dispatch.run(keys, commands, replies, receipt=receipt))
        all_here(replies)
        return [[known == 1 for known in reply] for reply in replies]

    async def times_to_live(self, keys: Sequence[bytes]) -> list[int]:
        """Return how long each key will stay, ms; -1 = for ever, -2 = there is no such key."""
        replies = late(len(keys))
        await self._in_time(self.dispatch.run(keys, [pack(b"PTTL", [key]) for key in keys], replies))
        all_here(replies)
        return replies

    async def notes(self, name: bytes) -> list[bytes | None]:
        """Return what `note` left under a name on each primary, None where there is nothing (any more). Raises Unavailable."""
        return await self._on_primaries(name, b"GET", ())

    async def note(self, name: bytes, value: bytes) -> None:
        """Leave a value under a name on every primary, where it lives and dies with that server's rows. Raises Unavailable."""
        await self._on_primaries(name, b"SET", (value,))

    async def settle(self, receipt: Receipt) -> int:
        """Wait until everything a receipt names is as safe as the settings ask; return its Durability. See `Acknowledging.settle`."""
        began = time.perf_counter()
        try:
            return await self._acknowledging.settle(receipt)
        finally:
            self._observe("settle", time.perf_counter() - began)

    def scan(self, prefix: bytes, suffix: bytes = b"", *, cursor: bytes = b"", count: int = 1000) -> AsyncIterator[Page]:
        """Yield every key that begins and ends with these bytes; see `scanning.scan`."""
        return scanning.scan(self.topology, prefix, suffix, cursor=cursor, count=count)

    async def watch(self, prefixes: Callable[[], Sequence[bytes]], listener: Listener) -> None:
        """Tell `listener` of every key that changes; see `tracking.watch`."""
        await tracking.watch(self.topology, prefixes, listener)

    async def close(self) -> None:
        """Close every connection."""
        await self._acknowledging.close()
        await self.topology.close()

    def _groups(self, keys: Sequence[bytes], size: int) -> list[Sequence[int]]:
        """Return positions of keys that one script may name together: of one slot, where there are slots, and not too many."""
        if not self.topology.slotted:
            return [range(at, min(at + size, len(keys))) for at in range(0, len(keys), size)]
        by_slot: dict[int, list[int]] = {}
        for at, key in enumerate(keys):
            by_slot.setdefault(slot_of(key), []).append(at)
        return [mine[at : at + size] for mine in by_slot.values() for at in range(0, len(mine), size)]

    async def _on_primaries(self, name: bytes, command: bytes, arguments: Sequence[bytes]) -> list[Any]:
        async def ask() -> list[Any]:
            await self.topology.ready()
            nodes = self.topology.primaries()
            return await asyncio.gather(*(node.ask(command, [self.topology.key_on(node, name), *arguments]) for node in nodes))

        try:
            async with asyncio.timeout(self._write_timeout_s):
                return await ask()
        except TimeoutError as error:
            raise unavailable() from error

    async def _written(
        self, operation: str, keys: Sequence[bytes], commands: Sequence[bytes], script: Script | None, receipt: Receipt | None
    ) -> list[Any]:
        replies = late(len(commands))
        began = time.perf_counter()
        try:
            if commands:
                await self._in_time(self.dispatch.run(keys, commands, replies, script=script, receipt=receipt))
        finally:
            self._observe(operation, time.perf_counter() - began)
        all_here(replies)
        return replies

    async def _in_time(self, work: Any) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await work
        except TimeoutError as error:
            raise unavailable() from error


def _rows(replies: list[Any], count: int, size: int) -> Read:
    """Take replies of `size` keys each apart into rows and what is not known."""
    if size == 1 and not any(isinstance(reply, Missing | Refusal) for reply in replies if type(reply) is not bytes):
        return Read(replies)
    rows: list[bytes | None] = []
    missing: dict[bool, list[int]] = {True: [], False: []}
    for reply in replies:
        if isinstance(reply, Missing | Refusal):
            width = min(size, count - len(rows))
            missing[reply is Missing.LATE] += range(len(rows), len(rows) + width)
            rows += [None] * width
        elif size == 1:
            rows.append(reply)
        else:
            rows += reply
    if not (missing[True] or missing[False]):
        return Read(rows)
    if len(missing[False]) == count:
        raise unavailable()
    return Read(rows, late=np.array(missing[True], np.intp), failed=np.array(missing[False], np.intp))


def _pack_swap(swap: Swap) -> bytes:
    digest = b"" if swap.old is None else hashlib.sha1(swap.old).hexdigest().encode()  # noqa: S324  (what Lua in Redis can compute)
    arguments = [digest, swap.mark or b"", swap.new, b"%d" % swap.ttl_ms, b"%d" % swap.applied_ttl_ms]
    for fingerprints in swap.applied.values():
        arguments += [b"%d" % len(fingerprints), *(b"%d" % one for one in fingerprints)]
    return SWAP.call([swap.key, swap.mark_key, *swap.applied], arguments)
