"""`plait bench features`: reading features against a bare MGET and against Feast, on one Redis, in one run; and the write side.

What is compared takes turns, so that whatever else the machine does meets all alike. Every way's answer is first compared with what was
written: a fast wrong answer ends the run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop
from rich.console import Console

from plait.errors import InvalidArgument
from plait_bench import features_events, features_report, features_writes, peer_feast
from plait_bench.environments import cache_folder
from plait_bench.features_data import SHAPES, SMALL, Shape, entity_ids, zipf
from plait_bench.features_ways import Asked, Feast, OverGrpc, PackedFloor, RedisPyFloor, Way, check, in_process
from plait_bench.features_world import World, batches, stub_of, world
from plait_bench.measure import percentile_ms
from plait_bench.peer_feast import FeastProcess
from plait_bench.processes import cores
from plait_bench.running import Say, machine, progress, run_folder, write_json

FLOOR: Final = RedisPyFloor.name
CACHE_BYTES: Final = 64 * 1024 * 1024  # the service's default
FEAST: Final = "feast"
PLAIN: Final = "ours, in process"
NEAR: Final = "ours, in process, near cache"
GRPC: Final = "ours, gRPC"
GRPC_NEAR: Final = "ours, gRPC, near cache"
REPLAY_ROWS: Final = 500
EXPONENTS: Final = (1.0, 1.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured. `keys`: entities written at full speed and replayed; `replays`: reads of 500 ids; `events`: of the last check."""

    rounds: int
    seconds: float
    keys: int
    replays: int
    probes: int
    events: int
    shapes: tuple[Shape, ...] = SHAPES


FULL: Final = Scale(rounds=7, seconds=1.0, keys=1_000_000, replays=2000, probes=1000, events=1_000_000)
QUICK: Final = Scale(rounds=3, seconds=0.25, keys=100_000, replays=400, probes=100, events=100_000)


@dataclass(slots=True)
class Reads:
    """One way's rounds."""

    rounds: list[list[float]] = field(default_factory=list)  # seconds per read

    @property
    def p50s_ms(self) -> list[float]:
        """Median of each round."""
        return [percentile_ms(one, 50) for one in self.rounds]

    def figures(self) -> dict[str, Any]:
        """Return what goes into the report."""
        taken = [one for round_ in self.rounds for one in round_]
        return {
            "p50_ms": percentile_ms(taken, 50),
            "p99_ms": percentile_ms(taken, 99),
            "p50_ms_rounds": self.p50s_ms,
            "reads": len(taken),
        }


def run(
    console: Console, json_path: Path | None = None, state_dir: Path | None = None, quick: bool = False, peers: str = "none"
) -> dict[str, Any]:
    """Measure, print tables, write the figures to `json_path`, return them.

    `quick`: about a minute (two with Feast), rougher, a tenth of the keys and events. `peers`: "feast" or none. Raises InvalidArgument
    (BENCH_PEER_UNKNOWN), Unavailable (BENCH_PEER_NOT_INSTALLED, BENCH_SERVER_FAILED), Internal (BENCH_ANSWER_WRONG).
    """
    feast = with_feast(peers)
    facts = measure(console, state_dir, QUICK if quick else FULL, feast=feast)
    facts["quick"] = quick
    for table in features_report.tables(facts):
        console.print(table)
    for line in features_report.remarks(facts):
        console.print(line)
    write_json(console, json_path, facts)
    return facts


def with_feast(peers: str) -> bool:
    """Return whether Feast is among the peers. Raises InvalidArgument (BENCH_PEER_UNKNOWN)."""
    wanted = {name.strip() for name in peers.split(",")} - {"", "none"}
    if wanted - {FEAST, "all"}:
        raise InvalidArgument(f"the only peer of this benchmark is {FEAST}; got {peers!r}", reason="BENCH_PEER_UNKNOWN")
    return bool(wanted)


