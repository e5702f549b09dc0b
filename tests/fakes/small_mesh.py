"""A whole mesh of real processes with the small ranker in it, for tests that drive plait over its public API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.fakes import small_ranker

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.client import Ranking, RankingClient
from plait.errors import NotFound, PlaitError, Unavailable
from plait.local.mesh import Mesh
from plait.registry.manifests import pin_artifacts
from plait.registry.store import Store

ROUTE = "home"
USER = {"age": 41.0, "active": 1.0}
ITEM_COUNT = 500
PATIENCE_S = 30.0


class SmallMesh:
    """What a test needs of a running mesh. `items` maps an item's id to its features, in the order of the model's input."""

    def __init__(self, mesh: Mesh, folder: Path, items: Mapping[str, list[float]]) -> None:
        self.mesh = mesh
        self.folder = folder
        self.items = items

    @property
    def endpoints(self) -> Any:
        """Where everything is."""
        return self.mesh.endpoints

    @property
    def artifact(self) -> Path:
        """The folder of the model that serves."""
        return self.folder / "ranker-1"

    def client(self, **options: Any) -> RankingClient:
        """Return a client with the mesh's key."""
        return RankingClient(self.endpoints.router, **{"api_key": self.endpoints.api_key, **options})

    async def apply(self, *records: Any) -> None:
        """Do what `plait apply` does."""
        async with await Store.open(self.endpoints.postgres_dsn) as store:
            await store.apply(pin_artifacts(small_ranker.manifests(*records)), actor="test", reason="")

    async def write(self, view: str, ids: Sequence[str], rows: Sequence[Mapping[str, float]]) -> None:
        """Write rows through the service."""
        names = list(rows[0])
        batch = pb.FeatureBatch(feature_view=view, event_times_us=[int(time.time() * 1e6)])
        batch.ids.string_ids.extend(ids)
        values = np.array([[row[name] for name in names] for row in rows], "<f4")
        batch.columns.add(features=names, dtype=types_pb2.DATA_TYPE_FLOAT32, data=values.tobytes())
        async with grpc.aio.insecure_channel(self.endpoints.feature_retrieval) as channel:
            stub: Any = pb_grpc.FeatureRetrievalServiceStub(channel)
            metadata = (("x-api-key", self.endpoints.api_key),)
            answer = await stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=metadata, timeout=20)
        assert answer.applied == len(ids), answer

    async def rank_until(self, client: RankingClient, wanted: Any, *, user: str = "u1", route: str = ROUTE) -> Ranking:
        """Rank again and again until `wanted(ranking)`; errors that pass by themselves count as not yet."""
        give_up = time.monotonic() + PATIENCE_S
        last: object = None
        while time.monotonic() < give_up:
            try:
                last = ranking = await client.rank(route, user, list(self.items)[:20], timeout_s=5)
            except (Unavailable, NotFound) as error:
                last = error
            else:
                if wanted(ranking):
                    return ranking
            await asyncio.sleep(0.02)
        raise AssertionError(f"did not happen within {PATIENCE_S} s; last: {last}")

    async def error_until(self, client: RankingClient, wanted: Any, *, route: str = ROUTE) -> PlaitError:
        """Rank again and again until it fails with an error that is `wanted(error)`."""
        give_up = time.monotonic() + PATIENCE_S
        last: object = None
        while time.monotonic() < give_up:
            try:
                last = await client.rank(route, "u1", list(self.items)[:20], timeout_s=5)
            except PlaitError as error:
                last = error
                if wanted(error):
                    return error
            await asyncio.sleep(0.02)
        raise AssertionError(f"did not happen within {PATIENCE_S} s; last: {last}")


@asynccontextmanager
async def small_mesh(folder: Path, environment: Mapping[str, str], **options: Any) -> AsyncIterator[SmallMesh]:
    """Run a mesh with rows, model and route in it, warm. `environment` is added to every service's; `options` go to Mesh."""
    generator = np.random.default_rng(0)
    items = {f"i{n}": row for n, row in enumerate(generator.random((ITEM_COUNT, 3), np.float32).tolist())}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        async with Mesh(folder / "state", **options) as mesh:
            world = SmallMesh(mesh, folder, items)
            small_ranker.publish(world.artifact)
            await world.apply(
                small_ranker.USERS,
                small_ranker.ITEMS,
                small_ranker.FEATURES,
                small_ranker.model("ranker", world.artifact),
                small_ranker.route(ROUTE),
            )
            await _written(world)
            async with world.client() as client:
                await world.rank_until(client, lambda ranking: not ranking.degraded_reasons)
            yield world


async def _written(world: SmallMesh) -> None:
    """Write every row, as soon as feature-retrieval has seen the views."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            await world.write("user-profile", ["u1"], [USER])
        except grpc.aio.AioRpcError:
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(0.02)
        else:
            break
    rows = [dict(zip(("price", "views", "sold"), row, strict=True)) for row in world.items.values()]
    await world.write("item-stats", list(world.items), rows)
