"""What a router does with more than its worker can do: answers in time, and the p99 of those let in, from 0.7 to 4 times the capacity.

Open loop with a budget per call, against a real router process and a worker of known capacity.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from plait.api.router.v1 import router_service_pb2 as pb
from plait.dtypes import BY_NAME
from plait.registry import last_known_good
from plait.registry.records import (
    ApiKey,
    Entity,
    Feature,
    FeatureSet,
    FeatureView,
    Model,
    ModelInput,
    ModelVersion,
    Route,
    Signature,
    Snapshot,
    Tenant,
    TensorSpec,
    Variant,
)
from plait.rpc.credentials import digest
from plait_bench.http2 import GrpcRequest
from plait_bench.load import Tally, Target, open_loop
from plait_bench.measure import Plan
from plait_bench.processes import ServerProcess, cores
from plait_bench.running import Say

FIXED_MS, EACH_MS, BATCH = 20.0, 2.0, 4  # far less than a router can do, so that it is not the CPU that is measured
CAPACITY_PER_S: Final = BATCH / (FIXED_MS + EACH_MS * BATCH) * 1e3
BUDGET_MS: Final = 200
LOADS: Final = (0.7, 1.0, 2.0, 4.0)
_ROWS, _COLUMNS = 20, 8
_METHOD: Final = "/plait.api.router.v1.RouterService/Rank"
_NO_POSTGRES: Final = "postgresql://nobody@127.0.0.1:1/nothing"
_START_S: Final = 60.0
_MEETING: Final = 0.7  # of the length of a measurement pass before it begins, and at least
_MEETING_S: Final = 2.0


def seconds(plan: Plan) -> float:
    """How long `measure` takes, about."""
    length_s = plan.rounds * plan.seconds
    return 10.0 + len(LOADS) * (length_s + _meeting_s(length_s))


def _meeting_s(length_s: float) -> float:
    return max(_MEETING_S, _MEETING * length_s)


def measure(plan: Plan, folder: Path, say: Say) -> dict[str, Any]:
    """Return the figures of each load, relative to what the worker can do. The router and the worker share a core, the load has the other."""
    length_s = plan.rounds * plan.seconds
    with ExitStack() as stack:
        say("a router before a worker of known capacity", 10.0)
        router, key = _start(folder, stack)
        target = Target(port=router, request=_request(key))
        give_up_s = time.monotonic() + _START_S
        while not open_loop(target, per_s=20.0, seconds=0.1).taken_s and time.monotonic() < give_up_s:
            pass  # the router has not found the worker yet
        found = {}
        for load in LOADS:
            say(f"{load:g} times what the worker can do", length_s + _meeting_s(length_s))
            per_s = CAPACITY_PER_S * load
            open_loop(
                target, per_s=per_s, seconds=_meeting_s(length_s)
            )  # what is measured is how it lives with a load, not how it meets it
            found[f"{load:g}"] = _figures(open_loop(target, per_s=per_s, seconds=length_s))
    peak = max(each["goodput"] for each in found.values())
    calm, worst = found[f"{LOADS[0]:g}"], found[f"{LOADS[-1]:g}"]
    return {
        "capacity_per_s": CAPACITY_PER_S,
        "budget_ms": BUDGET_MS,
        "loads": found,
        "goodput_at_4_over_peak": worst["goodput"] / peak if peak else 0.0,
        "p99_at_4_over_p99_at_0.7": worst["p99_ms"] / calm["p99_ms"] if calm["p99_ms"] else 0.0,
    }


def _figures(tally: Tally) -> dict[str, Any]:
    taken_ms = sorted(taken_s * 1e3 for taken_s in tally.taken_s)
    in_time = [taken for taken in taken_ms if taken <= BUDGET_MS]
    statuses: Counter[int] = tally.statuses
    return {
        "goodput": len(in_time) / tally.seconds / CAPACITY_PER_S,
        "p50_ms": _percentile(taken_ms, 0.5),
        "p99_ms": _percentile(taken_ms, 0.99),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
    }


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[int(len(ordered) * share)] if ordered else 0.0


def _start(folder: Path, stack: ExitStack) -> tuple[int, str]:
    """Start the worker and a router before it; return the router's port and a key."""
    folder = folder / "overload"
    folder.mkdir()
    key, token = f"plait_{secrets.token_hex(16)}", secrets.token_hex(16)
    server_core, _ = cores()
    place = folder / "worker.json"
    command = [sys.executable, "-m", "plait_bench.batching_worker", str(FIXED_MS), str(EACH_MS), str(BATCH), str(place)]
    env = dict(os.environ) | {"BATCHING_WORKER_TOKEN": token}
    worker = stack.enter_context(ServerProcess("worker", command, core=server_core, log=folder / "worker.log", env=env))
    address = _address(place, worker)
    last_known_good.write(folder / "registry.json", _registry(key))
    place = folder / "router.json"
    values = {
        "RPC__PORT_FILE": str(place),
        "RPC__SERVICE_TOKEN": token,
        "REGISTRY__DSN": _NO_POSTGRES,
        "REGISTRY__LAST_KNOWN_GOOD": str(folder / "registry.json"),
        "WORKERS__ADDRESSES": address,
        "TELEMETRY__LOG_LEVEL": "error",
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith("PLAIT_ROUTER_")} | {f"PLAIT_ROUTER_{k}": v for k, v in values.items()}
    command = [sys.executable, "-m", "router"]
    router = stack.enter_context(ServerProcess("router", command, core=server_core, log=folder / "router.log", env=env))
    return int(_address(place, router).rpartition(":")[2]), key


