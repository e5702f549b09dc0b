"""The load generator: one thread, raw non-blocking sockets, requests built once, so that it costs far less than any server it measures.

A Python client of gRPC or HTTP costs as much per call as a good server; measured with one, every server looks alike. Here a call costs
a send, a receive and a look at the answer's head. `plait_bench.ceiling` measures what is left as its own limit.
"""

from __future__ import annotations

import gc
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Final

from plait_bench.connection import Closed, Connection
from plait_bench.http1 import Http1Connection
from plait_bench.http2 import GrpcConnection, GrpcRequest

_STALL_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where calls go and what is sent: one whole HTTP/1.1 request, or a gRPC one."""

    port: int
    request: bytes | GrpcRequest
    host: str = "127.0.0.1"

    @property
    def ok(self) -> int:
        """The status of a call that went well."""
        return 200 if isinstance(self.request, bytes) else 0

    def connect(self) -> Connection:
        """Open a connection."""
        sock = socket.create_connection((self.host, self.port), timeout=_STALL_S)
        if isinstance(self.request, bytes):
            return Http1Connection(sock, self.request)
        return GrpcConnection(sock, self.request)


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was seen: seconds per call that went well, calls by status, how long it took, CPU seconds of the generator and of the server, first answers."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    server_cpu_s: float = 0.0
    taken_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    first_bodies: list[bytes] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        """Good calls per second."""
        return len(self.taken_s) / self.seconds if self.seconds else 0.0


def closed_loop(
    target: Target,
    *,
    callers: int,
    seconds: float,
    connections: int | None = None,
    warm_up_s: float = 0.0,
    server_cpu_s: Callable[[], float] = float,
) -> Tally:
    """Keep `callers` calls under way for `seconds`, after `warm_up_s` that does not count.

    `connections`: over how many the callers are spread; None = one each for HTTP/1.1, one for all for gRPC. `server_cpu_s` is read at both
    ends. Raises Closed where the server hangs up or stops answering.
    """
    count = connections or (callers if isinstance(target.request, bytes) else 1)
    with ExitStack() as stack:
        opened = stack.enter_context(_opened(target, count))
        poller = stack.enter_context(closing(_Poller(opened)))
        for number in range(callers):
            poller.begin(opened[number % count], time.perf_counter())
        _keep_going(poller, warm_up_s, Tally(), target.ok)
        tally = Tally()
        used_s = server_cpu_s()
        _keep_going(poller, seconds, tally, target.ok)
        tally.server_cpu_s = server_cpu_s() - used_s
        tally.first_bodies = [c.first_body for c in opened if c.first_body is not None]
        return tally


def open_loop(target: Target, *, per_s: float, seconds: float, connections: int = 4, settle_s: float = 2.0) -> Tally:
    """Begin `per_s` calls a second whether or not earlier ones were answered (gRPC only), then wait up to `settle_s` for the rest."""
    with ExitStack() as stack:
        opened = stack.enter_context(_opened(target, connections))
        poller = stack.enter_context(closing(_Poller(opened)))
        tally = Tally()
        with _measured(tally):
            began_s = time.perf_counter()
            begun, ended, total = 0, 0, int(per_s * seconds)
            while ended < total:
                now_s = time.perf_counter()
                if now_s - began_s > seconds + settle_s:
                    break
                due = min(total, int((now_s - began_s) * per_s))
                while begun < due:
                    poller.begin(opened[begun % connections], began_s + begun / per_s)
                    begun += 1
                wait_s = 0.05 if begun == total else max(0.0, began_s + (begun + 1) / per_s - time.perf_counter())
                ended += poller.turn(wait_s, tally, target.ok, None)
        tally.seconds = seconds
        return tally


def _keep_going(poller: _Poller, seconds: float, tally: Tally, ok: int) -> None:
    with _measured(tally):
        began_s = last_s = now_s = time.perf_counter()
        while now_s < began_s + seconds:
            ended = poller.turn(0.1, tally, ok, poller.begin)
            now_s = time.perf_counter()
            last_s = now_s if ended else last_s
            if now_s - last_s > _STALL_S:
                raise Closed(f"no answer for {_STALL_S:g} s")


class _Poller:
    """Waits for many connections at once."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._epoll = select.epoll()
        self._by_descriptor = {c.sock.fileno(): c for c in connections}
        self._blocked: set[int] = set()
        for descriptor in self._by_descriptor:
            self._epoll.register(descriptor, select.EPOLLIN)

    def begin(self, connection: Connection, now_s: float) -> None:
        connection.begin(now_s)
        if connection.blocked:
            self._watch(connection.sock.fileno(), connection)

    def turn(self, wait_s: float, tally: Tally, ok: int, then: Callable[[Connection, float], None] | None) -> int:
        """Handle what is ready; return how many calls ended. `then` begins the next one."""
        ended = 0
        for descriptor, events in self._epoll.poll(wait_s):
            connection = self._by_descriptor[descriptor]
            if events & select.EPOLLOUT:
                connection.flush()
            if events & ~select.EPOLLOUT:
                for began_s, status in connection.receive():
                    ended += 1
                    now_s = time.perf_counter()
                    tally.statuses[status] += 1
                    if status == ok:
                        tally.taken_s.append(now_s - began_s)
                    if then is not None:
                        then(connection, now_s)
            if connection.blocked or descriptor in self._blocked:
                self._watch(descriptor, connection)
        return ended

    def _watch(self, descriptor: int, connection: Connection) -> None:
        if connection.blocked and descriptor not in self._blocked:
            self._blocked.add(descriptor)
            self._epoll.modify(descriptor, select.EPOLLIN | select.EPOLLOUT)
        elif not connection.blocked and descriptor in self._blocked:
            self._blocked.remove(descriptor)
            self._epoll.modify(descriptor, select.EPOLLIN)

    def close(self) -> None:
        self._epoll.close()


@contextmanager
def _opened(target: Target, count: int) -> Iterator[list[Connection]]:
    opened: list[Connection] = []
    try:
        for _ in range(count):
            opened.append(target.connect())  # noqa: PERF401 - what was opened must be closed if a later one fails
        yield opened
    finally:
        for connection in opened:
            connection.close()


@contextmanager
def _measured(tally: Tally) -> Iterator[None]:
    """Take the time, without the collector's pauses in it."""
    collecting = gc.isenabled()
    gc.disable()
    cpu_s, began_s = time.process_time(), time.perf_counter()
    try:
        yield
    finally:
        tally.seconds, tally.cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        if collecting:
            gc.enable()
