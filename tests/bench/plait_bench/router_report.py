"""The router's figures as tables for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from plait_bench.report import rates
from plait_bench.router_pass_through import PROXY, ROUTER

Figures = Mapping[str, Any]


def tables(facts: Figures) -> Iterator[Table]:
    """Yield a table per question."""
    for size, found in facts["pass_through"].items():
        yield rates(f"ModelInfer of {size}, 32 callers on 4 connections", found["busy"])
        yield rates(f"ModelInfer of {size}, one caller", found["lone"])
    yield _overload(facts["overload"])


def remarks(facts: Figures) -> Iterator[str]:
    """Yield what does not fit a table."""
    for size, found in facts["pass_through"].items():
        own, other = (found["per_core"][name] for name in (ROUTER, PROXY))
        added = ", ".join(
            f"{found['added_p50_ms'][name]:.2f} ms p50 and {found['added_p99_ms'][name]:.2f} ms p99 {name}" for name in (ROUTER, PROXY)
        )
        yield f"{size}: {own:.0f} calls per second of the router's CPU, {found['per_core_to_proxy']:.2f} × of the proxy's {other:.0f}; added to a lone call: {added}"
    overload = facts["overload"]
    yield (
        f"at 4 times the capacity {overload['goodput_at_4_over_peak']:.2f} of the most answers in time, "
        f"and {overload['p99_at_4_over_p99_at_0.7']:.2f} times the p99 of 0.7 times the capacity for those let in"
    )
    yield "to know who calls by " + ", ".join(f"{name}: {took_us:.1f} us" for name, took_us in facts["identity_us"].items())
    machine = facts["machine"]
    before, after = machine["load_average"]["before"][0], machine["load_average"]["after"][0]
    yield (
        f"{machine['cpu']}, {machine['cores']} cores (router on {machine['server_core']}, load and workers on {machine['load_core']}), "
        f"load average {before:.1f} before and {after:.1f} after, Python {machine['python']}, grpcio {machine['versions']['grpcio']}"
    )


def _overload(found: Figures) -> Table:
    table = Table(title=f"Rank at loads relative to a worker's {found['capacity_per_s']:.0f} a second, {found['budget_ms']} ms each")
    for name in ("load", "in time ÷ capacity", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    for load, each in found["loads"].items():
        table.add_row(load, f"{each['goodput']:.2f}", f"{each['p50_ms']:.0f}", f"{each['p99_ms']:.0f}")
    return table
