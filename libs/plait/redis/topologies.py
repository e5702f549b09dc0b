"""Which server holds a key: the one there is, the one Sentinel names, or the one a Redis Cluster has given its slot to.

A topology only knows; `dispatch` asks. What it knows goes stale: it finds out anew when a server refuses or cannot be reached, and every
few seconds beside the calls, for a server that was replaced may go on answering those who still hold on to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Any, Final, Protocol

from plait.errors import Unavailable
from plait.redis.commands import SLOTS, slot_of
from plait.redis.connections import Access, Address, Node, unavailable
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

_NOT_BEFORE_S: Final = 0.05  # between two times of finding out, however many calls doubt
_AFTER_S: Final = 5.0  # what was known this long is looked at again


class Topology(Protocol):
    """Where keys are. Of `slotted` ones a command may name keys of one slot only."""

    slotted: bool

    async def ready(self) -> None:
        """Find out where keys are, where this is not known or was doubted. Raises Unavailable."""
        ...

    def node(self, key: bytes) -> Node:
        """Return the server that takes reads and writes of a key. Raises Unavailable where nobody does."""
        ...

    def nodes(self, keys: Sequence[bytes]) -> list[Node | None]:
        """Return the same for many keys, None where nobody does."""
        ...

    def at(self, address: Address) -> Node:
        """Return the server at an address that another one named."""
        ...

    def primaries(self) -> Sequence[Node]:
        """Return every server that takes writes."""
        ...

    def key_on(self, node: Node, name: bytes) -> bytes:
        """Return a key that begins with a name and that this server holds. Raises Unavailable where it holds none any more."""
        ...

    def doubt(self) -> None:
        """A server no longer did what it should: find out anew before the next use."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class Single:
    """One server, for ever."""

    slotted = False

    def __init__(self, access: Access) -> None:
        self._node = access.node()

    async def ready(self) -> None:
        """There is nothing to find out."""

    def node(self, key: bytes) -> Node:
        """Return the one there is."""
        return self._node

    def nodes(self, keys: Sequence[bytes]) -> list[Node | None]:
        """Return the one there is for every key."""
        return [self._node] * len(keys)

    def at(self, address: Address) -> Node:
        """Return the one there is."""
        return self._node

    def primaries(self) -> Sequence[Node]:
        """Return the one there is."""
        return (self._node,)

    def key_on(self, node: Node, name: bytes) -> bytes:
        """Return the name: every key is here."""
        return name

    def doubt(self) -> None:
        """There is no other."""

    async def close(self) -> None:
        """Close every connection."""
        await self._node.close()


class Sentinel:
    """The server that Sentinel names as the primary of a service (Redis' guidelines for clients of Sentinel).

    `access` says how to log in to the servers, `sentinels` where the Sentinels are.
    """

    slotted = False

    def __init__(self, access: Access, sentinels: Sequence[Node], service: str) -> None:
        self._access = access
        self._sentinels = list(sentinels)
        self._service = service
        self._node: Node | None = None
        self._knowledge = _Knowledge(self._find)

    async def ready(self) -> None:
        """Ask who is the primary, where this is not known or was doubted."""
        await self._knowledge.ready()

    def node(self, key: bytes) -> Node:
        """Return the primary."""
        if self._node is None:
            raise unavailable()
        return self._node

    def nodes(self, keys: Sequence[bytes]) -> list[Node | None]:
        """Return the primary for every key."""
        return [self._node] * len(keys)

    def at(self, address: Address) -> Node:
        """Return the primary: its replicas are not asked."""
        return self.node(b"")

    def primaries(self) -> Sequence[Node]:
        """Return the primary, where it is known."""
        return () if self._node is None else (self._node,)

    def key_on(self, node: Node, name: bytes) -> bytes:
        """Return the name: every key is on the primary."""
        return name

    def doubt(self) -> None:
        """Ask again before the next use."""
        self._knowledge.doubt()

    async def close(self) -> None:
        """Close every connection."""
        await self._knowledge.close()
        for node in (*self.primaries(), *self._sentinels):
            await node.close()

    async def _find(self) -> None:
        for at, sentinel in enumerate(self._sentinels):
            with contextlib.suppress(Unavailable):
                found = await sentinel.ask(b"SENTINEL", [b"get-master-addr-by-name", self._service.encode()])
                if found is None:
                    continue
                if await self._try((found[0].decode(), int(found[1]))):
                    self._sentinels.insert(0, self._sentinels.pop(at))  # it is asked first from now on
                    return
        raise unavailable()

    async def _try(self, address: Address) -> bool:
        """Take the server at an address if it says itself that it is a primary: a Sentinel may not have heard of the failover yet."""
        node = self._node if self._node is not None and self._node.address == address else self._access.node(address)
        try:
            primary: bool = (await node.ask(b"ROLE"))[0] == b"master"
            if primary:
                await self._take(node)
        finally:
            if node is not self._node:
                await node.close()
        return primary

    async def _take(self, node: Node) -> None:
        old, self._node = self._node, node
        if old is not None and old is not node:
            log.info("sentinel names another primary")
            await old.close()


