"""The figures as tables for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Figures = Mapping[str, Any]


def tables(facts: Figures) -> Iterator[Table]:
    """Yield a table per question."""
    yield rates("The load generator's own limit: servers that only read and answer", facts["ceiling"])
    for load, figures in facts["model_infer"].items():
        yield rates(f"ModelInfer 100 × 80 float32, {load}", figures)
    yield from _peers(facts["peers"])
    for network, found in facts["batching"].items():
        yield rates(f"Single rows, {network}: the model alone does {found['model_alone_rows_per_s']:.0f} rows/s", found["figures"])
    for rows, found in facts["lone_caller"].items():
        yield rates(f"A lone caller, {rows}: p50 is {found['p50_on_to_off']:.2f} × of batching off", found["figures"])
    for format_, found in facts["load_while_serving"]["formats"].items():
        yield rates(f"ModelInfer 100 × 80 float32, while a large {format_} is loaded ({found['load_s']:.1f} s a load)", found["figures"])


def _peers(peers: Figures) -> Iterator[Table]:
    for name, peer in peers.items():
        for load, found in peer["loads"].items():
            title = f"{name} {peer['version']} ({peer['protocol']}; {found['setting']}), {load}"
            yield rates(title, found["figures"], found["ours_to_peer"])


def rates(title: str, figures: Figures, ours_to_peer: Figures | None = None) -> Table:
    """Return a table of one row per contender."""
    latency = ["p50 ms", "p99 ms", "CPU ms"]
    table = _table(title, ["", "calls/s", *latency, "rate", "CPU"] if ours_to_peer else ["", "calls/s", "from", "to", *latency])
    for name, one in figures.items():
        rounds = one["calls_per_s_rounds"]
        cells = [name, f"{one['calls_per_s']:.0f}"]
        cells += [] if ours_to_peer else [f"{min(rounds):.0f}", f"{max(rounds):.0f}"]
        cells += [f"{one['p50_ms']:.2f}", f"{one['p99_ms']:.2f}", f"{one['server_cpu_ms_per_call']:.3f}"]
        if ours_to_peer:
            ratio = ours_to_peer.get(name)
            cells += [f"{ratio['calls_per_s']:.2f} ×", f"{ratio['server_cpu_per_call']:.2f} ×"] if ratio else ["", ""]
        table.add_row(*cells)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def remarks(facts: Figures) -> Iterator[str]:
    """Yield what does not fit a table."""
    for network, found in facts["batching"].items():
        alone, by_cpu = found["dynamic_64_to_model_alone"], found["dynamic_64_to_model_alone_by_cpu"]
        parts = [f"{alone:.3f} × of the model alone ({by_cpu:.3f} × by CPU time)"]
        parts.append(f"{found['dynamic_64_to_one_caller_of_64_rows']:.2f} × of one caller with 64 rows a call")
        if "dynamic_64_to_static_64" in found:
            parts.append(f"{found['dynamic_64_to_static_64']:.2f} × of the same server waiting for exactly 64")
        yield f"{network}: 64 callers of one row get {', '.join(parts)}"
    for case, over in facts["overload"].items():
        yield (
            f"overload, {case} a call: of {over['begun_per_s']:.0f} calls/s ({over['begun_per_s'] / over['sustainable_per_s']:.0f} × what is sustainable) "
            f"{over['answered_share']:.0%} were answered in time ({over['answered_to_sustainable']:.2f} × of the sustainable rate), p99 {over['answered_p99_ms']:.0f} ms "
            f"of a budget of {over['budget_ms']} ms; RESOURCE_EXHAUSTED {over['resource_exhausted']}, DEADLINE_EXCEEDED {over['deadline_exceeded']}"
        )
    for skipped in facts["skipped"]:
        yield f"left out: {skipped['what']}: {skipped['reason']}"
    machine = facts["machine"]
    before, after = machine["load_average"]["before"][0], machine["load_average"]["after"][0]
    yield (
        f"{machine['cpu']}, {machine['cores']} cores (server on {machine['server_core']}, load on {machine['load_core']}), load average {before:.1f} before and "
        f"{after:.1f} after, Python {machine['python']}, torch {machine['versions']['torch']}, grpcio {machine['versions']['grpcio']}"
    )
