"""`plait bench worker --device cuda`: a model on one GPU as the model-worker runs it, and as eager PyTorch does, in turn in one run.

Two questions. What do a lane's stream, pinned memory and recorded graphs bring over `module(x.to(device)).cpu()`, called from as many threads?
And what is left of that once requests come over gRPC?
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from model_worker import artifacts, backends
from model_worker.backends import LoadOptions, cuda
from model_worker.placement import CPU
from plait.errors import FailedPrecondition, Internal, InvalidArgument
from plait.registry.records import Model
from plait_bench import scenarios
from plait_bench.measure import FULL, QUICK, Plan, alternate, as_figures, percentile_ms
from plait_bench.models import HEAVY, MLP, Network, Rows, publish
from plait_bench.own import OwnWorker
from plait_bench.processes import cores
from plait_bench.report import rates
from plait_bench.scenarios import Bench

BUCKETS: Final = (1, 16, 64, 128, 512, 1024, 4096)
ROWS: Final = (1, 64, 128, 1024, 4096)  # each of them fills a bucket, so that what is compared is the same batch
THREADS: Final = (1, 4)
SERVED: Final = ((1, 1), (64, 1), (1, 100), (16, 100))  # callers, rows a call
_NARROW: Final = 5e-2  # by how much an answer computed in half precision may differ from the CPU's
_CLOSE: Final = 1e-3
EAGER: Final = "eager PyTorch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to have rows scored in this process; `prepare` runs first in each thread that calls."""

    name: str
    prepare: Callable[[], None]
    call: Callable[[Rows], Rows]
    tolerance: float = _CLOSE


@dataclass(slots=True)
class Timed:
    """One candidate's rounds."""

    rows: int
    threads: int
    rows_per_s: list[float] = field(default_factory=list)
    taken_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return what goes into the report."""
        return {
            "rows_per_call": self.rows,
            "threads": self.threads,
            "rows_per_s": statistics.median(self.rows_per_s),
            "rows_per_s_rounds": self.rows_per_s,
            "p50_ms": percentile_ms(self.taken_s, 50),
            "p99_ms": percentile_ms(self.taken_s, 99),
            "calls": len(self.taken_s),
        }


def run(
    console: Console, json_path: Path | None = None, state_dir: Path | None = None, quick: bool = False, device: str = "cuda"
) -> dict[str, Any]:
    """Measure on "cuda" or "cuda:<n>", print tables, write the figures to `json_path`, return them.

    Raises InvalidArgument (BENCH_DEVICE_UNKNOWN), FailedPrecondition (DEVICE_UNAVAILABLE), Unavailable (BENCH_SERVER_FAILED), Internal
    (BENCH_ANSWER_WRONG).
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise InvalidArgument(f"{device[:40]!r} is no device to measure: cuda, cuda:<number> or cpu", reason="BENCH_DEVICE_UNKNOWN")
    try:
        cuda.check(device)
    except FailedPrecondition as error:
        raise FailedPrecondition(f"there is no CUDA device here: {error.message}", reason=error.reason) from error
    place = f"cuda:{int(number or 0)}"
    facts = measure(console, state_dir, QUICK if quick else FULL, place)
    facts["quick"] = quick
    for table in tables(facts):
        console.print(table)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        console.print(f"the same figures are in {json_path}")
    return facts


def measure(
    console: Console,
    state_dir: Path | None,
    plan: Plan,
    device: str,
    networks: Sequence[Network] = (MLP, HEAVY),
    rows: Sequence[int] = ROWS,
) -> dict[str, Any]:
    """Run both scenarios on `device`; "cpu" is for showing that they work."""
    began_s = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plait-bench-gpu-"))) if state_dir is None else state_dir
        models = [publish(network, network.name, folder / "artifacts" / network.name, buckets=BUCKETS) for network in networks]

        def say(what: str, _: float) -> None:
            console.print(f"{time.monotonic() - began_s:5.0f} s  {what}")

        facts: dict[str, Any] = {
            "schema": "plait-bench-gpu/1",
            "machine": _machine(device),
            "plan": {"rounds": plan.rounds, "seconds": plan.seconds, "warm_up_s": plan.warm_up_s},
            "model": {
                network.name: in_process(network, model, device, plan, say, rows) for network, model in zip(networks, models, strict=True)
            },
        }
        facts["served"] = served(models, networks, device, plan, say, folder)
    facts["took_s"] = time.monotonic() - began_s
    return facts


# --- the model alone


def in_process(
    network: Network, model: Model, device: str, plan: Plan, say: Callable[[str, float], None], rows: Sequence[int] = ROWS
) -> dict[str, Any]:
    """Return the figures of every candidate, by "<rows> rows, <threads> threads", with the ratio of rows per second to eager PyTorch."""
    found = {}
    with ExitStack() as stack:
        everybody = list(candidates(network, model, device, stack))
        for count, threads in itertools.product(rows, THREADS):
            measured = in_turn(everybody, network, count, threads, plan, say)
            figures = {name: timed.figures() for name, timed in measured.items()}
            for name, timed in measured.items():
                pairs = zip(timed.rows_per_s, measured[EAGER].rows_per_s, strict=True)
                figures[name]["to_eager"] = statistics.median(ours / eager for ours, eager in pairs)
            found[f"{count} rows, {threads} {'thread' if threads == 1 else 'threads'}"] = figures
    return found


