"""`plait bench worker`: our model-worker against other Python model servers and against its own floors, one core each for server and load."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from model_worker.settings import ModelWorkerSettings
from plait.errors import InvalidArgument
from plait.settings import fields
from plait_bench import gpu, live_load, own, report, scenarios
from plait_bench.measure import FULL, QUICK, Plan
from plait_bench.models import HEAVY, MLP, publish
from plait_bench.own import OwnWorker
from plait_bench.peers import Peer, chosen
from plait_bench.processes import cores
from plait_bench.scenarios import Bench

STATIC_SETTING: Final = "BATCHING__STATIC_ROWS"  # measured where the worker knows it
_UNBATCHED: Final = {1: "mlp-unbatched-1", scenarios.ROWS: f"mlp-unbatched-{scenarios.ROWS}"}
Say = Callable[[str, float], None]


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
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        console.print(f"the same figures are in {json_path}")
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
        folder = stack.enter_context(_folder(state_dir))
        say = stack.enter_context(_progress(console, _total_s(plan, len(formats), peers, static=static)))
        bench = Bench(folder=folder, server_core=server_core, plan=plan, say=say)
        installed = {peer.name: peer.install(_cache(), lambda what: say(what, 0.0)) for peer in peers}
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


def _cache() -> Path:
    """Where peers are installed: $PLAIT_CACHE, or plait's folder in the user's cache."""
    given = os.environ.get("PLAIT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plait"


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Artifacts, logs and settings of the servers: kept where a folder was given, fresh in either case."""
    path = Path(tempfile.mkdtemp(prefix="plait-bench-")) if given is None else given.absolute() / "bench-worker"
    if given is not None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    try:
        yield path
    finally:
        if given is None:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _progress(console: Console, total_s: float) -> Iterator[Say]:
    """A bar in seconds. It is drawn between the rounds only: a thread that draws would run beside the load generator."""
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=total_s)

        def say(what: str, seconds: float) -> None:
            bar.update(task, description=what, advance=seconds, refresh=True)
            if not console.is_terminal:
                console.print(f"{bar.tasks[0].completed:5.0f} of {total_s:.0f} s  {what}")

        yield say


def _machine(server_core: int, load_core: int) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "grpcio", "torch")}
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "server_core": server_core,
        "load_core": load_core,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {**versions, "torch_cpu": torch.backends.cpu.get_cpu_capability()},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


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
