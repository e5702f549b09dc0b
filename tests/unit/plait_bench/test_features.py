"""The whole benchmark with tiny counts over real processes, the shape of its report, and that it tells wrong from right."""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import Internal, InvalidArgument
from plait_bench import features, features_events, features_report, peer_feast
from plait_bench.environments import cache_folder
from plait_bench.features import GRPC, GRPC_NEAR, NEAR, PLAIN, Reads, Scale, ratio
from plait_bench.features_data import COUNTED, Events, Shape, Values, counted
from plait_bench.features_ways import OverGrpc, PackedFloor, RedisPyFloor, check, in_process
from plait_bench.features_world import World, batch, stub_of, world
from plait_bench.features_writes import _Watch, _write_events, _wrong_rows

SHAPE = Shape(rows=5, columns=3)
TINY = Scale(rounds=2, seconds=0.01, keys=2000, replays=6, probes=5, events=3000, shapes=(SHAPE,))
NUMBER = (int, float)
FIGURES = {"p50_ms": NUMBER, "p99_ms": NUMBER, "p50_ms_rounds": [NUMBER], "reads": int}
RATIO = dict.fromkeys(("p50", "lowest", "highest"), NUMBER)
TIMES = dict.fromkeys(("p50_ms", "p99_ms"), NUMBER)
FEAST_INSTALLED = (peer_feast.ENVIRONMENT.folder(cache_folder()) / "complete").exists()


def fits(found: Any, shape: Any, at: str = "report") -> None:
    """Fail where `found` is not of this shape: types, lists of one shape, mappings with exactly these keys."""
    if isinstance(shape, dict):
        assert set(found) == set(shape), at
        for key, inner in shape.items():
            fits(found[key], inner, f"{at}.{key}")
    elif isinstance(shape, list):
        assert found, at
        for number, one in enumerate(found):
            fits(one, shape[0], f"{at}[{number}]")
    else:
        assert isinstance(found, shape), at


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return features.measure(Console(file=io.StringIO()), tmp_path_factory.mktemp("state"), TINY, feast=FEAST_INSTALLED)


def test_the_report_is_complete_and_can_be_read_back(facts: dict[str, Any]) -> None:
    ways = [RedisPyFloor.name, PackedFloor.name, PLAIN, NEAR, GRPC, GRPC_NEAR]
    peers = ["Feast get_online_features", "Feast, as a matrix"] if FEAST_INSTALLED else []
    ours = dict.fromkeys((PLAIN, NEAR, GRPC, GRPC_NEAR), RATIO)
    replay = dict.fromkeys(("keys", "lookups", "hit_ratio", "hit_ratio_second_half", "best_hit_ratio_second_half"), NUMBER)
    shape = {
        "schema": str,
        "machine": dict,
        "scale": {"rounds": int, "seconds": NUMBER},
        "reads": {
            "5x3": {
                "figures": dict.fromkeys([*ways, *peers], FIGURES),
                "to_floor": dict.fromkeys([*ways[1:], *peers], RATIO),
                "feast_to_ours": dict.fromkeys(peers, ours),
            }
        },
        "ingestion": dict.fromkeys(("rows", "columns", "rows_per_batch", "rows_per_s", "rows_per_cpu_s", "redis_cpu_us_per_row"), NUMBER)
        | {"rows_per_s_rounds": [NUMBER]},
        "replay": dict.fromkeys(("1", "1.2"), replay | {"figures": dict.fromkeys((PLAIN, NEAR), TIMES)}),
        "visibility": dict.fromkeys(("probes", "p50_ms", "p99_ms", "highest_ms", "acknowledged_p50_ms"), NUMBER),
        "newest_wins": dict.fromkeys(
            ("events", "writes", "entities", "applied", "rows_per_s", "rows_read_meanwhile", "went_backwards"), NUMBER
        )
        | {"wrong_rows": dict.fromkeys(("feature-retrieval", "feature-retrieval with near cache"), int)},
        "event_visibility": dict.fromkeys(("probes", "p50_ms", "p99_ms", "highest_ms", "acknowledged_p50_ms"), NUMBER),
        "counted_once": dict.fromkeys(("events", "published", "entities", "published_per_s", "applied_per_s", "applied_per_cpu_s"), NUMBER)
        | {"wrong_rows": dict.fromkeys(("feature-retrieval", "feature-retrieval with near cache"), int)},
        "feast": (str, type(None)),
        "took_s": NUMBER,
    }
    fits(facts, shape)
    assert json.loads(json.dumps(facts)) == facts


def test_nothing_is_lost_and_nothing_goes_back(facts: dict[str, Any]) -> None:
    newest = facts["newest_wins"]
    assert set(newest["wrong_rows"].values()) == {0}
    assert newest["went_backwards"] == 0
    assert newest["writes"] == 3900
    assert newest["entities"] <= newest["applied"] < newest["writes"]
    counted = facts["counted_once"]
    assert set(counted["wrong_rows"].values()) == {0}
    assert counted["published"] == 3900
    for replay in facts["replay"].values():
        assert 0 < replay["hit_ratio_second_half"] <= replay["best_hit_ratio_second_half"] < 1


