"""What one router was told to forget, every router hears: a stream in Redis that each of them follows from where it is.

A router that may have missed something forgets everything. While Redis is away routers go on answering from what they keep, within the
bounds of the routes; nobody was promised otherwise, because telling fails meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from google.protobuf.message import DecodeError

from plait.api.router.v1 import router_service_pb2 as pb
from plait.errors import Unavailable
from plait.redis.connections import Refusal, refused, unavailable
from plait.redis.dispatch import Dispatch
from plait.telemetry.logging import get_logger
from plait.telemetry.metrics import Metrics
from router.invalidation import MOST, Invalidations, named

log = get_logger(__name__)

STREAM: Final = b"iv1{plait}"
_TENANT: Final = b"t"
_REQUEST: Final = b"r"  # an InvalidateCacheRequest
_START: Final = b"0-0"
_PAGE: Final = 1000
_WAIT_S: Final = 1.0  # for news, in one command
_TIMEOUT_S: Final = 2.0  # beyond that, for the answer
_PAUSE_S: Final = 0.25  # after a failure
_SEQUENCE_BITS: Final = 32


class SharedInvalidations:
    """Tells the others and hears them: `run` feeds the log of this router. `heard_s` is when it last was in touch, on `clock`."""

    def __init__(
        self, invalidations: Invalidations, dispatch: Dispatch, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._invalidations = invalidations
        self._dispatch = dispatch
        self._clock = clock
        self._last = b""  # the entry heard last; empty = none was looked for yet
        self.heard_s = clock()
        behind = metrics.gauge(
            "plait_router_invalidations_behind_seconds", "how long this router has not heard what the others were told to forget"
        )
        behind.set_function(lambda: self._clock() - self.heard_s)

    def __repr__(self) -> str:
        return f"<SharedInvalidations last={self._last.decode() or 'none'}>"

    async def tell(self, tenant: str, request: pb.InvalidateCacheRequest) -> None:
        """Tell every router. Raises Unavailable (INVALIDATION_NOT_SHARED)."""
        entry = [_TENANT, tenant.encode(), _REQUEST, request.SerializeToString()]
        try:
            _good(await self._ask(b"XADD", [STREAM, b"MAXLEN", b"~", b"%d" % MOST, b"*", *entry]))
        except Unavailable as error:
            message = "this router has forgotten, but Redis cannot be reached to tell the others: retry"
            raise Unavailable(message, reason="INVALIDATION_NOT_SHARED", retry_after_s=_PAUSE_S) from error

    async def run(self) -> None:
        """Hear what is told, for ever."""
        while True:
            try:
                await self._catch_up()
                while True:
                    self._take(await self._news())
            except Unavailable as error:
                log.warning("what other routers were told to forget cannot be heard", reason=error.reason)
                await asyncio.sleep(_PAUSE_S)

    async def _catch_up(self) -> None:
        """Find the place in the stream again; where it is gone, what came after it may be gone as well."""
        if self._last in (b"", _START):
            if await self._trimmed():  # from here on at the latest everything is heard
                self._invalidations.forget_all(_number(await self._first()))
            self._last = _START
        elif not await self._still_there():
            log.warning("what other routers were told to forget was lost, so everything is forgotten")
            self._invalidations.forget_all()
            self._last = _START

    async def _trimmed(self) -> bool:
        """Whether entries were dropped from the front of the stream."""
        reply = await self._ask(b"XINFO", [b"STREAM", STREAM])
        if isinstance(reply, Refusal) and "no such key" in reply.text:
            return False
        fields = _good(reply)
        known = dict(zip(fields[::2], fields[1::2], strict=True))
        return int(known[b"entries-added"]) > int(known[b"length"])

    async def _first(self) -> bytes:
        found = _good(await self._ask(b"XRANGE", [STREAM, b"-", b"+", b"COUNT", b"1"]))
        return bytes(found[0][0]) if found else _START

    async def _still_there(self) -> bool:
        return bool(_good(await self._ask(b"XRANGE", [STREAM, self._last, self._last])))

    async def _news(self) -> list[Any]:
        """Return entries that were not heard yet, oldest first; empty where none came in a while."""
        arguments = [b"COUNT", b"%d" % _PAGE, b"BLOCK", b"%d" % int(_WAIT_S * 1000), b"STREAMS", STREAM, self._last]
        reply = _good(await self._ask(b"XREAD", arguments, waits_s=_WAIT_S))
        self.heard_s = self._clock()
        return list(reply[0][1]) if reply else []

    def _take(self, entries: list[Any]) -> None:
        for id_, fields in entries:
            known = dict(zip(fields[::2], fields[1::2], strict=True))
            try:
                request = pb.InvalidateCacheRequest.FromString(known[_REQUEST])
                self._invalidations.tell(named(known[_TENANT].decode(), request), _number(id_))
            except (DecodeError, KeyError, UnicodeDecodeError):  # of a version we do not know: better too much than too little
                self._invalidations.forget_all(_number(id_))
            self._last = bytes(id_)

    async def _ask(self, command: bytes, arguments: list[bytes], *, waits_s: float = 0.0) -> Any:
        try:
            async with asyncio.timeout(_TIMEOUT_S + waits_s):
                return await self._dispatch.one(STREAM, command, arguments)
        except TimeoutError as error:
            raise unavailable() from error


def _number(id_: bytes) -> int:
    """Return an entry's id, "milliseconds-sequence", as one number in the same order."""
    milliseconds, _, sequence = id_.partition(b"-")
    return int(milliseconds) << _SEQUENCE_BITS | int(sequence)


def _good(reply: Any) -> Any:
    if isinstance(reply, Refusal):
        raise refused(reply)
    return reply
