"""Redis as the row store: packed commands over pooled connections of redis.asyncio, and writes that only ever move forward in time.

`redis.asyncio` is what became of aioredis. Its connections carry authentication, TLS and parsing; the commands on the hot path are packed
here, because packing an MGET of 500 keys argument by argument takes longer than Redis takes to answer it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import numpy as np
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError

from feature_retrieval.store.rows import Read
from plait.errors import Unavailable
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

READ_CHUNK: Final = 1024  # keys of one MGET; large reads are several, so that a deadline keeps what has arrived
WRITE_CHUNK: Final = 64  # keys of one script call, so that it never blocks Redis for long
_RETRY_AFTER_S: Final = 0.25
_TRACKING_TURN_S: Final = 1.0  # how long the tracking connection waits before it asks Redis for a sign of life
_TRACKING_SILENCE_S: Final = 5.0

_Chunk = tuple[Sequence[bytes], Sequence[bytes]]  # keys, rows

# A row replaces another only if (event time, sequence, bytes) is greater: any order and any repetition of writes ends the same.
# 64-bit numbers are compared as two 32-bit halves because Lua's numbers are doubles; bytes one by one because Lua's < follows a locale.
_WRITE_IF_NEWER: Final = b"""
local ttl = tonumber(ARGV[1])
local out = {}
for i = 1, #KEYS do
  local row = ARGV[i + 1]
  local old = redis.call('GETRANGE', KEYS[i], 0, 31)
  local newer = #old < 32
  if not newer then
    local tl, th = struct.unpack('<I4i4', row, 9)
    local ol, oh = struct.unpack('<I4i4', old, 9)
    if th ~= oh then newer = th > oh
    elseif tl ~= ol then newer = tl > ol
    else
      local sl, sh = struct.unpack('<I4I4', row, 25)
      local pl, ph = struct.unpack('<I4I4', old, 25)
      if sh ~= ph then newer = sh > ph
      elseif sl ~= pl then newer = sl > pl
      else
        local full = redis.call('GET', KEYS[i])
        if full ~= row then
          newer = #row > #full
          for at = 1, math.min(#row, #full) do
            local a, b = string.byte(row, at), string.byte(full, at)
            if a ~= b then newer = a > b break end
          end
        end
      end
    end
  end
  if newer then
    if ttl > 0 then redis.call('SET', KEYS[i], row, 'PX', ttl) else redis.call('SET', KEYS[i], row) end
    out[i] = '1'
  else
    out[i] = '0'
  end
end
return table.concat(out)
"""
_SHA: Final = hashlib.sha1(_WRITE_IF_NEWER).hexdigest().encode()  # noqa: S324  (the name Redis gives a script)


class RedisStore:
    """Reads and writes rows by key. Every failure to reach Redis is Unavailable (STORE_UNAVAILABLE).

    After a failure calls fail at once for a quarter of a second instead of each waiting for its own time-out.
    """

    def __init__(self, url: str, *, connections: int = 32, connect_timeout_s: float = 1.0, write_timeout_s: float = 5.0) -> None:
        # Time-outs and retries are ours: redis-py's would add a task to every command and hide an outage for seconds.
        options: dict[str, Any] = {"socket_connect_timeout": connect_timeout_s, "socket_timeout": None, "retry": Retry(NoBackoff(), 0)}
        self._pool = aioredis.ConnectionPool.from_url(url, protocol=2, **options)
        self._tracking_pool = aioredis.ConnectionPool.from_url(url, protocol=3, **options)
        self._write_timeout_s = write_timeout_s
        self._free: deque[Any] = deque()
        self._slots = asyncio.Semaphore(connections)
        self._down_until = 0.0
        self._in_use = 0

    def __repr__(self) -> str:
        state = "down" if self.down else "up"
        return f"<RedisStore {state} connections={self._in_use}+{len(self._free)}>"

    @property
    def down(self) -> bool:
        """Whether Redis could not be reached a moment ago."""
        return time.monotonic() < self._down_until

    async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        """Return the rows of `keys`, in one round trip. At the time-out what has arrived is kept."""
        chunks = [keys[at : at + READ_CHUNK] for at in range(0, len(keys), READ_CHUNK)]
        rows: list[bytes | None] = []
        try:
            async with asyncio.timeout(timeout_s), self._connection() as connection:
                await connection.send_packed_command([_pack(b"MGET", chunk) for chunk in chunks], check_health=False)
                for _ in chunks:
                    rows += await connection.read_response(disable_decoding=True, timeout=math.inf)
        except TimeoutError:
            pass
        arrived = len(rows)
        if arrived == len(keys):
            return Read(rows)
        return Read(rows + [None] * (len(keys) - arrived), late=np.arange(arrived, len(keys)))

    async def write(self, keys: Sequence[bytes], rows: Sequence[bytes], ttl_ms: int) -> int:
        """Write rows where they are newer than what is stored; return how many were. `ttl_ms` 0 = kept for ever."""
        chunks = [(keys[at : at + WRITE_CHUNK], rows[at : at + WRITE_CHUNK]) for at in range(0, len(keys), WRITE_CHUNK)]
        try:
            async with asyncio.timeout(self._write_timeout_s), self._connection() as connection:
                applied, forgotten = await _write_chunks(connection, chunks, ttl_ms)
                if forgotten:  # a restarted Redis has lost the script
                    await connection.send_packed_command([_pack(b"SCRIPT", [b"LOAD", _WRITE_IF_NEWER])], check_health=False)
                    await connection.read_response(disable_decoding=True)
                    more, _ = await _write_chunks(connection, forgotten, ttl_ms)
                    applied += more
        except TimeoutError as error:
            raise _unavailable() from error
        return applied

    async def watch(self, prefixes: Callable[[], Sequence[bytes]], listener: Listener) -> None:
        """Tell `listener` of every key that changes, until the connection breaks or the prefixes change; then return or raise Unavailable.

        Uses RESP3 client-side tracking in broadcast mode on a connection of its own.
        """
        wanted = tuple(prefixes())
        connection: Any = self._tracking_pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await _track(connection, wanted)
            listener.connected(wanted)
            heard = time.monotonic()
            while tuple(prefixes()) == wanted:
                message = await connection.read_response(disable_decoding=True, timeout=_TRACKING_TURN_S, push_request=True)
                if isinstance(message, list) and message[0] == b"invalidate":
                    listener.changed(message[1])
                if message is not None:
                    heard = time.monotonic()
                elif time.monotonic() - heard > _TRACKING_SILENCE_S:
                    raise TimeoutError("redis has fallen silent")
                else:
                    await connection.send_packed_command([_pack(b"PING", [])], check_health=False)
        except (RedisError, OSError) as error:
            raise _unavailable() from error
        finally:
            listener.disconnected()
            await _discard(connection)

    async def close(self) -> None:
        """Close every connection."""
        while self._free:
            await _discard(self._free.popleft())

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        if self.down:
            raise _unavailable()
        await self._slots.acquire()
        self._in_use += 1
        connection: Any = self._free.pop() if self._free else self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            if not connection.is_connected:
                await connection.connect()
            yield connection
        except ResponseError as error:  # an answer (no memory, read-only, …): this command failed, others may not
            await _discard(connection)
            raise _refused(error) from error
        except (RedisError, OSError) as error:
            await _discard(connection)
            self._fail(error)
            raise _unavailable() from error
        except BaseException:  # cancelled amid an answer: what is still to come belongs to nobody
            await _discard(connection)
            raise
        else:
            self._free.append(connection)
        finally:
            self._in_use -= 1
            self._slots.release()

    def _fail(self, error: Exception) -> None:
        if not self.down:
            log.warning("redis cannot be reached", error=type(error).__name__)
        self._down_until = time.monotonic() + _RETRY_AFTER_S
        while self._free:  # the others are dead as well
            connection = self._free.pop()
            connection._close()  # noqa: SLF001  (its synchronous close: there is no loop turn to spend here)


class Listener:
    """Hears of changed keys; see `RedisStore.watch`."""

    def connected(self, prefixes: Sequence[bytes]) -> None:
        """Tracking is on: from now on every change of a key that begins with one of these is told."""

    def disconnected(self) -> None:
        """Tracking is off: changes are missed from now on."""

    def changed(self, keys: Sequence[bytes] | None) -> None:
        """These keys changed; None = all of them may have."""


async def _track(connection: Any, prefixes: Sequence[bytes]) -> None:
    await connection.connect()
    connection._parser.set_invalidation_push_handler(_as_it_is)  # noqa: SLF001  (redis-py offers no public way on a bare connection)
    arguments = [b"TRACKING", b"ON", b"BCAST"]
    for prefix in prefixes:
        arguments += [b"PREFIX", prefix]
    await connection.send_packed_command([_pack(b"CLIENT", arguments)], check_health=False)
    await connection.read_response(disable_decoding=True)


async def _as_it_is(message: Any) -> Any:
    return message


async def _write_chunks(connection: Any, chunks: list[_Chunk], ttl_ms: int) -> tuple[int, list[_Chunk]]:
    """Send every chunk at once; return how many rows were newer, and the chunks for which Redis does not know the script."""
    await connection.send_packed_command([_pack_write(keys, rows, ttl_ms) for keys, rows in chunks], check_health=False)
    applied, forgotten = 0, []
    for chunk in chunks:
        try:
            applied += (await connection.read_response(disable_decoding=True, disconnect_on_error=False)).count(b"1")
        except NoScriptError:
            forgotten.append(chunk)
    return applied, forgotten


def _pack(command: bytes, arguments: Sequence[bytes]) -> bytes:
    head = b"*%d\r\n$%d\r\n%b\r\n" % (len(arguments) + 1, len(command), command)
    return head + b"".join([b"$%d\r\n%b\r\n" % (len(a), a) for a in arguments])


def _pack_write(keys: Sequence[bytes], rows: Sequence[bytes], ttl_ms: int) -> bytes:
    return _pack(b"EVALSHA", [_SHA, b"%d" % len(keys), *keys, b"%d" % ttl_ms, *rows])


async def _discard(connection: Any) -> None:
    with contextlib.suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)


def _refused(error: ResponseError) -> Unavailable:
    return Unavailable(
        f"the feature store answered with an error ({type(error).__name__}): retry, and see Redis' log and memory",
        reason="STORE_UNAVAILABLE",
        retry_after_s=_RETRY_AFTER_S,
    )


def _unavailable() -> Unavailable:
    return Unavailable(
        "the feature store cannot be reached: retry, and see that Redis is up", reason="STORE_UNAVAILABLE", retry_after_s=_RETRY_AFTER_S
    )
