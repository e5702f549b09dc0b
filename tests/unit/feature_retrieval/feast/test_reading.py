"""Reading a Feast store in a real Redis: rows as ours, next to our own, and what cannot be read is never made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import redis
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_retrieval.feast.keys import EntityKeys, field_of, time_field_of
from feature_retrieval.feast.reading import FeastRows
from feature_retrieval.row_codec import Id, KeySpace, RowCodec, header
from feature_retrieval.store.rows import Read
from feature_retrieval.views import schemas_of
from plait.api.feast.types import value_pb2 as feast
from plait.errors import Unavailable
from plait.redis.connections import Access
from plait.redis.topologies import Single
from plait.registry.records import Entity, FeastSource, Feature, FeatureView, KeyPart, Snapshot

PAIR = Entity(type="pair", key="composite", parts=(KeyPart(name="b", type="int64"), KeyPart(name="a")))
VIEW = FeatureView(
    name="stats",
    entity=PAIR,
    features=(Feature(name="x"), Feature(name="n", dtype="int64"), Feature(name="word", dtype="string", vocabulary=("hot", "cold"))),
    feast=FeastSource(project="shop", view="Stats", join_keys=("b", "a")),
)
OTHER = FeatureView(
    name="other", entity=PAIR, features=(Feature(name="y"),), feast=FeastSource(project="shop", view="Other", join_keys=("b", "a"))
)
OWN = FeatureView(name="own", entity=PAIR, features=(Feature(name="z"),))
SNAPSHOT = Snapshot(feature_views={view.name: view for view in (VIEW, OTHER, OWN)})
CODEC = RowCodec(schemas_of(VIEW)[-1])


class OurStore:
    """Answers every key with itself; or not at all."""

    def __init__(self, *, down: bool = False) -> None:
        self.down = down
        self.asked: list[bytes] = []

    async def read(self, keys: Any, timeout_s: float) -> Read:
        self.asked += keys
        if self.down:
            raise Unavailable("away")
        return Read(list(keys))


def space(view: FeatureView, tenant: str = "t") -> KeySpace:
    made = KeySpace.of(tenant, view.entity.type, view.name, view.version)
    return made.foreign() if view.feast else made


def put(url: str, view: FeatureView, entity_id: Id, at_us: int, **cells: Any) -> None:
    """Write as Feast does: a hash per entity, all its views in it. A cell is keyword arguments of a Value, or bytes."""
    assert view.feast is not None
    moment = Timestamp()
    moment.FromMicroseconds(at_us)
    fields: dict[bytes, bytes] = {time_field_of(view.feast.view): moment.SerializeToString()}
    for name, value in cells.items():
        fields[field_of(view.feast.view, name)] = value if isinstance(value, bytes) else feast.Value(**value).SerializeToString()
    with redis.Redis.from_url(url) as client:
        client.hset(EntityKeys(view.feast).keys([entity_id])[0], mapping=fields)  # type: ignore[arg-type]


def rows_of(url: str | None, store: Any = None) -> FeastRows:
    return FeastRows(store or OurStore(), None if url is None else Single(Access(url=url)), lambda: SNAPSHOT)


async def closed(rows: FeastRows, keys: list[bytes], timeout_s: float = 5) -> Read:
    try:
        return await rows.read(keys, timeout_s)
    finally:
        if rows._dispatch is not None:
            await rows._dispatch.topology.close()


async def test_rows_are_as_if_they_were_ours(redis_url: str) -> None:
    put(redis_url, VIEW, (7, "k"), 1_700_000_000_123_456, x={"float_val": 1.5}, n={"int64_val": -2}, word={"string_val": "cold"})
    put(redis_url, VIEW, (7, "é"), 5_000_000, x={"float_val": 0.0}, n=b"", word={"string_val": "none of them"})
    put(redis_url, OTHER, (7, "only the other view"), 1, y={"float_val": 1})
    ids: list[Id] = [(7, "k"), (7, "é"), (7, "only the other view"), (8, "k")]
    found = await closed(rows_of(redis_url), space(VIEW).keys(ids))
    assert found.whole
    assert found.rows[2:] == [None, None]
    block = CODEC.widen([row for row in found.rows if row is not None])
    assert block is not None
    assert header(block)["event_time_us"].tolist() == [1_700_000_000_123_456, 5_000_000]
    assert CODEC.nulls(block).tolist() == [[False, False, False], [False, True, False]]
    column = {name: block[:, c.offset : c.end].copy().view(c.dtype)[:, 0].tolist() for name, c in CODEC.columns.items()}
    assert column == {"x": [1.5, 0.0], "n": [-2, 0], "word": [2, 0]}
    assert CODEC.texts(found.rows[0] or b"") == {"word": b"cold"}


async def test_ours_and_theirs_are_asked_together_and_stay_in_place(redis_url: str) -> None:
    put(redis_url, VIEW, (1, "a"), 1, x={"float_val": 1})
    put(redis_url, OTHER, (1, "a"), 2, y={"float_val": 3})
    ids: list[Id] = [(1, "a"), (2, "a")]
    own, stats, other = (space(view).keys(ids) for view in (OWN, VIEW, OTHER))
    keys = [stats[0], own[0], other[0], own[1], stats[1], other[1]]
    ours = OurStore()
    found = await closed(rows_of(redis_url, ours), keys)
    assert found.whole
    assert [row is not None for row in found.rows] == [True, True, True, True, False, False]
    assert [found.rows[1], found.rows[3]] == ours.asked == own
    assert (len(found.rows[0] or b""), len(found.rows[2] or b"")) != (0, 0)
    down = await closed(rows_of(redis_url, OurStore(down=True)), keys)
    assert (down.failed.tolist(), down.rows[0]) == ([1, 3], found.rows[0])


async def test_a_row_that_cannot_be_read_fails_alone(redis_url: str) -> None:
    put(redis_url, VIEW, (1, "good"), 1, x={"float_val": 1})
    put(redis_url, VIEW, (1, "other type"), 1, x={"double_val": 1})
    put(redis_url, VIEW, (1, "not utf-8"), 1, word=b"\x12\x01\xff")
    put(redis_url, VIEW, (1, "junk"), 1, n=b"\x20\xff")
    with redis.Redis.from_url(redis_url) as client:
        assert VIEW.feast is not None
        client.set(EntityKeys(VIEW.feast).keys([(1, "no hash")])[0], b"x")
        client.hset(EntityKeys(VIEW.feast).keys([(1, "no time")])[0], time_field_of("Stats"), b"\xff")
    ids: list[Id] = [(1, name) for name in ("good", "other type", "not utf-8", "junk", "no hash", "no time", "absent")]
    found = await closed(rows_of(redis_url), space(VIEW).keys(ids))
    assert found.failed.tolist() == [1, 2, 3, 4, 5]
    assert [row is not None for row in found.rows] == [True] + [False] * 6


async def test_time_and_servers_that_are_away(redis_url: str) -> None:
    keys = space(VIEW).keys([(1, "a"), (2, "b")])
    for rows in (rows_of(None), rows_of("redis://127.0.0.1:1/0")):  # no address; port 1 is tcpmux: nothing listens there
        found = await closed(rows, keys)
        assert (found.rows, found.failed.tolist()) == ([None, None], [0, 1])
    late = await closed(rows_of(redis_url), keys, timeout_s=0)
    assert (late.rows, late.late.tolist()) == ([None, None], [0, 1])


async def test_a_view_that_has_left_is_not_made_up(redis_url: str) -> None:
    put(redis_url, VIEW, (1, "a"), 1, x={"float_val": 1})
    rows = FeastRows(OurStore(), Single(Access(url=redis_url)), lambda: Snapshot(feature_views={"other": OTHER}))
    found = await closed(rows, space(VIEW).keys([(1, "a")]))
    assert found.failed.tolist() == [0]


async def test_without_views_of_feast_nothing_is_looked_at() -> None:
    ours = OurStore()
    rows = FeastRows(ours, None, lambda: Snapshot(feature_views={"own": OWN}))
    keys = space(OWN).keys([(1, "a")])
    assert (await rows.read(keys, 1)).rows == keys


_PARTS = st.tuples(st.integers(-(2**63), 2**63 - 1), st.text(max_size=10))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(_PARTS, min_size=1, max_size=6, unique=True), tenant=st.sampled_from(["t", "a" * 42, "b" * 63]))
async def test_each_id_gets_its_own_row_whoever_asks(redis_url: str, ids: list[Any], tenant: str) -> None:
    for number, entity_id in enumerate(ids):
        put(redis_url, VIEW, entity_id, 1 + number, n={"int64_val": number})
    found = await closed(rows_of(redis_url), space(VIEW, tenant).keys(ids[::-1]))
    block = CODEC.widen([row or b"" for row in found.rows])
    assert block is not None
    assert header(block)["event_time_us"].tolist() == list(range(len(ids), 0, -1))
    assert np.ascontiguousarray(block[:, CODEC.columns["n"].offset :][:, :8]).view("<i8")[:, 0].tolist() == list(
        range(len(ids) - 1, -1, -1)
    )


def test_keys_of_foreign_rows_are_of_no_space_of_ours() -> None:
    for view in (VIEW, OTHER):
        [key] = space(view).keys([(1, "a")])
        assert not key.startswith(b"p1{")
        assert space(view).id_of(key) == (1, "a")


@pytest.mark.parametrize("view", [VIEW, OTHER])
def test_a_plan_reads_a_view_of_feasts_by_foreign_keys(view: FeatureView) -> None:
    from feature_retrieval.views import Plans
    from plait.registry.records import FeatureSet, ModelInput

    first = view.features[0].name
    feature_set = FeatureSet(name="s", inputs=(ModelInput(name="i", entity="pair", features=(f"{view.name}:{first}",)),))
    plan = Plans(Snapshot(feature_views={view.name: view}, feature_sets={"s": feature_set})).get("s", ())
    assert plan.entities[0].views[0].key_space("t") == space(view)
