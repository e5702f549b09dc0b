"""Streams to replicas that really go away: who is asked, who is asked again, and who is left alone for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from tests.fakes.model_worker import FakeModelWorker

from plait.api.model_worker.v1 import model_worker_service_pb2 as pb
from plait.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    PlaitError,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from router.connections import Connections, lost

STREAM = "/plait.api.model_worker.v1.ModelWorkerService/StreamInfer"


@asynccontextmanager
async def connections(*addresses: str, token: str = "the-token", per_replica: int = 1) -> AsyncIterator[Connections]:
    settings = ChannelSettings(service_token=token)  # type: ignore[arg-type]
    made = Connections(
        "Infer", addresses, STREAM, pb.StreamInferResponse, settings, per_replica=per_replica, ejection_s=0.05, max_ejection_s=0.2
    )
    try:
        yield made
    finally:
        await made.close()


def frame() -> pb.StreamInferRequest:
    made = pb.StreamInferRequest()
    made.request.model_name = "ranker"
    made.request.inputs.add(name="user", datatype="FP32", shape=[1, 1])
    made.request.inputs.add(name="item", datatype="FP32", shape=[1, 1])
    made.request.raw_input_contents.extend([bytes(4), bytes(4)])
    return made


async def call(of: Connections, timeout_s: float = 20.0, elsewhere: Callable[[PlaitError], bool] = lambda _: False) -> Any:
    return await of.call(frame(), deadline=Deadline.after(timeout_s), tenant="shop", request_id="r-1", elsewhere=elsewhere)


async def answered(of: Connections) -> None:
    """Return once a call is answered again."""
    while True:
        try:
            await call(of)
        except Unavailable:
            await asyncio.sleep(0.02)
        else:
            return


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Unavailable("gone", reason="CONNECTION_LOST"), True),
        (Unavailable("loading", reason="MODEL_LOADING"), False),
        (Unauthenticated("who?"), True),
        (PermissionDenied("no"), True),
        (Unimplemented("what?"), True),
        (DeadlineExceeded("late"), False),
        (Cancelled("closed"), False),
        (ResourceExhausted("full"), False),
        (InvalidArgument("bad"), False),
    ],
)
def test_lost_is_not_reached_as_against_an_answer(error: PlaitError, expected: bool) -> None:
    assert lost(error) is expected


async def test_the_call_carries_tenant_request_id_and_what_is_left_of_the_deadline() -> None:
    async with FakeModelWorker() as worker, connections(worker.address) as to_worker:
        assert (await call(to_worker, timeout_s=5.0)).model_name == "ranker"
        [seen] = worker.calls
        assert (seen.tenant, seen.request_id, seen.is_service) == ("shop", "r-1", True)
        assert seen.deadline.remaining_s() <= 5.0


async def test_one_stream_carries_many_calls_and_per_replica_opens_more() -> None:
    async with FakeModelWorker() as worker, connections(worker.address, per_replica=3) as to_worker:
        assert repr(to_worker).count("#") == 3
        worker.gate = asyncio.Event()
        calls = [asyncio.create_task(call(to_worker)) for _ in range(30)]
        while len(worker.calls) < 30:
            await asyncio.sleep(0)
        assert "in_flight=0" not in repr(to_worker)
        worker.gate.set()
        assert len(await asyncio.gather(*calls)) == 30
        assert repr(to_worker).count("in_flight=0 up") == 3


async def test_the_only_replica_is_tried_again_after_a_break_within_the_call() -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(FakeModelWorker())
        port = int(first.address.rpartition(":")[2])
        to_worker = await stack.enter_async_context(connections(first.address))
        first.gate = asyncio.Event()
        under_way = asyncio.create_task(call(to_worker))
        await asyncio.wait_for(first.started.wait(), 20)
        await first.server._server.stop(None)
        async with FakeModelWorker(port=port):
            await asyncio.wait_for(asyncio.gather(under_way, return_exceptions=True), 20)
            await asyncio.wait_for(answered(to_worker), 20)
            assert "failing" not in repr(to_worker)


async def test_without_any_replica_the_error_is_typed_and_both_are_avoided() -> None:
    async with FakeModelWorker() as one, FakeModelWorker() as two:
        addresses = one.address, two.address
    async with connections(*addresses) as to_nobody:
        for _ in range(4):
            with pytest.raises(Unavailable) as caught:
                await call(to_nobody)
            assert caught.value.reason == "CONNECTION_LOST"
            assert caught.value.retry_after_s is not None
        assert repr(to_nobody).count("failing") == 2
        assert repr(to_nobody).count("in_flight=0") == 2


async def test_a_lost_replica_costs_no_call_where_there_is_another() -> None:
    async with FakeModelWorker() as gone:
        address = gone.address
    async with FakeModelWorker() as good, connections(address, good.address) as both:
        for _ in range(20):
            await call(both)
        assert len(good.calls) == 20
        assert f"<{good.address} in_flight=0 up>" in repr(both)
        assert f"<{address} in_flight=0 failing" in repr(both)


async def test_elsewhere_is_asked_once_and_only_where_there_is_an_elsewhere() -> None:
    async with FakeModelWorker() as one, FakeModelWorker() as two:
        one.error = two.error = NotFound("no such model")
        async with connections(one.address, two.address) as both:
            with pytest.raises(NotFound):
                await call(both, elsewhere=lambda error: isinstance(error, NotFound))
            assert (len(one.calls), len(two.calls)) == (1, 1)
            with pytest.raises(NotFound):
                await call(both)
            assert len(one.calls) + len(two.calls) == 3
            assert "failing" not in repr(both), "it answered, so it is not avoided"
        async with connections(one.address) as alone:
            before = len(one.calls)
            with pytest.raises(NotFound):
                await call(alone, elsewhere=lambda _: True)
            assert len(one.calls) == before + 1


async def test_an_error_that_was_answered_is_not_tried_again() -> None:
    async with FakeModelWorker() as one, FakeModelWorker() as two, connections(one.address, two.address) as both:
        one.error = two.error = ResourceExhausted("full", reason="QUEUE_FULL")
        with pytest.raises(ResourceExhausted):
            await call(both)
        assert len(one.calls) + len(two.calls) == 1


async def test_who_does_not_take_us_for_a_service_is_lost() -> None:
    async with FakeModelWorker() as worker, connections(worker.address, token="another") as to_worker:
        with pytest.raises(PlaitError) as caught:
            await call(to_worker)
        assert lost(caught.value)
        assert "failing" in repr(to_worker)
        assert not worker.calls


async def test_a_deadline_ends_the_wait_and_says_nothing_against_the_replica() -> None:
    async with FakeModelWorker() as worker, connections(worker.address) as to_worker:
        worker.gate = asyncio.Event()
        with pytest.raises(DeadlineExceeded):
            await call(to_worker, timeout_s=0.05)
        assert repr(to_worker) == f"<Connections Infer [<{worker.address} in_flight=0 up>]>"


async def test_a_caller_that_leaves_leaves_nothing_in_flight() -> None:
    async with FakeModelWorker() as worker, connections(worker.address) as to_worker:
        worker.gate = asyncio.Event()
        leaving = asyncio.create_task(call(to_worker))
        await asyncio.wait_for(worker.started.wait(), 20)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert "in_flight=0 up" in repr(to_worker)


async def test_close_fails_what_still_waits() -> None:
    async with FakeModelWorker() as worker, connections(worker.address) as to_worker:
        worker.gate = asyncio.Event()
        waiting = asyncio.create_task(call(to_worker))
        await asyncio.wait_for(worker.started.wait(), 20)
        await to_worker.close()
        with pytest.raises(Cancelled):
            await waiting
