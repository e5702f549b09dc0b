"""What may be said of a write: how safe it is, and never more than that.

WAITAOF and WAIT speak of what their own connection wrote. So a barrier, one small write and the wait for it on one connection, vouches for
all that the same run of the server took before; everybody who waits at one moment shares it. A server that restarted or was replaced
since is another run, and what the old one took may be gone: that is Unavailable, and to be written again, which changes nothing if it was
not lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Final, Literal

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, Unavailable
from plait.redis.commands import pack
from plait.redis.connections import RETRY_AFTER_S, Node, Refusal, refused, unavailable
from plait.redis.dispatch import Receipt
from plait.redis.topologies import Topology
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

Ack = Literal["auto", "applied", "synced", "replicated"]

BARRIER_KEY: Final = b"w1"
_BARRIERS: Final = 8  # under way at once to one server, and at most a quarter of its connections
_APART_S: Final = (
    0.12  # at most, between two that are under way: where a file is synced every second each takes up to that, and eight span it
)
_FADES: Final = 0.9  # how much of the longest wait counts after each shorter one
_ASK_AGAIN_S: Final = 60.0  # a server without an append-only file may have been given one


class Acknowledging:
    """Waits until what a receipt names is as safe as asked for.

    `ack`: `applied` (in memory), `synced` (in the append-only file of the primary), `replicated` (in the memory of `replicas`
    replicas), `auto` (synced where the server can, else applied).
    """

    def __init__(self, topology: Topology, *, ack: Ack = "auto", replicas: int = 1, timeout_s: float = 5.0) -> None:
        self._topology = topology
        self._ack = ack
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._next: dict[Node, asyncio.Task[tuple[str, int]]] = {}
        self._lanes: dict[Node, _Lanes] = {}
        self._without_file: dict[Node, float] = {}
        self._tasks: set[asyncio.Task[tuple[str, int]]] = set()

    async def settle(self, receipt: Receipt) -> int:
        """Return the Durability of everything the receipt names, the least of all servers.

        Raises Unavailable (NOT_DURABLE: write again) and FailedPrecondition (ACK_NOT_POSSIBLE).
        """
        if self._ack == "applied" or not receipt.places:
            return pb.DURABILITY_APPLIED
        return min(await asyncio.gather(*(self._place(node, run) for node, run in receipt.places)))

    async def close(self) -> None:
        """Stop waiting."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _place(self, node: Node, run: str) -> int:
        if self._ack == "auto" and time.monotonic() < self._without_file.get(node, 0.0):
            return pb.DURABILITY_APPLIED
        if not run:
            return self._not_possible("we may not ask a server who it is: allow the command INFO")
        barrier = self._next.get(node)
        if barrier is None:
            barrier = self._next[node] = asyncio.create_task(self._barrier(node), name="durability barrier")
            self._tasks.add(barrier)
            barrier.add_done_callback(self._ended)
        current, durability = await asyncio.shield(barrier)
        if current != run:
            raise _not_durable("the server restarted or was replaced since")
        return durability

    def _ended(self, barrier: asyncio.Task[tuple[str, int]]) -> None:
        self._tasks.discard(barrier)
        if not barrier.cancelled():
            barrier.exception()  # everybody who waited may have left

    async def _barrier(self, node: Node) -> tuple[str, int]:
        """Return which run of the server answered, and how safe everything is that it took before."""
        lanes = self._lanes.setdefault(node, _Lanes(min(_BARRIERS, max(1, node.connections // 4))))
        try:
            sent_at = await lanes.turn()
        finally:
            del self._next[node]  # whoever comes from here on may have written after it was sent
        replies: list[Any] = []
        try:
            commands = [pack(b"SET", [self._topology.key_on(node, BARRIER_KEY), b"1"]), self._wait()]
            async with asyncio.timeout(self._timeout_s + 1):
                run = await node.exchange(commands, 2, replies, with_run=True)
        except TimeoutError as error:
            raise unavailable() from error
        finally:
            lanes.leave(sent_at)
        return run, self._verdict(node, replies)

    def _wait(self) -> bytes:
        timeout_ms = b"%d" % int(self._timeout_s * 1000)
        if self._ack == "replicated":
            return pack(b"WAIT", [b"%d" % self._replicas, timeout_ms])
        return pack(b"WAITAOF", [b"1", b"0", timeout_ms])

    def _verdict(self, node: Node, replies: Sequence[Any]) -> int:
        write, waited = replies
        if isinstance(write, Refusal):
            self._topology.doubt()
            raise refused(write)
        if isinstance(waited, Refusal):
            if "append" not in waited.text and "unknown command" not in waited.text:
                raise refused(waited)
            self._without_file[node] = time.monotonic() + _ASK_AGAIN_S
            return self._not_possible("Redis keeps no append-only file: set appendonly yes")
        if self._ack == "replicated":
            if waited < self._replicas:
                raise _not_durable(f"{waited} of {self._replicas} replicas have it")
            return pb.DURABILITY_REPLICATED
        if waited[0] < 1:
            raise _not_durable("the append-only file was not synced in time")
        return pb.DURABILITY_SYNCED

    def _not_possible(self, why: str) -> int:
        if self._ack != "auto":
            raise FailedPrecondition(f"writes cannot be acknowledged as {self._ack}: {why}, or ask for less", reason="ACK_NOT_POSSIBLE")
        log.warning("writes are acknowledged once they are in Redis' memory, and lost if it crashes", why=why)
        return pb.DURABILITY_APPLIED


class _Lanes:
    """Barriers to one server: so many at once, and spread over the time they take, so that nobody waits long for the next to be sent. Where a
    disk is quick they follow each other as quickly."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = asyncio.Semaphore(count)
        self._under_way = 0
        self._sent_at = 0.0
        self._took_s = _APART_S * count

    def __repr__(self) -> str:
        return f"<_Lanes under_way={self._under_way}/{self._count}>"

    async def turn(self) -> float:
        """Wait until the next may be sent; return what to call `leave` with once it is answered."""
        await self._free.acquire()
        pause_s = self._sent_at + min(_APART_S, self._took_s / self._count) - time.monotonic()
        if self._under_way and pause_s > 0:
            try:
                await asyncio.sleep(pause_s)
            except BaseException:
                self._free.release()
                raise
        self._sent_at = time.monotonic()
        self._under_way += 1
        return self._sent_at

    def leave(self, sent_at: float) -> None:
        """One is answered."""
        self._took_s = max(time.monotonic() - sent_at, _FADES * self._took_s)
        self._under_way -= 1
        self._free.release()


def _not_durable(why: str) -> Unavailable:
    return Unavailable(
        f"the rows were written, but may be lost again ({why}): write them again", reason="NOT_DURABLE", retry_after_s=RETRY_AFTER_S
    )
