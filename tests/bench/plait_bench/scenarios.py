"""What is measured, one function per question; each returns plain figures for the report."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from plait_bench import http1
from plait_bench.connection import Closed
from plait_bench.http2 import GrpcRequest
from plait_bench.inference import METHOD, infer_request, scores_of
from plait_bench.load import Target, closed_loop, open_loop
from plait_bench.measure import Contender, Plan, alternate, as_figures, check_answers, percentile_ms, ratios
from plait_bench.models import HEAVY, MLP, Network
from plait_bench.own import OwnWorker
from plait_bench.peers import Peer
from plait_bench.processes import ServerProcess, free_port, wait_for_port

ROWS: Final = 100  # of one ModelInfer of the comparison
BATCH: Final = 64
_ANSWER_BYTES: Final = 450  # about what a ModelInferResponse with 100 scores has
_START_S: Final = 120.0
_OVERLOAD: Final = 4.0
_OVERLOAD_BUDGET_MS: Final = 200
_RESOURCE_EXHAUSTED, _DEADLINE_EXCEEDED = 8, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How many callers, over how many connections where the protocol can share one."""

    callers: int
    connections: int

    @property
    def name(self) -> str:
        """A key of the report."""
        if self.callers == 1:
            return "1 caller"
        return f"{self.callers} callers, {'one connection' if self.connections == 1 else 'a connection each'}"


LOADS: Final = (Load(callers=1, connections=1), Load(callers=16, connections=16), Load(callers=16, connections=1))


@dataclass(slots=True, kw_only=True)
class Bench:
    """What every scenario needs. `say` hears what is done and how many of the announced seconds it took; `skipped` says why a part is missing."""

    folder: Path
    server_core: int
    plan: Plan
    say: Callable[[str, float], None]
    skipped: list[dict[str, str]] = field(default_factory=list)

    def skip(self, what: str, reason: str) -> None:
        """Note what is left out."""
        self.skipped.append({"what": what, "reason": reason})
        self.say(f"left out: {what}: {reason}", 0.0)


# --- the generator's own limit


def ceiling(bench: Bench) -> dict[str, Any]:
    """16 callers of 100 rows against servers that only read and answer."""
    rows = MLP.rows(ROWS)
    requests: dict[str, bytes | GrpcRequest] = {
        "http": http1.build_request("/inference", rows.tobytes()),
        "grpc": GrpcRequest(method=METHOD, message=infer_request("mlp", rows).SerializeToString()),
    }
    found = {}
    for kind, request in requests.items():
        port = free_port()
        argv = [sys.executable, "-m", "plait_bench.ceiling", kind, str(port), str(_ANSWER_BYTES)]
        with ServerProcess(
            f"ceiling {kind}", argv, core=bench.server_core, log=bench.folder / f"ceiling-{kind}.log", env=os.environ
        ) as server:
            wait_for_port(server, port, _START_S)
            contender = Contender(
                name=f"ceiling {kind}", server=server, target=Target(port=port, request=request), callers=16, rows_per_call=ROWS
            )
            found[kind] = alternate([contender], bench.plan, bench.say)[contender.name].figures()
    return found


def ceiling_s(plan: Plan) -> float:
    """Seconds that `ceiling` announces."""
    return 2 * plan.rounds * plan.round_s


# --- ModelInfer 100 × 80 against the peers


def own_contender(
    worker: OwnWorker, model: str, network: Network, rows: int, callers: int, connections: int = 1, name: str = ""
) -> Contender:
    """Return calls of `model` with `rows` rows each."""
    sample = network.rows(rows)
    return Contender(
        name=name or f"plait {model}",
        server=worker,
        target=worker.target(model, sample),
        callers=callers,
        connections=connections,
        rows_per_call=rows,
        scores=scores_of,
        expected=network.scores(sample),
    )


def model_infer(bench: Bench, worker: OwnWorker, own_models: Mapping[str, str]) -> dict[str, Any]:
    """Our own rates alone; `own_models`: by artifact format, the model's name."""
    found = {}
    for load in LOADS:
        contenders = [
            own_contender(worker, name, MLP, ROWS, load.callers, load.connections, _own(format_)) for format_, name in own_models.items()
        ]
        found[load.name] = as_figures(alternate(contenders, bench.plan, bench.say))
    return found


def model_infer_s(plan: Plan, formats: int) -> float:
    """Seconds that `model_infer` announces."""
    return len(LOADS) * formats * plan.rounds * plan.round_s


def _own(format_: str) -> str:
    return f"plait {format_}"


