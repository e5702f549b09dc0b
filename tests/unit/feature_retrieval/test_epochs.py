"""Epochs on a real Redis: whatever is streamed, backfilled, killed and delayed meanwhile, each epoch ends as the newest of what belongs to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.calls import ADMIN, call_of
from tests.fakes.upkeep import nothing_was_erased

from feature_retrieval.epochs import EpochUpkeep
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.row_codec import FLAG_BACKFILL, KeySpace
from feature_retrieval.store.redis import RedisStore
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import FailedPrecondition, NotFound, PermissionDenied
from plait.registry import epochs as rules
from plait.registry.records import Aggregation, Entity, Epochs, Feature, FeatureView, Snapshot

NOW_S = 1_700_000_000.0
NOW_US = int(NOW_S * 1e6)
VIEW = FeatureView(name="stats", entity=Entity(type="item"), features=(Feature(name="a"),))
IDS = ("i", "j", "k")


@dataclass(frozen=True)
class Row:
    """What is written of one entity. Times repeat on purpose, so that sequence, origin and bytes decide, too."""

    entity: str
    time: int
    sequence: int
    value: float
    deleted: bool = False


ROWS = st.builds(Row, st.sampled_from(IDS), st.integers(0, 3), st.integers(0, 1), st.sampled_from([0.0, 1.0, 2.0]), st.booleans())


def batch_of(row: Row, **more: Any) -> Any:
    batch = pb.FeatureBatch(
        feature_view="stats", event_times_us=[NOW_US + row.time], sequences=[row.sequence], deleted=[row.deleted], **more
    )
    batch.ids.string_ids.append(row.entity)
    batch.columns.add(features=["a"], dtype=11, data=np.float32(row.value).tobytes())
    return batch


@dataclass
class World:
    """One registry, writers that may not have heard of its newest epochs yet, and what was streamed: the model."""

    store: RedisStore
    epochs: Epochs = field(default_factory=Epochs)
    heard: list[Epochs] = field(default_factory=lambda: [Epochs()] * 2)
    streamed: list[Row] = field(default_factory=list)
    backfilled: dict[int, list[Row]] = field(default_factory=dict)

    def snapshot(self, epochs: Epochs) -> Snapshot:
        return Snapshot(feature_views={"stats": VIEW}, epochs={("default", "stats", 1): epochs})

    async def move(self, rule: Callable[[Epochs], Epochs]) -> None:
        self.epochs = rule(self.epochs)

    async def everybody_hears(self) -> None:
        self.heard = [self.epochs] * 2

    async def stream(self, writer: int, row: Row) -> None:
        self.streamed.append(row)
        ingestion = Ingestion(self.store, lambda: self.snapshot(self.heard[writer]), clock=lambda: NOW_S)
        await ingestion.write(batch_of(row), pb.WriteFeaturesResponse(), call_of())

    async def backfill(self, rows: Sequence[Row]) -> None:
        building = self.epochs.building
        assert building is not None
        self.backfilled.setdefault(building, []).extend(rows)
        ingestion = Ingestion(self.store, lambda: self.snapshot(self.epochs), clock=lambda: NOW_S)
        for row in rows:
            await ingestion.write(batch_of(row, epoch=building, backfill=True), pb.WriteFeaturesResponse(), ADMIN)

    async def carry_over(self, source: int, target: int) -> None:
        upkeep = EpochUpkeep(self.store, lambda: self.snapshot(self.epochs), nothing_was_erased, lambda: NOW_S)
        request = pb.CarryOverEpochRequest(feature_view="stats", from_epoch=source, to_epoch=target)
        answers = [answer async for answer in upkeep.carry_over(request, ADMIN)]
        assert answers[-1].cursor == b""

    async def in_epoch(self, epoch: int) -> list[tuple[Any, ...] | None]:
        """What is stored, without whether it was backfilled: (time, sequence, deleted, value) by entity."""
        rows = (await self.store.read(KeySpace.of("default", "item", "stats", 1, epoch).keys(IDS), 10)).rows
        return [None if row is None else read(row) for row in rows]

    async def check(self, epoch: int) -> None:
        """Each row is the newest of what was backfilled into this very epoch and what was streamed.

        A streamed row that was older than what an earlier file said of its entity lost against it there, and so may be missing here:
        nobody ever read it, and it is not carried over. Everything newer must be.
        """
        for entity, found in zip(IDS, await self.in_epoch(epoch), strict=True):
            mine = [(rank(row, False), row) for row in self.backfilled.get(epoch, []) if row.entity == entity]
            streamed = [(rank(row, True), row) for row in self.streamed if row.entity == entity]
            earlier = [rank(row, False) for at, rows in self.backfilled.items() if at < epoch for row in rows if row.entity == entity]
            certain = [pair for pair in streamed if not earlier or pair[0] > max(earlier)]
            must = max([*mine, *certain], key=lambda pair: pair[0], default=None)
            may = [plain(row) for order, row in [*mine, *streamed] if must is None or order >= must[0]]
            assert found in may or (found is None and must is None), (epoch, entity)
            if not earlier and must is not None:
                assert found == plain(must[1])


def rank(row: Row, streamed: bool) -> tuple[Any, ...]:
    """The order of rows: event time, sequence, streamed before backfilled, bytes (the flag of a deletion comes before the value)."""
    return row.time, row.sequence, streamed, row.deleted, np.float32(row.value).tobytes()


def plain(row: Row) -> tuple[Any, ...]:
    return NOW_US + row.time, row.sequence, row.deleted, row.value


def read(row: bytes) -> tuple[Any, ...]:
    time, sequence = int.from_bytes(row[8:16], "little"), int.from_bytes(row[24:32], "little")
    return time, sequence, bool(row[4] & 1), float(np.frombuffer(row[-4:], np.float32)[0])


STREAMED = st.lists(st.tuples(st.integers(0, 1), ROWS), max_size=3)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Two backfills, with rows streamed by writers that hear late between any two steps, a file cut anywhere and begun again, a rollback."""
    steps: list[tuple[str, Any]] = []

    def streaming() -> None:
        steps.append(("stream", draw(STREAMED)))
        if draw(st.booleans()):
            steps.append(("one hears", draw(st.integers(0, 1))))
            steps.append(("stream", draw(STREAMED)))

    for _ in range(draw(st.integers(1, 2))):
        file = draw(st.lists(ROWS, max_size=4))
        streaming()
        steps.append(("begin", None))
        streaming()
        cut = draw(st.integers(0, len(file)))
        steps.append(("backfill", file[:cut]))
        streaming()
        steps.append(("backfill", file[draw(st.integers(0, cut)) :]))  # begun again at or before where it was killed
        streaming()
        steps.append(("carry over", None))
        streaming()
        steps.append(("flip", None))
        streaming()
        steps += [("everybody hears", None), ("carry over again", None), ("check", None)]
        streaming()
        steps.append(("check", None))
    if draw(st.booleans()):
        steps.append(("rollback", None))
        streaming()
        steps.append(("check", None))
    return steps


