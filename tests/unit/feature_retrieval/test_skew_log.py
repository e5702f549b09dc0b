"""The skew log: every request of a sampled key, the very bytes that were answered, and never in anybody's way."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from feature_retrieval.ingestion import Ingestion
from feature_retrieval.near_cache import NearCache
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.row_codec import encode_id, entity_prefix
from feature_retrieval.skew_log import SkewLog
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.views import Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import served_row_pb2
from plait.api.types.v1 import types_pb2
from plait.registry.records import Entity, Epochs, Feature, FeatureSet, FeatureView, ModelInput, Snapshot, Transform
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline

NOW_S = 1_700_000_000.0
ITEM = FeatureView(
    name="stats", entity=Entity(type="item"), version=2, features=(Feature(name="a", default=1), Feature(name="b")), max_age_s=60
)
USER = FeatureView(name="profile", entity=Entity(type="user", key="int64"), features=(Feature(name="age", default=30),))
HOME = FeatureSet(
    name="home",
    transforms=(Transform(name="sum", entity="item", expression="{stats:a} + {profile:age}", default=0),),
    inputs=(
        ModelInput(name="item", entity="item", features=("stats:b", "$transform:sum")),
        ModelInput(name="more", entity="item", features=("stats:a",), dtype="int32"),
        ModelInput(name="user", entity="user", features=("profile:age",)),
    ),
)
SNAPSHOT = Snapshot(
    revision=8, feature_views={"stats": ITEM, "profile": USER}, feature_sets={"home": HOME},
    epochs={("shop", "stats", 2): Epochs(serving=5)},
)  # fmt: skip


class World:
    def __init__(self, url: str, folder: Path, *, share: float, near_cache: bool = True, **limits: Any) -> None:
        self.store = RedisStore(url)
        self.now_s = NOW_S
        self.log = log_of(folder, share, clock=lambda: self.now_s, **limits)
        cache = NearCache(1 << 20 if near_cache else 0, 60)
        cache.connected([entity_prefix("shop", t) for t in ("item", "user")])
        plans = Plans(SNAPSHOT)
        self.page = Retrieval(self.store, cache, lambda: plans, clock=lambda: self.now_s, note=self.log.note)

    async def write(self) -> None:
        batch = pb.FeatureBatch(feature_view="stats", event_times_us=[int((NOW_S - 9) * 1e6)], ids={"string_ids": ["i0", "i1"]})
        batch.columns.add(features=["a", "b"], dtype=types_pb2.DATA_TYPE_FLOAT32, data=b"\0\0\x80?\0\0\0@" * 2, null_bits=b"\2")
        await Ingestion(self.store, lambda: SNAPSHOT, clock=lambda: NOW_S).write(batch, pb.WriteFeaturesResponse(), call())

    async def read(self, items: list[str], request_id: str = "r") -> Any:
        request = pb.GetFeaturesRequest(feature_set="home", include_event_times=True)
        request.entities.add(entity_type="item").ids.string_ids.extend(items)
        request.entities.add(entity_type="user").ids.int64_ids.append(7)
        response = pb.GetFeaturesResponse()
        await self.page.get_features(request, response, call(request_id))
        return response


def log_of(
    folder: Path, share: float, *, clock: Any, max_file_bytes: int = 1 << 20, max_file_s: float = 100, queue_rows: int = 1000
) -> SkewLog:
    return SkewLog(folder, share=share, max_file_bytes=max_file_bytes, max_file_s=max_file_s, queue_rows=queue_rows, clock=clock)


def call(request_id: str = "r") -> Call:
    return Call(method="GetFeatures", tenant="shop", request_id=request_id, deadline=Deadline.after(20))


def logged(folder: Path) -> list[Any]:
    """Every row of every file, in order."""
    rows = []
    for path in sorted(folder.glob("served-*.rows"), key=lambda p: int(p.stem.rpartition("-")[2])):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = shift = 0
            while True:
                byte = data[at]
                size |= (byte & 0x7F) << shift
                at, shift = at + 1, shift + 7
                if byte < 0x80:
                    break
            rows.append(served_row_pb2.ServedRow.FromString(data[at : at + size]))
            at += size
    return rows


@pytest_asyncio.fixture
async def world(redis_url: str, tmp_path: Path) -> AsyncIterator[World]:
    made = World(redis_url, tmp_path / "log", share=1)
    yield made
    await made.store.close()


async def test_the_bytes_are_those_of_the_answer(world: World, tmp_path: Path) -> None:
    await world.write()
    for _ in range(2):  # from the store, and from the near cache
        answer = await world.read(["i1", "none", "i0", "i1"], "r7")
    world.log.close()
    rows = logged(tmp_path / "log")
    assert len(rows) == 2 * (4 + 1)
    items, [user] = rows[5:9], rows[9:]
    assert [list(row.id.string_ids) for row in items] == [["i1"], ["none"], ["i0"], ["i1"]]
    for name in ("item", "more"):
        whole = next(t for t in answer.tensors if t.name == name)
        told = [next(t for t in row.tensors if t.name == name) for row in items]
        assert b"".join(t.data for t in told) == whole.data
        assert {(t.dtype, tuple(t.shape)) for t in told} == {(whole.dtype, (1, whole.shape[1]))}
    report = answer.views[0]
    assert bytes(row.views[0].status for row in items) == report.statuses
    assert [row.views[0].event_time_us for row in items] == [int((NOW_S - 9) * 1e6), 0, int((NOW_S - 9) * 1e6), int((NOW_S - 9) * 1e6)]
    [view] = items[0].views
    assert (view.feature_view, view.view_version, view.epoch) == ("stats", 2, 5)
    first = items[0]
    assert (first.served_at_us, first.tenant, first.feature_set, first.registry_revision) == (int(NOW_S * 1e6), "shop", "home", 8)
    assert (first.request_id, first.entity_type, [t.name for t in first.tensors]) == ("r7", "item", ["item", "more"])
    assert (list(user.id.int64_ids), user.entity_type, [t.name for t in user.tensors]) == ([7], "user", ["user"])
    assert repr(world.log) == "<SkewLog waiting=0/1000 {'written': 10}>"


async def test_all_requests_of_a_sampled_key_and_none_of_another(redis_url: str, tmp_path: Path) -> None:
    w = World(redis_url, tmp_path, share=0.3)
    ids = [f"i{n}" for n in range(100)]
    for _ in range(3):
        await w.read(ids)
        await w.read(ids[50:])
    w.log.close()
    await w.store.close()
    sampled = [i for i in ids if zlib.crc32(encode_id(i)) < 0.3 * 2**32]
    assert 10 < len(sampled) < 60
    seen = [row.id.string_ids[0] for row in logged(tmp_path) if row.entity_type == "item"]
    assert seen == ([*sampled, *(i for i in sampled if i in ids[50:])]) * 3


async def test_a_refused_answer_is_not_logged(world: World, tmp_path: Path) -> None:
    request = pb.GetFeaturesRequest(feature_set="home", policy=types_pb2.MISSING_POLICY_FAIL)
    request.entities.add(entity_type="item").ids.string_ids.append("none")
    request.entities.add(entity_type="user").ids.int64_ids.append(7)
    with pytest.raises(Exception, match="not present"):
        await world.page.get_features(request, pb.GetFeaturesResponse(), call())
    world.log.close()
    assert logged(tmp_path / "log") == []


async def test_a_full_queue_drops_and_counts(redis_url: str, tmp_path: Path) -> None:
    w = World(redis_url, tmp_path, share=1, queue_rows=5)
    await w.read(["a", "b", "c"])  # and the user
    await w.read(["a", "b", "c"])
    assert (repr(w.log), w.log.outcomes["dropped"]) == ("<SkewLog waiting=5/5 {'dropped': 3}>", 3)
    await w.log.flush()
    await w.read(["a"])
    w.log.close()
    assert (w.log.outcomes["written"], len(logged(tmp_path))) == (7, 7)
    await w.store.close()


async def test_files_are_finished_by_size_and_by_age(redis_url: str, tmp_path: Path) -> None:
    w = World(redis_url, tmp_path, share=1, max_file_bytes=150, max_file_s=10)
    await w.read(["a", "b", "c"])
    await w.log.flush()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) > 1
    before = {path.name for path in tmp_path.iterdir()}
    await w.read(["d"])
    w.now_s += 11
    await w.log.flush()
    assert len({path.name for path in tmp_path.iterdir()} - before) >= 1
    w.log.close()
    assert [row.id.string_ids[0] for row in logged(tmp_path) if row.entity_type == "item"] == ["a", "b", "c", "d"]
    await w.store.close()


async def test_a_disk_that_refuses_hurts_nobody(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    w = World(redis_url, tmp_path / "file", share=1)
    await w.read(["a"])
    await w.log.flush()
    await w.read(["a"])
    w.log.close()
    assert w.log.outcomes == {"failed": 4}
    await w.store.close()


async def test_rows_are_written_while_it_runs(redis_url: str, tmp_path: Path) -> None:
    w = World(redis_url, tmp_path, share=1)
    running = asyncio.create_task(w.log.run())
    await w.read(["a"])
    while not w.log.outcomes["written"]:
        await asyncio.sleep(0.01)
    assert len(logged(tmp_path)) == 2
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    w.log.close()
    await w.store.close()
