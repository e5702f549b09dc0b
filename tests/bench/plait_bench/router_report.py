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
    yield from _faults(facts["faults"])
    cache, changes = facts["cache"], facts["changes"]
    yield (
        f"the cache: a hit {cache['hit_p50_us']:.0f} us, a miss {cache['miss_overhead_us']:.0f} us more than without, {cache['zipf_hit_ratio']:.0%} hits of "
        f"{cache['zipf_users']} users (Zipf {cache['zipf_exponent']}); {cache['stampede_callers']} callers at once ask the model {cache['stampede_model_calls']} times"
    )
    yield (
        f"{changes['changes']} changes of a route on {changes['routers']} routers: {changes['answers_of_two_worlds']} of {changes['answers']} answers were of two worlds, "
        f"the last router followed after {changes['last_router_p50_ms']:.0f} ms, {changes['last_router_max_ms']:.0f} ms at most"
    )
    machine = facts["machine"]
    before, after = machine["load_average"]["before"][0], machine["load_average"]["after"][0]
    yield (
        f"{machine['cpu']}, {machine['cores']} cores (router on {machine['server_core']}, load and workers on {machine['load_core']}), "
        f"load average {before:.1f} before and {after:.1f} after, Python {machine['python']}, grpcio {machine['versions']['grpcio']}"
    )


def _faults(found: Figures) -> Iterator[str]:
    killed, slow = found["one_killed"], found["one_ten_times_slower"]
    yield (
        f"one of {found['workers']} workers killed under load: {killed['failed']:.0f} calls failed; p99 {killed['before']['p99_ms']:.0f} ms before, "
        f"{killed['first_second']['p99_ms']:.0f} ms in the second after, {killed['after']['p99_ms']:.0f} ms then"
    )
    yield f"one ten times slower: p99 {slow['plait']['p99_ms']:.0f} ms, by calls in flight alone {slow['least_in_flight']['p99_ms']:.0f} ms"


def _overload(found: Figures) -> Table:
    table = Table(title=f"Rank at loads relative to a worker's {found['capacity_per_s']:.0f} a second, {found['budget_ms']} ms each")
    for name in ("load", "in time ÷ capacity", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    for load, each in found["loads"].items():
        table.add_row(load, f"{each['goodput']:.2f}", f"{each['p50_ms']:.0f}", f"{each['p99_ms']:.0f}")
    return table
