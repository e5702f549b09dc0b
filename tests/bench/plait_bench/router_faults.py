"""What callers notice when a worker behind the router is killed, and when one is slow: the router's own pools before three real workers."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
from pydantic import SecretStr

from plait.api.model_worker.v1 import model_worker_service_pb2 as worker_pb
from plait.errors import PlaitError
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from plait_bench.inference import infer_request
from plait_bench.measure import Plan
from plait_bench.models import MLP, publish
from plait_bench.own import OwnWorker
from plait_bench.processes import cores
from router.balancer import Balancer
from router.connections import CallPlan, Connections, framed
from router.discovery.found import Found
from router.replica import Replica
from router.transports.plait import PlaitTransport

Figures = Mapping[str, Any]

WORKERS: Final = 3
CALLERS: Final = 16
ROWS: Final = 100
_STREAM: Final = "/plait.api.model_worker.v1.ModelWorkerService/StreamInfer"
_TIMEOUT_S: Final = 5.0
_DURING_S: Final = 1.0  # after the kill
_STOPPED_S, _RUNNING_S = 0.018, 0.002  # of each 20 ms: ten times slower


class LeastInFlight(Balancer):
    """Power of two choices by our own calls in flight and nothing else: what most clients do."""

    def _better(self, a: Replica, b: Replica, rows: int, now_s: float) -> Replica:
        return b if b.in_flight < a.in_flight else a


@dataclass(slots=True)
class _Seen:
    """Calls as they ended: (moment, seconds taken), and how many failed."""

    ended: list[tuple[float, float]] = field(default_factory=list)
    failed: int = 0

    def between(self, begin_s: float, end_s: float) -> dict[str, Any]:
        took = [took_s for at_s, took_s in self.ended if begin_s <= at_s < end_s]
        if not took:
            return {"calls": 0}
        p50, p99 = np.percentile(took, [50, 99]) * 1e3
        return {"calls": len(took), "p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3)}


def measure(plan: Plan) -> Figures:
    """Return the figures of one worker killed and of one worker slow, against balancing by calls in flight alone."""
    with tempfile.TemporaryDirectory(prefix="plait-bench-") as folder, ExitStack() as stack:
        model = publish(MLP, MLP.name, Path(folder) / "artifact")
        token, core = secrets.token_hex(16), cores()[0]
        settings = {"RPC__SERVICE_TOKEN": token}
        workers = [
            stack.enter_context(OwnWorker([model], Path(folder) / f"worker-{n}", core=core, settings=settings)) for n in range(WORKERS)
        ]
        for worker in workers:
            worker.token = token  # one mesh, one token
            worker.wait()
        bench = _Bench([f"127.0.0.1:{worker.port}" for worker in workers], token, plan)
        slow = asyncio.run(bench.slow(workers[0].pid))
        killed = asyncio.run(bench.killed(workers[0].pid))
    return {"workers": WORKERS, "callers": CALLERS, "rows_per_call": ROWS, "one_killed": killed, "one_ten_times_slower": slow}


class _Bench:
    def __init__(self, addresses: Sequence[str], token: str, plan: Plan) -> None:
        self._addresses = addresses
        self._channel = ChannelSettings(service_token=SecretStr(token))
        self._plan = plan
        self._request = infer_request(MLP.name, MLP.rows(ROWS))

    async def killed(self, pid: int) -> dict[str, Any]:
        """Kill one worker under load, and look before, in the second after, and later."""
        connections, seen = self._connections(Balancer()), _Seen()
        callers = [asyncio.create_task(self._call(connections, seen)) for _ in range(CALLERS)]
        await asyncio.sleep(self._plan.warm_up_s)
        began_s = time.monotonic()
        await asyncio.sleep(self._plan.seconds)
        killed_s = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(_DURING_S + self._plan.seconds)
        await _stopped(callers)
        await connections.close()
        return {
            "failed": seen.failed,
            "before": seen.between(began_s, killed_s),
            "first_second": seen.between(killed_s, killed_s + _DURING_S),
            "after": seen.between(killed_s + _DURING_S, float("inf")),
        }

    async def slow(self, pid: int) -> dict[str, Any]:
        """Slow one worker down and compare the two ways to balance, round by round in turn."""
        found: dict[str, list[dict[str, Any]]] = {"plait": [], "least_in_flight": []}
        with _slowed(pid):
            for _ in range(self._plan.rounds):
                for name, rounds in found.items():
                    rounds.append(await self._round(Balancer() if name == "plait" else LeastInFlight()))
        return {name: _medians(rounds) for name, rounds in found.items()}

    async def _round(self, balancer: Balancer) -> dict[str, Any]:
        connections, seen = self._connections(balancer), _Seen()
        callers = [asyncio.create_task(self._call(connections, seen)) for _ in range(CALLERS)]
        await asyncio.sleep(self._plan.warm_up_s)
        began_s = time.monotonic()
        await asyncio.sleep(self._plan.seconds)
        figures = seen.between(began_s, float("inf")) | {"failed": seen.failed}
        await _stopped(callers)
        await connections.close()
        return figures

    def _connections(self, balancer: Balancer) -> Connections:
        def opened(address: str, on_load: Any) -> PlaitTransport:
            return PlaitTransport(address, "infer", _STREAM, worker_pb.StreamInferResponse, self._channel, on_load=on_load)

        made = Connections("bench", opened, balancer)
        made.adopt(frozenset(Found(address=address) for address in self._addresses))
        return made

    async def _call(self, connections: Connections, seen: _Seen) -> None:
        while True:
            frame = worker_pb.StreamInferRequest(request=self._request)
            plan = CallPlan(model=MLP.name, rows=ROWS, deadline=Deadline.after(_TIMEOUT_S), tenant="bench", request_id="")
            began_s = time.monotonic()
            try:
                await connections.call(framed(frame, plan), plan)
            except PlaitError:
                seen.failed += 1
            now_s = time.monotonic()
            seen.ended.append((now_s, now_s - began_s))


@contextmanager
def _slowed(pid: int) -> Iterator[None]:
    """Stop a process for nine tenths of the time."""
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.wait(_RUNNING_S):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(_STOPPED_S)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go, name="slow down")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


async def _stopped(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: round(median(figures[name] for figures in rounds), 3) for name in ("calls", "p50_ms", "p99_ms", "failed")}
