"""What a change of a route does to answers under way, and what each policy of a route costs a request.

Four routers on one registry answer all the time while the alias behind their route moves to and fro. Each answer must be of one world: the
version that its revision named. How long after the commit the last router answers by it is measured. The policies are measured in one process,
from the question to the road, with a road that answers at once.

    python -m plait_bench.router_changes [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvloop

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.client import RankingClient, Tensor
from plait.local.postgres import EmbeddedPostgres
from plait.registry.manifests import Manifest
from plait.registry.policies import Condition, ExperimentArm, Rule
from plait.registry.records import (
    Entity,
    Experiment,
    Feature,
    FeatureSet,
    FeatureView,
    Model,
    ModelInput,
    ModelVersion,
    Route,
    Signature,
    Snapshot,
    Tenant,
    TensorSpec,
    Variant,
)
from plait.registry.resources import records_of
from plait.registry.store import Store
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline
from plait_bench.own_router import Helper, OwnRouter
from plait_bench.processes import cores
from router.asking import Asking
from router.route_table import compile_table
from router.stopwatch import Stopwatch

ROUTERS: Final = 4
_ROWS: Final = 50
_ANSWER_BYTES: Final = 4 * _ROWS
_BEHIND_S: Final = 30.0  # longest wait for a router to hear of a change


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How many changes are made, and how many questions are asked in a round of each policy."""

    changes: int
    calls: int
    rounds: int


FULL: Final = Scale(changes=50, calls=5000, rounds=7)
QUICK: Final = Scale(changes=5, calls=500, rounds=3)


def measure(scale: Scale) -> dict[str, Any]:
    """Return the figures; costs in microseconds, times after the commit in milliseconds."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, tempfile.TemporaryDirectory() as folder:
        changes = runner.run(_changes(scale, Path(folder)))
    return {**changes, **_policies(scale)}


@dataclass(slots=True)
class _Seen:
    """What the askers saw: the newest revision of each router, and every (revision, version) there was."""

    newest: list[int] = field(default_factory=lambda: [0] * ROUTERS)
    answers: Counter[tuple[int, str]] = field(default_factory=Counter)
    heard: asyncio.Event = field(default_factory=asyncio.Event)


async def _changes(scale: Scale, folder: Path) -> dict[str, Any]:
    server_core, load_core = cores()
    async with AsyncExitStack() as stack:
        postgres = await stack.enter_async_context(EmbeddedPostgres())
        dsn = postgres.create_database("bench")
        store = await stack.enter_async_context(await Store.open(dsn))
        await store.migrate()
        world = registry()
        first = await store.apply([Manifest(record=record) for record in records_of(world)], actor="bench")
        _, secret = await store.create_key("default", actor="bench")
        worker = stack.enter_context(Helper("worker", str(_ANSWER_BYTES), core=load_core, folder=folder, name="worker"))
        worker.wait()
        routers = [
            stack.enter_context(
                OwnRouter(world, worker.address, folder, core=server_core, settings={"REGISTRY__DSN": dsn}, name=f"router-{n}")
            )
            for n in range(ROUTERS)
        ]
        for router in routers:
            router.wait()
        seen = _Seen()
        async with asyncio.TaskGroup() as group:
            askers = [group.create_task(_ask(seen, n, router.address, secret)) for n, router in enumerate(routers)]
            expected = {first[-1].revision: "1"}
            behind_ms = await _move(scale, store, world, seen, expected)
            for asker in askers:
                asker.cancel()
    wrong = sum(count for (revision, version), count in seen.answers.items() if expected.get(revision, version) != version)
    return {
        "routers": ROUTERS,
        "changes": len(behind_ms),
        "answers": seen.answers.total(),
        "answers_of_two_worlds": wrong,
        "last_router_p50_ms": statistics.median(behind_ms),
        "last_router_max_ms": max(behind_ms),
    }


async def _move(scale: Scale, store: Store, world: Snapshot, seen: _Seen, expected: dict[int, str]) -> list[float]:
    """Move the alias to and fro; return how long after each commit the last router answered by it."""
    behind_ms = []
    for number in range(scale.changes):
        version = "12"[(number + 1) % 2]
        model = replace(world.models["mlp"], aliases={"champion": version})
        [change] = await store.apply([Manifest(record=model)], actor="bench")
        committed_s = time.perf_counter()
        expected[change.revision] = version
        async with asyncio.timeout(_BEHIND_S):
            while min(seen.newest) < change.revision:
                seen.heard.clear()
                await seen.heard.wait()
        behind_ms.append((time.perf_counter() - committed_s) * 1e3)
    return behind_ms


async def _ask(seen: _Seen, number: int, address: str, key: str) -> None:
    tensors = [Tensor.of("user", np.zeros((1, 1), np.float32)), Tensor.of("item", np.zeros((_ROWS, 1), np.float32))]
    items = [f"i{n}" for n in range(_ROWS)]
    async with RankingClient(address, api_key=key) as client:
        while True:
            answer = await client.rank("home", "u", items, inline_features=tensors, top_k=1)
            seen.answers[answer.revision, answer.version] += 1
            if answer.revision > seen.newest[number]:
                seen.newest[number] = answer.revision
                seen.heard.set()


def _policies(scale: Scale) -> dict[str, float]:
    """Return what it takes to make a question, by what its route says; in turns, the median of the rounds' means."""
    two = (Variant(name="main", model="mlp", use="1"), Variant(name="other", model="mlp", use="2"))
    other = {"labels": {"country": ("xx",)}}
    rules = tuple(Rule(name=f"r{n}", variant="other", when=Condition(**other)) for n in range(10))  # type: ignore[arg-type]
    experiment = Experiment(name="x", route="home", arms=tuple(ExperimentArm(variant=v.name) for v in two))
    worlds = {
        "plain": _with(),
        "two_weights": _with(variants=two),
        "ten_rules": _with(variants=two, rules=rules),
        "experiment": replace(_with(variants=two), experiments={"x": experiment}),
        "sticky_by_label": _with(variants=two, sticky="label:country"),
    }
    rounds: dict[str, list[float]] = {name: [] for name in worlds}
    for _ in range(scale.rounds):
        for name, world in worlds.items():
            rounds[name].append(_question_us(world, scale.calls))
    return {f"question_{name}_us": statistics.median(taken) for name, taken in rounds.items()}


