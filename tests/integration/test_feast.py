"""Feast as it is, from its own environment: what it defines is taken over, and what it wrote is read where it lies."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from pydantic import SecretStr
from tests.fakes.clients.feast_world import ENTITIES
from tests.fakes.feast_repository import CLIENTS, PYTHON, feast_world, needs_feast
from tests.fakes.feature_world import TOKEN, statuses, tensor
from typer.testing import CliRunner

from feature_retrieval.app import open_service
from feature_retrieval.settings import FeastSettings, FeatureRetrievalSettings, RowStoreSettings
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.cli.main import app
from plait.local.redis import EmbeddedRedis
from plait.redis.settings import RedisSettings
from plait.registry.manifests import Manifest, load
from plait.registry.records import FeatureSet, ModelInput
from plait.registry.store import Store
from plait.rpc.process import Tasks
from plait.settings import RegistrySettings, RpcSettings
from plait_bench.environments import foreign_environ

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


@dataclass(frozen=True)
class Running:
    """A feature-retrieval that also answers Feast's clients."""

    address: str
    stub: Any

    async def asked_by_feast(self, *requests: dict[str, Any]) -> list[Any]:
        """Have Feast's own stubs send requests, from a process of their own; return what they saw."""
        process = await asyncio.create_subprocess_exec(
            PYTHON, CLIENTS / "feast_client.py", self.address, stdin=-1, stdout=-1, stderr=-1, env=foreign_environ(PYTHON)
        )
        out, err = await asyncio.wait_for(process.communicate(json.dumps(requests).encode()), 100)
        assert process.returncode == 0, err.decode()[-4000:]
        said = json.loads(out.splitlines()[-1])
        assert said["version"].startswith("plait")
        answers: list[Any] = said["answers"]
        return answers


@asynccontextmanager
async def service(redis_url: str, feast_url: str, dsn: str, manifests: Sequence[Manifest]) -> AsyncIterator[Running]:
    """A whole feature-retrieval, its rows in one Redis and Feast's in another."""
    async with await Store.open(dsn) as store:
        await store.migrate()
        await store.apply(manifests, actor="test", reason="")
    settings = FeatureRetrievalSettings(
        rpc=RpcSettings(service_token=SecretStr("t0ken"), grace_s=2),
        redis=RowStoreSettings(url=SecretStr(redis_url)),
        registry=RegistrySettings(dsn=SecretStr(dsn)),
        feast=FeastSettings(enabled=bool(feast_url), serving=True, redis=RedisSettings(url=SecretStr(feast_url or redis_url))),
    )
    async with AsyncExitStack() as stack:
        tasks = Tasks(await stack.enter_async_context(asyncio.TaskGroup()))
        stack.callback(tasks.stop)
        server = await open_service(settings, stack, tasks)
        stack.callback(server.tracing.close)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Running(server.address, pb_grpc.FeatureRetrievalServiceStub(channel))
        await server.drain()


async def read(stub: Any, feature_set: str, **entities: Any) -> Any:
    request = pb.GetFeaturesRequest(feature_set=feature_set, include_event_times=True)
    for entity_type, ids in entities.items():
        request.entities.add(entity_type=entity_type.replace("_", "-"), ids=ids)
    return await stub.GetFeatures(request, metadata=TOKEN, timeout=20)


DRIVERS = types_pb2.EntityIds(int64_ids=ENTITIES)
SINGLE = ("conv_rate", "acc_rate", "avg_daily_trips", "active", "level", "since", "city", "car")


WIDE = ("driver_hourly_stats-vectors:taste", "driver_hourly_stats:recent")


def in_place(drivers: Drivers, out: Path) -> list[Manifest]:
    """Import the repository so that Feast's rows are read; add a set of all that is one number, and of a vector and a list."""
    imported(drivers, out, "--in-place", "--max-length", "2")
    mine = FeatureSet(
        name="mine",
        inputs=(
            ModelInput(name="driver", entity="driver", features=tuple(f"driver_hourly_stats:{n}" for n in SINGLE), dtype="float64"),
            ModelInput(name="wide", entity="driver", features=WIDE),
        ),
    )
    views = [m for m in load([out]) if m.kind == "FeatureView"]
    # Its one feature, "Rides", cannot be called so here: in place it is left out, and with it the view.
    assert "pairstats" not in {m.name for m in views}
    return [*views, Manifest(record=mine)]