class Cluster:
    """A Redis Cluster: each slot's primary takes its keys. `seeds` are asked where nothing is known yet."""

    slotted = True

    def __init__(self, access: Access, seeds: Sequence[Address]) -> None:
        self._access = access
        self._seeds = [access.node(seed) for seed in seeds]
        self._nodes: dict[Address, Node] = {}
        self._slots: list[Node | None] = [None] * SLOTS
        self._primaries: tuple[Node, ...] = ()
        self._tags: dict[int, bytes] = {}
        self._knowledge = _Knowledge(self._find)

    async def ready(self) -> None:
        """Ask for the slots' owners, where they are not known or were doubted."""
        await self._knowledge.ready()

    def node(self, key: bytes) -> Node:
        """Return the primary of the key's slot."""
        node = self._slots[slot_of(key)]
        if node is None:
            raise unavailable()
        return node

    def nodes(self, keys: Sequence[bytes]) -> list[Node | None]:
        """Return the primary of each key's slot, None where it has none."""
        slots = self._slots
        return [slots[slot_of(key)] for key in keys]

    def at(self, address: Address) -> Node:
        """Return the server at an address that another one named."""
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = self._access.node(address)
        return node

    def primaries(self) -> Sequence[Node]:
        """Return the owners of slots."""
        return self._primaries

    def key_on(self, node: Node, name: bytes) -> bytes:
        """Return the name with a hash tag that lies in the first of the server's slots."""
        if node not in self._primaries:
            raise unavailable()
        slot = self._slots.index(node)
        if slot not in self._tags:
            self._tags[slot] = next(tag for tag in map(b"%d".__mod__, count()) if slot_of(tag) == slot)
        return name + b"{" + self._tags[slot] + b"}"

    def doubt(self) -> None:
        """Ask again before the next use."""
        self._knowledge.doubt()

    async def close(self) -> None:
        """Close every connection."""
        await self._knowledge.close()
        for node in (*self._nodes.values(), *self._seeds):
            await node.close()

    async def _find(self) -> None:
        for node in (*self._primaries, *self._seeds):
            with contextlib.suppress(Unavailable):
                await self._take(await node.ask(b"CLUSTER", [b"SLOTS"]), node)
                return
        raise unavailable()

    async def _take(self, ranges: Any, asked: Node) -> None:
        """Learn from the answer of CLUSTER SLOTS: [first, last, [host, port, …] of the primary, replicas …] each."""
        slots: list[Node | None] = [None] * SLOTS
        for first, last, primary, *_ in ranges:
            host = (primary[0] or b"").decode()
            node = self.at((host if host not in ("", "?") else asked.address[0], int(primary[1])))
            slots[first : last + 1] = [node] * (last - first + 1)
        self._slots = slots
        self._primaries = tuple(dict.fromkeys(node for node in slots if node is not None))
        for gone in [address for address, node in self._nodes.items() if node not in self._primaries]:
            await self._nodes.pop(gone).close()


class _Knowledge:
    """When to find out anew: `find` learns, or raises Unavailable."""

    def __init__(self, find: Callable[[], Awaitable[None]]) -> None:
        self._find = find
        self._known = False
        self._doubted = True
        self._found_at = -_AFTER_S
        self._lock = asyncio.Lock()
        self._look: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Find out where nothing is known or it was doubted, but not at every call; where that fails, go on with what was known."""
        age_s = time.monotonic() - self._found_at
        if self._known and not self._doubted:
            if age_s > _AFTER_S and (self._look is None or self._look.done()):
                self._look = asyncio.create_task(self._look_again(), name="redis topology")
            return
        if self._known and age_s < _NOT_BEFORE_S:
            return
        async with self._lock:
            if self._known and (not self._doubted or time.monotonic() - self._found_at < _NOT_BEFORE_S):
                return  # somebody else has just done it
            try:
                await self._learn()
            except Unavailable:
                if not self._known:
                    raise

    def doubt(self) -> None:
        """What is known may be wrong."""
        self._doubted = True

    async def close(self) -> None:
        """Stop looking."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)

    async def _look_again(self) -> None:
        with contextlib.suppress(Unavailable):
            async with self._lock:
                await self._learn()

    async def _learn(self) -> None:
        self._found_at = time.monotonic()
        self._doubted = False
        try:
            await self._find()
        except BaseException:
            self._doubted = True
            raise
        self._known = True
