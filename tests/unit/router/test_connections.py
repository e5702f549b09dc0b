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
from plait.registry.policies import Hedge
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from router.balancer import Balancer
from router.connections import CallPlan, Connections, framed, lost
from router.discovery.found import Found
from router.latency import MIN_SAMPLES
from router.transports.plait import PlaitTransport

STREAM = "/plait.api.model_worker.v1.ModelWorkerService/StreamInfer"


@asynccontextmanager
async def connections(*addresses: str, token: str = "the-token", most: int = 1, stateful: bool = False) -> AsyncIterator[Connections]:
    settings = ChannelSettings(service_token=token)  # type: ignore[arg-type]
    balancer = Balancer(ejection_s=0.05, max_ejection_s=0.2, slow_start_s=0.0)
    made = Connections(
        "Infer",
        lambda address, on_load: PlaitTransport(address, "Infer", STREAM, pb.StreamInferResponse, settings, most=most, on_load=on_load),
        balancer,
        stateful=stateful,
    )
    made.adopt(frozenset(Found(address=address) for address in addresses))
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


async def call(of: Connections, timeout_s: float = 20.0, elsewhere: Callable[[PlaitError], bool] = lambda _: False, **more: Any) -> Any:
    plan = CallPlan(deadline=Deadline.after(timeout_s), tenant="shop", request_id="r-1", **more)
    return await of.call(framed(frame(), plan), plan, elsewhere)


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


async def test_one_stream_carries_many_calls_and_a_crowd_gets_more_streams() -> None:
    async with FakeModelWorker() as worker, connections(worker.address, most=3) as to_worker:
        worker.gate = asyncio.Event()
        [endpoint] = to_worker._by_address.values()
        for calls, streams in ((60, 1), (100, 2), (170, 3), (250, 3)):
            waiting = [asyncio.create_task(call(to_worker)) for _ in range(calls)]
            while len(worker.calls) < calls:
                await asyncio.sleep(0)
            assert f"streams={streams}" in repr(endpoint.transport)
            assert f"in_flight={calls} up" in repr(to_worker)
            worker.gate.set()
            assert len(await asyncio.gather(*waiting)) == calls
            worker.gate.clear()
            worker.calls.clear()
        assert "in_flight=0 up" in repr(to_worker)


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


async def test_attempts_are_counted_and_each_goes_elsewhere() -> None:
    async with FakeModelWorker() as one, FakeModelWorker() as two, FakeModelWorker() as three:
        for worker in (one, two, three):
            worker.error = NotFound("no such model")
        async with connections(one.address, two.address, three.address) as of:
            for attempts, expected in ((1, 1), (2, 2), (3, 3)):
                before = len(one.calls) + len(two.calls) + len(three.calls)
                with pytest.raises(NotFound):
                    await call(of, elsewhere=lambda _: True, attempts=attempts)
                assert len(one.calls) + len(two.calls) + len(three.calls) - before == expected
            assert max(len(one.calls), len(two.calls), len(three.calls)) <= 3, (
                "three calls of one to three attempts, none twice on one worker"
            )


async def test_a_pool_whose_calls_depend_on_each_other_tries_nothing_again() -> None:
    async with FakeModelWorker() as gone:
        address = gone.address
    async with FakeModelWorker() as good, connections(address, good.address, stateful=True) as of:
        failed = 0
        for _ in range(20):
            try:
                await call(of)
            except Unavailable:
                failed += 1
        assert failed >= 1
        assert len(good.calls) == 20 - failed


async def test_while_everything_fails_retries_stay_within_their_budget() -> None:
    async with FakeModelWorker() as one, FakeModelWorker() as two, connections(one.address, two.address) as of:
        one.error = two.error = Unavailable("going down")
        for _ in range(60):
            with pytest.raises(Unavailable):
                await call(of, elsewhere=lambda _: True)
        assert len(one.calls) + len(two.calls) <= 60 + 10
        one.error = two.error = None
        for _ in range(80):
            await call(of)
        one.error = Unavailable("going down")
        before = len(one.calls)
        while len(one.calls) == before:
            await call(of, elsewhere=lambda _: True)