def test_it_is_told_to_a_person(facts: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=200)
    for table in features_report.tables(facts):
        console.print(table)
    for line in features_report.remarks(facts):
        console.print(line)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Reading 5 entities × 3 float32" in said
    assert "0 wrong rows" in said
    assert ("--peers feast" in said) != FEAST_INSTALLED


def test_peers_are_feast_or_none() -> None:
    assert [features.with_feast(peers) for peers in ("", "none", "feast", "all")] == [False, False, True, True]
    with pytest.raises(InvalidArgument, match="tecton") as caught:
        features.with_feast("feast,tecton")
    assert caught.value.reason == "BENCH_PEER_UNKNOWN"


def test_a_ratio_is_of_rounds_that_met_the_same_weather() -> None:
    calm, stormy = [0.001] * 3, [0.010] * 3
    ours, floor = Reads([calm, stormy, calm]), Reads([calm, stormy, [0.0005] * 3])
    assert ratio(ours, floor) == {"p50": 1.0, "lowest": 1.0, "highest": pytest.approx(2.0)}


@asynccontextmanager
async def small_world(folder: Path) -> AsyncIterator[World]:
    async with world(folder, min(os.sched_getaffinity(0)), (SHAPE,)) as w:
        yield w


async def test_a_wrong_answer_or_row_is_found(tmp_path: Path) -> None:
    async with small_world(tmp_path) as w:
        shape = SHAPE
        wrong = shape.values.copy()
        wrong[1, 2] += 1
        with w.plain.channel() as channel:
            stub = stub_of(channel)
            await written(stub, w, shape.name, shape.ids, wrong)
            floor = RedisPyFloor(w, shape.name, shape.ids)
            over = OverGrpc("grpc", shape.name, w.plain)
            try:
                await check([floor, over], shape.ids[2:5], wrong[2:5])
                for way in (floor, over):
                    with pytest.raises(Internal, match=re.escape(way.name)):
                        await check([way], shape.ids[:2], shape.values[:2])
            finally:
                floor.close()
                over.close()
            await events_end_in_the_newest_and_a_foreign_row_is_counted(stub, w)


async def written(stub: Any, w: World, view: str, ids: list[str], values: Values) -> None:
    made = batch(view, ids, values, [int(time.time() * 1e6)])
    answer = stub.WriteFeatures(pb.WriteFeaturesRequest(batch=made), metadata=w.plain.metadata, timeout=20)
    assert answer.applied == len(ids)


async def events_end_in_the_newest_and_a_foreign_row_is_counted(stub: Any, w: World) -> None:
    now_us = int(time.time() * 1e6)
    numbers = np.arange(4)
    events = Events(np.array([0, 0, 1, 1]), now_us - np.array([1, 2, 2, 1]) * 1000, numbers.astype(np.uint64), numbers)
    ids = ["a", "b", "never"]
    assert await _write_events(w.plain, ids, events) == 3
    assert [await _wrong_rows(server, ids, events) for server in (w.plain, w.cached)] == [0, 0]
    await written(stub, w, COUNTED, ["b"], np.full((1, 4), 9, np.float32))
    assert await _wrong_rows(w.plain, ids, events) == 2  # read twice


async def test_an_event_that_is_not_counted_is_found(tmp_path: Path) -> None:
    numbers = np.arange(3)
    events = Events(np.array([0, 0, 1]), int(time.time() * 1e6) - numbers * 1000, numbers.astype(np.uint64), numbers)
    ids = ["a", "b"]
    async with small_world(tmp_path) as w:
        await features_events._publish_all(w.plain, ids, events.at([0, 1, 2, 0]))
        await features_events._until_applied(w.cached)
        expected = counted(events, 2)
        assert expected.tolist() == [[2, 1, 0], [1, 2, 2]]
        assert [await features_events.wrong_rows(server, ids, expected) for server in (w.plain, w.cached)] == [0, 0]
        assert await features_events.wrong_rows(w.cached, ids, counted(events.at([0, 2]), 2)) == 2  # read twice


async def test_the_near_cache_is_asked_first(tmp_path: Path) -> None:
    async with small_world(tmp_path) as w:
        with w.plain.channel() as channel:
            await written(stub_of(channel), w, SHAPE.name, SHAPE.ids, SHAPE.values)
        async with in_process(w, SHAPE.name, name=NEAR, cache_bytes=1 << 20) as near:
            for _ in range(3):
                assert (await near.read(SHAPE.ids)).tolist() == SHAPE.values.tolist()
            assert near.store.keys == len(SHAPE.ids)
        async with in_process(w, SHAPE.name, name=PLAIN, cache_bytes=0) as plain:
            for _ in range(3):
                await plain.read(SHAPE.ids)
            assert plain.store.keys == 3 * len(SHAPE.ids)


def test_a_row_that_gets_older_is_noticed() -> None:
    watch = _Watch()
    watch.take(np.array([1, 2]), np.array([10, 20]))
    watch.take(np.array([1, 2]), np.array([10, 19]))
    watch.take(np.array([2]), np.array([20]))
    assert (watch.reads, watch.backwards) == (5, 1)
