"""What the features benchmark runs on: one Redis, one registry, and two real feature-retrieval processes, with and without a near cache."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import numpy.typing as npt

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.local.postgres import EmbeddedPostgres
from plait.local.redis import EmbeddedRedis
from plait.registry.manifests import Manifest
from plait.registry.records import Snapshot
from plait.registry.store import Store
from plait_bench import features_data
from plait_bench.features_data import Shape, Values
from plait_bench.processes import ServerProcess, cpu_seconds

TENANT: Final = "default"
BATCH_ROWS: Final = 1000
_PREFIX: Final = "PLAIT_FEATURE_RETRIEVAL_"
_MESSAGE_BYTES: Final = 64 * 1024 * 1024
_CHANNEL: Final = (("grpc.max_receive_message_length", _MESSAGE_BYTES), ("grpc.max_send_message_length", _MESSAGE_BYTES))


class OwnFeatures(ServerProcess):
    """One `python -m feature_retrieval`; `settings` by name without prefix, for example NEAR_CACHE__MAX_BYTES."""

    def __init__(self, folder: Path, *, core: int, settings: Mapping[str, str], name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._port_file = folder / "port.json"
        self.token = secrets.token_hex(16)
        values = {
            "RPC__PORT_FILE": str(self._port_file),
            "RPC__SERVICE_TOKEN": self.token,
            "RPC__MAX_MESSAGE_BYTES": str(_MESSAGE_BYTES),
            "TELEMETRY__LOG_LEVEL": "warning",
            **settings,
        }
        env = {k: v for k, v in os.environ.items() if not k.startswith(_PREFIX)} | {_PREFIX + k: v for k, v in values.items()}
        super().__init__(name, [sys.executable, "-m", "feature_retrieval"], core=core, log=folder / "service.log", env=env)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call must carry."""
        return (("x-plait-service-token", self.token),)

    def wait(self, timeout_s: float = 60.0) -> None:
        """Return once it serves. Raises Unavailable (BENCH_SERVER_FAILED)."""
        give_up_s = time.monotonic() + timeout_s
        while not self._port_file.exists():
            self.check()
            if time.monotonic() > give_up_s:
                raise self.failed("was not ready in time")
            time.sleep(0.05)

    @property
    def address(self) -> str:
        """host:port."""
        return str(json.loads(self._port_file.read_text(encoding="utf-8"))["rpc"])

    def channel(self) -> grpc.Channel:
        """Return a blocking channel to it."""
        return grpc.insecure_channel(self.address, options=_CHANNEL)

    def aio_channel(self) -> grpc.aio.Channel:
        """Return an asyncio channel to it."""
        return grpc.aio.insecure_channel(self.address, options=_CHANNEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything that runs. `cached` has a near cache, `plain` none; both serve the same Redis."""

    folder: Path
    redis: EmbeddedRedis
    snapshot: Snapshot
    plain: OwnFeatures
    cached: OwnFeatures

    @property
    def password(self) -> str:
        """Of the Redis."""
        return self.redis.url.partition("://:")[2].rpartition("@")[0]

    def redis_cpu_s(self) -> float:
        """Return the CPU seconds Redis has used so far."""
        return sum(cpu_seconds([self.redis.child.pid]))


@asynccontextmanager
async def world(folder: Path, server_core: int, shapes: Sequence[Shape]) -> AsyncIterator[World]:
    """Start it all: the servers share one core, so that the other is the callers'."""
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(EmbeddedRedis(log=folder / "redis.log"))
        os.sched_setaffinity(redis.child.pid, {server_core})
        postgres = await stack.enter_async_context(EmbeddedPostgres(log=folder / "postgres.log"))
        dsn = postgres.create_database("bench")
        async with await Store.open(dsn) as store:
            await store.migrate()
            await store.apply([Manifest(record=record) for record in features_data.records(shapes)], actor="bench", reason="")
            snapshot = await store.snapshot()
        common = {"REDIS__URL": redis.url, "REGISTRY__DSN": dsn}
        plain = OwnFeatures(folder / "plain", core=server_core, settings=common | {"NEAR_CACHE__MAX_BYTES": "0"}, name="feature-retrieval")
        stack.callback(plain.stop)
        cached = OwnFeatures(folder / "cached", core=server_core, settings=common, name="feature-retrieval with near cache")
        stack.callback(cached.stop)
        plain.wait()
        cached.wait()
        yield World(folder=folder, redis=redis, snapshot=snapshot, plain=plain, cached=cached)


def batch(view: str, ids: list[str], values: Values, event_times_us: list[int], sequences: list[int] | None = None) -> pb.FeatureBatch:
    """Return a FeatureBatch of [ids, columns] float32."""
    made = pb.FeatureBatch(feature_view=view, event_times_us=event_times_us, sequences=sequences)
    made.ids.string_ids.extend(ids)
    names = [f"f{n}" for n in range(values.shape[1])]
    made.columns.add(features=names, dtype=types_pb2.DATA_TYPE_FLOAT32, data=values.tobytes())
    return made


def batches(view: str, ids: list[str], values: Values, now_us: int) -> list[pb.IngestFeaturesRequest]:
    """Return rows as batches of BATCH_ROWS, all of one event time."""
    return [
        pb.IngestFeaturesRequest(
            batch_id=first, batch=batch(view, ids[first : first + BATCH_ROWS], values[first : first + BATCH_ROWS], [now_us])
        )
        for first in range(0, len(ids), BATCH_ROWS)
    ]


def read_request(feature_set: str, ids: list[str], *, with_times: bool = False) -> pb.GetFeaturesRequest:
    """Return a GetFeaturesRequest for items."""
    request = pb.GetFeaturesRequest(feature_set=feature_set, include_event_times=with_times)
    request.entities.add(entity_type=features_data.ENTITY).ids.string_ids.extend(ids)
    return request


def tensor_of(response: pb.GetFeaturesResponse) -> Values:
    """Return the answer's only tensor, [ids, columns], without a copy."""
    [tensor] = response.tensors
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))


def times_of(response: pb.GetFeaturesResponse) -> npt.NDArray[np.int64]:
    """Return the event times of the answer's only view, µs since the epoch, 0 where there is no row."""
    [view] = response.views
    return np.frombuffer(view.event_times_us, "<i8")


def stub_of(channel: Any) -> Any:
    """Return a stub; blocking or asyncio, as the channel is."""
    return pb_grpc.FeatureRetrievalServiceStub(channel)
