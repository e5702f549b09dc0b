"""What the router's cache costs and brings, in one process: a hit, what a miss pays for it, how much of a Zipf load it takes, a stampede.

What is around it (gRPC, the interceptor, the order of a route's steps) is left out, so that microseconds are seen. The road behind answers at
once; a miss with and without the cache is measured in turns.

    python -m plait_bench.router_cache [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import uvloop

from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.types.v1 import types_pb2
from plait.registry.policies import CachePolicy
from plait.registry.records import (
    Entity,
    Feature,
    FeatureSet,
    FeatureView,
    Model,
    ModelInput,
    ModelVersion,
    Route,
    Signature,
    Snapshot,
    TensorSpec,
    Variant,
)
from plait.rpc.call import Call, enter
from plait.rpc.deadline import Deadline
from plait.telemetry.metrics import Metrics
from plait_bench.features_data import zipf
from router.answers import Answers
from router.asking import Asking
from router.invalidation import Invalidations
from router.question import Question, Road
from router.route_table import RouteTable, compile_table
from router.settings import CacheSettings
from router.stopwatch import Stopwatch

CANDIDATES: Final = 100
TOP_K: Final = 20
EXPONENT: Final = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured: calls of each round, users of the Zipf load and its calls."""

    rounds: int
    calls: int
    users: int
    asked: int


FULL: Final = Scale(rounds=7, calls=3000, users=200_000, asked=300_000)
QUICK: Final = Scale(rounds=3, calls=500, users=5000, asked=5000)


def measure(scale: Scale) -> dict[str, Any]:
    """Return the figures; times in microseconds."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_measure(scale))


async def _measure(scale: Scale) -> dict[str, Any]:
    hits, plain, misses = [], [], []
    for round_ in range(scale.rounds):
        bench = _Bench()
        await bench.ask(bench.cached, "warm")
        hits.append(await _times(scale.calls, lambda _, b=bench: b.ask(b.cached, "warm")))  # type: ignore[misc]
        names = [f"{round_}-{number}" for number in range(scale.calls)]
        plain.append(await _times(scale.calls, lambda n, b=bench, w=names: b.ask(b.road, w[n])))  # type: ignore[misc]
        misses.append(await _times(scale.calls, lambda n, b=bench, w=names: b.ask(b.cached, w[n])))  # type: ignore[misc]
    hit_us, plain_us, miss_us = (statistics.median(rounds) for rounds in (hits, plain, misses))
    return {
        "candidates": CANDIDATES,
        "top_k": TOP_K,
        "hit_p50_us": hit_us,
        "plain_p50_us": plain_us,
        "miss_p50_us": miss_us,
        "miss_overhead_us": miss_us - plain_us,
        "stampede_callers": 100,
        "stampede_model_calls": await _stampede(),
        **await _under_zipf(scale),
    }


async def _under_zipf(scale: Scale) -> dict[str, Any]:
    """Users asked for by Zipf's law, more than memory holds."""
    bench = _Bench()
    users = zipf(scale.users, EXPONENT, scale.asked, seed=1).tolist()
    began_s = time.perf_counter()
    for user in users:
        await bench.ask(bench.cached, str(user))
    took_s = time.perf_counter() - began_s
    return {
        "zipf_users": scale.users,
        "zipf_exponent": EXPONENT,
        "zipf_hit_ratio": 1 - bench.runs / len(users),
        "zipf_answers_per_s": len(users) / took_s,
    }


async def _stampede() -> int:
    bench = _Bench(pause=True)
    await asyncio.gather(*(bench.ask(bench.cached, "cold") for _ in range(100)))
    return bench.runs


async def _times(calls: int, ask: Callable[[int], Any]) -> float:
    """Return the median time of a call."""
    taken_s = []
    for number in range(calls):
        began_s = time.perf_counter()
        await ask(number)
        taken_s.append(time.perf_counter() - began_s)
    return statistics.median(taken_s) * 1e6


class _Bench:
    """A route with a cache before a road that answers at once, or after a turn of the loop (`pause`)."""

    def __init__(self, *, pause: bool = False) -> None:
        registry = _registry()
        self._table: RouteTable = compile_table(registry)
        self._asking = Asking(1 << 24)
        self._call = Call(method="m", tenant="default", caller="k", deadline=Deadline.after(3600))
        self._pause = pause
        self._answer = pb.RankResponse(
            item_ids=types_pb2.EntityIds(string_ids=[f"item-{n}" for n in range(TOP_K)]), scores=[float(n) for n in range(TOP_K)]
        )
        self._candidates = types_pb2.EntityIds(string_ids=[f"item-{n}" for n in range(CANDIDATES)])
        self.runs = 0
        self.road: Road = self._make
        answers = Answers(CacheSettings(), Invalidations(), Metrics())
        answers.adopt(registry)
        route = self._table.routes["home"]
        self.cached = answers.around(self.road, route, CachePolicy(ttl_s=3600, early_refresh=0))
        enter(self._call)

    async def ask(self, road: Road, user: str) -> Any:
        request = pb.RankRequest(route="home", subject=types_pb2.EntityIds(string_ids=[user]), candidates=self._candidates, top_k=TOP_K)
        return await road(self._asking.rank(request, self._table, self._call, Stopwatch()))

    async def _make(self, question: Question) -> pb.RankResponse:
        self.runs += 1
        if self._pause:
            await asyncio.sleep(0)
        response = pb.RankResponse()
        response.CopyFrom(self._answer)
        return response


def _registry() -> Snapshot:
    views = {
        f"{kind}-view": FeatureView(name=f"{kind}-view", entity=Entity(type=kind), features=(Feature(name="f"),))
        for kind in ("user", "item")
    }
    inputs = tuple(ModelInput(name=kind, entity=kind, features=(f"{kind}-view:f",)) for kind in ("user", "item"))
    signature = Signature(
        inputs=(
            TensorSpec(name="user", dtype="float32", shape=(1, 1), per="request"),
            TensorSpec(name="item", dtype="float32", shape=(-1, 1)),
        ),
        outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
        feature_set="set",
    )
    version = ModelVersion(version="1", artifact="/m", digest="sha256:1", signature=signature)
    return Snapshot(
        revision=1,
        models={"ranker": Model(name="ranker", versions=(version,), aliases={"champion": "1"})},
        feature_views=views,
        feature_sets={"set": FeatureSet(name="set", inputs=inputs)},
        routes={"home": Route(name="home", variants=(Variant(name="main", model="ranker", use="champion"),))},
    )


def main(words: list[str] | None = None) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="What the router's cache costs and brings.")
    parser.add_argument("--quick", action="store_true", help="fewer calls, rougher figures")
    scale = QUICK if parser.parse_args(words).quick else FULL
    for name, value in measure(scale).items():
        sys.stdout.write(f"{name:24} {value:,.2f}\n" if isinstance(value, float) else f"{name:24} {value:,}\n")


if __name__ == "__main__":
    main()
