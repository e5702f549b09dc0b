"""Every type from a batch to a tensor, through the real store and the near cache, against a model in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.feature_world import statuses, tensor
from tests.unit.feature_retrieval.test_batch_encoding import expected, send, tables

from feature_retrieval.ingestion import Ingestion
from feature_retrieval.near_cache import NearCache
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.row_codec import entity_prefix
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.views import Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.local.redis import EmbeddedRedis
from plait.registry.records import Feature, FeatureSchema, FeatureSet, FeatureView, ModelInput, Snapshot
from plait.registry.references import width_of
from plait.registry.shapes import stand_in
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline

NOW_S = 1_700_000_000.0
CALL = Call(method="WriteFeatures", tenant="shop", deadline=Deadline.after(3600))
NO_DEFAULT = {"string": 0, "bool": 0, "timestamp": 0, "int8": 0, "int16": 0, "int32": 0, "int64": 0}


def cells(feature: Feature, value: Any) -> list[float]:
    """The columns of one cell of a float64 tensor."""
    if value is not None:
        scale = feature.scale or 1
        return [float(v) * scale for v in expected(feature, value)]
    if feature.default is not None:
        return [float(stand_in(feature))] * width_of(feature)
    if feature.max_length:
        return [float(feature.pad)] * feature.max_length
    return [math.nan if feature.scale else float(NO_DEFAULT.get(feature.dtype, math.nan))] * width_of(feature)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[FeatureView, list[list[Any]]]:
    """A view of every type, some with defaults and scales, and its rows."""
    view, rows = draw(tables())
    changed = []
    for feature in view.features:
        default: Any = None
        if draw(st.booleans()):
            default = True if feature.dtype == "bool" else feature.vocabulary[-1] if feature.vocabulary else 1
            default = "any text" if feature.hash_buckets else default
        scale = 0.25 if feature.dtype == "int8" and feature.width and draw(st.booleans()) else 0.0
        changed.append(replace(feature, default=default, scale=scale))
    return replace(view, features=tuple(changed)), rows


async def ask(page: Retrieval, ids: list[str]) -> pb.GetFeaturesResponse:
    request = pb.GetFeaturesRequest(feature_set="all")
    request.entities.add(entity_type="item").ids.string_ids.extend(ids)
    response = pb.GetFeaturesResponse()
    await page.get_features(request, response, Call(method="GetFeatures", tenant="shop", deadline=Deadline.after(20)))
    return response


def batch_of(view: FeatureView, ids: list[str], rows: list[list[Any]]) -> pb.FeatureBatch:
    batch = pb.FeatureBatch(feature_view="any", event_times_us=[int(NOW_S * 1e6)])
    batch.ids.string_ids.extend(ids)
    for at, feature in enumerate(view.features):
        send(batch, feature, [row[at] for row in rows])
    return batch


def snapshot_of(view: FeatureView, asked: FeatureView) -> Snapshot:
    """A registry with a view, and a set of all features of `asked` as one float64 tensor."""
    features = tuple(f"any:{feature.name}" for feature in asked.features)
    feature_set = FeatureSet(name="all", inputs=(ModelInput(name="x", entity="item", features=features, dtype="float64"),))
    return Snapshot(feature_views={"any": view}, feature_sets={"all": feature_set})


def check_answer(response: pb.GetFeaturesResponse, view: FeatureView, rows: list[list[Any] | None]) -> None:
    """Compare an answer with the rows asked for, None where there is none."""
    blank: list[Any] = [None] * len(view.features)
    wanted = [[cell for feature, value in zip(view.features, row or blank, strict=True) for cell in cells(feature, value)] for row in rows]
    np.testing.assert_array_equal(tensor(response, "x"), np.array(wanted, np.float64))
    none = "DEFAULTED" if all(f.default is not None for f in view.features) else "NOT_FOUND"
    assert statuses(response, "any") == [none if row is None else "NULL" if None in row else "PRESENT" for row in rows]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=worlds(), order=st.lists(st.integers(0, 5), min_size=1, max_size=8), data=st.data())
async def test_every_type_reaches_the_tensor(
    redis_server: EmbeddedRedis, made: tuple[FeatureView, list[list[Any]]], order: list[int], data: st.DataObject
) -> None:
    """Some rows were written before some columns were appended, which are null in them."""
    whole, rows = made
    before = data.draw(st.integers(1, len(whole.features)))
    older = data.draw(st.integers(0, len(rows))) if before < len(whole.features) else 0
    old = replace(whole, features=whole.features[:before])
    schemas = (FeatureSchema(id=1, features=old.features), FeatureSchema(id=2, features=whole.features))
    view = replace(whole, schemas=schemas) if older else whole
    rows = [row[:before] + [None] * (len(row) - before) if at < older else row for at, row in enumerate(rows)]
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    store, cache = RedisStore(redis_server.url), NearCache(1 << 20, 300.0)
    cache.connected([entity_prefix("shop", "item")])
    try:
        for written, first, behind in ((old, 0, older), (view, older, len(rows))):
            if first == behind:
                continue
            result, ids = pb.WriteFeaturesResponse(), [f"i{n}" for n in range(first, behind)]
            batch = batch_of(written, ids, [row[: len(written.features)] for row in rows[first:behind]])
            await Ingestion(store, lambda v=written: snapshot_of(v, v), clock=lambda: NOW_S).write(batch, result, CALL)  # type: ignore[misc]
            assert (result.applied, list(result.errors)) == (behind - first, [])
        plans = Plans(snapshot_of(view, whole))
        page = Retrieval(store, cache, lambda: plans, clock=lambda: NOW_S)
        for _ in range(2):  # from Redis, then from the near cache
            response = await ask(page, [f"i{n}" for n in order])
            check_answer(response, whole, [rows[n] if n < len(rows) else None for n in order])
    finally:
        await store.close()
