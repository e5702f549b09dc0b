"""How loaded this worker is, as load balancers read it: an ORCA report in the trailer of every answer, and the router's own on streams.

The message is xds.data.orca.v3.OrcaLoadReport, the trailer `endpoint-load-metrics-bin` (gRFC A51, per-query reporting; A58 weighs by
utilization and rate). It is written by hand because no package ships the message without overwriting files of others (xds-protos), and it is
made anew at most every 100 ms, since a report costs more than sending one. The router wants to know less, sooner: `StreamLoad`.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, ParamSpec, TypeVar

from model_worker.batcher import Answer

TRAILER: Final = "endpoint-load-metrics-bin"
_EVERY_S: Final = 0.1
_STREAM_EVERY_S: Final = 0.01
_SMOOTH: Final = 1 / 32
_DOUBLE: Final = struct.Struct("<Bd")
P = ParamSpec("P")
T = TypeVar("T")
_CPU, _RPS, _EPS, _APPLICATION, _NAMED = 1, 6, 7, 9, 8  # field numbers


class LoadReport:
    """Counts what is answered and reports rates since the last report. `cpus`: how many this process may use; `busy_s`: seconds computed so
    far by all models; `queued_rows`: rows waiting now. Lives on the event loop."""

    def __init__(
        self,
        cpus: int,
        busy_s: Callable[[], float],
        queued_rows: Callable[[], float],
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._cpus = cpus
        self._busy_s = busy_s
        self._queued_rows = queued_rows
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._answered = self._failed = 0
        self._before = (clock(), cpu_clock(), busy_s())
        self._report = b""

    def count(self, *, failed: bool = False) -> None:
        """Count one call."""
        self._answered += 1
        self._failed += failed

    def counting(self, work: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        """Return `work` so that each call of it is counted, as failed where it raises."""

        async def counted(*args: P.args, **more: P.kwargs) -> T:
            try:
                result = await work(*args, **more)
            except Exception:
                self.count(failed=True)
                raise
            self.count()
            return result

        return counted

    def __call__(self) -> bytes:
        """Return the serialized report: utilizations 0..1 of the CPUs and of the models' instances, calls and errors per second, queued rows."""
        now_s = self._clock()
        began_s, cpu_s, busy_s = self._before
        if self._report and now_s - began_s < _EVERY_S:
            return self._report
        now_cpu_s, now_busy_s = self._cpu_clock(), self._busy_s()
        passed_s = max(now_s - began_s, 1e-6)
        self._report = encode(
            cpu=(now_cpu_s - cpu_s) / passed_s / self._cpus,
            rps=self._answered / passed_s,
            eps=self._failed / passed_s,
            application=min(1.0, (now_busy_s - busy_s) / passed_s),
            named={"queued_rows": self._queued_rows()},
        )
        self._before = now_s, now_cpu_s, now_busy_s
        self._answered = self._failed = 0
        return self._report


class StreamLoad:
    """What the router's balancer is told on the answers of StreamInfer (message LoadReport), at most every 10 ms on one stream.

    `queued_rows`: rows waiting now; `draining`: whether the process is about to stop. Lives on the event loop.
    """

    def __init__(
        self, queued_rows: Callable[[], float], draining: Callable[[], bool], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._queued_rows = queued_rows
        self._draining = draining
        self._clock = clock
        self._in_flight = 0
        self._queue_s = self._row_s = 0.0

    def __repr__(self) -> str:
        return f"<StreamLoad in_flight={self._in_flight} queue_us={self._queue_s * 1e6:.0f} row_ns={self._row_s * 1e9:.0f}>"

    def counting(self, work: Callable[P, Awaitable[Answer]]) -> Callable[P, Awaitable[Answer]]:
        """Return `work` so that what it does is seen here."""

        async def counted(*args: P.args, **more: P.kwargs) -> Answer:
            self._in_flight += 1
            try:
                answer = await work(*args, **more)
            finally:
                self._in_flight -= 1
            self._queue_s += _SMOOTH * (answer.queue_s - self._queue_s)
            self._row_s += _SMOOTH * (answer.compute_s / max(1, answer.rows) - self._row_s)
            return answer

        return counted

    def reporter(self) -> Callable[[Any], None]:
        """Return what adds the report to a StreamInferResponse of one stream when it is due."""
        due_s = self._clock()

        def report(response: Any) -> None:
            nonlocal due_s
            now_s = self._clock()
            if now_s >= due_s:
                due_s = now_s + _STREAM_EVERY_S
                self._fill(response.load)

        return report

    def _fill(self, load: Any) -> None:
        load.in_flight = self._in_flight
        load.queued_rows = int(self._queued_rows())
        load.queue_us = int(self._queue_s * 1e6)
        load.row_ns = int(self._row_s * 1e9)
        load.draining = self._draining()


def encode(*, cpu: float, rps: float, eps: float, application: float, named: Mapping[str, float]) -> bytes:
    """Return an OrcaLoadReport with these fields."""
    report = b"".join(_double(number, value) for number, value in ((_CPU, cpu), (_RPS, rps), (_EPS, eps), (_APPLICATION, application)))
    for name, value in named.items():
        key = name.encode()
        entry = bytes([1 << 3 | 2, len(key)]) + key + _double(2, value)
        report += bytes([_NAMED << 3 | 2, len(entry)]) + entry
    return report


def _double(number: int, value: float) -> bytes:
    return _DOUBLE.pack(number << 3 | 1, value)
