"""`plait features materialize`, end to end: a file into a new epoch while rows are streamed, one flip, a rollback, a resume."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytest_asyncio
from tests.fakes.calls import call_of
from tests.fakes.features_process import FeaturesProcess, features_process
from tests.fakes.tcp_proxy import TcpProxy

from feature_retrieval.ingestion import Ingestion
from feature_retrieval.replicas import Replicas
from feature_retrieval.row_codec import KeySpace
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import from_rpc_error
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput, Snapshot

VIEW = FeatureView(name="stats", entity=Entity(type="item"), features=(Feature(name="a", default=-1),))
SET = FeatureSet(name="home", inputs=(ModelInput(name="item", entity="item", features=("stats:a",)),))
NOW_US = int(time.time() * 1e6)


@pytest_asyncio.fixture
async def process(redis_url: str, postgres_dsn: str) -> AsyncIterator[FeaturesProcess]:
    async with features_process(redis_url, postgres_dsn, [VIEW, SET]) as running:
        yield running


def file_of(folder: Path, rows: list[tuple[str, int, float]], name: str = "rows.parquet", **options: Any) -> Path:
    file = folder / name
    table = pa.table({"id": [r[0] for r in rows], "event_time": [r[1] for r in rows], "a": np.array([r[2] for r in rows], np.float32)})
    pq.write_table(table, file, **options)
    return file


async def test_a_file_is_served_after_one_flip_and_what_was_streamed_stays(process: FeaturesProcess, tmp_path: Path) -> None:
    await process.write("stats", [("newer", NOW_US, 1), ("older", NOW_US - 10, 2), ("streamed only", NOW_US, 3)])
    file = file_of(tmp_path, [("newer", NOW_US - 5, 10), ("older", NOW_US - 5, 20), ("file only", NOW_US - 5, 30)])
    outcome = await process.good("materialize", "stats", "--from", file)
    assert (outcome["epoch"], outcome["flipped"], outcome["rows"], outcome["applied"]) == (1, True, 3, 3)
    assert outcome["carried_over"] >= 2
    ids = ["newer", "older", "streamed only", "file only"]
    await eventually(process, ids, [1, 20, 3, 30])
    assert (await process.good("epochs", "stats"))["previous"] == 0
    assert not list(tmp_path.glob("*.plait-progress"))

    await process.write("stats", [("later", NOW_US, 4)])
    await process.good("rollback", "stats")
    await eventually(process, [*ids, "later"], [1, 2, 3, -1, 4])  # as it was, and with what was streamed since
    await process.good("rollback", "stats")
    await eventually(process, [*ids, "later"], [1, 20, 3, 30, 4])


async def eventually(process: FeaturesProcess, ids: list[str], expected: list[float]) -> None:
    async with asyncio.timeout(20):
        while await process.read("home", ids) != expected:
            await asyncio.sleep(0.01)


async def test_no_request_sees_half_of_a_flip(process: FeaturesProcess, tmp_path: Path) -> None:
    ids = [f"i{n}" for n in range(200)]
    await process.good("materialize", "stats", "--from", file_of(tmp_path, [(i, NOW_US - 9, 1) for i in ids]))
    await eventually(process, ids, [1.0] * 200)
    seen: set[frozenset[float]] = set()

    async def read() -> None:
        while True:
            seen.add(frozenset(await process.read("home", ids)))

    readers = [asyncio.create_task(read()) for _ in range(4)]
    await process.good("materialize", "stats", "--from", file_of(tmp_path, [(i, NOW_US - 5, 2) for i in ids], "new.parquet"))
    await eventually(process, ids, [2.0] * 200)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    assert seen == {frozenset({1.0}), frozenset({2.0})}


async def test_without_a_flip_nobody_reads_it_until_it_is_flipped(process: FeaturesProcess, tmp_path: Path) -> None:
    await process.write("stats", [("streamed", NOW_US, 3)])
    file = file_of(tmp_path, [("i", NOW_US, 1)])
    assert (await process.good("materialize", "stats", "--from", file, "--no-flip"))["flipped"] is False
    assert await process.read("home", ["i"]) == [-1]
    again = await process.plait("materialize", "stats", "--from", file)
    assert "[EPOCH_BUSY]" in again.stderr
    assert (await process.good("flip", "stats"))["serving"] == 1
    await eventually(process, ["i", "streamed"], [1, 3])
    assert (await process.good("retire", "stats"))["previous"] is None
    in_use = await process.plait("purge", "stats", "--epoch", 1)
    assert "[EPOCH_IN_USE]" in in_use.stderr
    assert (await process.good("purge", "stats", "--epoch", 0))["removed"] == 1
    assert await process.read("home", ["i", "streamed"]) == [1, 3]


async def test_a_writer_that_was_cut_off_during_a_flip_is_carried_over_later(
    process: FeaturesProcess, tmp_path: Path, redis_url: str
) -> None:
    await process.good("materialize", "stats", "--from", file_of(tmp_path, [("i", NOW_US - 5, 1)]))
    await eventually(process, ["i"], [1])
    store = RedisStore(redis_url, ack="applied")
    late = Ingestion(store, lambda: Snapshot(feature_views={"stats": VIEW}))  # it knows epoch 0 only
    batch = pb.FeatureBatch(feature_view="stats", event_times_us=[NOW_US], ids={"string_ids": ["i"]})  # type: ignore[arg-type]
    batch.columns.add(features=["a"], dtype=11, data=np.float32(2).tobytes())  # type: ignore[arg-type]
    await late.write(batch, pb.WriteFeaturesResponse(), call_of())
    await store.close()
    assert await process.read("home", ["i"]) == [1]
    assert (await process.good("carry-over", "stats"))["carried_over"] == 1
    await eventually(process, ["i"], [2])


async def test_nothing_is_flipped_or_purged_behind_the_back_of_a_replica(process: FeaturesProcess, tmp_path: Path, redis_url: str) -> None:
    store = RedisStore(redis_url, ack="applied")
    cut_off = Replicas(store.dispatch, "cut off from Postgres", lambda: known)
    known = (await process.registry.snapshot()).revision
    announcing = asyncio.create_task(cut_off.run())
    late = Ingestion(store, lambda: Snapshot(feature_views={"stats": VIEW}))  # what it goes on doing: it knows epoch 0 only
    file = file_of(tmp_path, [("i", NOW_US - 5, 1)])
    command = asyncio.create_task(process.good("materialize", "stats", "--from", file))
    async with asyncio.timeout(60):
        while not (epochs := await process.registry.epochs("default", "stats")).built:
            await asyncio.sleep(0.01)
    assert epochs.serving == 0
    request = pb.CarryOverEpochRequest(feature_view="stats", from_epoch=0, to_epoch=1)
    async with asyncio.timeout(20):
        while (reason := await _reason_of(process.stub.CarryOverEpoch(request, metadata=process.metadata))) == "EPOCH_NOT_FOUND":
            await asyncio.sleep(0.01)  # not heard here
    assert reason == "REPLICA_BEHIND"
    batch = pb.FeatureBatch(feature_view="stats", event_times_us=[NOW_US], ids={"string_ids": ["i"]})  # type: ignore[arg-type]
    batch.columns.add(features=["a"], dtype=11, data=np.float32(2).tobytes())  # type: ignore[arg-type]
    await late.write(batch, pb.WriteFeaturesResponse(), call_of())
    assert not command.done()
    known += 100  # it has heard
    assert (await command)["flipped"]
    await eventually(process, ["i"], [2])
    known = 0
    await cut_off.announce()
    await process.good("retire", "stats")
    purge = pb.PurgeEpochRequest(feature_view="stats", epoch=0)
    async with asyncio.timeout(20):
        while (reason := await _reason_of(process.stub.PurgeEpoch(purge, metadata=process.metadata))) == "EPOCH_IN_USE":  # not heard here
            await asyncio.sleep(0.01)
    assert reason == "REPLICA_BEHIND"
    announcing.cancel()
    await store.close()


async def _reason_of(stream: Any) -> str:
    try:
        _ = [answer async for answer in stream]
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return ""


async def test_what_is_half_built_is_not_flipped(process: FeaturesProcess, tmp_path: Path) -> None:
    await process.registry.begin_epoch("default", "stats", actor="test")
    half = await process.plait("flip", "stats")
    assert "[EPOCH_INCOMPLETE]" in half.stderr
    assert "is being built" in (await process.plait("epochs", "stats")).stdout
    assert (await process.good("flip", "stats", "--incomplete"))["serving"] == 1
    file = file_of(tmp_path, [("i", NOW_US, 1), ("", NOW_US, 1)])
    assert "[ROWS_REFUSED]" in (await process.plait("materialize", "stats", "--from", file, "--no-flip")).stderr
    assert "[EPOCH_INCOMPLETE]" in (await process.plait("flip", "stats")).stderr
    assert not (await process.good("materialize", "stats", "--from", file, "--no-flip", "--resume", "--max-refused", 1))["flipped"]
    assert "is complete" in (await process.plait("epochs", "stats")).stdout
    assert (await process.good("flip", "stats"))["serving"] == 2


async def test_into_the_current_epochs_rows_are_added(process: FeaturesProcess, tmp_path: Path) -> None:
    await process.write("stats", [("newer", NOW_US, 1)])
    file = file_of(tmp_path, [("newer", NOW_US - 5, 10), ("new", NOW_US - 5, 20)])
    outcome = await process.good("materialize", "stats", "--from", file, "--epoch", "current")
    assert (outcome["epoch"], outcome["applied"], outcome["ignored"]) == (None, 1, 1)
    assert await process.read("home", ["newer", "new"]) == [1, 20]


async def test_refused_rows_stop_the_flip_and_are_told_by_row(process: FeaturesProcess, tmp_path: Path) -> None:
    file = file_of(tmp_path, [("i", NOW_US, 1), ("future", NOW_US + 10**9, 1), ("", NOW_US, 1)])
    refused = await process.plait("materialize", "stats", "--from", file)
    assert refused.exit_code == 1
    assert "[ROWS_REFUSED]" in refused.stderr
    assert "1 EVENT_TIME_IN_FUTURE (first: row 1)" in refused.stderr
    assert "1 ID_INVALID (first: row 2)" in refused.stderr
    assert "future" not in refused.stdout  # an id
    assert await process.read("home", ["i"]) == [-1]
    outcome = await process.good("materialize", "stats", "--from", file, "--resume", "--max-refused", 2)
    assert (outcome["flipped"], outcome["rows"], outcome["skipped"]) == (True, 0, 3)
    await eventually(process, ["i"], [1])


@pytest.mark.parametrize(
    ("rows", "words", "reason"),
    [
        ({"id": ["i"], "event_time": [1]}, ("--map", "x=y"), "PARQUET_MISFIT"),
        ({"id": ["i"], "event_time": [1], "a": [1.0]}, ("--resume",), "RESUME_MISMATCH"),
        ({"id": ["i"], "event_time": [NOW_US // 1_000], "a": [1.0]}, (), "PARQUET_MISFIT"),
        ({"id": ["i"], "event_time": [NOW_US // 1_000_000], "a": [1.0]}, (), "PARQUET_MISFIT"),
        ({"id": pa.array([], pa.string()), "event_time": pa.array([], pa.int64()), "a": pa.array([], pa.float32())}, (), "PARQUET_EMPTY"),
        ({"id": ["i", None], "event_time": [NOW_US, NOW_US], "a": [1.0, 1.0]}, (), "PARQUET_MISFIT"),
    ],
)
async def test_what_cannot_be_begun_leaves_nothing_behind(
    process: FeaturesProcess, tmp_path: Path, rows: Any, words: Any, reason: str
) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table(rows), file)
    result = await process.plait("materialize", "stats", "--from", file, *words)
    assert (result.exit_code, f"[{reason}]" in result.stderr) == (1, True), result.stderr
    assert (await process.good("epochs", "stats"))["building"] is None
    assert not list(tmp_path.glob("*.plait-progress"))


async def test_a_key_without_the_scope_begins_nothing(process: FeaturesProcess, tmp_path: Path) -> None:
    file = file_of(tmp_path, [("i", NOW_US, 1)])
    _, key = await process.registry.create_key("default", ["features"], actor="test")
    refused = await process.plait("materialize", "stats", "--from", file, PLAIT_API_KEY=key)
    assert "[SCOPE_MISSING]" in refused.stderr
    assert (await process.good("epochs", "stats"))["building"] is None
    exposed = await process.plait("materialize", "stats", "--from", file, "--address", "features.example:443")
    assert "[API_KEY_EXPOSED]" in exposed.stderr


async def test_a_file_that_changed_is_not_resumed(process: FeaturesProcess, tmp_path: Path) -> None:
    file = file_of(tmp_path, [("i", NOW_US, 1)])
    await process.good("materialize", "stats", "--from", file, "--no-flip")
    file_of(tmp_path, [("i", NOW_US, 2)])
    changed = await process.plait("materialize", "stats", "--from", file, "--resume")
    assert "[RESUME_MISMATCH]" in changed.stderr
    assert "another file" in changed.stderr


async def test_a_run_that_is_killed_anywhere_goes_on_and_ends_the_same(process: FeaturesProcess, tmp_path: Path, redis_url: str) -> None:
    rows = [(f"i{n}", NOW_US - 5, float(n % 97)) for n in range(100_000)]
    file = file_of(tmp_path, rows, row_group_size=7_000)
    command = [sys.executable, "-m", "plait.cli", "features", "materialize", "stats", "--from", str(file), "--json"]
    env = {**os.environ, **process.env}
    progress = tmp_path / "rows.parquet.plait-progress"
    for kill in range(2):
        resume = ["--resume"] if kill else []
        child = await asyncio.create_subprocess_exec(
            *command, "--rate", "15000", *resume, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        reached = json.loads(progress.read_text())["row_group"] if progress.exists() else -1
        async with asyncio.timeout(60):
            while not (progress.exists() and json.loads(progress.read_text())["row_group"] > reached):
                await asyncio.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        await child.wait()
    outcome = await process.good("materialize", "stats", "--from", file, "--resume")
    assert outcome["flipped"]
    assert 0 < outcome["skipped"] < len(rows)
    assert outcome["skipped"] + outcome["rows"] == len(rows)
    store = RedisStore(redis_url, ack="applied")
    keys = KeySpace.of("default", "item", "stats", 1, outcome["epoch"]).keys([entity for entity, _, _ in rows])
    stored = (await store.read(keys, 30)).rows
    await store.close()
    assert [np.frombuffer(row[-4:], np.float32)[0] for row in stored if row] == [value for _, _, value in rows]


async def test_a_registry_that_is_away_meanwhile_is_waited_for(process: FeaturesProcess, tmp_path: Path, postgres_dsn: str) -> None:
    address = postgres_dsn.rpartition("@")[2].partition("/")[0]
    host, port = address.split(":")
    file = file_of(tmp_path, [(f"i{n}", NOW_US - 5, 1.0) for n in range(20_000)], row_group_size=5_000)
    async with TcpProxy((host, int(port))) as door:
        target, dsn = door.target, postgres_dsn.replace(address, f"127.0.0.1:{door.port}")
        words = ("materialize", "stats", "--from", file, "--rate", 10_000)
        command = asyncio.create_task(process.plait(*words, PLAIT_POSTGRES_DSN=dsn))
        kept = tmp_path / "rows.parquet.plait-progress"
        async with asyncio.timeout(60):
            while not (kept.exists() and json.loads(kept.read_text())["row_group"]):
                await asyncio.sleep(0.01)
            await door.cut()
            while json.loads(kept.read_text())["row_group"] < 3 or json.loads(kept.read_text())["row"] < 5_000:
                await asyncio.sleep(0.01)
        assert not command.done()
        door.target = target
        assert (await command).exit_code == 0
    await eventually(process, ["i0", "i19999"], [1, 1])
