"""`plait bench router`: what the router costs, measured against the plainest thing that could stand in its place."""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from plait.errors import InvalidArgument
from plait_bench import router_cache, router_changes, router_faults, router_identity, router_overload, router_pass_through, router_report
from plait_bench.measure import FULL, QUICK, Plan
from plait_bench.processes import cores
from plait_bench.running import machine, progress, run_folder, write_json

_FAULTS_S, _CACHE_S, _CHANGES_S = 12.0, 1.0, 10.0  # about, where they are quick


def run(
    console: Console,
    json_path: Path | None = None,
    state_dir: Path | None = None,
    quick: bool = False,
    peers: str = "none",
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure, print tables, write the figures to `json_path`, return them.

    `quick`: under a minute, rougher. Raises InvalidArgument (BENCH_WITHOUT_PEERS, BENCH_WITHOUT_DEVICE), Unavailable (BENCH_SERVER_FAILED).
    """
    if peers != "none":
        raise InvalidArgument("the router is measured against a plain proxy, always: leave --peers out", reason="BENCH_WITHOUT_PEERS")
    if device != "cpu":
        raise InvalidArgument("the router uses no accelerator: leave --device out", reason="BENCH_WITHOUT_DEVICE")
    facts = measure(console, state_dir, QUICK if quick else FULL)
    facts["quick"] = quick
    for table in router_report.tables(facts):
        console.print(table)
    for line in router_report.remarks(facts):
        console.print(line)
    write_json(console, json_path, facts)
    return facts


def measure(console: Console, state_dir: Path | None, plan: Plan) -> dict[str, Any]:
    """Run every scenario; return the report."""
    began_s, load_before = time.monotonic(), os.getloadavg()
    server_core, load_core = cores()
    total_s = router_pass_through.seconds(plan) + router_overload.seconds(plan) + _FAULTS_S + _CACHE_S + _CHANGES_S
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(state_dir, "bench-router"))
        say = stack.enter_context(progress(console, total_s))
        allowed = os.sched_getaffinity(0)
        stack.callback(os.sched_setaffinity, 0, allowed)
        os.sched_setaffinity(0, {load_core})
        facts: dict[str, Any] = {
            "schema": "plait-bench-router/1",
            "machine": machine(server_core, load_core, ("numpy", "grpcio", "protobuf")),
            "plan": {"rounds": plan.rounds, "seconds": plan.seconds, "warm_up_s": plan.warm_up_s},
            "pass_through": router_pass_through.measure(plan, folder, say),
            "overload": router_overload.measure(plan, folder, say),
            "identity_us": router_identity.measure(20 * plan.rounds),
        }
        small = plan.seconds < FULL.seconds
        say("workers killed and slow", 0.0)
        facts["faults"] = router_faults.measure(plan)
        say("a cache's hits and misses", _FAULTS_S)
        facts["cache"] = router_cache.measure(router_cache.QUICK if small else router_cache.FULL)
        say("changes of a route", _CACHE_S)
        facts["changes"] = router_changes.measure(router_changes.QUICK if small else router_changes.FULL)
    facts["machine"]["load_average"] = {"before": [*load_before], "after": [*os.getloadavg()]}
    facts["took_s"] = time.monotonic() - began_s
    return facts


def main() -> None:
    """Run it without the CLI."""
    parser = argparse.ArgumentParser(prog="python -m plait_bench.router", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    run(Console(), given.json, given.state, given.quick)


if __name__ == "__main__":
    main()
