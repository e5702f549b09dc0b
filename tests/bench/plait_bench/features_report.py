"""The features benchmark's figures as tables for a person."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Table

Figures = Mapping[str, Any]


def tables(facts: Figures) -> Iterator[Table]:
    """Yield a table per question."""
    for shape, found in facts["reads"].items():
        yield _reads(shape, found)
    yield _replay(facts["replay"])


def _reads(shape: str, found: Figures) -> Table:
    rows, _, columns = shape.partition("x")
    peers = found["feast_to_ours"]
    table = _table(
        f"Reading {rows} entities × {columns} float32",
        ["", "p50 ms", "p99 ms", "× of raw MGET", "from", "to", *[f"{peer} takes" for peer in peers]],
    )
    for name, one in found["figures"].items():
        ratio = found["to_floor"].get(name)
        spread = [f"{ratio[key]:.2f}" for key in ("p50", "lowest", "highest")] if ratio else ["1", "", ""]
        times = [f"{ours[name]['p50']:.0f} ×" if name in ours else "" for ours in peers.values()]
        table.add_row(name, f"{one['p50_ms']:.3f}", f"{one['p99_ms']:.3f}", *spread, *times)
    return table


def _replay(replays: Figures) -> Table:
    table = _table(
        "A replay of 500 ids a read, second half; near cache of 64 MiB",
        ["Zipf", "hits", "of at most", "p50 ms", "p99 ms", "p50 without", "p99 without"],
    )
    for exponent, found in replays.items():
        without, near = found["figures"].values()
        table.add_row(
            f"{exponent}, {found['keys']} keys",
            f"{found['hit_ratio_second_half']:.1%}",
            f"{found['best_hit_ratio_second_half']:.1%}",
            *(f"{one[key]:.2f}" for one in (near, without) for key in ("p50_ms", "p99_ms")),
        )
    return table


def remarks(facts: Figures) -> Iterator[str]:
    """Yield what does not fit a table."""
    one = facts["ingestion"]
    yield (
        f"IngestFeatures: {one['rows_per_s']:.0f} rows/s of {one['columns']} columns by the clock (service and Redis on one core), "
        f"{one['rows_per_cpu_s']:.0f} per CPU second of the service; Redis {one['redis_cpu_us_per_row']:.1f} µs a row"
    )
    one = facts["visibility"]
    yield (
        f"written in one process → read in another that had the row in its near cache, beside 2000 rows/s: "
        f"p50 {one['p50_ms']:.2f} ms, p99 {one['p99_ms']:.2f} ms (acknowledged after {one['acknowledged_p50_ms']:.2f} ms)"
    )
    one = facts["newest_wins"]
    yield (
        f"{one['writes']} shuffled and repeated writes of {one['events']} events through two processes: {sum(one['wrong_rows'].values())} wrong rows, "
        f"{one['went_backwards']} of {one['rows_read_meanwhile']} rows read meanwhile were older than before ({one['rows_per_s']:.0f} rows/s)"
    )
    one = facts["event_visibility"]
    yield (
        f"event published in one process → counted in what another reads, beside 2000 events/s: p50 {one['p50_ms']:.2f} ms, "
        f"p99 {one['p99_ms']:.2f} ms (acknowledged after {one['acknowledged_p50_ms']:.2f} ms)"
    )
    one = facts["counted_once"]
    yield (
        f"{one['published']} shuffled and repeated events of {one['events']} into 3 aggregates, two processes sharing the work: "
        f"{sum(one['wrong_rows'].values())} wrong rows; {one['applied_per_s']:.0f} events/s by the clock, {one['applied_per_cpu_s']:.0f} per CPU "
        f"second of the services"
    )
    if facts["feast"] is None:
        yield "left out: Feast, which was not asked for: --peers feast"
    host = facts["machine"]
    before, after = host["load_average"]["before"][0], host["load_average"]["after"][0]
    versions = ", ".join(f"{name} {version}" for name, version in {**host["versions"], "feast": facts["feast"]}.items() if version)
    yield (
        f"{host['cpu']}, {host['cores']} cores (Redis and services on {host['server_core']}, callers on {host['load_core']}), load average "
        f"{before:.1f} before and {after:.1f} after, Python {host['python']}, {versions}"
    )


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table
