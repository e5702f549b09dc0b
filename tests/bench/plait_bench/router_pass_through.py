"""What the router's pass-through costs: inferences per core of its CPU against a plain grpc.aio proxy, and what it adds to a call's latency."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np

from plait.registry.records import Model, ModelVersion, Snapshot
from plait_bench.inference import infer_call
from plait_bench.load import Target
from plait_bench.measure import Contender, Measured, Plan, alternate, as_figures
from plait_bench.models import Rows
from plait_bench.own_router import Helper, OwnRouter, PortedProcess
from plait_bench.processes import cores
from plait_bench.proxy import TOKEN
from plait_bench.running import Say

ROUTER: Final = "through the router"
PROXY: Final = "through a plain grpc.aio proxy"
DIRECT: Final = "the worker directly"
_MODEL: Final = "mlp"
_SIZES: Final[dict[str, Rows]] = {"200 bytes": np.zeros((1, 50), np.float32), "100 × 80 float32": np.zeros((100, 80), np.float32)}
_CALLERS: Final = 32
_ANSWER_BYTES: Final = 200


def seconds(plan: Plan) -> float:
    """How long `measure` takes, about."""
    return len(_SIZES) * plan.rounds * plan.round_s * (2 + 3) + 5.0


def measure(plan: Plan, folder: Path, say: Say) -> dict[str, Any]:
    """Return figures by message size. The router and the proxy have a core to themselves in turn; the worker, which answers canned bytes,
    shares the other one with the load."""
    server_core, load_core = cores()
    with ExitStack() as stack:
        say("starting the router and the proxy", 0.0)
        worker = stack.enter_context(Helper("worker", str(_ANSWER_BYTES), core=load_core, folder=folder, name="worker"))
        worker.wait()
        known = Model(name=_MODEL, versions=(ModelVersion(version="1", artifact="canned:", digest="sha256:0"),), aliases={"champion": "1"})
        snapshot = Snapshot(revision=1, models={_MODEL: known})
        router = stack.enter_context(OwnRouter(snapshot, worker.address, folder, core=server_core))
        proxy = stack.enter_context(Helper("proxy", worker.address, core=server_core, folder=folder, name="proxy"))
        for server in (router, proxy):
            server.wait()
        servers = {ROUTER: router, PROXY: proxy, DIRECT: worker}
        return {size: _figures(plan, servers, rows, say) for size, rows in _SIZES.items()}


def _figures(plan: Plan, servers: dict[str, PortedProcess], rows: Rows, say: Say) -> dict[str, Any]:
    busy = alternate([_contender(name, servers[name], rows, _CALLERS) for name in (ROUTER, PROXY)], plan, say)
    lone = alternate([_contender(name, server, rows, 1) for name, server in servers.items()], plan, say)
    return {
        "busy": as_figures(busy),
        "per_core": {name: per_core(one) for name, one in busy.items()},
        "per_core_to_proxy": per_core(busy[ROUTER]) / per_core(busy[PROXY]),
        "lone": as_figures(lone),
        "added_p50_ms": {name: lone[name].p50_ms - lone[DIRECT].p50_ms for name in (ROUTER, PROXY)},
        "added_p99_ms": {name: _p99(lone[name]) - _p99(lone[DIRECT]) for name in (ROUTER, PROXY)},
    }


def per_core(measured: Measured) -> float:
    """Return calls per second of the server's CPU time, median of the rounds."""
    return 1e3 / max(float(np.median(measured.server_cpu_ms)), 1e-9)


def _p99(measured: Measured) -> float:
    value: float = measured.figures()["p99_ms"]
    return value


def _contender(name: str, server: PortedProcess, rows: Rows, callers: int) -> Contender:
    return Contender(
        name=name,
        server=server,
        target=Target(port=server.port, request=infer_call(_MODEL, rows, token=TOKEN)),
        callers=callers,
        connections=min(callers, 4),
        rows_per_call=len(rows),
    )
