"""Feast's own online path, in Feast's own environment: told over stdin what to write and read, answering over stdout, a line of JSON each.

Feast reads online features in the caller's process; its server puts HTTP in front of the same call. So this is the faster way to use it.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.infra.offline_stores.file_source import ParquetFormat
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Float32

ROWS_AT_ONCE = 200


class Reader:
    """A feature view per shape in one project on the bench's Redis."""

    def __init__(self, folder: Path, address: str, password: str) -> None:
        self._folder = folder
        self._store = FeatureStore(
            config=RepoConfig(
                project="bench",
                provider="local",
                registry=str(folder / "registry.db"),
                online_store={"type": "redis", "connection_string": f"{address},password={password}"},
                entity_key_serialization_version=3,
            )
        )
        self._services: dict[str, FeatureService] = {}
        self._columns: dict[str, list[str]] = {}

    def write(self, shape: str, ids: list[str], values: str, event_time_s: float) -> dict[str, Any]:
        """Make the view of a shape and write [ids, features] float32 from a .npy file; the seconds it took."""
        block = np.load(values)
        names = [f"f{n}" for n in range(block.shape[1])]
        entity = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)
        source = FileSource(name=shape, path=str(self._folder / "none.parquet"), file_format=ParquetFormat(), timestamp_field="at")
        view = FeatureView(name=shape, entities=[entity], schema=[Field(name=n, dtype=Float32) for n in names], source=source, ttl=None)
        service = FeatureService(name=f"{shape}-set", features=[view])
        self._store.apply([entity, view, service])
        self._services[shape], self._columns[shape] = service, names
        at = datetime.datetime.fromtimestamp(event_time_s, datetime.UTC)
        began = time.perf_counter()
        view = self._store.get_feature_view(shape)
        for first in range(0, len(ids), ROWS_AT_ONCE):
            rows = []
            for entity_id, row in zip(ids[first : first + ROWS_AT_ONCE], block[first : first + ROWS_AT_ONCE].tolist(), strict=True):
                key = EntityKey(join_keys=["item_id"], entity_values=[Value(string_val=entity_id)])
                rows.append((key, {n: Value(float_val=v) for n, v in zip(names, row, strict=True)}, at, None))
            self._store._get_provider().online_write_batch(self._store.config, view, rows, None)
        return {"took_s": time.perf_counter() - began}

    def read(self, shape: str, ids: list[str], *, tensor: bool) -> Any:
        """One `get_online_features`; with `tensor`, as [ids, features] float32."""
        answer = self._store.get_online_features(features=self._services[shape], entity_rows={"item_id": ids})
        if not tensor:
            return answer
        columns = answer.to_dict()
        return np.array([columns[name] for name in self._columns[shape]], np.float32).T

    def answer(self, shape: str, ids: list[str], file: str) -> dict[str, Any]:
        """Save what is read for these ids."""
        np.save(file, self.read(shape, ids, tensor=True))
        return {}

    def round(self, shape: str, asked: list[list[str]], seconds: float, tensor: bool) -> dict[str, Any]:
        """Read again and again; the seconds each call took."""
        taken: list[float] = []
        give_up = time.perf_counter() + seconds
        at = 0
        while not taken or time.perf_counter() < give_up:
            ids = asked[at % len(asked)]
            began = time.perf_counter()
            self.read(shape, ids, tensor=tensor)
            taken.append(time.perf_counter() - began)
            at += 1
        return {"taken_s": taken}


def commands() -> Iterator[dict[str, Any]]:
    """Yield what is asked until stdin ends."""
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Serve until stdin ends. What Feast prints goes to stderr: stdout is ours."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = json.loads(sys.stdin.readline())
    reader = Reader(Path(given["folder"]), given["address"], given["password"])
    for command in commands():
        what = command.pop("do")
        out.write(json.dumps(getattr(reader, what)(**command)) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
