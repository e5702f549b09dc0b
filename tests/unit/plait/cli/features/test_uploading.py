"""Uploads to a real grpc.aio server that breaks in every way it may: each batch is acknowledged once, in order, or the error is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.cli.features.parquet import Position
from plait.cli.features.uploading import Totals, Upload, follow
from plait.errors import FailedPrecondition, InvalidArgument, NotFound, PlaitError, Unavailable


class Service(pb_grpc.FeatureRetrievalServiceServicer):
    """Answers as `plan` says, one word per batch or page that arrives; "ok" when it is used up. `taken`: batch ids, as often as they came."""

    def __init__(self, plan: list[str]) -> None:
        self.plan = iter(plan)
        self.taken: list[int] = []
        self.asked: list[bytes] = []

    async def IngestFeatures(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for request in request_iterator:
            word = next(self.plan, "ok")
            if word == "break":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
            if word == "end":
                return
            self.taken.append(request.batch_id)
            ack = pb.IngestFeaturesResponse(batch_id=request.batch_id)
            error: PlaitError | None = {
                "later": Unavailable("later"),
                "new epoch": NotFound("not yet", reason="EPOCH_NOT_FOUND"),
                "never": FailedPrecondition("never", reason="VIEW_IS_FOREIGN"),
            }.get(word)
            if error is None:
                ack.result.applied = len(request.batch.event_times_us)
            else:
                ack.status.code, ack.status.message = error.code.value[0], error.message
                ack.status.status_details = error.to_status().SerializeToString()
            yield ack

    async def CarryOverEpoch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append(request.cursor)
        for page in range(int(request.cursor or b"0"), 5):
            if next(self.plan, "ok") == "break":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
            yield pb.CarryOverEpochResponse(scanned=page + 1, total=5, cursor=b"%d" % (page + 1) if page < 4 else b"")


@asynccontextmanager
async def serving(plan: list[str]) -> AsyncIterator[tuple[Service, Any]]:
    service, server = Service(plan), grpc.aio.server()
    pb_grpc.add_FeatureRetrievalServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield service, pb_grpc.FeatureRetrievalServiceStub(channel)
    await server.stop(0)


def batches(count: int) -> Iterator[tuple[Position, pb.FeatureBatch]]:
    for number in range(count):
        yield Position(0, (number + 1) * 2), pb.FeatureBatch(feature_view="v", event_times_us=[1, 2])


async def uploaded(plan: list[str], count: int, patience_s: float = 30) -> tuple[Service, list[int], list[Position]]:
    numbers: list[int] = []
    positions: list[Position] = []

    def acked(sent: Any, result: Any) -> None:
        numbers.append(sent.number)
        positions.append(sent.position)
        assert result.applied == sent.rows == 2
        assert sent.first_row == sent.number * 2 + 100

    async with serving(plan) as (service, stub):
        await Upload(stub, (), batches(count), acked, first_row=100, patience_s=patience_s).run()
    return service, numbers, positions


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["ok", "ok", "ok", "break", "end", "later", "new epoch"]), max_size=12), st.integers(0, 8))
def test_every_batch_is_acknowledged_once_and_in_order(plan: list[str], count: int) -> None:
    service, numbers, positions = asyncio.run(uploaded(plan, count))
    assert numbers == list(range(count))
    assert positions == [Position(0, (n + 1) * 2) for n in range(count)]
    assert set(service.taken) == set(range(count))


async def test_more_than_a_window_goes_through() -> None:
    _, numbers, _ = await uploaded(["ok"] * 30 + ["break"], 300)
    assert numbers == list(range(300))


async def test_a_batch_that_is_refused_whole_ends_it() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await uploaded(["ok", "never"], 5)
    assert caught.value.reason == "VIEW_IS_FOREIGN"


async def test_what_never_works_is_told_in_the_end() -> None:
    with pytest.raises(Unavailable):
        await uploaded(["break"] * 1000, 5, patience_s=0.2)


async def test_a_file_that_cannot_be_read_on_is_told_at_once() -> None:
    def broken() -> Iterator[tuple[Position, pb.FeatureBatch]]:
        yield from batches(1)
        raise InvalidArgument("torn", reason="PARQUET_UNREADABLE")

    async with serving([]) as (_, stub):
        with pytest.raises(InvalidArgument, match="torn"):
            await Upload(stub, (), broken(), lambda *_: None).run()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["ok", "ok", "break"]), max_size=10))
def test_a_stream_of_answers_is_followed_over_every_break(plan: list[str]) -> None:
    async def run() -> None:
        heard: list[int] = []
        async with serving(plan) as (service, stub):
            await follow(stub.CarryOverEpoch, pb.CarryOverEpochRequest(), lambda answer: heard.append(answer.scanned))
        assert heard == [1, 2, 3, 4, 5]
        assert service.asked == sorted(service.asked)

    asyncio.run(run())


def test_totals_name_the_first_row_of_the_file_for_each_reason() -> None:
    totals = Totals()
    for first_row in (0, 10):
        result = pb.WriteFeaturesResponse(applied=7, ignored=1, durability=pb.DURABILITY_SYNCED)
        result.errors.add(row=3, reason="ID_INVALID")
        result.errors.add(row=4, reason="ID_INVALID")
        totals.add(first_row, 10, result)
    assert (totals.rows, totals.applied, totals.ignored) == (20, 14, 2)
    assert (dict(totals.refused), totals.first) == ({"ID_INVALID": 4}, {"ID_INVALID": 3})
    assert totals.durability == pb.DURABILITY_SYNCED
