"""One Redis server and the pooled connections to it: the only module that knows `redis`.

`redis.asyncio` is what became of aioredis. Its connections carry authentication, TLS and parsing; what is sent over them is packed by
whoever asks. What a server answers as an error is a value here (`Refusal`), because in a pipeline every command has its own answer; what
breaks a connection is Unavailable (STORE_UNAVAILABLE).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import redis.asyncio as aioredis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from plait.errors import Unavailable
from plait.redis.commands import pack
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

RETRY_AFTER_S: Final = 0.25
Address = tuple[str, int]
RefusalKind = Literal["noscript", "moved", "ask", "again", "down", "readonly", "other"]

_KINDS: Final[dict[type[ResponseError], RefusalKind]] = {
    NoScriptError: "noscript",
    MovedError: "moved",  # before AskError, which it derives from
    AskError: "ask",
    TryAgainError: "again",
    ClusterDownError: "down",
    ReadOnlyError: "readonly",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error that a server answered: `name` is its class, `address` where it points (MOVED, ASK)."""

    kind: RefusalKind
    name: str
    text: str
    address: Address | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How to connect to any server of one deployment; `url` names the first, its password, database and whether it speaks TLS."""

    url: str
    connections: int = 32
    connect_timeout_s: float = 1.0
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    def node(self, address: Address | None = None) -> Node:
        """Return the server at an address, by default the URL's."""
        arguments: dict[str, Any] = dict(parse_url(self.url))
        kind = arguments.pop("connection_class", aioredis.Connection)
        if issubclass(kind, aioredis.SSLConnection):
            arguments |= {"ssl_ca_certs": self.tls_ca, "ssl_certfile": self.tls_cert, "ssl_keyfile": self.tls_key}
        host, port = address or (arguments.get("host", "localhost"), arguments.get("port", 6379))
        # Time-outs and retries are ours: redis-py's would add a task to every command and hide an outage for seconds.
        arguments |= {
            "host": host,
            "port": port,
            "socket_connect_timeout": self.connect_timeout_s,
            "socket_timeout": None,
            "retry": Retry(NoBackoff(), 0),
        }
        return Node(kind, arguments, self.connections)


@dataclass(slots=True)
class _Link:
    """A connection, and which run of the server it leads to ('' = not asked yet)."""

    connection: Any
    run: str = ""


