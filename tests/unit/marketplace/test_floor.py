"""What the producer writes through the service, the floor scores as the model does on features computed offline."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import redis
import torch
from pydantic import SecretStr

from feature_retrieval.app import open_service
from feature_retrieval.erasure_guard import LOADED_KEY
from feature_retrieval.settings import FeatureRetrievalSettings, RowStoreSettings
from marketplace import manifests, producer, train
from marketplace.data import Dataset
from marketplace.features import Features
from marketplace.floor import Floor
from plait.registry import last_known_good
from plait.registry.manifests import load
from plait.registry.records import ApiKey, Snapshot
from plait.registry.resources import snapshot_of
from plait.rpc.process import Tasks
from plait.settings import RegistrySettings, RpcSettings

SECRET = "a-test-key"


def committed() -> Snapshot:
    """The registry as the committed views and feature set make it."""
    found = load([manifests.FOLDER / "feature-views.yaml", manifests.FOLDER / "feature-set.yaml"])
    key = ApiKey(id="k", tenant="default", sha256=hashlib.sha256(SECRET.encode()).hexdigest())
    return snapshot_of(1, [manifest.record for manifest in found], [key])


@asynccontextmanager
async def feature_retrieval(redis_url: str, registry: Path) -> AsyncIterator[str]:
    """The whole service on a free port; yields its address."""
    last_known_good.write(registry, committed())
    with redis.Redis.from_url(redis_url) as client:
        client.set(LOADED_KEY, 0)  # there is no Postgres to ask which entities were erased
    settings = FeatureRetrievalSettings(
        rpc=RpcSettings(grace_s=5),
        redis=RowStoreSettings(url=SecretStr(redis_url)),
        registry=RegistrySettings(dsn=SecretStr("postgresql://plait@127.0.0.1:1/none"), last_known_good=registry),
    )
    async with AsyncExitStack() as stack:
        tasks = Tasks(await stack.enter_async_context(asyncio.TaskGroup()))
        stack.callback(tasks.stop)
        server = await open_service(settings, stack, tasks)
        await server.start()
        yield server.address
        await server.drain()


async def test_online_equals_offline(redis_url: str, tmp_path: Path, data: Dataset, features: Features, trained: Any) -> None:
    rows: list[int] = []
    async with feature_retrieval(redis_url, tmp_path / "registry.json") as address, grpc.aio.insecure_channel(address) as channel:
        written = await producer.replay(channel, SECRET, data, features, rows.append)
        again = await producer.replay(channel, SECRET, data, features)
    assert written.rows == sum(rows) == producer.row_count(data)
    # Batches are written concurrently, so a row may come after its entity's next one and then changes nothing.
    assert 2 * (len(data.user_ids) + len(data.item_ids)) <= written.applied <= written.rows
    assert (again.rows, again.applied) == (written.rows, 0)  # a replay changes nothing
    assert written.seconds > 0

    folder = train.export(trained.model, data, features, tmp_path / "artifact", name="r", feature_set="f")
    floor = Floor(redis_url, committed(), folder / "model.pt")
    try:
        for user in (0, 17, len(data.user_ids) - 1):
            items = random.Random(user).sample(range(len(data.item_ids)), 25)  # noqa: S311
            scores = floor.rank(data.user_ids[user], [data.item_ids[i] for i in items])
            who, what = np.array([user]), np.array(items)
            with torch.inference_mode():
                expected = trained.model(
                    torch.from_numpy(features.user(who, features.user_behaviour.latest(who))),
                    torch.from_numpy(features.item(what, features.item_stats.latest(what))),
                    torch.tensor([0, len(items)]),
                )
            assert scores.dtype == np.float32
            torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-5, atol=1e-6)
    finally:
        floor.close()