async def test_a_stream_that_breaks_under_many_calls_is_one_failure_and_costs_none_of_them() -> None:
    async with FakeModelWorker() as good, AsyncExitStack() as stack:
        dying = await stack.enter_async_context(FakeModelWorker())
        of = await stack.enter_async_context(connections(dying.address, good.address))
        dying.gate = asyncio.Event()
        calls = [asyncio.create_task(call(of)) for _ in range(60)]
        await asyncio.wait_for(dying.started.wait(), 20)
        while len(dying.calls) + len(good.calls) < 60:
            await asyncio.sleep(0)
        assert len(dying.calls) > 10
        await dying.server._server.stop(None)
        assert len(await asyncio.wait_for(asyncio.gather(*calls), 20)) == 60
        assert of._budget.allows


async def test_nobody_to_call_is_a_typed_error() -> None:
    async with connections() as of:
        with pytest.raises(Unavailable) as caught:
            await call(of)
        assert caught.value.reason == "POOL_UNAVAILABLE"


async def test_what_is_found_no_more_answers_what_it_holds_and_gets_nothing_new() -> None:
    async with FakeModelWorker() as old, FakeModelWorker() as new, connections(old.address) as of:
        old.gate = asyncio.Event()
        held = asyncio.create_task(call(of))
        await asyncio.wait_for(old.started.wait(), 20)
        of.adopt(frozenset({Found(address=new.address)}))
        for _ in range(5):
            await call(of)
        assert (len(old.calls), len(new.calls)) == (1, 5)
        old.gate.set()
        assert (await held).model_name == "ranker"
        while of._closing:
            await asyncio.gather(*of._closing)
        assert old.address not in repr(of)


async def test_a_list_that_is_suddenly_empty_is_not_believed_at_once() -> None:
    async with FakeModelWorker() as worker, connections(worker.address) as of:
        of.adopt(frozenset())
        await call(of)
        of.adopt(frozenset({Found(address=worker.address, ready=False)}))
        assert of._empty is None
        assert "not taking calls" in repr(of)
        await call(of)  # it is all there is


async def test_an_empty_list_is_believed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.connections._KEEP_S", 0.0)
    async with FakeModelWorker() as worker, connections(worker.address) as of:
        of.adopt(frozenset())
        while worker.address in repr(of):
            await asyncio.sleep(0)
        with pytest.raises(Unavailable) as caught:
            await call(of)
        assert caught.value.reason == "POOL_UNAVAILABLE"


async def test_one_that_is_about_to_stop_gets_nothing_new() -> None:
    async with FakeModelWorker() as stopping, FakeModelWorker() as other, connections(stopping.address, other.address) as of:
        stopping.load = pb.LoadReport(draining=True)
        while not stopping.calls:
            await call(of)
        assert "not taking calls" in repr(of)
        for _ in range(20):
            await call(of)
        assert len(stopping.calls) == 1


async def test_what_answers_say_of_load_decides() -> None:
    async with FakeModelWorker() as crowded, FakeModelWorker() as idle, connections(crowded.address, idle.address) as of:
        crowded.load = pb.LoadReport(in_flight=50, row_ns=1000)
        while not crowded.calls:
            await call(of)
        for _ in range(10):
            await call(of)
        assert len(crowded.calls) == 1


# ---- hedging


async def warm(of: Connections, hedge: Hedge) -> None:
    """Have enough calls answered that lateness is known."""
    for _ in range(MIN_SAMPLES):
        await call(of, model="ranker", version="2", hedge=hedge)


async def test_a_late_call_is_overtaken_by_a_second_one_and_cancelled_where_it_waits() -> None:
    hedge = Hedge(percentile=95, share=0.5)
    async with FakeModelWorker() as one, FakeModelWorker() as two, connections(one.address, two.address) as of:
        await warm(of, hedge)
        for worker in (one, two):
            worker.calls.clear()
        one.gate = asyncio.Event()
        while not one.calls:
            assert (await call(of, model="ranker", version="2", hedge=hedge)).model_name == "ranker"
        while not one.cancelled:
            await asyncio.sleep(0.01)
        assert repr(of).count("in_flight=0 up") == 2, "the slow one is not blamed"


async def test_second_calls_are_a_share_of_all() -> None:
    hedge = Hedge(percentile=50, share=0.1)
    async with FakeModelWorker() as one, FakeModelWorker() as two, connections(one.address, two.address) as of:
        for _ in range(300):
            await call(of, model="ranker", version="2", hedge=hedge)
        assert 300 < len(one.calls) + len(two.calls) <= 300 + 31


async def test_the_only_worker_is_not_asked_twice() -> None:
    hedge = Hedge(percentile=50, share=0.5)
    async with FakeModelWorker() as alone, connections(alone.address) as of:
        for _ in range(100):
            await call(of, model="ranker", version="2", hedge=hedge)
        assert len(alone.calls) == 100