class Node:
    """One server. After a failure calls fail at once for a quarter of a second instead of each waiting for its own time-out."""

    def __init__(self, kind: Any, arguments: dict[str, Any], connections: int) -> None:
        self.address: Address = (arguments["host"], arguments["port"])
        self._kind = kind
        self._arguments = arguments
        self._free: deque[_Link] = deque()
        self.connections = connections
        self._slots = asyncio.Semaphore(connections)
        self._down_until = 0.0
        self._closed = False
        self._tls: Any = None
        self.in_use = 0

    def __repr__(self) -> str:
        state = "down" if self.down else "up"
        return f"<Node {self.address[0]}:{self.address[1]} {state} connections={self.in_use}+{len(self._free)}>"

    @property
    def down(self) -> bool:
        """Whether it could not be reached a moment ago."""
        return time.monotonic() < self._down_until

    @property
    def idle(self) -> int:
        """How many connections wait to be used."""
        return len(self._free)

    async def exchange(self, commands: Sequence[bytes], count: int, replies: list[Any], *, with_run: bool = False) -> str:
        """Send packed commands at once and append their `count` replies as they arrive: bytes, int, None, list or Refusal.

        Returns which run of the server answered ('' unless `with_run`). Raises Unavailable; cancelled, it leaves nothing to the next.
        """
        async with self._link() as link:
            if with_run and not link.run:
                link.run = await _run_of(link.connection)
            await link.connection.send_packed_command(b"".join(commands), check_health=False)
            read = link.connection._parser.read_response  # noqa: SLF001  (its own would add 3 us to each of hundreds of replies)
            for _ in range(count):
                reply = await read(disable_decoding=True)
                replies.append(reply if type(reply) is bytes or not isinstance(reply, ResponseError) else _refusal(reply))
            return link.run

    async def ask(self, command: bytes, arguments: Sequence[bytes] = ()) -> Any:
        """Send one command and return its reply; what the server refuses is raised as Unavailable."""
        replies: list[Any] = []
        await self.exchange([pack(command, arguments)], 1, replies)
        if isinstance(replies[0], Refusal):
            raise refused(replies[0])
        return replies[0]

    @asynccontextmanager
    async def pushes(self) -> AsyncIterator[PushConnection]:
        """Open a RESP3 connection of its own for what the server tells unasked. Raises Unavailable when it breaks."""
        connection = self._connection(protocol=3)
        try:
            await connection.connect()
            connection._parser.set_invalidation_push_handler(_as_it_is)  # noqa: SLF001  (no public way on a bare connection)
            yield PushConnection(connection)
        except (RedisError, OSError) as error:
            raise unavailable() from error
        finally:
            await _discard(connection)

    async def close(self) -> None:
        """Close every idle connection, and those in use once they are given back."""
        self._closed = True
        while self._free:
            await _discard(self._free.popleft().connection)

    @asynccontextmanager
    async def _link(self) -> AsyncIterator[_Link]:
        if self.down:
            raise unavailable()
        await self._slots.acquire()
        self.in_use += 1
        link = self._free.pop() if self._free else _Link(self._connection(protocol=2))
        try:
            if not link.connection.is_connected:
                link.run = ""
                await link.connection.connect()
            yield link
        except (RedisError, OSError) as error:
            await _discard(link.connection)
            self._fail(error)
            raise unavailable() from error
        except BaseException:  # cancelled amid an answer: what is still to come belongs to nobody
            await _discard(link.connection)
            raise
        else:
            if self._closed:
                await _discard(link.connection)
            else:
                self._free.append(link)
        finally:
            self.in_use -= 1
            self._slots.release()

    def _connection(self, protocol: int) -> Any:
        connection = self._kind(**self._arguments | {"protocol": protocol})
        if issubclass(self._kind, aioredis.SSLConnection):  # reading all of the system's roots takes longer than the handshake
            self._tls = self._tls or connection.ssl_context
            connection.ssl_context = self._tls
        return connection

    def _fail(self, error: Exception) -> None:
        if not self.down:
            log.warning("redis cannot be reached", error=type(error).__name__)
        self._down_until = time.monotonic() + RETRY_AFTER_S
        while self._free:  # the others are dead as well
            connection = self._free.pop().connection
            connection._close()  # noqa: SLF001  (its synchronous close: there is no loop turn to spend here)


class PushConnection:
    """A connection that also hears what nobody asked for."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def send(self, command: bytes, arguments: Sequence[bytes] = ()) -> None:
        """Send a command; its answer comes among the messages."""
        await self._connection.send_packed_command([pack(command, arguments)], check_health=False)

    async def answer(self) -> Any:
        """Return the next answer; what is pushed meanwhile is dropped."""
        return await self._connection.read_response(disable_decoding=True, timeout=math.inf)

    async def heard(self, timeout_s: float) -> Any:
        """Return the next message, pushed or answered, or None when there was none in time."""
        return await self._connection.read_response(disable_decoding=True, timeout=timeout_s, push_request=True)


async def _as_it_is(message: Any) -> Any:
    return message


async def _run_of(connection: Any) -> str:
    """Return the random id a server gave itself when it started; '' where we may not ask."""
    await connection.send_packed_command([pack(b"INFO", [b"server"])], check_health=False)
    try:
        lines = (await connection.read_response(disable_decoding=True, timeout=math.inf)).splitlines()
    except ResponseError:
        return ""
    return next((line.partition(b":")[2].decode() for line in lines if line.startswith(b"run_id:")), "")


async def _discard(connection: Any) -> None:
    with contextlib.suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)


def _refusal(error: ResponseError) -> Refusal:
    kind: RefusalKind = next((kind for known, kind in _KINDS.items() if isinstance(error, known)), "other")
    address = (error.host, error.port) if isinstance(error, AskError) else None
    return Refusal(kind, type(error).__name__, str(error), address)


def refused(refusal: Refusal) -> Unavailable:
    """Return the error for what a server refused; its text may hold keys, so only its class is told."""
    return Unavailable(
        f"the feature store answered with an error ({refusal.name}): retry, and see Redis' log and memory",
        reason="STORE_UNAVAILABLE",
        retry_after_s=RETRY_AFTER_S,
    )


def unavailable() -> Unavailable:
    """Return the error for a server that cannot be reached."""
    return Unavailable(
        "the feature store cannot be reached: retry, and see that Redis is up", reason="STORE_UNAVAILABLE", retry_after_s=RETRY_AFTER_S
    )
