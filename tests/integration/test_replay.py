"""`plait features replay`, end to end: an aggregate that was declared just now gets its past, and nothing counts twice."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytest_asyncio
from tests.fakes.event_world import event, feature
from tests.fakes.features_process import FeaturesProcess, features_process

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.registry.manifests import Manifest
from plait.registry.records import Aggregation, Entity, FeatureSet, FeatureView, ModelInput

VIEW = FeatureView(
    name="activity",
    entity=Entity(type="listing"),
    aggregation=Aggregation(entity_from="object", lateness_s=3600),
    features=(feature("views", "count", "view", default=0),),
)
LATER = dataclasses.replace(VIEW, features=(*VIEW.features, feature("spent", "sum", "complete_purchase", value="value", default=0)))
SET = FeatureSet(name="home", inputs=(ModelInput(name="listing", entity="listing", features=("activity:views",)),))
BOTH = FeatureSet(name="both", inputs=(ModelInput(name="listing", entity="listing", features=("activity:views", "activity:spent")),))
DAY_S = 86_400


@pytest_asyncio.fixture
async def process(redis_url: str, postgres_dsn: str) -> AsyncIterator[FeaturesProcess]:
    async with features_process(redis_url, postgres_dsn, [VIEW, SET]) as running:
        yield running


async def read(process: FeaturesProcess, feature_set: str = "home") -> list[float]:
    request = pb.GetFeaturesRequest(feature_set=feature_set, entities=[{"entity_type": "listing", "ids": {"string_ids": ["l1"]}}])  # type: ignore[list-item]
    answer = await process.stub.GetFeatures(request, metadata=process.metadata, timeout=20)
    found: list[float] = np.frombuffer(answer.tensors[0].data, np.float32).tolist()
    return found


async def eventually(process: FeaturesProcess, expected: list[float], feature_set: str = "home") -> None:
    async with asyncio.timeout(20):
        while await read(process, feature_set) != expected:
            await asyncio.sleep(0.01)


async def publish(process: FeaturesProcess, events: Sequence[Any]) -> None:
    await process.stub.PublishEvents(pb.PublishEventsRequest(events=events), metadata=process.metadata, timeout=20)


def lines(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file = folder / "events.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def line(event_id: str, kind: str, at_s: float, **more: Any) -> dict[str, Any]:
    at = datetime.fromtimestamp(at_s, UTC).isoformat().replace("+00:00", "Z")
    return {"event_id": event_id, "type": kind, "event_time": at, "subject": {"user": "u1"}, "object": {"listing": "l1"}, **more}


async def test_a_new_aggregate_gets_its_past_and_nothing_counts_twice(process: FeaturesProcess, tmp_path: Path) -> None:
    now = time.time()
    live = [event("live-1", at_s=now), event("live-2", at_s=now), event("bought", "complete_purchase", at_s=now, value=5)]
    await publish(process, live)
    await eventually(process, [2])
    await process.registry.apply([Manifest(record=LATER), Manifest(record=BOTH)], actor="test")
    async with asyncio.timeout(20):
        while (await process.good("status", "activity"))["lag_events"]:
            await asyncio.sleep(0.01)
    past = [line(f"old-{n}", "view", now - n * DAY_S) for n in range(5)]
    log = [*past, line("live-1", "view", now), *past[:2], line("paid", "complete_purchase", now - 9 * DAY_S, value=2.5)]
    unread = [*log, line("", "view", now), line("live-1", "view", now + 1)]
    refused = await process.plait("replay", "activity", "--from", lines(tmp_path, unread))
    assert "1 EVENT_ID_INVALID (first: 10)" in refused.stderr, refused.stderr
    assert "[EVENTS_REFUSED]" in refused.stderr
    assert "[EPOCH_INCOMPLETE]" in (await process.plait("flip", "activity")).stderr
    assert await read(process) == [2]
    outcome = await process.good(
        "replay", "activity", "--from", tmp_path / "events.jsonl", "--resume", "--max-refused", 1, "--gap-ok", "--no-flip"
    )
    assert (outcome["skipped"], outcome["events"], outcome["epoch"], outcome["flipped"]) == (11, 0, 1, False)
    assert outcome["stream"] == 3  # what had been published before is still in the stream
    await publish(process, [event("live-3", at_s=now), *live])
    await eventually(process, [3])
    assert (await process.good("flip", "activity"))["serving"] == 1
    await eventually(process, [5 + 3, 2.5 + 5], "both")
    await publish(process, [event("live-4", at_s=now), *live])
    await eventually(process, [9, 7.5], "both")
    await process.good("rollback", "activity")
    await eventually(process, [4])  # it was counted, too


async def test_a_log_that_ends_before_the_stream_begins_is_not_served(process: FeaturesProcess, tmp_path: Path) -> None:
    now = time.time()
    old = lines(tmp_path, [line("old", "view", now - DAY_S)])
    gap = await process.plait("replay", "activity", "--from", old)
    assert "the stream holds none" in gap.stderr
    assert "[REPLAY_GAP]" in gap.stderr
    await publish(process, [event("live", at_s=now)])
    gap = await process.plait("replay", "activity", "--from", old, "--resume")
    assert "the stream begins at" in gap.stderr
    assert (await process.good("replay", "activity", "--from", old, "--resume", "--gap-ok"))["flipped"]
    await eventually(process, [2])
    assert not list(tmp_path.glob("*.plait-progress"))


async def test_a_parquet_log_that_is_killed_goes_on(process: FeaturesProcess, tmp_path: Path) -> None:
    now, count = time.time(), 30_000
    file = tmp_path / "events.parquet"
    times = [int(now * 1e6) - n for n in range(count)]
    table = pa.table(
        {
            "event_id": [f"e{n}" for n in range(count)],
            "type": ["view", "like"] * (count // 2),
            "event_time": pa.array(times, pa.timestamp("us")),
            "object_type": ["listing"] * count,
            "object_id": ["l1"] * count,
            "value": [float("nan") if n == 7 else None for n in range(count)],
            "values": pa.array([[("price", 1.5)]] * count, pa.map_(pa.string(), pa.float64())),
        }
    )
    pq.write_table(table, file)
    command = [sys.executable, "-m", "plait.cli", "features", "replay", "activity", "--from", str(file), "--rate", "6000"]
    child = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **process.env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    kept = tmp_path / "events.parquet.plait-progress"
    async with asyncio.timeout(60):
        while not (kept.exists() and json.loads(kept.read_text())["row"]):
            await asyncio.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    await child.wait()
    outcome = await process.good("replay", "activity", "--from", file, "--resume", "--gap-ok", "--max-refused", 1)
    assert 0 < outcome["skipped"] < count
    assert outcome["skipped"] + outcome["events"] == count
    await eventually(process, [count / 2 - 0])  # the one that was refused is a like


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("bad.jsonl", b"[1]\n", "EVENT_UNREADABLE"),
        ("bad.jsonl", b'{"type": "nonsense"}\n', "EVENT_UNREADABLE"),
        ("bad.parquet", b"PAR1 not really", "PARQUET_UNREADABLE"),
        ("bad.parquet", {"event_id": ["e"], "type": ["view"]}, "EVENT_UNREADABLE"),
        ("bad.parquet", {"event_id": ["e"], "type": ["view"], "event_time": ["yesterday"]}, "EVENT_UNREADABLE"),
        ("bad.parquet", {"event_id": [None], "type": ["view"], "event_time": [None]}, "EVENT_UNREADABLE"),
    ],
)
async def test_what_is_no_log(process: FeaturesProcess, tmp_path: Path, name: str, content: Any, reason: str) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        pq.write_table(pa.table(content), file)
    result = await process.plait("replay", "activity", "--from", file)
    assert f"[{reason}]" in result.stderr, result.stderr
    assert (await process.good("epochs", "activity"))["building"] is None
    assert not list(tmp_path.glob("*.plait-progress"))


async def test_a_cursor_that_plait_did_not_give_is_refused(process: FeaturesProcess) -> None:
    await process.registry.begin_epoch("default", "activity", actor="test")
    for cursor in (b"ann", b"1-1", b"1-1 x", b"1-1 2-x"):
        request = pb.ReplayEventsRequest(feature_view="activity", epoch=1, cursor=cursor)
        async with asyncio.timeout(20):
            while True:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await process.stub.ReplayEvents(request, metadata=process.metadata, timeout=20)
                if caught.value.code() != grpc.StatusCode.NOT_FOUND:  # the service has not heard of the epoch yet
                    break
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