def against_peer(bench: Bench, worker: OwnWorker, own_models: Mapping[str, str], peer: Peer, python: Path) -> dict[str, Any]:
    """Ours and the peer in turn, the peer with the setting that served it best for that number of callers."""
    model = bench.folder / "peer-model.pt"
    if not model.exists():
        MLP.save_torchscript(model)
    found: dict[str, Any] = {"version": peer.environment.version(python), "protocol": peer.protocol, "trials": {}, "loads": {}}
    best: dict[int, str] = {}
    rates: dict[str, dict[int, float]] = {}
    for name, settings in peer.settings.items():
        with _peer(bench, peer, python, model, name, settings) as contender:
            rates[name] = {callers: _trial(bench, peer, name, contender(Load(callers=callers, connections=callers))) for callers in (1, 16)}
    for callers in (1, 16):
        best[callers] = max(rates, key=lambda name: rates[name][callers])
    found["trials"] = {name: {str(callers): rate for callers, rate in of.items()} for name, of in rates.items()}
    for callers in (1, 16):
        with _peer(bench, peer, python, model, best[callers], peer.settings[best[callers]]) as contender:
            for load in (load for load in LOADS if load.callers == callers):
                ours = [own_contender(worker, name, MLP, ROWS, callers, load.connections, _own(f)) for f, name in own_models.items()]
                measured = alternate([*ours, contender(load)], bench.plan, bench.say)
                found["loads"][load.name] = {
                    "setting": best[callers],
                    "figures": as_figures(measured),
                    "ours_to_peer": {o.name: ratios(measured[o.name], measured[peer.name]) for o in ours},
                }
    return found


def against_peer_s(plan: Plan, formats: int, peer: Peer) -> float:
    """Seconds that `against_peer` announces."""
    return len(LOADS) * (formats + 1) * plan.rounds * plan.round_s + 2 * len(peer.settings) * (plan.trial_s + plan.warm_up_s)


def _trial(bench: Bench, peer: Peer, setting: str, contender: Contender) -> float:
    plan = bench.plan
    tally = closed_loop(
        contender.target, callers=contender.callers, connections=contender.connections, seconds=plan.trial_s, warm_up_s=plan.warm_up_s
    )
    check_answers(contender, tally)
    bench.say(f"{peer.name} ({setting}), {contender.callers} callers: {tally.per_s:.0f} calls/s", plan.trial_s + plan.warm_up_s)
    return tally.per_s


@contextmanager
def _peer(
    bench: Bench, peer: Peer, python: Path, model: Path, setting: str, settings: Mapping[str, str]
) -> Iterator[Callable[[Load], Contender]]:
    rows = MLP.rows(ROWS)
    bench.say(f"starting {peer.name} ({setting})", 0.0)
    server, port = peer.start(python, bench.folder / peer.name, model, MLP, settings, bench.server_core)
    with server:
        wait_for_port(server, port, _START_S)
        target = peer.request(rows)(port)
        until_answers(server, target)
        shares = not isinstance(target.request, bytes)
        yield lambda load: Contender(
            name=peer.name,
            server=server,
            target=target,
            callers=load.callers,
            connections=load.connections if shares else None,
            rows_per_call=ROWS,
            scores=peer.scores,
            expected=MLP.scores(rows),
        )


def until_answers(server: ServerProcess, target: Target, timeout_s: float = _START_S) -> None:
    """Return once a call goes well. Raises Unavailable (BENCH_SERVER_FAILED)."""
    give_up_s = time.monotonic() + timeout_s
    last = "nothing"
    while time.monotonic() < give_up_s:
        server.check()
        try:
            tally = closed_loop(target, callers=1, seconds=0.1)
        except (Closed, OSError) as error:
            last = str(error)
        else:
            if tally.taken_s:
                return
            last = f"statuses {dict(tally.statuses)}"
        time.sleep(0.1)
    raise server.failed(f"answered no call within {timeout_s:g} s ({last})")


# --- dynamic batches of single rows against static ones


def floor(bench: Bench, network: Network, folder: Path) -> tuple[float, float]:
    """Return rows per second, and CPU milliseconds per row, of the model alone: batches of 64 by one thread on the server's core, no server at all."""
    path = folder / f"floor-{network.name}.pt"
    network.save_torchscript(path)
    model: Any = torch.jit.load(str(path)).eval()  # type: ignore[no-untyped-call]
    rows = network.rows(BATCH)
    allowed = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    os.sched_setaffinity(0, {bench.server_core})
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(20):
                model(torch.from_numpy(rows)).numpy()
            began_s, used_s, batches = time.perf_counter(), time.process_time(), 0
            while (took_s := time.perf_counter() - began_s) < bench.plan.seconds:
                model(torch.from_numpy(rows)).numpy()
                batches += 1
            used_s = time.process_time() - used_s
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)
    bench.say(f"{network.name} without a server: {batches * BATCH / took_s:.0f} rows/s", bench.plan.seconds)
    return batches * BATCH / took_s, used_s / (batches * BATCH) * 1e3


