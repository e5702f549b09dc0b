"""`plait features skew` on a log that the page wrote, a file of recomputed rows, and a real registry."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fakes.feature_world import make_batch
from typer.testing import Result

from feature_retrieval.ingestion import Ingestion
from feature_retrieval.near_cache import NearCache
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.skew_log import SkewLog
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.views import Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.cli.features.parquet import ParquetWriter
from plait.registry.manifests import Manifest
from plait.registry.records import Entity, Feature, FeatureSet, FeatureView, ModelInput, Snapshot
from plait.registry.store import Store
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline

Plait = Callable[..., Result]
VIEW = FeatureView(name="stats", entity=Entity(type="item"), features=(Feature(name="a", default=1), Feature(name="b", default=0)))
SET = FeatureSet(name="home", inputs=(ModelInput(name="item", entity="item", features=("stats:b", "stats:a")),))
SNAPSHOT = Snapshot(feature_views={"stats": VIEW}, feature_sets={"home": SET})
IDS = [f"i{n}" for n in range(20)]
AT_S = 1_700_000_000.0


@pytest.fixture
def dsn(postgres_dsn: str) -> str:
    async def fill() -> None:
        async with await Store.open(postgres_dsn) as store:
            await store.migrate()
            await store.apply([Manifest(record=record) for record in (VIEW, SET)], actor="me")

    asyncio.run(fill())
    return postgres_dsn


def batch_of(ids: list[str], a: Any, b: Any) -> pb.FeatureBatch:
    batch = make_batch("stats", ids, {"a": a, "b": b}, at_s=AT_S)
    times = list(batch.event_times_us) * len(ids)
    del batch.event_times_us[:]
    batch.event_times_us.extend(times)
    return batch


async def serve(redis_url: str, log: Path) -> None:
    """Write all but one of the ids, and read them all twice."""
    store, plans = RedisStore(redis_url), Plans(SNAPSHOT)
    skew_log = SkewLog(log, share=1, max_file_bytes=1000, max_file_s=100, queue_rows=1000)
    page = Retrieval(store, NearCache(0, 60), lambda: plans, note=skew_log.note)
    call = Call(method="test", tenant="default", deadline=Deadline.after(20))
    written = IDS[:-1]
    batch = batch_of(written, np.arange(len(written)), np.arange(len(written)) * 2)
    await Ingestion(store, lambda: SNAPSHOT).write(batch, pb.WriteFeaturesResponse(), call)
    for _ in range(2):
        request = pb.GetFeaturesRequest(feature_set="home")
        request.entities.add(entity_type="item").ids.string_ids.extend(IDS)
        await page.get_features(request, pb.GetFeaturesResponse(), call)
    skew_log.close()
    await store.close()


def test_the_mismatches_of_each_feature_are_told(plait: Plait, dsn: str, redis_url: str, tmp_path: Path) -> None:
    log, recomputed = tmp_path / "log", tmp_path / "offline.parquet"
    asyncio.run(serve(redis_url, log))
    a = np.arange(len(IDS), dtype=np.float32)
    b = a * 2
    a[3] += 0.5
    with ParquetWriter(recomputed, VIEW) as writer:
        writer.append(batch_of(IDS, a, b))
    env = {"PLAIT_POSTGRES_DSN": dsn}
    for offline in (f"stats={recomputed}", str(recomputed)):
        told = plait("features", "skew", "--set", "home", "--log", log, "--offline", offline, "--json", env=env)
        assert told.exit_code == 0, told.stderr
        assert json.loads(told.stdout) == {
            "rows": 40,
            "misfits": 0,
            "left_out": [],
            "views": {"stats": {"matched": 38, "unmatched": 0, "behind": 0, "absent": 2}},
            "features": {
                "stats:b": {"compared": 38, "mismatched": 0, "rate": 0.0, "largest": 0.0},
                "stats:a": {"compared": 38, "mismatched": 2, "rate": 2 / 38, "largest": 0.5},
            },
        }
    shown = plait("features", "skew", "--set", "home", "--log", log, "--offline", recomputed, env=env)
    assert ["stats:a", "38", "2", "5.2632%", "0.5"] in [line.split() for line in shown.stdout.splitlines()]
    near = plait("features", "skew", "--set", "home", "--log", log, "--offline", recomputed, "--tolerance", 0.5, "--json", env=env)
    assert json.loads(near.stdout)["features"]["stats:a"]["mismatched"] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--set", "hone"), "did you mean 'home'?"),
        (("--set", "home", "--offline", "other=x.parquet"), "one of stats, which home reads"),
        (("--set", "home", "--offline", "stats=nosuch.parquet"), "cannot be read"),
    ],
)
def test_what_cannot_be_compared_says_why(plait: Plait, dsn: str, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    offline = () if "--offline" in words else ("--offline", "stats=nosuch.parquet")
    result = plait("features", "skew", *words, *offline, "--log", tmp_path, env={"PLAIT_POSTGRES_DSN": dsn})
    assert result.exit_code != 0
    assert says in result.stderr
