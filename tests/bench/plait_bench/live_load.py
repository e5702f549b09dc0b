"""What callers notice while a large model is loaded beside the one they use (users of TensorFlow Serving complain of it: #882, #1608)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

import grpc

from plait.api.inference.v2 import inference_pb2 as pb
from plait.api.inference.v2 import inference_pb2_grpc as pb_grpc
from plait.errors import Unavailable
from plait_bench.load import closed_loop
from plait_bench.measure import Contender, Measured, Plan, check_answers, percentile_ms
from plait_bench.models import MLP, Network, publish
from plait_bench.own import OwnWorker
from plait_bench.scenarios import ROWS, Bench, own_contender, started

LARGE: Final = Network("large", (1024, 4096, 4096, 4096, 4096, 1))  # 218 MB
CALLERS: Final = 4
_ROUND: Final = 4  # of a plan's: so that a full run's holds a whole load
_CALL_S: Final = 120.0
_SETTINGS: Final = {"MODELS__REPOSITORY_CONTROL": "true"}
_QUIET, _LOADING = "nothing loads", "a model loads"


@dataclass(slots=True)
class _Loads:
    """What the thread that loads and unloads has seen: seconds each load took."""

    taken_s: list[float] = field(default_factory=list)
    error: grpc.RpcError | None = None


def load_while_serving(bench: Bench, formats: Mapping[str, str]) -> dict[str, Any]:
    """100 × 80 of CALLERS callers with nothing else going on and while LARGE is loaded, unloaded and loaded again, in turn; by artifact format.

    `formats`: artifact formats, as the keys. Raises Unavailable (BENCH_SERVER_FAILED) where a load fails.
    """
    artifacts = bench.folder / "live-load"
    models = [publish(MLP, MLP.name, artifacts / MLP.name)]
    large = {format_: publish(LARGE, f"large-{format_}", artifacts / format_, format_=format_) for format_ in formats}
    with ExitStack() as stack:
        worker = OwnWorker(
            [*models, *large.values()],
            bench.folder / "live-load-worker",
            core=bench.server_core,
            settings=_SETTINGS,
            name="plait live load",
        )
        bench.say("starting a model-worker with large models", 0.0)
        started(stack, [worker])
        found = {format_: _beside(bench, worker, model.name) for format_, model in large.items()}
    return {
        "model_bytes": sum(t.numel() * 4 for t in LARGE.module.parameters()),
        "callers": CALLERS,
        "rows_per_call": ROWS,
        "formats": found,
    }


def load_while_serving_s(plan: Plan, formats: int) -> float:
    """Seconds that `load_while_serving` announces."""
    return formats * 2 * plan.rounds * (_seconds(plan) + plan.warm_up_s)


def _seconds(plan: Plan) -> float:
    return plan.seconds * _ROUND


def _beside(bench: Bench, worker: OwnWorker, name: str) -> dict[str, Any]:
    contender = own_contender(worker, MLP.name, MLP, ROWS, CALLERS, CALLERS)
    measured = {what: Measured(ROWS, CALLERS) for what in (_QUIET, _LOADING)}
    loads = _Loads()
    _control(worker, name, loads, once=True)
    for _ in range(bench.plan.rounds):
        _round(bench, contender, measured[_QUIET])
        with _kept_loading(worker, name, loads):
            _round(bench, contender, measured[_LOADING])
    if loads.error is not None:
        raise Unavailable(f"{name} could not be loaded and unloaded: {loads.error}", reason="BENCH_SERVER_FAILED")
    quiet, loading = measured[_QUIET], measured[_LOADING]
    return {
        "figures": {what: _figures(one) for what, one in measured.items()},
        "loads": len(loads.taken_s),
        "load_s": median(loads.taken_s),
        "p50_loading_to_quiet": loading.p50_ms / quiet.p50_ms,
        "p99_loading_to_quiet": percentile_ms(loading.taken_s, 99) / percentile_ms(quiet.taken_s, 99),
        "rate_loading_to_quiet": loading.rate / quiet.rate,
    }


def _round(bench: Bench, contender: Contender, measured: Measured) -> None:
    contender.server.check()
    seconds = _seconds(bench.plan)
    tally = closed_loop(
        contender.target,
        callers=contender.callers,
        connections=contender.connections,
        seconds=seconds,
        warm_up_s=bench.plan.warm_up_s,
        server_cpu_s=contender.server.cpu_s,
    )
    check_answers(contender, tally)
    measured.add(tally, contender.target.ok)
    bench.say(f"{contender.name}, {CALLERS} callers: {tally.per_s:.0f} calls/s", seconds + bench.plan.warm_up_s)


def _figures(measured: Measured) -> dict[str, Any]:
    tail = {f"p{name}_ms": percentile_ms(measured.taken_s, percent) for name, percent in (("99_9", 99.9), ("100", 100.0))}
    return measured.figures() | tail


@contextmanager
def _kept_loading(worker: OwnWorker, name: str, loads: _Loads) -> Iterator[None]:
    """Have the model loaded over and over, in a thread that only waits; at the end let the last load finish."""
    ended = threading.Event()
    thread = threading.Thread(target=_control, args=(worker, name, loads), kwargs={"ended": ended}, name="loads")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _control(worker: OwnWorker, name: str, loads: _Loads, *, once: bool = False, ended: threading.Event | None = None) -> None:
    """Unload the model where `once`, else load and unload it until `ended`, and leave it unloaded."""
    metadata = (("x-plait-service-token", worker.token),)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{worker.port}") as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            while True:
                if not once:
                    began_s = time.monotonic()
                    stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=name), metadata=metadata, timeout=_CALL_S)
                    loads.taken_s.append(time.monotonic() - began_s)
                stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=name), metadata=metadata, timeout=_CALL_S)
                if once or ended is None or ended.is_set():
                    return
    except grpc.RpcError as error:
        loads.error = error
