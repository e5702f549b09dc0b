"""Feast as it is, from its own environment: what it defines is taken over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tests.fakes.feast_repository import PYTHON, feast_world, needs_feast
from typer.testing import CliRunner

from plait.cli.main import app
from plait.local.redis import EmbeddedRedis
from plait.registry.manifests import load
from plait.registry.store import Store

pytestmark = needs_feast


@dataclass(frozen=True)
class Drivers:
    """A Feast repository, the Redis it has filled, and what Feast itself reads there."""

    repo: Path
    redis: EmbeddedRedis
    seen: dict[str, Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def drivers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Drivers]:
    repo = tmp_path_factory.mktemp("feast") / "repo"
    async with EmbeddedRedis() as redis:
        yield Drivers(repo, redis, feast_world(repo, redis))


def imported(drivers: Drivers, out: Path, *options: str) -> str:
    """Run the command; return what it said on stderr."""
    words = ["features", "import-feast", str(drivers.repo), "--python", str(PYTHON), "--out", str(out), *options]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.stderr
    return result.stderr


async def test_a_repository_is_taken_over_and_applied(drivers: Drivers, tmp_path: Path, postgres_dsn: str) -> None:
    said = imported(drivers, tmp_path / "manifests")
    manifests = load([tmp_path / "manifests"])
    async with await Store.open(postgres_dsn) as store:
        await store.migrate()
        await store.apply(manifests, actor="test", reason="")
        snapshot = await store.snapshot()
    hourly, vectors = snapshot.feature_views["driver_hourly_stats"], snapshot.feature_views["driver_hourly_stats-vectors"]
    assert (hourly.entity.type, hourly.entity.key, hourly.max_age_s) == ("driver", "int64", 86400)
    assert {f.name: f.dtype for f in hourly.features} == {
        "conv_rate": "float32", "acc_rate": "float64", "avg_daily_trips": "int64", "active": "bool", "level": "int32", "since": "timestamp",
        "city": "string", "car": "string", "recent": "int64",
    }  # fmt: skip
    features = {f.name: f for f in hourly.features}
    assert features["city"].vocabulary == ("paris", "kyoto")
    assert features["avg_daily_trips"].description == "Average daily trips"
    assert [(f.name, f.width) for f in vectors.features] == [("taste", 3)]
    pair = snapshot.feature_views["pairstats"]
    assert [(p.name, p.type) for p in pair.entity.parts] == [("customer_id", "string"), ("driver_id", "int64")]
    assert snapshot.feature_sets["driver_activity"].inputs[0].features == (
        "driver_hourly_stats:conv_rate", "driver_hourly_stats:city", "driver_hourly_stats:level",
    )  # fmt: skip
    assert [i.entity for i in snapshot.feature_sets["allofit"].inputs] == ["customer-driver", "driver"]
    text = (tmp_path / "manifests" / "feature-sets.yaml").read_text()
    assert '#   |     return pd.DataFrame({"conv_plus": inputs["conv_rate"] + inputs["to_add"]})' in text
    for words in ("'words' (Array(String))", "'config' (Json)", "FeatureView 'everything': it has no entity", "'renamed'", "'plus'"):
        assert words in said