async def test_feasts_rows_are_read_where_they_lie(drivers: Drivers, tmp_path: Path, postgres_dsn: str, redis_url: str) -> None:
    """Every value is what Feast itself answers; what Feast does not tell apart (too old, never written, null) is told."""
    async with service(redis_url, drivers.redis.url, postgres_dsn, in_place(drivers, tmp_path / "m")) as running:
        stub = running.stub
        for _ in range(3):  # nothing of it is kept
            answer = await read(stub, "mine", driver=DRIVERS)
            assert statuses(answer, "driver_hourly_stats") == ["PRESENT", "NULL", "STALE", "NOT_FOUND"]
            values = tensor(answer, "driver")
            theirs = drivers.seen["values"]
            for column, name in enumerate(SINGLE):
                for row in range(3):
                    expected = _expected(name, theirs[name][row], values[row, column])
                    assert values[row, column] == expected or (np.isnan(expected) and np.isnan(values[row, column])), (name, row)
            wide = tensor(answer, "wide")
            assert wide[0].tolist() == [0.5, -1, 2, 5, 6]
            assert statuses(answer, "driver_hourly_stats-vectors") == ["PRESENT", "NULL", "STALE", "NOT_FOUND"]
            assert wide[1, 3:].tolist() == [0, 0]  # an empty list, padded
            times = np.frombuffer(answer.views[0].event_times_us, "<i8").tolist()
            day_us = 86_400_000_000
            assert times == [drivers.seen["event_time_us"]] * 2 + [drivers.seen["event_time_us"] - 3 * day_us, 0]
        one = types_pb2.EntityIds(int64_ids=[1001])
        request = pb.ExplainFeaturesRequest(feature_set="mine", entities=[{"entity_type": "driver", "ids": one}])
        explained = await stub.ExplainFeatures(request, metadata=TOKEN, timeout=20)
        assert {view.source for view in explained.views} == {pb.ROW_SOURCE_FEAST}
        assert "blue" in {column.stored_value for column in explained.columns}
        batch = pb.FeatureBatch(feature_view="driver_hourly_stats", ids=one, event_times_us=[1])
        with pytest.raises(grpc.aio.AioRpcError, match="Feast"):
            await stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=TOKEN, timeout=20)


def _expected(name: str, theirs: Any, ours: float) -> float:
    """Return what Feast's value is in a tensor of float64 where no default is declared."""
    if name == "city":  # coded by the vocabulary "paris, kyoto"
        return {"paris": 1.0, "kyoto": 2.0}.get(theirs, 0.0)
    if name == "car":  # coded by a hash
        assert 0 <= ours < 1 << 20
        return ours if theirs is not None else 0.0
    if theirs is None:
        return math.nan if name in {"conv_rate", "acc_rate"} else 0.0
    return float(theirs) * (1e6 if name == "since" else 1)


async def test_without_feasts_redis_nothing_is_made_up(drivers: Drivers, tmp_path: Path, postgres_dsn: str, redis_url: str) -> None:
    manifests = in_place(drivers, tmp_path / "m")
    async with service(redis_url, "", postgres_dsn, manifests) as running:
        assert statuses(await read(running.stub, "mine", driver=DRIVERS), "driver_hourly_stats") == ["UNAVAILABLE"] * 4
    nobody = "redis://127.0.0.1:1/0"  # port 1 is tcpmux: nothing listens there
    async with service(redis_url, nobody, postgres_dsn, manifests) as running:
        assert statuses(await read(running.stub, "mine", driver=DRIVERS), "driver_hourly_stats") == ["UNAVAILABLE"] * 4


async def test_feasts_clients_get_what_feast_gave_them(drivers: Drivers, tmp_path: Path, postgres_dsn: str, redis_url: str) -> None:
    """The same questions to Feast and, by Feast's own stubs, to us: the same values, and statuses that tell more."""
    views = in_place(drivers, tmp_path / "m")
    names = [*SINGLE, "recent", "taste"]
    of = {name: "driver_hourly_stats-vectors" if name == "taste" else "driver_hourly_stats" for name in names}
    async with service(redis_url, drivers.redis.url, postgres_dsn, views) as running:
        features = [f"{of[name]}:{name}" for name in names]
        twice = [*ENTITIES, ENTITIES[0]]
        plain, full, by_set, wrong, unknown, odd = await running.asked_by_feast(
            {"features": features, "entities": {"driver_id": twice}},
            {"features": features[:2], "entities": {"anything": ENTITIES[:1]}, "full": True},
            {"service": "mine", "entities": {"driver": ENTITIES}},
            {"features": ["driver_hourly_stats:none"], "entities": {"driver_id": [1]}},
            {"service": "nine", "entities": {"driver_id": [1]}},
            {"features": features[:1], "entities": {"driver_id": ["a string"]}},
        )
        assert plain["names"] == ["driver_id", *names]
        assert plain["views"] == {"driver_hourly_stats": 1, "driver_hourly_stats-vectors": 1}
        for name in names:
            theirs = drivers.seen["values"][name]
            assert plain["values"][name] == [*theirs, theirs[0]], name
        present, null, missing, too_old = 1, 2, 3, 4
        assert plain["statuses"]["acc_rate"] == [present, present, too_old, missing, present]
        assert plain["statuses"]["conv_rate"] == [present, null, too_old, missing, present]
        assert plain["values"]["driver_id"] == twice
        assert plain["times_us"]["city"][:2] == [drivers.seen["event_time_us"]] * 2
        assert full["names"] == ["anything", "driver_hourly_stats__conv_rate", "driver_hourly_stats__acc_rate"]
        assert set(by_set["names"]) == {"driver", *names}
        assert by_set["values"]["car"] == drivers.seen["values"]["car"]
        assert wrong["code"] == unknown["code"] == "NOT_FOUND"
        assert "mine" in unknown["error"]
        assert odd["code"] == "INVALID_ARGUMENT"
    async with service(redis_url, "", postgres_dsn, views) as running:
        [down] = await running.asked_by_feast({"features": features, "entities": {"driver_id": ENTITIES}})
        assert down["code"] == "UNAVAILABLE"