def measure(console: Console, state_dir: Path | None, scale: Scale, *, feast: bool) -> dict[str, Any]:
    """Run everything; return the report."""
    with run_folder(state_dir, "bench-features") as folder, progress(console, _total_s(scale, feast=feast)) as say:
        python = peer_feast.ENVIRONMENT.install(cache_folder(), lambda what: say(what, 0.0)) if feast else None
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_measure(folder, scale, python, say))


async def _measure(folder: Path, scale: Scale, feast: Path | None, say: Say) -> dict[str, Any]:
    began_s, load_before = time.monotonic(), os.getloadavg()
    server_core, load_core = cores()
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {load_core})
    facts: dict[str, Any] = {
        "schema": "plait-bench-features/1",
        "machine": machine(server_core, load_core, ("numpy", "grpcio", "redis", "hiredis", "protobuf")),
        "scale": {"rounds": scale.rounds, "seconds": scale.seconds},
    }
    try:
        say("starting Redis, Postgres and two feature-retrieval processes", 0.0)
        async with world(folder, server_core, scale.shapes) as w:
            facts["reads"] = await _reads(w, scale, feast, say)
            facts["ingestion"] = await features_writes.ingestion(w, scale.keys, say)
            facts["replay"] = {f"{exponent:g}": await _replay(w, scale, exponent, say) for exponent in EXPONENTS}
            facts["visibility"] = await features_writes.visibility(w, scale.probes, scale.keys, say)
            facts["newest_wins"] = await features_writes.newest_wins(w, scale.events, say)
            facts["event_visibility"] = await features_events.visibility(w, scale.probes, say)
            facts["counted_once"] = await features_events.counted_once(w, scale.events, say)
    finally:
        os.sched_setaffinity(0, allowed)
    facts["feast"] = None if feast is None else peer_feast.ENVIRONMENT.version(feast)
    facts["machine"]["load_average"] = {"before": list(load_before), "after": list(os.getloadavg())}
    facts["took_s"] = time.monotonic() - began_s
    return facts


async def _reads(w: World, scale: Scale, feast: Path | None, say: Say) -> dict[str, Any]:
    """Compare the ways at each shape."""
    found: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        process = None
        if feast is not None:
            process = stack.enter_context(FeastProcess(feast, w.folder / "feast", w.redis.address, w.password))
        for shape in scale.shapes:
            await asyncio.to_thread(_fill, w, shape, process)
            found[shape.name] = await _compare(w, shape, scale, process, say)
    return found


def _fill(w: World, shape: Shape, process: FeastProcess | None) -> None:
    """Write the same values our way and Feast's."""
    with w.plain.channel() as channel:
        requests = batches(shape.name, shape.ids, shape.values, int(time.time() * 1e6))
        for _ in stub_of(channel).IngestFeatures(iter(requests), metadata=w.plain.metadata):
            pass
    if process is not None:
        file = w.folder / "values.npy"
        np.save(file, shape.values)
        process.do("write", shape=shape.name, ids=shape.ids, values=str(file), event_time_s=time.time())


async def _compare(w: World, shape: Shape, scale: Scale, process: FeastProcess | None, say: Say) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        ways: list[Way] = [
            stack.enter_context(closing(RedisPyFloor(w, shape.name, shape.ids))),
            stack.enter_context(closing(PackedFloor(w, shape.name, shape.ids))),
            await stack.enter_async_context(in_process(w, shape.name, name=PLAIN, cache_bytes=0)),
            await stack.enter_async_context(in_process(w, shape.name, name=NEAR, cache_bytes=CACHE_BYTES)),
            stack.enter_context(closing(OverGrpc(GRPC, shape.name, w.plain))),
            stack.enter_context(closing(OverGrpc(GRPC_NEAR, shape.name, w.cached))),
        ]
        if process is not None:
            ways += [Feast(process, shape.name, w, tensor=tensor) for tensor in (False, True)]
        for way in ways:  # a near cache knows every entity from here on
            await way.read(shape.ids)
        questions = shape.questions()
        await check(ways, [shape.ids[n] for n in questions[0]], shape.values[questions[0]])
        measured = await alternate(ways, [[shape.ids[n] for n in one] for one in questions], scale, shape.name, say)
    return {
        "figures": {name: reads.figures() for name, reads in measured.items()},
        "to_floor": {name: ratio(reads, measured[FLOOR]) for name, reads in measured.items() if name != FLOOR},
        "feast_to_ours": {
            peer: {ours: ratio(measured[peer], measured[ours]) for ours in (PLAIN, NEAR, GRPC, GRPC_NEAR)}
            for peer in measured
            if peer.startswith("Feast")
        },
    }


