"""`plait bench worker`: our model-worker against other Python model servers and against its own floors, one core each for server and load."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from model_worker.settings import ModelWorkerSettings
from plait.errors import InvalidArgument
from plait.settings import fields
from plait_bench import gpu, live_load, own, report, scenarios
from plait_bench.environments import cache_folder
from plait_bench.measure import FULL, QUICK, Plan
from plait_bench.models import HEAVY, MLP, publish
from plait_bench.own import OwnWorker
from plait_bench.peers import Peer, chosen
from plait_bench.processes import cores
from plait_bench.running import machine, progress, run_folder, write_json
from plait_bench.scenarios import Bench

STATIC_SETTING: Final = "BATCHING__STATIC_ROWS"  # measured where the worker knows it
_UNBATCHED: Final = {1: "mlp-unbatched-1", scenarios.ROWS: f"mlp-unbatched-{scenarios.ROWS}"}


def run(
    console: Console,
    json_path: Path | None = None,
    state_dir: Path | None = None,
    quick: bool = False,
    peers: str = "none",
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure, print tables, write the figures to `json_path`, return them.

    `quick`: under a minute, rougher. `peers`: names with commas between, or all. `device`: any but "cpu" is measured against eager PyTorch
    instead (`gpu`). Raises InvalidArgument (BENCH_PEER_UNKNOWN), Unavailable (BENCH_PEER_NOT_INSTALLED, BENCH_SERVER_FAILED), Internal
    (BENCH_ANSWER_WRONG), and what `gpu.run` does.
    """
    if device != "cpu":
        if peers != "none":
            raise InvalidArgument("on a GPU there are no peers, only eager PyTorch: leave --peers out", reason="BENCH_WITHOUT_PEERS")
        return gpu.run(console, json_path, state_dir, quick, device)
    wanted = chosen(peers)
    facts = measure(console, state_dir, QUICK if quick else FULL, wanted)
    facts["quick"] = quick
    for table in report.tables(facts):
        console.print(table)
    for line in report.remarks(facts):
        console.print(line)
    write_json(console, json_path, facts)
    return facts


def measure(console: Console, state_dir: Path | None, plan: Plan, peers: list[Peer]) -> dict[str, Any]:
    """Run every scenario; return the report."""
    began_s, load_before = time.monotonic(), os.getloadavg()
    server_core, load_core = cores()
    formats = {"torchscript": MLP.name}
    missing = own.onnx_missing()
    if not missing:
        formats["onnx"] = "mlp-onnx"
    static = any(name.endswith(STATIC_SETTING) for name, _ in fields(ModelWorkerSettings))
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(state_dir, "bench-worker"))
        say = stack.enter_context(progress(console, _total_s(plan, len(formats), peers, static=static)))
        bench = Bench(folder=folder, server_core=server_core, plan=plan, say=say)
        installed = {peer.name: peer.environment.install(cache_folder(), lambda what: say(what, 0.0)) for peer in peers}
        allowed = os.sched_getaffinity(0)
        stack.callback(os.sched_setaffinity, 0, allowed)
        os.sched_setaffinity(0, {load_core})
        facts: dict[str, Any] = {
            "schema": "plait-bench-worker/1",
            "machine": _machine(server_core, load_core),
            "plan": {"rounds": plan.rounds, "seconds": plan.seconds, "warm_up_s": plan.warm_up_s},
            "ceiling": scenarios.ceiling(bench),
        }
        facts |= _ours(bench, formats, missing, peers, installed, static=static)
        facts["skipped"] = bench.skipped
    facts["machine"]["load_average"] = {"before": load_before, "after": os.getloadavg()}
    facts["took_s"] = time.monotonic() - began_s
    return facts


def _ours(
    bench: Bench, formats: dict[str, str], onnx_missing: str, peers: list[Peer], installed: dict[str, Path], *, static: bool
) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    artifacts = bench.folder / "artifacts"
    models = [publish(MLP, MLP.name, artifacts / MLP.name), publish(HEAVY, HEAVY.name, artifacts / HEAVY.name)]
    batched = list(models)
    models += [publish(MLP, name, artifacts / name, max_rows=rows) for rows, name in _UNBATCHED.items()]
    if "onnx" in formats:
        models.append(publish(MLP, formats["onnx"], artifacts / formats["onnx"], format_="onnx"))
    else:
        bench.skip("ONNX", onnx_missing)
    with ExitStack() as stack:
        worker = OwnWorker(models, bench.folder / "worker", core=bench.server_core)
        workers = [worker]
        waits = None
        if static:
            settings = {STATIC_SETTING: str(scenarios.BATCH)}
            waits = OwnWorker(batched, bench.folder / "static", core=bench.server_core, settings=settings, name="plait static")
            workers.append(waits)
        else:
            bench.skip("a server that waits for exactly 64 rows", f"this model-worker has no setting {STATIC_SETTING}")
        bench.say("starting the model-worker", 0.0)
        scenarios.started(stack, workers)
        facts["model_infer"] = scenarios.model_infer(bench, worker, formats)
        facts["batching"] = scenarios.batching(bench, worker, waits)
        facts["lone_caller"] = scenarios.lone_caller(bench, worker, _UNBATCHED)
        facts["overload"] = scenarios.overload(bench, worker)
        facts["peers"] = {peer.name: scenarios.against_peer(bench, worker, formats, peer, installed[peer.name]) for peer in peers}
    facts["load_while_serving"] = live_load.load_while_serving(bench, formats)
    if not peers:
        bench.skip("peers", "none were asked for: --peers mosec,kserve,mlserver,litserve")
    return facts


def _total_s(plan: Plan, formats: int, peers: list[Peer], *, static: bool) -> float:
    return (
        scenarios.ceiling_s(plan)
        + scenarios.model_infer_s(plan, formats)
        + scenarios.batching_s(plan, static=static)
        + scenarios.lone_caller_s(plan, len(_UNBATCHED))
        + scenarios.overload_s(plan)
        + live_load.load_while_serving_s(plan, formats)
        + sum(scenarios.against_peer_s(plan, formats, peer) for peer in peers)
    )


def _machine(server_core: int, load_core: int) -> dict[str, Any]:
    facts = machine(server_core, load_core, ("numpy", "grpcio", "torch"))
    facts["versions"]["torch_cpu"] = torch.backends.cpu.get_cpu_capability()
    return facts


def main() -> None:
    """Run it without the CLI."""
    parser = argparse.ArgumentParser(prog="python -m plait_bench.worker", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", default="none")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    run(Console(), given.json, given.state, given.quick, given.peers, given.device)


if __name__ == "__main__":
    main()
