"""Hearing of changed keys: RESP3 client-side tracking in broadcast mode, on one connection of its own to every primary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Final

from plait.redis.connections import PushConnection, unavailable
from plait.redis.topologies import Topology

_TURN_S: Final = 1.0  # how long to wait before a server is asked for a sign of life
_SILENCE_S: Final = 5.0


class Listener:
    """Hears of changed keys."""

    def connected(self, prefixes: Sequence[bytes]) -> None:
        """Tracking is on: from now on every change of a key that begins with one of these is told."""

    def disconnected(self) -> None:
        """Tracking is off: changes are missed from now on."""

    def changed(self, keys: Sequence[bytes] | None) -> None:
        """These keys changed; None = all of them may have."""


async def watch(topology: Topology, prefixes: Callable[[], Sequence[bytes]], listener: Listener) -> None:
    """Tell `listener` of every key that changes, until a connection breaks or the prefixes or primaries change; then return or raise Unavailable.

    The listener is told that tracking is on once it is on at every primary.
    """
    wanted = tuple(prefixes())
    await topology.ready()
    nodes = tuple(topology.primaries())
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(node.pushes()) for node in nodes]
        for connection in connections:
            await _track(connection, wanted)
        stack.callback(listener.disconnected)  # told before the connections are closed
        listener.connected(wanted)

        def stale() -> bool:
            return tuple(prefixes()) != wanted or tuple(topology.primaries()) != nodes

        await _first(connections, topology, stale, listener)


async def _first(connections: Sequence[PushConnection], topology: Topology, stale: Callable[[], bool], listener: Listener) -> None:
    """Listen to all until one of them ends."""
    if len(connections) == 1:
        await _listen(connections[0], topology, stale, listener)
        return
    tasks = [asyncio.create_task(_listen(connection, topology, stale, listener), name="changes") for connection in connections]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _track(connection: PushConnection, prefixes: Sequence[bytes]) -> None:
    arguments = [b"TRACKING", b"ON", b"BCAST"]
    for prefix in prefixes:
        arguments += [b"PREFIX", prefix]
    await connection.send(b"CLIENT", arguments)
    await connection.answer()


async def _listen(connection: PushConnection, topology: Topology, stale: Callable[[], bool], listener: Listener) -> None:
    heard = time.monotonic()
    while not stale():
        message = await connection.heard(_TURN_S)
        if isinstance(message, list) and message[0] == b"invalidate":
            listener.changed(message[1])
        if message is not None:
            heard = time.monotonic()
        elif time.monotonic() - heard > _SILENCE_S:
            raise unavailable()
        else:
            await topology.ready()  # without calls, nobody else would notice a new primary
            await connection.send(b"PING")
