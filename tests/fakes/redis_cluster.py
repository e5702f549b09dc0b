"""A Redis Cluster of real servers: three primaries, each with a third of the slots, or as the test moves them."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import redis

from plait.local.ports import Port
from plait.local.redis import EmbeddedRedis

SLOTS = 16384
_PASSWORD = "of-the-cluster"


class RedisCluster:
    """An async context manager. One that is down takes only its own slots with it."""

    def __init__(self, count: int = 3) -> None:
        self._count = count
        self._stack = AsyncExitStack()
        self._ports: list[Port] = []
        self.nodes: list[EmbeddedRedis] = []

    @property
    def url(self) -> str:
        """The URL of the first server."""
        return self.nodes[0].url

    async def __aenter__(self) -> Self:
        try:
            for _ in range(self._count):
                bus = Port()  # by default the cluster's bus is ten thousand ports up, which may be none
                self._ports.append(bus)
                options = {
                    "requirepass": _PASSWORD,
                    "masterauth": _PASSWORD,
                    "cluster-enabled": "yes",
                    "cluster-config-file": "nodes.conf",
                    "cluster-port": str(bus.number),
                    "cluster-node-timeout": "1000",
                    "cluster-require-full-coverage": "no",
                }
                self.nodes.append(await self._stack.enter_async_context(EmbeddedRedis(options=options)))
            await self._join()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()
        for port in self._ports:
            port.close()

    def client(self, at: int) -> Any:
        """Return a client of one server, for whoever closes it."""
        return redis.Redis.from_url(self.nodes[at].url)

    def flush(self) -> None:
        """Empty every server that is up."""
        for node in self.nodes:
            if node.child.running:
                with redis.Redis.from_url(node.url) as client:
                    client.flushall()
                    client.script_flush()

    async def settled(self) -> None:
        """Wait until every server that is up knows all others and says that its part is well."""
        give_up = time.monotonic() + 30
        while not all(self._is_well(at) for at in range(self._count)):
            assert time.monotonic() < give_up
            await asyncio.sleep(0.05)

    def _is_well(self, at: int) -> bool:
        with self.client(at) as client:
            info: Any = client.execute_command("CLUSTER INFO")
        text = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
        return text["cluster_state"] == "ok" and int(text["cluster_known_nodes"]) == self._count and int(text["cluster_slots_ok"]) == SLOTS

    async def _join(self) -> None:
        share = -(-SLOTS // self._count)
        host, port = self.nodes[0].address.split(":")
        for at in range(self._count):
            with self.client(at) as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", at * share, min((at + 1) * share, SLOTS) - 1)
                if at:
                    client.execute_command("CLUSTER MEET", host, port, self._ports[0].number)
        await self.settled()