def _question_us(world: Snapshot, calls: int) -> float:
    table, asking = compile_table(world), Asking(1 << 24)
    call = Call(method="m", tenant="default", deadline=Deadline.after(3600))
    request = pb.RankRequest(route="home", labels={"country": "de"}, request_id="r")
    request.subject.string_ids.append("u")
    request.candidates.CopyFrom(types_pb2.EntityIds(string_ids=[f"i{n}" for n in range(_ROWS)]))
    began_s = time.perf_counter()
    for _ in range(calls):
        asking.rank(request, table, call, Stopwatch())
    return (time.perf_counter() - began_s) / calls * 1e6


def _with(**fields: Any) -> Snapshot:
    world = registry()
    return replace(world, routes={"home": replace(world.routes["home"], **fields)})


def registry() -> Snapshot:
    """Return a registry whose route asks the worker of canned answers."""
    kinds: Sequence[str] = ("user", "item")
    views = {f"{k}-view": FeatureView(name=f"{k}-view", entity=Entity(type=k), features=(Feature(name="f"),)) for k in kinds}
    inputs = tuple(ModelInput(name=k, entity=k, features=(f"{k}-view:f",)) for k in kinds)
    signature = Signature(
        inputs=(
            TensorSpec(name="user", dtype="float32", shape=(1, 1), per="request"),
            TensorSpec(name="item", dtype="float32", shape=(-1, 1)),
        ),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(-1,)),),
        feature_set="set",
    )
    versions = tuple(
        ModelVersion(version=n, artifact=f"/models/mlp/{n}", digest="sha256:" + n * 64, signature=signature) for n in ("1", "2")
    )
    route = Route(name="home", variants=(Variant(name="main", model="mlp", use="champion"),), score="y")
    return Snapshot(
        revision=1,
        models={"mlp": Model(name="mlp", versions=versions, aliases={"champion": "1"})},
        feature_views=views,
        feature_sets={"set": FeatureSet(name="set", inputs=inputs)},
        routes={"home": route},
        tenants={"default": Tenant(name="default")},
    )


def main(words: list[str] | None = None) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="What changes of routes do, and what their policies cost.")
    parser.add_argument("--quick", action="store_true", help="fewer changes, rougher figures")
    scale = QUICK if parser.parse_args(words).quick else FULL
    for name, value in measure(scale).items():
        sys.stdout.write(f"{name:28} {value:,.2f}\n" if isinstance(value, float) else f"{name:28} {value:,}\n")


if __name__ == "__main__":
    main()