def candidates(network: Network, model: Model, device: str, stack: ExitStack) -> Iterator[Candidate]:
    """Yield eager PyTorch and ours: plain, with graphs where there is a GPU, and in half precision. `stack` closes them."""
    artifact = artifacts.fetch(model.versions[0], None)

    def ours(name: str, buckets: tuple[int, ...] = (), autocast: Any = "") -> Candidate:
        loaded = backends.load(artifact, LoadOptions(device=device, instances=max(THREADS), buckets=buckets, autocast=autocast))
        stack.callback(loaded.close)

        def call(x: Rows) -> Rows:
            [scores] = loaded((x,))
            return scores

        return Candidate(name=name, prepare=loaded.prepare_thread, call=call, tolerance=_NARROW if autocast else _CLOSE)

    yield _eager(network, device, "")
    yield ours("plait")
    if device != CPU:
        yield ours("plait, graphs", BUCKETS)
        yield _eager(network, device, "float16")
        yield ours("plait, graphs, float16", BUCKETS, "float16")


def _eager(network: Network, device: str, autocast: str) -> Candidate:
    module = Network(network.name, network.widths).module.to(device)  # another copy: `network`'s own stays on the CPU
    kind = torch.device(device).type

    def call(x: Rows) -> Rows:
        with torch.inference_mode(), torch.autocast(kind, dtype=torch.float16, enabled=bool(autocast)):
            scores: Rows = module(torch.from_numpy(x).to(device)).float().cpu().numpy()
        return scores

    name = f"{EAGER}, {autocast}" if autocast else EAGER
    return Candidate(name=name, prepare=_one_thread, call=call, tolerance=_NARROW if autocast else _CLOSE)


def _one_thread() -> None:
    torch.set_num_threads(1)


def in_turn(
    everybody: Sequence[Candidate], network: Network, rows: int, threads: int, plan: Plan, say: Callable[[str, float], None]
) -> dict[str, Timed]:
    """Measure all of them in turn, forwards and backwards. Raises Internal (BENCH_ANSWER_WRONG) where one's scores are not the model's."""
    x = network.rows(rows)
    expected = network.scores(x)
    measured = {candidate.name: Timed(rows, threads) for candidate in everybody}
    for round_ in range(plan.rounds):
        for candidate in everybody if round_ % 2 == 0 else reversed(everybody):
            if not round_:
                _check(candidate, x, expected)
            taken_s = closed_loop(candidate, x, threads, plan)
            timed = measured[candidate.name]
            timed.rows_per_s.append(rows * len(taken_s) / plan.seconds)
            timed.taken_s += taken_s
    for name, timed in measured.items():
        say(f"{name}, {rows} rows, {threads} threads: {statistics.median(timed.rows_per_s):.0f} rows/s", 0.0)
    return measured


def _check(candidate: Candidate, x: Rows, expected: Rows) -> None:
    for _ in range(max(THREADS)):  # each of its lanes, which also records what there is to record
        found = candidate.call(x)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=candidate.tolerance, atol=candidate.tolerance):
            raise Internal(f"{candidate.name} answers other scores than the model", reason="BENCH_ANSWER_WRONG")


def closed_loop(candidate: Candidate, x: Rows, threads: int, plan: Plan) -> list[float]:
    """Return the seconds of every call that ended within `plan.seconds` after the warm-up, of as many callers that call without a pause."""
    ready = threading.Barrier(threads)
    taken: list[list[float]] = [[] for _ in range(threads)]
    errors: list[Exception] = []

    def caller(own: list[float]) -> None:
        try:
            candidate.prepare()
            ready.wait()
            begin_s = time.perf_counter() + plan.warm_up_s
            end_s, before_s = begin_s + plan.seconds, time.perf_counter()
            while before_s < end_s:
                candidate.call(x)
                after_s = time.perf_counter()
                if begin_s <= before_s and after_s <= end_s:
                    own.append(after_s - before_s)
                before_s = after_s
        except Exception as error:
            errors.append(error)
            ready.abort()

    callers = [threading.Thread(target=caller, args=(own,)) for own in taken]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    if errors:
        raise errors[0]
    return [s for own in taken for s in own]


# --- over gRPC


def served(
    models: Sequence[Model], networks: Sequence[Network], device: str, plan: Plan, say: Callable[[str, float], None], folder: Path
) -> dict[str, Any]:
    """Return the figures of a worker on the device for every network and load, one core for the worker's process and one for the load."""
    server_core, load_core = cores()
    bench = Bench(folder=folder, server_core=server_core, plan=plan, say=say)
    worker = OwnWorker(models, folder / "worker", core=server_core, settings={"MODELS__DEVICE": device})
    allowed = os.sched_getaffinity(0)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, allowed)
        scenarios.started(stack, [worker])
        os.sched_setaffinity(0, {load_core})
        for network in networks:
            contenders = [
                scenarios.own_contender(worker, network.name, network, rows, callers, callers, f"{rows} rows, {callers} callers")
                for callers, rows in SERVED
            ]
            found[network.name] = as_figures(alternate(contenders, bench.plan, say))
    return found


# --- for a person


def tables(facts: Mapping[str, Any]) -> Iterable[Table]:
    """Yield a table per network and load, then one per network for what is left over gRPC."""
    for network, loads in facts["model"].items():
        for load, figures in loads.items():
            table = Table(
                "",
                "rows/s",
                "to eager",
                "p50 ms",
                "p99 ms",
                title=f"{network} on {facts['machine']['device']}, {load}",
                title_justify="left",
            )
            for name, one in figures.items():
                table.add_row(name, f"{one['rows_per_s']:.0f}", f"{one['to_eager']:.2f} ×", f"{one['p50_ms']:.3f}", f"{one['p99_ms']:.3f}")
            yield table
    for network, figures in facts["served"].items():
        yield rates(f"{network} over gRPC", figures)


def _machine(device: str) -> dict[str, Any]:
    facts = {"device": device, "cores": os.cpu_count(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if device != CPU:
        memory = backends.device_memory(device)
        facts |= {"name": torch.cuda.get_device_name(device), "memory_bytes": memory[1] if memory else None}
    return facts