def batching(bench: Bench, worker: OwnWorker, static: OwnWorker | None) -> dict[str, Any]:
    """Single rows of 1, 16 and 64 callers, against (a) the model alone, (b) a server that waits for exactly 64, (c) one caller with 64 rows a call."""
    found = {}
    for network in (MLP, HEAVY):
        alone_per_s, alone_cpu_ms = floor(bench, network, bench.folder)
        contenders = [
            own_contender(worker, network.name, network, 1, callers, name=f"dynamic, {callers} × 1 row") for callers in (1, 16, BATCH)
        ]
        contenders.append(own_contender(worker, network.name, network, BATCH, 1, name="1 × 64 rows"))
        if static is not None:
            contenders.append(own_contender(static, network.name, network, 1, BATCH, name="static, 64 × 1 row"))
        measured = alternate(contenders, bench.plan, bench.say)
        dynamic = measured[f"dynamic, {BATCH} × 1 row"]
        figures = {
            "model_alone_rows_per_s": alone_per_s,
            "model_alone_cpu_ms_per_row": alone_cpu_ms,
            "figures": as_figures(measured),
            "dynamic_64_to_model_alone": dynamic.rate / alone_per_s,
            "dynamic_64_to_model_alone_by_cpu": alone_cpu_ms / max(statistics.median(dynamic.server_cpu_ms), 1e-9),
            "dynamic_64_to_one_caller_of_64_rows": dynamic.rate / (measured["1 × 64 rows"].rate * BATCH),
        }
        if static is not None:
            figures["dynamic_64_to_static_64"] = ratios(dynamic, measured["static, 64 × 1 row"])["calls_per_s"]
        found[network.name] = figures
    return found


def batching_s(plan: Plan, *, static: bool) -> float:
    """Seconds that `batching` announces."""
    return 2 * ((4 + static) * plan.rounds * plan.round_s + plan.seconds)


# --- a lone caller


def lone_caller(bench: Bench, worker: OwnWorker, unbatched: Mapping[int, str]) -> dict[str, Any]:
    """One caller of a model that batches and of the same one that cannot: its batches hold no more than his rows. `unbatched`: its name by rows."""
    found = {}
    for rows, name in unbatched.items():
        with_batching = own_contender(worker, MLP.name, MLP, rows, 1, name="batching on")
        without = own_contender(worker, name, MLP, rows, 1, name="batching off")
        measured = alternate([with_batching, without], bench.plan, bench.say)
        found[f"{rows} {'row' if rows == 1 else 'rows'}"] = {
            "figures": as_figures(measured),
            "p50_on_to_off": measured["batching on"].p50_ms / measured["batching off"].p50_ms,
        }
    return found


def lone_caller_s(plan: Plan, cases: int) -> float:
    """Seconds that `lone_caller` announces."""
    return cases * 2 * plan.rounds * plan.round_s


# --- more than can be served


def overload(bench: Bench, worker: OwnWorker) -> dict[str, Any]:
    """Four times what is sustainable, begun whether or not answers come, each call with a budget of 200 ms: heavy batches, where the model is
    the limit and refusing is cheap, and single rows, where the wire is and a refusal costs as much as an answer."""
    cases = {f"{BATCH} rows": (HEAVY, BATCH, 8), "1 row": (MLP, 1, BATCH)}
    found = {name: _overload(bench, worker, *case) for name, case in cases.items()}
    return {name: figures for name, figures in found.items() if figures}


def _overload(bench: Bench, worker: OwnWorker, network: Network, rows: int, callers: int) -> dict[str, Any]:
    contender = own_contender(worker, network.name, network, rows, callers, name=f"sustainable, {rows} rows a call")
    sustainable = alternate([contender], bench.plan, bench.say)[contender.name]
    target = worker.target(network.name, network.rows(rows), timeout_ms=_OVERLOAD_BUDGET_MS)
    seconds = bench.plan.seconds * 2
    per_s = _OVERLOAD * sustainable.rate
    try:
        tally = open_loop(target, per_s=per_s, seconds=seconds)
    except (Closed, OSError) as error:
        bench.skip(f"overload, {rows} rows a call", f"the server broke off: {error}")
        return {}
    begun = int(per_s * seconds)
    # The generator waits for late answers, a caller does not; and what lies unread in the socket is late before the server knows of it.
    in_time = [taken_s for taken_s in tally.taken_s if taken_s * 1e3 <= _OVERLOAD_BUDGET_MS]
    bench.say(f"overload: {per_s:.0f} calls/s begun, {len(in_time) / seconds:.0f} answered in time", seconds)
    return {
        "sustainable_per_s": sustainable.rate,
        "begun_per_s": per_s,
        "budget_ms": _OVERLOAD_BUDGET_MS,
        "answered_share": len(in_time) / begun,
        "answered_per_s": len(in_time) / seconds,
        "answered_to_sustainable": len(in_time) / seconds / sustainable.rate,
        "answered_p50_ms": percentile_ms(in_time, 50),
        "answered_p99_ms": percentile_ms(in_time, 99),
        "answered_late_per_s": (len(tally.taken_s) - len(in_time)) / seconds,
        "resource_exhausted": tally.statuses[_RESOURCE_EXHAUSTED],
        "deadline_exceeded": tally.statuses[_DEADLINE_EXCEEDED],
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "never_answered": begun - sum(tally.statuses.values()),
    }


def overload_s(plan: Plan) -> float:
    """Seconds that `overload` announces."""
    return 2 * (plan.rounds * plan.round_s + plan.seconds * 2)


def started(stack: ExitStack, workers: Sequence[OwnWorker]) -> None:
    """Wait for our workers, which `stack` ends."""
    for worker in workers:
        stack.enter_context(worker)
    for worker in workers:
        worker.wait()
