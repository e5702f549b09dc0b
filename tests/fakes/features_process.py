"""feature-retrieval as the process runs it, on a real Redis and a real PostgreSQL, and the command line beside it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from pydantic import SecretStr

from feature_retrieval.app import open_service
from feature_retrieval.settings import FeatureRetrievalSettings, IngestionSettings, PrivacySettings, RowStoreSettings
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.registry.manifests import Manifest
from plait.registry.records import Record
from plait.registry.store import Store
from plait.rpc.process import Tasks
from plait.rpc.server import RpcServer
from plait.settings import RegistrySettings, RpcSettings, TelemetrySettings

PRIVACY_KEY = "p" * 32


@dataclass(frozen=True)
class Ended:
    """What a command left."""

    exit_code: int
    stdout: str
    stderr: str


class FeaturesProcess:
    """A running service: `stub` to call it, `registry` to change its world, `plait` to run the command line against it."""

    def __init__(self, server: RpcServer, stub: Any, registry: Store, dsn: str, key: str) -> None:
        self.server = server
        self.address = address = server.address
        self.stub = stub
        self.registry = registry
        self.key = key
        self.metadata = (("authorization", f"Bearer {key}"),)
        self.env = {"PLAIT_FEATURES_ADDRESS": address, "PLAIT_POSTGRES_DSN": dsn, "PLAIT_API_KEY": key, "COLUMNS": "400", "TERM": "dumb"}

    async def plait(self, *words: object, **env: str) -> Ended:
        """Run `plait features …` in a process of its own."""
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "plait.cli", "features", *map(str, words)),
            env={**os.environ, **self.env, "NO_COLOR": "1", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        stdout, stderr = await child.communicate()
        return Ended(child.returncode or 0, stdout.decode(), stderr.decode())

    async def good(self, *words: object) -> Any:
        """Run it with --json and return the document."""
        ended = await self.plait(*words, "--json")
        assert ended.exit_code == 0, ended.stderr
        return json.loads(ended.stdout)

    async def write(self, view: str, rows: Sequence[tuple[str, int, float]], **more: Any) -> Any:
        """Stream (id, event time µs, value of feature "a")."""
        batch = pb.FeatureBatch(feature_view=view, event_times_us=[at_us for _, at_us, _ in rows], **more)
        batch.ids.string_ids.extend(entity for entity, _, _ in rows)
        batch.columns.add(features=["a"], dtype=11, data=np.array([value for _, _, value in rows], np.float32).tobytes())  # type: ignore[arg-type]
        return await self.stub.WriteFeatures(pb.WriteFeaturesRequest(batch=batch), metadata=self.metadata, timeout=20)

    async def read(self, feature_set: str, ids: Sequence[str]) -> list[float]:
        """Return the first column of a set's first tensor."""
        request = pb.GetFeaturesRequest(feature_set=feature_set, entities=[{"entity_type": "item", "ids": {"string_ids": ids}}])  # type: ignore[list-item]
        answer = await self.stub.GetFeatures(request, metadata=self.metadata, timeout=20)
        found: list[float] = np.frombuffer(answer.tensors[0].data, np.float32).reshape(len(ids), -1)[:, 0].tolist()
        return found


@asynccontextmanager
async def features_process(
    redis_url: str, dsn: str, records: Sequence[Record], *, telemetry: TelemetrySettings | None = None
) -> AsyncIterator[FeaturesProcess]:
    """Run it."""
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(await Store.open(dsn))
        await registry.migrate()
        await registry.apply([Manifest(record=record) for record in records], actor="test")
        _, key = await registry.create_key("default", ["features", "admin"], actor="test")
        settings = FeatureRetrievalSettings(
            rpc=RpcSettings(grace_s=5),
            redis=RowStoreSettings(url=SecretStr(redis_url)),
            registry=RegistrySettings(dsn=SecretStr(dsn)),
            ingestion=IngestionSettings(ack="applied"),
            privacy=PrivacySettings(key=SecretStr(PRIVACY_KEY)),
            telemetry=telemetry or TelemetrySettings(),
        )
        tasks = Tasks(await stack.enter_async_context(asyncio.TaskGroup()))
        stack.callback(tasks.stop)
        server = await open_service(settings, stack, tasks)
        stack.callback(server.tracing.close)
        await server.start()
        stack.push_async_callback(server.drain)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        yield FeaturesProcess(server, pb_grpc.FeatureRetrievalServiceStub(channel), registry, dsn, key)