async def play(store: RedisStore, steps: Sequence[tuple[str, Any]]) -> None:
    world = World(store)
    for step, given_value in steps:
        match step:
            case "stream":
                for writer, row in given_value:
                    await world.stream(writer, row)
            case "one hears":
                world.heard[given_value] = world.epochs
            case "everybody hears":
                await world.everybody_hears()
            case "backfill":
                await world.backfill(given_value)
            case "carry over":
                await world.carry_over(world.epochs.serving, world.epochs.building or 0)
            case "carry over again":
                await world.carry_over(world.epochs.previous or 0, world.epochs.serving)
            case "check":
                for epoch in world.epochs.in_use:
                    await world.check(epoch)
            case _:
                await world.move(getattr(rules, step))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(histories())
def test_a_backfill_never_erases_what_was_streamed_and_a_rollback_has_it_all(redis_url: str, steps: list[tuple[str, Any]]) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()

    async def run() -> None:
        store = RedisStore(redis_url, ack="applied")
        try:
            await play(store, steps)
        finally:
            await store.close()

    asyncio.run(run())


@pytest.fixture
async def world(redis_url: str) -> Any:
    store = RedisStore(redis_url, ack="applied")
    yield World(store)
    await store.close()


def upkeep_of(world: World, view: FeatureView = VIEW, clock: Callable[[], float] = lambda: NOW_S) -> EpochUpkeep:
    snapshot = Snapshot(feature_views={"stats": view}, epochs={("default", "stats", 1): world.epochs})
    return EpochUpkeep(world.store, lambda: snapshot, nothing_was_erased, clock)


async def answers_of(stream: Any) -> list[Any]:
    return [answer async for answer in stream]


