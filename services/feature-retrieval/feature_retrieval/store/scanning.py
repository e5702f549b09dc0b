"""Walking over every key of a kind, on every primary, with a cursor that a later process can go on from.

Every key that is there from beginning to end is met at least once (SCAN's promise), some twice. A cursor of Redis means something to the
very run of the server that gave it (its hash has a random seed), so ours remembers the runs: where any is another, the walk begins anew.
Moving slots between servers while a walk is under way may hide the keys that move: do not reshard meanwhile.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from plait.errors import InvalidArgument
from plait.redis.commands import literally, pack
from plait.redis.connections import Node, Refusal, refused
from plait.redis.topologies import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some keys; `cursor` goes on after them (empty: that was all). `scanned` of about `total` keys of the whole store were looked at."""

    keys: list[bytes]
    cursor: bytes
    scanned: int
    total: int


async def scan(topology: Topology, prefix: bytes, suffix: bytes = b"", *, cursor: bytes = b"", count: int = 1000) -> AsyncIterator[Page]:
    """Yield the keys that begin and end with these bytes, page by page; `count` is about how many keys Redis looks at for one.

    Raises InvalidArgument (CURSOR_INVALID) for a cursor that is not ours, Unavailable.
    """
    await topology.ready()
    nodes = sorted(topology.primaries(), key=lambda node: node.address)
    totals = await asyncio.gather(*(node.ask(b"DBSIZE") for node in nodes))
    runs = await asyncio.gather(*(_run(node) for node in nodes))
    stamp = zlib.crc32(repr([(node.address, run) for node, run in zip(nodes, runs, strict=True)]).encode())
    at, position, scanned = _resume(cursor, stamp)
    arguments = [b"MATCH", literally(prefix) + b"*" + literally(suffix), b"COUNT", b"%d" % count]
    while at < len(nodes):
        position, keys = await nodes[at].ask(b"SCAN", [b"%d" % int(position), *arguments])
        scanned = min(scanned + count, sum(totals))
        if int(position) == 0:
            at += 1
            scanned = max(scanned, sum(totals[:at]))
        end = at == len(nodes)
        yield Page(
            keys=[key for key in keys if len(key) >= len(prefix) + len(suffix)],
            cursor=b"" if end else b"%d %d %d %d" % (stamp, at, int(position), scanned),
            scanned=sum(totals) if end else scanned,
            total=sum(totals),
        )


async def _run(node: Node) -> str:
    replies: list[Any] = []
    run = await node.exchange([pack(b"PING")], 1, replies, with_run=True)
    if isinstance(replies[0], Refusal):
        raise refused(replies[0])
    return run


def _resume(cursor: bytes, stamp: int) -> tuple[int, int, int]:
    if not cursor:
        return 0, 0, 0
    try:
        given, at, position, scanned = map(int, cursor.split())
    except ValueError:
        raise InvalidArgument("the cursor is none that plait gave: leave it out to begin anew", reason="CURSOR_INVALID") from None
    return (at, position, scanned) if given == stamp else (0, 0, 0)
