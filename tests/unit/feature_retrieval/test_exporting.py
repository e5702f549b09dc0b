"""Exports from a real Redis: every row that a reader could read, of every schema, page by page."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from tests.fakes.calls import ADMIN, call_of

from feature_retrieval.exporting import Exporting
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.row_codec import KeySpace
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, PlaitError
from plait.registry.records import Aggregation, Entity, Epochs, Feature, FeatureSchema, FeatureView, Snapshot

A, B = Feature(name="a"), Feature(name="b")
OLD = FeatureView(name="stats", entity=Entity(type="item"), features=(A,), schemas=(FeatureSchema(id=1, features=(A,)),))
NEW = replace(OLD, features=(A, B), schemas=(*OLD.schemas, FeatureSchema(id=2, features=(A, B))))


@pytest_asyncio.fixture
async def store(redis_url: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(redis_url, ack="applied")
    yield store
    await store.close()


async def write(store: RedisStore, view: FeatureView, ids: list[str], values: list[float], feature: str = "a", **more: Any) -> None:
    batch = pb.FeatureBatch(feature_view="stats", event_times_us=[int(time.time() * 1e6)], **more)
    batch.ids.string_ids.extend(ids)
    batch.columns.add(features=[feature], dtype=11, data=np.array(values, np.float32).tobytes())  # type: ignore[arg-type]
    snapshot = Snapshot(feature_views={"stats": view})
    await Ingestion(store, lambda: snapshot).write(batch, pb.WriteFeaturesResponse(), ADMIN)


async def exported(store: RedisStore, view: FeatureView = NEW, call: Any = ADMIN, epochs: Epochs | None = None, **more: Any) -> list[Any]:
    snapshot = Snapshot(feature_views={"stats": view}, epochs={("default", "stats", 1): epochs or Epochs()})
    request = pb.ExportFeaturesRequest(feature_view="stats", **more)
    return [answer async for answer in Exporting(store, lambda: snapshot).export(request, call)]


def rows_of(answers: list[Any]) -> dict[str, float]:
    """The first column's value by id."""
    found: dict[str, float] = {}
    for answer in answers:
        if answer.HasField("batch"):
            values = np.frombuffer(answer.batch.columns[0].data, np.float32).reshape(len(answer.batch.ids.string_ids), -1)[:, 0]
            found |= dict(zip(answer.batch.ids.string_ids, values.tolist(), strict=True))
    return found


async def test_rows_of_every_schema_are_exported_and_what_nobody_can_read_is_not(store: RedisStore) -> None:
    await write(store, OLD, ["old"], [1])
    await write(store, NEW, ["new"], [2])
    space = KeySpace.of("default", "item", "stats", 1)
    await store.write(space.keys(["torn"]), space.mark_keys(["torn"]), [b"\1\0\1\0" + bytes(20)], 0)
    answers = await exported(store)
    assert rows_of(answers) == {"old": 1, "new": 2}
    assert {tuple(a.batch.columns[0].features) for a in answers if a.HasField("batch")} == {("a",), ("a", "b")}
    assert answers[-1].cursor == b""
    assert answers[-1].scanned == answers[-1].total


async def test_an_export_goes_on_at_its_cursor(store: RedisStore) -> None:
    ids = [f"i{n}" for n in range(6000)]
    await write(store, OLD, ids, [1] * 6000)
    snapshot = Snapshot(feature_views={"stats": OLD})
    stream = Exporting(store, lambda: snapshot).export(pb.ExportFeaturesRequest(feature_view="stats"), ADMIN)
    seen: list[Any] = []
    async for answer in stream:
        seen.append(answer)
        if answer.cursor and len(seen) > 4:
            break
    await stream.aclose()
    assert 0 < len(rows_of(seen)) < 6000
    assert not any(answer.cursor for answer in seen if answer.HasField("batch"))  # a page is behind only when all of it is out
    rest = await exported(store, OLD, cursor=seen[-1].cursor)
    assert rows_of(seen).keys() | rows_of(rest).keys() == set(ids)
    assert len(rows_of(rest)) < 6000


@pytest.mark.parametrize(
    ("view", "call", "more", "kind", "reason"),
    [
        (NEW, call_of(), {}, PermissionDenied, "SCOPE_MISSING"),
        (replace(NEW, readers=("rival",)), ADMIN, {}, PermissionDenied, "VIEW_NOT_READABLE"),
        (replace(NEW, aggregation=Aggregation()), ADMIN, {}, FailedPrecondition, "VIEW_IS_AGGREGATED"),
        (NEW, ADMIN, {"epoch": 3}, NotFound, "EPOCH_NOT_FOUND"),
        (NEW, ADMIN, {"view_version": 9}, NotFound, "VIEW_VERSION_NOT_FOUND"),
        (NEW, ADMIN, {"cursor": b"nonsense"}, InvalidArgument, "CURSOR_INVALID"),
    ],
)
async def test_what_is_not_exported(
    store: RedisStore, view: FeatureView, call: Any, more: Any, kind: type[PlaitError], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        await exported(store, view, call, **more)
    assert caught.value.reason == reason


async def test_the_served_epoch_is_exported_unless_another_is_named(store: RedisStore) -> None:
    await write(store, OLD, ["i"], [1])
    space = KeySpace.of("default", "item", "stats", 1, 2)
    [row] = (await store.read(KeySpace.of("default", "item", "stats", 1).keys(["i"]), 5)).rows
    await store.write(space.keys(["other"]), space.mark_keys(["other"]), [row or b""], 0)
    epochs = Epochs(serving=2, previous=0, newest=2)
    assert rows_of(await exported(store, OLD, epochs=epochs)) == {"other": 1}
    assert rows_of(await exported(store, OLD, epochs=epochs, epoch=0)) == {"i": 1}