async def reason_of(stream: Any, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        await answers_of(stream)
    return str(getattr(caught.value, "reason", ""))


async def test_a_carry_over_goes_on_at_its_cursor(world: World) -> None:
    rows = [Row(f"e{n}", 1, 0, float(n % 3)) for n in range(5000)]
    ingestion = Ingestion(world.store, lambda: world.snapshot(Epochs()), clock=lambda: NOW_S)
    batch = pb.FeatureBatch(feature_view="stats", event_times_us=[NOW_US])
    batch.ids.string_ids.extend(row.entity for row in rows)
    batch.columns.add(features=["a"], dtype=11, data=np.array([row.value for row in rows], np.float32).tobytes())
    await ingestion.write(batch, pb.WriteFeaturesResponse(), call_of())
    world.epochs = Epochs(building=1, newest=1)
    request = pb.CarryOverEpochRequest(feature_view="stats", from_epoch=0, to_epoch=1)
    stream = upkeep_of(world).carry_over(request, ADMIN)
    first = await anext(stream)  # killed after its first page
    await stream.aclose()
    assert first.copied < 5000
    request.cursor = first.cursor
    last = (await answers_of(upkeep_of(world).carry_over(request, ADMIN)))[-1]
    assert (last.cursor, last.scanned) == (b"", last.total)
    space = KeySpace.of("default", "item", "stats", 1, 1)
    assert None not in (await world.store.read(space.keys([row.entity for row in rows]), 10)).rows


async def test_what_is_past_its_retention_is_not_given_another_life(world: World) -> None:
    view = replace(VIEW, retention_s=10)
    await world.stream(0, Row("i", 0, 0, 1.0))
    await world.stream(0, Row("j", 5_000_000, 0, 1.0))
    world.epochs = Epochs(building=1, newest=1)
    request = pb.CarryOverEpochRequest(feature_view="stats", from_epoch=0, to_epoch=1)
    [*_, last] = await answers_of(upkeep_of(world, view, lambda: NOW_S + 12).carry_over(request, ADMIN))
    assert last.copied == 1
    assert [row is not None for row in await world.in_epoch(1)] == [False, True, False]


async def test_only_epochs_in_use_are_carried_over_and_only_by_administrators(world: World) -> None:
    world.epochs = Epochs(serving=1, building=2, newest=2)
    ask = lambda source, target: pb.CarryOverEpochRequest(feature_view="stats", from_epoch=source, to_epoch=target)  # noqa: E731
    assert await reason_of(upkeep_of(world).carry_over(ask(0, 2), ADMIN), NotFound) == "EPOCH_NOT_FOUND"
    assert await reason_of(upkeep_of(world).carry_over(ask(1, 1), ADMIN), NotFound) == "EPOCH_NOT_FOUND"
    assert await reason_of(upkeep_of(world).carry_over(ask(1, 2), call_of()), PermissionDenied) == "SCOPE_MISSING"
    aggregated = replace(VIEW, aggregation=Aggregation())
    assert await reason_of(upkeep_of(world, aggregated).carry_over(ask(1, 2), ADMIN), FailedPrecondition) == "VIEW_IS_AGGREGATED"
    closed = replace(VIEW, writers=("rival",))
    assert await reason_of(upkeep_of(world, closed).carry_over(ask(1, 2), ADMIN), PermissionDenied) == "VIEW_NOT_WRITABLE"


async def test_a_purge_removes_an_epoch_that_is_not_in_use_and_nothing_else(world: World) -> None:
    world.heard = [Epochs(building=1, newest=1)] * 2
    for entity in IDS:
        await world.stream(0, Row(entity, 1, 0, 1.0))
    world.epochs = Epochs(building=1, newest=1)
    request = pb.PurgeEpochRequest(feature_view="stats", epoch=1)
    assert await reason_of(upkeep_of(world).purge(request, ADMIN), FailedPrecondition) == "EPOCH_IN_USE"
    world.epochs = Epochs(newest=1)
    assert await reason_of(upkeep_of(world).purge(request, call_of()), PermissionDenied) == "SCOPE_MISSING"
    assert (await answers_of(upkeep_of(world).purge(request, ADMIN)))[-1].removed == 3
    assert await world.in_epoch(1) == [None] * 3
    assert None not in await world.in_epoch(0)
    request.epoch = 2
    assert await reason_of(upkeep_of(world).purge(request, ADMIN), NotFound) == "EPOCH_NOT_FOUND"


async def test_a_carried_row_is_a_streamed_one_still(world: World) -> None:
    await world.stream(0, Row("i", 1, 0, 1.0))
    world.epochs = Epochs(building=1, newest=1)
    await world.carry_over(0, 1)
    [key] = KeySpace.of("default", "item", "stats", 1, 1).keys(["i"])
    [row] = (await world.store.read([key], 10)).rows
    assert row is not None
    assert not row[4] & FLAG_BACKFILL