async def alternate(ways: Sequence[Way], asked: Asked, scale: Scale, what: str, say: Say) -> dict[str, Reads]:
    """Give each way its turn in every round, forwards and backwards."""
    measured = {way.name: Reads() for way in ways}
    for round_ in range(scale.rounds):
        for way in ways if round_ % 2 == 0 else reversed(ways):
            taken = await way.round(asked, scale.seconds)
            measured[way.name].rounds.append(taken)
            say(f"{what}, {way.name}: {percentile_ms(taken, 50):.2f} ms", scale.seconds)
    return measured


def ratio(of: Reads, to: Reads) -> dict[str, float]:
    """Return how many times as long one takes as the other: the median over the rounds of their p50s' ratio, and its spread."""
    ratios = [a / b for a, b in zip(of.p50s_ms, to.p50s_ms, strict=True)]
    return {"p50": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


async def _replay(w: World, scale: Scale, exponent: float, say: Say) -> dict[str, Any]:
    """Read as a marketplace's calls would: few entities are in most of them. A near cache that starts empty, and none, in turn."""
    keys = zipf(scale.keys, exponent, scale.replays * REPLAY_ROWS, seed=int(exponent * 10))
    ids = entity_ids(scale.keys)
    half = scale.replays // 2
    async with AsyncExitStack() as stack:
        plain = await stack.enter_async_context(in_process(w, SMALL, name=PLAIN, cache_bytes=0))
        near = await stack.enter_async_context(in_process(w, SMALL, name=NEAR, cache_bytes=CACHE_BYTES))
        taken: dict[str, list[float]] = {PLAIN: [], NEAR: []}
        warm_up = 0
        for number, positions in enumerate(keys.reshape(scale.replays, REPLAY_ROWS)):
            if number == half:
                warm_up = near.store.keys
            asked = [ids[n] for n in positions.tolist()]
            for way in (plain, near):
                began = time.perf_counter()
                await way.read(asked)
                taken[way.name].append(time.perf_counter() - began)
                await asyncio.sleep(0)  # what a near cache does once its caller has the answer must not be the next way's
        missed = near.store.keys
    say(f"replay, Zipf {exponent:g}", sum(map(sum, taken.values())))
    lookups = half * REPLAY_ROWS
    warm = keys[-(scale.replays - half) * REPLAY_ROWS :]
    return {
        "keys": scale.keys,
        "lookups": len(keys),
        "hit_ratio": 1 - missed / len(keys),
        "hit_ratio_second_half": 1 - (missed - warm_up) / len(warm),
        # What a cache without bounds would reach: a key misses once.
        "best_hit_ratio_second_half": 1 - (len(np.unique(keys)) - len(np.unique(keys[:lookups]))) / len(warm),
        "figures": {name: _second_half(one, half) for name, one in taken.items()},
    }


def _second_half(taken: Sequence[float], half: int) -> dict[str, float]:
    return {"p50_ms": percentile_ms(taken[half:], 50), "p99_ms": percentile_ms(taken[half:], 99)}


def _total_s(scale: Scale, *, feast: bool) -> float:
    ways = 8 if feast else 6
    return len(scale.shapes) * ways * scale.rounds * scale.seconds + scale.keys / 40_000 + scale.replays * 0.006 + scale.events / 8_000


def main() -> None:
    """Run it without the CLI."""
    parser = argparse.ArgumentParser(prog="python -m plait_bench.features", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers", default="none")
    given = parser.parse_args()
    run(Console(), given.json, given.state, given.quick, given.peers)


if __name__ == "__main__":
    main()
