"""Two real Redis servers, one the replica of the other, and a real Sentinel that watches over them."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import redis

from plait.local.child import Child
from plait.local.ports import Port
from plait.local.redis import EmbeddedRedis, locate

SERVICE: Final = "shop"
SENTINEL_PASSWORD: Final = "of-the-sentinel"
_PASSWORD: Final = "of-the-servers"


class RedisSentinel:
    """An async context manager. `address` is the Sentinel's, `url` says how to log in to the servers and names none of them."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._port: Port
        self._home: Path
        self.servers: list[EmbeddedRedis] = []

    @property
    def address(self) -> str:
        return self._port.address

    @property
    def url(self) -> str:
        return f"redis://:{_PASSWORD}@nobody.invalid/0"

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    def sentinel(self) -> redis.Redis:
        """Return a client of the Sentinel."""
        return redis.Redis(port=self._port.number, password=SENTINEL_PASSWORD)

    def primary(self) -> EmbeddedRedis:
        """Return the server that the Sentinel names."""
        with self.sentinel() as client:
            _, port = client.sentinel_get_master_addr_by_name(SERVICE)
        return next(server for server in self.servers if server.address.endswith(f":{port}"))

    def flush(self) -> None:
        """Empty the primary."""
        with redis.Redis.from_url(self.primary().url) as client:
            client.flushall()
            client.script_flush()

    async def eventually(self, condition: Callable[[Any], bool]) -> None:
        """Wait until what the Sentinel knows of the primary is so."""
        give_up = time.monotonic() + 30
        while True:
            with self.sentinel() as client:
                if condition(client.sentinel_master(SERVICE)):
                    return
            assert time.monotonic() < give_up
            await asyncio.sleep(0.05)

    async def _start(self) -> None:
        common = {"requirepass": _PASSWORD, "masterauth": _PASSWORD, "repl-diskless-sync-delay": "0"}
        first = await self._stack.enter_async_context(EmbeddedRedis(options=common))
        replica_of = {"replicaof": first.address.replace(":", " ")}
        second = await self._stack.enter_async_context(EmbeddedRedis(options=common | replica_of))
        self.servers = [first, second]
        self._port = Port()
        self._stack.callback(self._port.close)
        self._home = Path(tempfile.mkdtemp(prefix="plait-sentinel-"))
        self._stack.callback(shutil.rmtree, self._home, ignore_errors=True)
        config = self._home / "sentinel.conf"
        host, port = first.address.split(":")
        config.write_text(
            f"bind 127.0.0.1\nport {self._port.number}\nrequirepass {SENTINEL_PASSWORD}\ndir {self._home}\n"
            f"sentinel monitor {SERVICE} {host} {port} 1\nsentinel auth-pass {SERVICE} {_PASSWORD}\n"
            f"sentinel down-after-milliseconds {SERVICE} 1000\nsentinel failover-timeout {SERVICE} 5000\n"
        )
        child = Child.start([locate(), config, "--sentinel"], name="sentinel", log=self._home / "log", cwd=self._home)
        self._stack.push_async_callback(child.stop, signal.SIGTERM, grace_s=10)
        give_up = time.monotonic() + 30
        while not self._answers():
            assert time.monotonic() < give_up, child.log_tail()
            await asyncio.sleep(0.05)
        await self.eventually(lambda primary: primary["num-slaves"] == 1)

    def _answers(self) -> bool:
        try:
            with self.sentinel() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False
