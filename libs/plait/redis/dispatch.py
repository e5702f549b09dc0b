"""Commands to the servers that hold their keys, in one round trip where nothing moved; what moved is asked again where it went.

A command's reply is a value: what arrived, `LATE` where time ran out, `FAILED` where its server could not be reached, or the Refusal that
stayed. So one dead or slow server costs the answers of its own keys only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from plait.errors import Unavailable
from plait.redis.commands import pack
from plait.redis.connections import Node, Refusal, refused, unavailable
from plait.redis.script import Script
from plait.redis.topologies import Topology

_ATTEMPTS: Final = 6
_PAUSE_S: Final = 0.02  # before a command is sent again that met a slot on the move
_ASKING: Final = pack(b"ASKING")


class Missing(Enum):
    """What there is in place of a reply."""

    LATE = "late"
    FAILED = "failed"


@dataclass(slots=True)
class Receipt:
    """Which runs of which servers hold what was written; hand it to `settle`. Several writes may share one."""

    places: set[tuple[Node, str]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Call:
    """Commands, the keys whose servers take them, and where their replies go; all parallel."""

    keys: Sequence[bytes]
    commands: Sequence[bytes]
    replies: list[Any]
    script: Script | None
    receipt: Receipt | None


class Dispatch:
    """Sends commands by key. Time is the caller's: cancelled, or out of it, the replies that came are kept."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    async def run(
        self,
        keys: Sequence[bytes],
        commands: Sequence[bytes],
        replies: list[Any],
        *,
        script: Script | None = None,
        receipt: Receipt | None = None,
    ) -> None:
        """Send each packed command to the server of its key; fill `replies` (as long as `commands`, given as all LATE) as they arrive.

        Raises Unavailable only where nobody could be asked at all.
        """
        call = _Call(keys, commands, replies, script, receipt)
        todo: Sequence[int] = range(len(keys))
        for attempt in range(_ATTEMPTS):
            if attempt > 1:
                await asyncio.sleep(_PAUSE_S * attempt)
            await self.topology.ready()
            await self._send(self._by_node(call, todo), call)
            todo = await self._again(todo, call)
            if not todo:
                return

    async def one(self, key: bytes, command: bytes, arguments: Sequence[bytes], *, receipt: Receipt | None = None) -> Any:
        """Send one command and return its reply, a Refusal included. Raises Unavailable."""
        replies = late(1)
        await self.run([key], [pack(command, arguments)], replies, receipt=receipt)
        if isinstance(replies[0], Missing):
            raise unavailable()
        return replies[0]

    def _by_node(self, call: _Call, todo: Sequence[int]) -> dict[Node, Sequence[int]]:
        if not self.topology.slotted:
            return {self.topology.node(b""): todo}
        groups: dict[Node | None, list[int]] = {}
        keys = call.keys if len(todo) == len(call.keys) else [call.keys[at] for at in todo]
        for at, node in zip(todo, self.topology.nodes(keys), strict=True):
            groups.setdefault(node, []).append(at)
        for at in groups.pop(None, ()):  # nobody holds this slot now
            call.replies[at] = Missing.FAILED
        return {node: positions for node, positions in groups.items() if node is not None}

    async def _send(self, groups: dict[Node, Sequence[int]], call: _Call) -> None:
        if len(groups) == 1:
            for node, positions in groups.items():
                await self._exchange(node, positions, call)
            return
        await asyncio.gather(*(self._exchange(node, positions, call) for node, positions in groups.items()))

    async def _exchange(self, node: Node, positions: Sequence[int], call: _Call, *, asking: bool = False) -> None:
        replies, receipt = call.replies, call.receipt
        packed = call.commands if len(positions) == len(call.commands) else [call.commands[at] for at in positions]
        if asking:
            packed = [part for command in packed for part in (_ASKING, command)]
        arrived: list[Any] = []
        try:
            run = await node.exchange(packed, len(packed), arrived, with_run=receipt is not None)
            if receipt is not None:
                receipt.places.add((node, run))
        except Unavailable:
            self.topology.doubt()
            for at in positions:
                replies[at] = Missing.FAILED
        finally:  # out of time or broken: what has arrived is kept
            for at, reply in zip(positions, arrived[1::2] if asking else arrived, strict=False):
                replies[at] = reply

    async def _again(self, todo: Iterable[int], call: _Call) -> list[int]:
        """See to it that refusals that pass can pass; return which commands to send once more."""
        again: list[int] = []
        asks: dict[Node, list[int]] = {}
        strangers: set[Node] = set()  # servers that do not know the script
        for at in todo:
            refusal = call.replies[at]
            if not isinstance(refusal, Refusal) or refusal.kind == "other":
                continue
            if refusal.kind == "ask" and refusal.address is not None:
                asks.setdefault(self.topology.at(refusal.address), []).append(at)
                continue
            again.append(at)
            if refusal.kind == "noscript":
                strangers.add(self.topology.node(call.keys[at]))
            elif refusal.kind != "again":
                self.topology.doubt()
        for node in strangers | (asks.keys() if call.script else set()):
            await _load(node, call.script)
        for node, positions in asks.items():  # the slot is being handed over, and this key is there already: only this once
            await self._exchange(node, positions, call, asking=True)
            again += [at for at in positions if isinstance(call.replies[at], Refusal) and call.replies[at].kind != "other"]
        return again


def late(count: int) -> list[Any]:
    """Return `count` replies that have not come yet."""
    return [Missing.LATE] * count


def all_here(replies: Sequence[Any]) -> None:
    """Raise Unavailable unless every command was answered and none refused."""
    for reply in replies:
        if isinstance(reply, Missing):
            raise unavailable()
        if isinstance(reply, Refusal):
            raise refused(reply)


async def _load(node: Node, script: Script | None) -> None:
    if script is not None:
        with contextlib.suppress(Unavailable):  # whoever comes next meets the same, and says so
            await node.exchange([script.load()], 1, [])
