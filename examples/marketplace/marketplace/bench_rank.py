"""`plait bench rank`: the mesh against the floor, side by side in one run on one machine."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from marketplace import manifests
from marketplace.demo import Prepared, candidates_of, percentile_ms, prepared, write_json
from marketplace.floor import Floor
from marketplace.load import Generator, Spec
from plait.client import SyncRankingClient
from plait.errors import Unavailable

SIZES: Final = (1, 100, 500, 1000)
CALLERS: Final = 16
_QUESTIONS: Final = 64


def run(console: Console, json_path: Path | None = None, state_dir: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Measure, print a table, write the figures to `json_path`, return them. `quick`: a tenth of the calls."""
    return asyncio.run(_run(console, json_path, state_dir, quick))


async def _run(console: Console, json_path: Path | None, state_dir: Path | None, quick: bool) -> dict[str, Any]:
    rounds, seconds = (3, 0.5) if quick else (12, 4.0)
    async with prepared(console, state_dir) as world:
        results = []
        for size in SIZES:
            with console.status(f"{size} candidates: alone, then {CALLERS} callers"):
                asked = _questions(world, size)
                alone = await asyncio.to_thread(_alone, world, asked, rounds)
                loaded = await _loaded(world, asked, seconds)
            results.append({"candidates": size, "alone": alone, "loaded": loaded})
        facts: dict[str, Any] = {"machine": _machine(), "callers": CALLERS, "quick": quick, "results": results}
    for table in _tables(results):
        console.print(table)
    machine = facts["machine"]
    console.print(
        f"{machine['cores']} cores, load average {machine['load_average_1m']:.1f}, Python {machine['python']}, torch {machine['torch']}"
    )
    write_json(console, json_path, facts)
    return facts


def _questions(world: Prepared, size: int) -> list[tuple[str, list[str]]]:
    return [(world.data.user_ids[user], candidates_of(world.data, user, size, seed=size)) for user in range(_QUESTIONS)]


def _alone(world: Prepared, asked: list[tuple[str, list[str]]], rounds: int) -> dict[str, float]:
    """One caller: short rounds of either way in turn, so that noise meets both."""
    floor = Floor(world.endpoints.redis_url, world.snapshot, world.artifact / "model.pt")
    with SyncRankingClient(world.endpoints.router, api_key=world.endpoints.api_key) as client:

        def through_mesh(user: str, items: list[str]) -> None:
            if (tier := client.rank(manifests.ROUTE, user, items, timeout_s=10).tier) != "full":
                raise Unavailable(f"tier {tier} answered in place of the model: measure where there is less to do", reason="BENCH_DEGRADED")

        ways: dict[str, Callable[[str, list[str]], object]] = {"mesh": through_mesh, "floor": floor.rank}
        taken: dict[str, list[float]] = {"mesh": [], "floor": []}
        for round_ in range(rounds + 1):
            for name, way in ways.items():
                for user, items in asked[:32]:
                    began = time.perf_counter()
                    way(user, items)
                    if round_:  # the first round is warm-up
                        taken[name].append(time.perf_counter() - began)
    floor.close()
    mesh, base = taken["mesh"], taken["floor"]
    return {
        "mesh_p50_ms": percentile_ms(mesh, 50),
        "mesh_p99_ms": percentile_ms(mesh, 99),
        "floor_p50_ms": percentile_ms(base, 50),
        "floor_p99_ms": percentile_ms(base, 99),
        "p50_ratio": percentile_ms(mesh, 50) / percentile_ms(base, 50),
        "calls": len(mesh),
    }


async def _loaded(world: Prepared, asked: list[tuple[str, list[str]]], seconds: float) -> dict[str, float]:
    """16 callers of the mesh; and what the floor does with both cores to itself: one loop on each."""
    endpoints = world.endpoints
    mesh_spec = Spec(way="mesh", seconds=seconds, questions=asked, callers=CALLERS, router=endpoints.router, api_key=endpoints.api_key)
    floor_spec = Spec(way="floor", seconds=seconds, questions=asked, redis_url=endpoints.redis_url, model=str(world.artifact / "model.pt"))
    mesh = await (await Generator.start(mesh_spec)).measure()
    loops = [await Generator.start(floor_spec) for _ in range(os.cpu_count() or 1)]
    floor = [taken for loop in await asyncio.gather(*(loop.measure() for loop in loops)) for taken in loop]
    return {
        "mesh_per_s": len(mesh) / seconds,
        "mesh_p50_ms": percentile_ms(mesh, 50),
        "mesh_p99_ms": percentile_ms(mesh, 99),
        "floor_per_s": len(floor) / seconds,
        "throughput_ratio": len(mesh) / max(len(floor), 1),
        "calls": len(mesh),
    }


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "load_average_1m": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _tables(results: list[dict[str, Any]]) -> list[Table]:
    alone = _table("one caller", ("candidates", "mesh p50", "p99", "floor p50", "p99", "p50 ratio"))
    loaded = _table(f"{CALLERS} callers; the floor: one loop per core", ("candidates", "mesh/s", "p50", "p99", "floor/s", "ratio"))
    for result in results:
        size, one, many = str(result["candidates"]), result["alone"], result["loaded"]
        times = (f"{one[key]:.2f} ms" for key in ("mesh_p50_ms", "mesh_p99_ms", "floor_p50_ms", "floor_p99_ms"))
        alone.add_row(size, *times, f"{one['p50_ratio']:.2f} ×")
        loaded.add_row(
            size,
            f"{many['mesh_per_s']:.0f}",
            f"{many['mesh_p50_ms']:.1f} ms",
            f"{many['mesh_p99_ms']:.1f} ms",
            f"{many['floor_per_s']:.0f}",
            f"{many['throughput_ratio']:.2f} ×",
        )
    return [alone, loaded]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=f"Rank: {title}", title_justify="left", box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="right")
    return table
