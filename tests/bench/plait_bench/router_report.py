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


def remarks(facts: Figures) -> Iterator[str]:
    """Yield what does not fit a table."""
    for size, found in facts["pass_through"].items():
        own, other = (found["per_core"][name] for name in (ROUTER, PROXY))
        added = ", ".join(
            f"{found['added_p50_ms'][name]:.2f} ms p50 and {found['added_p99_ms'][name]:.2f} ms p99 {name}" for name in (ROUTER, PROXY)
        )
        yield f"{size}: {own:.0f} calls per second of the router's CPU, {found['per_core_to_proxy']:.2f} × of the proxy's {other:.0f}; added to a lone call: {added}"
    yield "to know who calls by " + ", ".join(f"{name}: {took_us:.1f} us" for name, took_us in facts["identity_us"].items())
    machine = facts["machine"]
    before, after = machine["load_average"]["before"][0], machine["load_average"]["after"][0]
    yield (
        f"{machine['cpu']}, {machine['cores']} cores (router on {machine['server_core']}, load and workers on {machine['load_core']}), "
        f"load average {before:.1f} before and {after:.1f} after, Python {machine['python']}, grpcio {machine['versions']['grpcio']}"
    )
