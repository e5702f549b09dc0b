"""Our rows as Feast's answers: every type exactly, nulls and absent rows as such, and no more cells than a process can bear."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tests.unit.feature_retrieval.feast.test_asking import request

from feature_retrieval.batch_encoding import Encoder
from feature_retrieval.feast import serving
from feature_retrieval.feast.serving import Serving
from feature_retrieval.near_cache import NearCache
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.row_codec import KeySpace, RowCodec
from feature_retrieval.store.rows import Read
from feature_retrieval.views import Plans
from plait.api.feast.serving import serving_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.errors import DeadlineExceeded, InvalidArgument, Unavailable
from plait.registry.records import Entity, Feature, FeatureSchema, FeatureView, Snapshot
from plait.registry.shapes import wire_type
from plait.rpc.call import Call, enter
from plait.rpc.deadline import Deadline

FEATURES = (
    Feature(name="b", dtype="bool"),
    Feature(name="i8", dtype="int8"),
    Feature(name="i64", dtype="int64"),
    Feature(name="f16", dtype="float16"),
    Feature(name="f32", dtype="float32", default=7.0),
    Feature(name="f64", dtype="float64"),
    Feature(name="at", dtype="timestamp"),
    Feature(name="word", dtype="string", vocabulary=("hot",)),
    Feature(name="list", dtype="int32", max_length=3, pad=-1),
)
CURRENT = (*FEATURES, Feature(name="young", dtype="int64", default=1))
VIEW = FeatureView(
    name="v",
    entity=Entity(type="item"),
    features=CURRENT,
    max_age_s=3600,
    schemas=(FeatureSchema(id=1, features=FEATURES), FeatureSchema(id=2, features=CURRENT)),
)
VECTORS = FeatureView(
    name="w", entity=Entity(type="item"), features=(Feature(name="e", width=2), Feature(name="q", dtype="int8", width=2, scale=0.5))
)
PLANS = Plans(Snapshot(feature_views={"v": VIEW, "w": VECTORS}))
FULL = {
    "b": True, "i8": -3, "i64": 2**60 + 1, "f16": 1.5, "f32": 0.1, "f64": 0.1, "at": 1_700_000_000_000_000, "word": "any word", "list": [4, 5],
}  # fmt: skip


def stored(view: FeatureView, values: dict[str, Any], schema: int = -1, at_s: float | None = None) -> bytes:
    """Return one row as it lies in Redis; what is not given is null."""
    features = (view.schemas or (FeatureSchema(id=1, features=view.features),))[schema]
    batch = features_pb.FeatureBatch(event_times_us=[int((at_s or time.time()) * 1e6)])
    for feature in features.features:
        if feature.name not in values:
            continue
        value, wire = values[feature.name], wire_type(feature)
        data = value.encode() if isinstance(value, str) else np.array(value, wire.numpy).tobytes()
        column = batch.columns.add(features=[feature.name], dtype=wire.number, data=data)  # type: ignore[arg-type]
        if feature.dtype == "string" or feature.max_length:
            column.offsets = np.array([0, len(data)], "<u4").tobytes()
    encoder = Encoder(view, RowCodec(features))
    encoded = encoder.encode(batch, [""])
    assert not encoded.refused
    return encoder.codec.pack(encoded.block, encoded.tails)[0]


class Store:
    """Rows by id; keys in `late` and `failed` get no answer."""

    def __init__(self, rows: dict[tuple[str, str], bytes], late: Sequence[str] = (), failed: Sequence[str] = ()) -> None:
        spaces = {view.name: KeySpace.of("t", "item", view.name, 1) for view in (VIEW, VECTORS)}
        self._rows = {spaces[view].keys([entity_id])[0]: row for (view, entity_id), row in rows.items()}
        self._late = {key for space in spaces.values() for key in space.keys(list(late))}
        self._failed = {key for space in spaces.values() for key in space.keys(list(failed))}

    async def read(self, keys: Sequence[bytes], timeout_s: float) -> Read:
        def at(chosen: set[bytes]) -> Any:
            return np.array([n for n, key in enumerate(keys) if key in chosen], np.intp)

        return Read([self._rows.get(key) for key in keys], late=at(self._late), failed=at(self._failed))


async def ask(store: Store, features: Sequence[str], ids: list[str]) -> dict[str, tuple[list[Any], list[int]]]:
    """Return values (None where a Value holds nothing) and statuses by name."""
    enter(Call(method="m", tenant="t", deadline=Deadline.after(10)))
    servicer = Serving(Retrieval(store, NearCache(0, 1.0), lambda: PLANS), lambda: PLANS)
    answer = await servicer.GetOnlineFeatures(request(features, item=ids), None)
    return {
        name: ([_plain(value) for value in vector.values], list(vector.statuses))
        for name, vector in zip(answer.metadata.feature_names.val, answer.results, strict=True)
    }


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("val")
    if kind is None:
        return None
    found = getattr(value, kind)
    return (kind, list(found.val)) if hasattr(found, "val") else (kind, found)


ALL = [f"v:{feature.name}" for feature in CURRENT]


async def test_every_type_exactly() -> None:
    rows = {("v", "i"): stored(VIEW, {**FULL, "young": 9}), ("w", "i"): stored(VECTORS, {"e": [1, -2], "q": [3, -4]})}
    found = await ask(Store(rows), [*ALL, "w:e", "w:q"], ["i", "i"])
    assert {name: values for name, (values, _) in found.items()} == {
        "item": [("string_val", "i")] * 2,
        "b": [("bool_val", True)] * 2,
        "i8": [("int32_val", -3)] * 2,
        "i64": [("int64_val", 2**60 + 1)] * 2,
        "f16": [("float_val", 1.5)] * 2,
        "f32": [("float_val", float(np.float32(0.1)))] * 2,
        "f64": [("double_val", 0.1)] * 2,
        "at": [("unix_timestamp_val", 1_700_000_000)] * 2,
        "word": [("string_val", "any word")] * 2,
        "list": [("int32_list_val", [4, 5])] * 2,
        "young": [("int64_val", 9)] * 2,
        "e": [("float_list_val", [1, -2])] * 2,
        "q": [("float_list_val", [1.5, -2])] * 2,
    }
    assert {tuple(statuses) for _, statuses in found.values()} == {(pb.PRESENT, pb.PRESENT)}


async def test_nulls_absent_and_old_rows_are_told_apart_and_no_default_is_passed_off() -> None:
    old = time.time() - 7200
    rows = {
        ("v", "some"): stored(VIEW, {"f32": 0.5, "list": []}),
        ("v", "older schema"): stored(VIEW, FULL, schema=0),
        ("v", "old"): stored(VIEW, {"f32": 0.25}, at_s=old),
    }
    found = await ask(Store(rows), ALL, ["some", "older schema", "old", "never"])
    assert found["f32"] == (
        [("float_val", 0.5), ("float_val", float(np.float32(0.1))), ("float_val", 0.25), None],
        [pb.PRESENT, pb.PRESENT, pb.OUTSIDE_MAX_AGE, pb.NOT_FOUND],
    )
    assert found["young"] == ([None] * 4, [pb.NULL_VALUE, pb.NULL_VALUE, pb.OUTSIDE_MAX_AGE, pb.NOT_FOUND])
    assert found["list"][0] == [("int32_list_val", []), ("int32_list_val", [4, 5]), None, None]
    assert found["word"][0] == [None, ("string_val", "any word"), None, None]


async def test_what_is_not_known_fails_the_call() -> None:
    with pytest.raises(Unavailable, match="retry"):
        await ask(Store({}, failed=["i"]), ["v:b"], ["i", "j"])
    with pytest.raises(DeadlineExceeded, match="in time"):
        await ask(Store({}, late=["i"]), ["v:b"], ["i", "j"])


async def test_cells_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MAX_CELLS", 3)
    assert len(await ask(Store({}), ["v:b", "v:i8"], ["i"])) == 3
    with pytest.raises(InvalidArgument, match="call GetFeatures"):
        await ask(Store({}), ["v:b", "v:i8"], ["i", "j"])