def _address(place: Path, server: ServerProcess) -> str:
    give_up_s = time.monotonic() + _START_S
    while not place.exists():
        server.check()
        if time.monotonic() > give_up_s:
            raise server.failed("was not ready in time")
        time.sleep(0.05)
    found: Mapping[str, str] = json.loads(place.read_text(encoding="utf-8"))
    return found["rpc"]


def _registry(key: str) -> Snapshot:
    item = TensorSpec(name="item", dtype="float32", shape=(-1, _COLUMNS))
    signature = Signature(inputs=(item,), outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),), feature_set="ranker")
    view = FeatureView(
        name="item-view", entity=Entity(type="item", key="string"), features=tuple(Feature(name=f"f{n}") for n in range(_COLUMNS))
    )
    inputs = (ModelInput(name="item", entity="item", features=tuple(f"item-view:f{n}" for n in range(_COLUMNS))),)
    model = Model(name="ranker", versions=(ModelVersion(version="1", artifact="/m", digest="sha256:1", signature=signature),))
    return Snapshot(
        revision=1,
        models={"ranker": model},
        feature_views={"item-view": view},
        feature_sets={"ranker": FeatureSet(name="ranker", inputs=inputs)},
        routes={"home": Route(name="home", variants=(Variant(name="main", model="ranker", use="1"),))},
        tenants={"shop": Tenant(name="shop")},
        keys={digest(key): ApiKey(id="k", tenant="shop", sha256=digest(key))},
    )


def _request(key: str) -> GrpcRequest:
    """Return a Rank with its features inline, so that nothing but the worker is behind the router."""
    request = pb.RankRequest(route="home")
    request.subject.string_ids.append("u1")
    request.candidates.string_ids.extend(f"i{n}" for n in range(_ROWS))
    dtype = BY_NAME["float32"].number
    request.inline_features.add(name="item", dtype=dtype, shape=[_ROWS, _COLUMNS], data=bytes(4 * _ROWS * _COLUMNS))
    metadata = (("authorization", f"Bearer {key}"),)
    return GrpcRequest(method=_METHOD, message=request.SerializeToString(), metadata=metadata, timeout_ms=BUDGET_MS)
