"""`plait features export`, `erase` and `verify`, end to end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import prometheus_client
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import pytest_asyncio
from tests.fakes.features_process import PRIVACY_KEY, FeaturesProcess, features_process
from tests.fakes.otlp_collector import OtlpCollector

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import PermissionDenied, from_rpc_error
from plait.local.state import StateFolder, write_private
from plait.registry.manifests import Manifest
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput
from plait.settings import TelemetrySettings

VIEW = FeatureView(
    name="stats",
    entity=Entity(type="item"),
    features=(Feature(name="a", default=-1), Feature(name="colour", dtype="string", vocabulary=("red",)), Feature(name="b", dtype="int64")),
)
PRIVATE = FeatureView(name="private", entity=Entity(type="item"), features=(Feature(name="a"),), readers=("somebody",))
SET = FeatureSet(name="home", inputs=(ModelInput(name="item", entity="item", features=("stats:a",)),))
HIDDEN = FeatureSet(name="hidden", inputs=(ModelInput(name="item", entity="item", features=("stats:a", "private:a")),))
NOW_US = int(time.time() * 1e6)


@pytest_asyncio.fixture
async def process(redis_url: str, postgres_dsn: str) -> AsyncIterator[FeaturesProcess]:
    async with features_process(redis_url, postgres_dsn, [VIEW, PRIVATE, SET, HIDDEN]) as running:
        yield running


async def test_what_was_exported_materializes_to_the_same_export(process: FeaturesProcess, tmp_path: Path) -> None:
    rows = [(f"i{n}", NOW_US - n, float(n)) for n in range(3000)]
    await process.write("stats", rows)
    await process.write("stats", [("i7", NOW_US + 1, 0)], deleted=[True], sequences=[5], expires_at_us=[NOW_US + 10])
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    assert (await process.good("export", "stats", "--to", first))["rows"] == 3000
    await process.good("materialize", "stats", "--from", first)
    outcome = await process.good("export", "stats", "--to", second, "--epoch", 1)
    assert outcome["rows"] == 3000
    tables = [pq.read_table(file).sort_by("_id") for file in (first, second)]
    assert tables[0].equals(tables[1])
    [deleted] = tables[0].filter(pc.equal(tables[0]["_id"], "i7")).to_pylist()
    assert (deleted["_deleted"], deleted["_sequence"], deleted["colour"]) == (True, 5, None)


async def test_who_may_not_read_a_view_may_not_export_it(process: FeaturesProcess, tmp_path: Path) -> None:
    refused = await process.plait("export", "private", "--to", tmp_path / "x.parquet")
    assert "[VIEW_NOT_READABLE]" in refused.stderr
    assert list(tmp_path.iterdir()) == []  # no half of a file
    gone = await process.plait("export", "stats", "--epoch", 9, "--to", tmp_path / "x.parquet")
    assert gone.exit_code == 1


async def test_who_may_not_read_a_view_is_told_nothing_of_it(process: FeaturesProcess) -> None:
    described = pb.DescribeFeatureSetRequest(feature_set="hidden")
    with pytest.raises(grpc.aio.AioRpcError) as reading:
        await process.read("hidden", ["i1"])
    with pytest.raises(grpc.aio.AioRpcError) as describing:
        await process.stub.DescribeFeatureSet(described, metadata=process.metadata)
    for refused in (reading, describing):
        error = from_rpc_error(refused.value)
        assert (error.reason, type(error)) == ("VIEW_NOT_READABLE", PermissionDenied)
    await process.registry.apply([Manifest(record=dataclasses.replace(PRIVATE, readers=("default",)))], actor="test")
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await process.stub.DescribeFeatureSet(described, metadata=process.metadata)
                break
    assert [feature.feature_view for feature in answer.inputs[0].features] == ["stats", "private"]


async def test_a_view_that_is_not_there_is_named_with_the_one_that_was_meant(process: FeaturesProcess, tmp_path: Path) -> None:
    for words in (("epochs", "statz"), ("export", "statz", "--to", tmp_path / "x.parquet"), ("status", "statz"), ("rollback", "statz")):
        refused = await process.plait(*words)
        assert refused.exit_code == 1
        assert "did you mean 'stats'?" in refused.stderr, refused.stderr
        assert "see 'plait get featureview' for what there is" in refused.stderr


async def test_erased_entities_are_gone_and_certified(process: FeaturesProcess, tmp_path: Path) -> None:
    await process.write("stats", [("ann", NOW_US, 1), ("bob", NOW_US, 2), ("cid", NOW_US, 3)])
    file, listed = tmp_path / "erased.json", tmp_path / "ids.txt"
    listed.write_text("bob\n")
    document = await process.good(
        "erase", "item", "--ids", "ann", "--ids-from", listed, "--reason", "asked", "--certificate", file, "--yes"
    )
    assert [one["views"][1]["rows"] for one in document["certificates"]] == [1, 1]
    assert await process.read("home", ["ann", "bob", "cid"]) == [-1, -1, 3]
    answer = await process.write("stats", [("ann", NOW_US, 1)])
    assert [error.reason for error in answer.errors] == ["ENTITY_ERASED"]
    assert "ann" not in file.read_text()

    again = await process.plait("erase", "item", "--ids", "cid", "--reason", "asked", "--certificate", file, "--yes")
    assert again.exit_code == 2
    assert await process.read("home", ["cid"]) == [3]  # no certificate is lost, and nobody erased without one
    refused = await process.plait("erase", "nothing", "--ids", "x", "--reason", "asked", "--certificate", tmp_path / "no.json", "--yes")
    assert "[ENTITY_TYPE_NOT_FOUND]" in refused.stderr
    assert not (tmp_path / "no.json").exists()

    good = await process.plait("verify", file, PLAIT_FEATURE_RETRIEVAL_PRIVACY__KEY=PRIVACY_KEY)
    assert good.exit_code == 0, good.stderr
    nowhere = await process.plait("verify", file, "--state", tmp_path)
    assert nowhere.exit_code == 2
    assert "no mesh on" in nowhere.stderr
    write_private(StateFolder(tmp_path).credentials, {"api_key": "", "service_token": "", "privacy_key": PRIVACY_KEY})
    assert (await process.plait("verify", file, "--state", tmp_path)).exit_code == 0
    other = await process.plait("verify", file, PLAIT_FEATURE_RETRIEVAL_PRIVACY__KEY="q" * 32)
    assert "[CERTIFICATE_INVALID]" in other.stderr
    changed = json.loads(file.read_text())
    changed["certificates"][0]["views"][1]["rows"] = 2
    file.write_text(json.dumps(changed))
    assert "[CERTIFICATE_INVALID]" in (await process.plait("verify", file, "--key", PRIVACY_KEY)).stderr
    file.write_text("{}")
    assert "[CERTIFICATE_UNREADABLE]" in (await process.plait("verify", file, "--key", PRIVACY_KEY)).stderr


async def test_erasing_asks_first(process: FeaturesProcess, tmp_path: Path) -> None:
    await process.write("stats", [("ann", NOW_US, 1)])
    asked = await process.plait("erase", "item", "--ids", "ann", "--reason", "asked", "--certificate", tmp_path / "c.json")
    assert asked.exit_code == 1
    assert await process.read("home", ["ann"]) == [1]


async def test_no_id_is_in_a_log_a_span_or_a_metric(
    redis_url: str, postgres_dsn: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marked, number, value = "marked-needle-marked", 4_815_162_342, 48151.625
    people = FeatureView(name="people", entity=Entity(type="user", key="int64"), features=(Feature(name="a"),))
    with OtlpCollector() as collector:
        telemetry = TelemetrySettings(log_level="debug", trace_exporter="otlp", otlp_endpoint=collector.address, trace_sample_ratio=1)
        async with features_process(redis_url, postgres_dsn, [VIEW, PRIVATE, SET, people], telemetry=telemetry) as process:
            await process.write("stats", [(marked, NOW_US, value), (marked, NOW_US + 10**12, 1)])
            await process.read("home", [marked])
            with pytest.raises(grpc.aio.AioRpcError):
                await process.write("people", [(marked, NOW_US, 1)])
            with pytest.raises(grpc.aio.AioRpcError):
                await process.read("home", [marked, ""])
            request = pb.EraseEntityRequest(entities={"entity_type": "item", "ids": {"string_ids": [marked]}}, reason="asked")  # type: ignore[arg-type]
            await process.stub.EraseEntity(request, metadata=process.metadata, timeout=20)
            request = pb.EraseEntityRequest(entities={"entity_type": "user", "ids": {"int64_ids": [number]}})  # type: ignore[arg-type]
            await process.stub.EraseEntity(request, metadata=process.metadata, timeout=20)
            await process.write("stats", [(marked, NOW_US, 1)])
            await process.good("export", "stats", "--to", tmp_path / "out.parquet")
            metrics = prometheus_client.generate_latest(process.server.metrics.registry).decode()
            sent = await asyncio.to_thread(collector.wait, lambda spans: any("EraseEntity" in span.name for _, span in spans))
        spans = "\n".join(str(span) for _, span in [*sent, *collector.spans])
    captured = capfd.readouterr()
    logs = captured.out + captured.err
    assert "entity erased" in logs
    assert "EraseEntity" in metrics
    for told in (logs, metrics, spans):
        assert not [secret for secret in ("needle", str(number), str(value)) if secret in told]
