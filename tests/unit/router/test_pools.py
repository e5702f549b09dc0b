"""What a worker's failures mean to a caller of the router, who chose neither model nor tensors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tests.fakes.foreign_server import ForeignServer
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.registry_world import eventually

from plait.api.inference.v2 import inference_pb2
from plait.api.model_worker.v1 import model_worker_service_pb2 as pb
from plait.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    PlaitError,
    ResourceExhausted,
    Unavailable,
    Violation,
)
from plait.registry.policies import PoolEndpoint
from plait.registry.records import Model, ModelVersion, Pool, Snapshot
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from router.connections import CallPlan
from router.pools import Pools
from router.settings import WorkersSettings


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[FakeModelWorker]:
    async with FakeModelWorker() as worker:
        yield worker


@pytest_asyncio.fixture
async def pool(worker: FakeModelWorker) -> AsyncIterator[Pools]:
    pool = Pools(WorkersSettings(addresses=worker.address), ChannelSettings(service_token="the-token"))  # type: ignore[arg-type]
    yield pool
    await pool.close()


async def infer(pool: Pools) -> inference_pb2.ModelInferResponse:
    frame = pb.StreamInferRequest()
    frame.request.model_name = "ranker"
    for name in ("user", "item"):
        frame.request.inputs.add(name=name, datatype="FP32", shape=[1, 1])
        frame.request.raw_input_contents.append(bytes(4))
    return await pool.infer(frame, CallPlan(model="ranker", version="2", deadline=Deadline.after(20), tenant="shop", request_id="r"))


async def test_an_answer_comes_back_as_it_is(pool: Pools, worker: FakeModelWorker) -> None:
    answer = await infer(pool)
    assert [(o.name, list(o.shape)) for o in answer.outputs] == [("score", [1])]
    assert worker.address in repr(pool)


@pytest.mark.parametrize(
    ("raised", "expected", "reason", "retry"),
    [
        (NotFound("Request for unknown model", reason="MODEL_NOT_FOUND"), Unavailable, "MODEL_NOT_READY", True),
        (Unavailable("loading", reason="MODEL_LOADING"), Unavailable, "MODEL_LOADING", True),
        (Unavailable("loading", reason="MODEL_LOADING", retry_after_s=7.0), Unavailable, "MODEL_LOADING", True),
        (FailedPrecondition("did not load", reason="MODEL_FAILED"), FailedPrecondition, "MODEL_FAILED", False),
        (InvalidArgument("wrong", violations=[Violation("inputs[0]", "is wrong")]), FailedPrecondition, "SIGNATURE_MISMATCH", False),
        (ResourceExhausted("full", reason="QUEUE_FULL", retry_after_s=0.5), ResourceExhausted, "QUEUE_FULL", True),
        (DeadlineExceeded("late", reason="TOO_LATE"), DeadlineExceeded, "TOO_LATE", False),
        (Internal("a fault of ours"), Internal, "INTERNAL", False),
        (PermissionDenied("not you"), Unavailable, "WORKER_UNAVAILABLE", True),
        (Cancelled("going down"), Unavailable, "WORKER_UNAVAILABLE", True),
    ],
)
async def test_failures_in_the_callers_terms(
    pool: Pools, worker: FakeModelWorker, raised: PlaitError, expected: type[PlaitError], reason: str, retry: bool
) -> None:
    worker.error = raised
    with pytest.raises(expected) as caught:
        await infer(pool)
    assert caught.value.reason == reason
    assert (caught.value.retry_after_s is not None) is retry
    if raised.retry_after_s is not None:
        assert caught.value.retry_after_s == pytest.approx(raised.retry_after_s)
    assert [v.description for v in raised.violations if v.description not in caught.value.message] == []
    worker.error = None
    await infer(pool)


async def test_no_worker_at_all_is_worth_a_retry() -> None:
    async with FakeModelWorker() as gone:
        address = gone.address
    pool = Pools(WorkersSettings(addresses=address), ChannelSettings())
    try:
        with pytest.raises(Unavailable) as caught:
            await infer(pool)
    finally:
        await pool.close()
    assert (caught.value.reason, caught.value.retry_after_s) == ("WORKER_UNAVAILABLE", 0.25)
    assert address not in caught.value.message, "where our services live is nobody's business"


@pytest.mark.parametrize("error", [NotFound("no such model"), Unavailable("loading", reason="MODEL_LOADING")])
async def test_a_worker_that_lags_says_nothing_of_the_others(worker: FakeModelWorker, error: PlaitError) -> None:
    async with FakeModelWorker() as lags:
        lags.error = error
        settings = WorkersSettings(addresses=f"{lags.address},{worker.address}")
        pool = Pools(settings, ChannelSettings(service_token="the-token"))  # type: ignore[arg-type]
        try:
            for _ in range(100):
                await infer(pool)
                if lags.calls:
                    break
            assert lags.calls
            assert "failing" not in repr(pool)
        finally:
            await pool.close()


# ---- which pool


def record(name: str, *addresses: str, **fields: Any) -> Pool:
    return Pool(name=name, endpoints=tuple(PoolEndpoint(address=address) for address in addresses), **fields)


def world(*records: Pool, pool: str = "") -> Snapshot:
    models = {"ranker": Model(name="ranker", versions=(ModelVersion(version="2"),), pool=pool)}
    return Snapshot(models=models, pools={r.name: r for r in records})


async def test_a_model_runs_where_its_pool_is(pool: Pools, worker: FakeModelWorker) -> None:
    async with FakeModelWorker() as other, FakeModelWorker() as another:
        pool.adopt(world(record("gpu", other.address)))
        await infer(pool)
        assert (len(worker.calls), len(other.calls)) == (1, 0)
        pool.adopt(world(record("gpu", other.address), pool="gpu"))
        await infer(pool)
        assert (len(worker.calls), len(other.calls)) == (1, 1)
        pool.adopt(world(record("gpu", another.address), pool="gpu"))
        await infer(pool)
        assert (len(other.calls), len(another.calls)) == (1, 1)
        pool.adopt(world())
        await infer(pool)
        assert (len(worker.calls), len(other.calls), len(another.calls)) == (2, 1, 1)
        while pool._leaving:
            await asyncio.gather(*pool._leaving)
        assert another.address not in repr(pool)


async def test_a_pool_that_stays_keeps_its_connections(pool: Pools, worker: FakeModelWorker) -> None:
    async with FakeModelWorker() as other:
        pool.adopt(world(record("gpu", other.address), pool="gpu"))
        kept = pool._pools["gpu"].connections
        pool.adopt(world(record("gpu", other.address, worker.address), pool="gpu"))
        assert pool._pools["gpu"].connections is kept
        pool.adopt(world(record("gpu", other.address, stateful=True), pool="gpu"))
        assert pool._pools["gpu"].connections is not kept


async def test_a_foreign_pool_gets_the_same_tensors_and_no_token(pool: Pools) -> None:
    async with ForeignServer(("ranker", "2")) as triton:
        pool.adopt(world(record("triton", triton.address, protocol="oip"), pool="triton"))
        answer = await infer(pool)
        assert (answer.model_name, [list(o.shape) for o in answer.outputs]) == ("ranker", [[1]])
        plan = CallPlan(model="ranker", version="2", deadline=Deadline.after(20), tenant="shop", request_id="r")
        raw = await pool.infer_raw(triton.requests[0].SerializeToString(), plan)
        assert inference_pb2.ModelInferResponse.FromString(raw) == answer
        assert "the-token" not in repr(triton.metadata)
        triton.fail = (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape")
        with pytest.raises(InvalidArgument, match="unexpected shape"):
            await pool.infer_raw(triton.requests[0].SerializeToString(), plan)
        with pytest.raises(FailedPrecondition):
            await infer(pool)


async def test_calls_go_to_those_that_hold_the_version(pool: Pools) -> None:
    async with ForeignServer(("ranker", "2")) as holds, ForeignServer(("ranker", "1")) as lags:
        pool.adopt(world(record("triton", holds.address, lags.address, protocol="oip"), pool="triton"))
        assert pool.ready("ranker", "9"), "nothing is known yet"
        looking = asyncio.create_task(pool.run())
        await eventually(lambda: not pool.ready("ranker", "9"))
        assert pool.ready("ranker", "2")
        assert pool.ready("ranker", "1")
        for _ in range(10):
            await infer(pool)
        assert (len(holds.requests), len(lags.requests)) == (10, 0)
        assert lags.address in repr(pool._connections("ranker").transports("ranker", "1")[0])
        lags.held = (("ranker", "2"),)
        holds.held = (("ranker", "3"),)
        await eventually(lambda: pool.ready("ranker", "3"))
        await infer(pool)
        assert len(lags.requests) == 1
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def test_a_pool_that_goes_while_it_is_asked_what_it_holds_stops_nothing(pool: Pools) -> None:
    async with ForeignServer(("ranker", "2")) as triton:
        triton.index_gate = asyncio.Event()
        pool.adopt(world(record("triton", triton.address, protocol="oip"), pool="triton"))
        looking = asyncio.create_task(pool.look())
        await asyncio.wait_for(triton.index_asked.wait(), 20)
        pool.adopt(world())
        while pool._leaving:
            await asyncio.gather(*pool._leaving)
        await asyncio.wait_for(looking, 20)
        await pool.look()


async def test_a_search_that_ends_stops_the_process(worker: FakeModelWorker) -> None:
    pool = Pools(WorkersSettings(addresses=worker.address), ChannelSettings())

    async def ends() -> None:
        raise KeyError("a fault of ours")

    pool._default.search = asyncio.create_task(ends())
    await asyncio.sleep(0)
    try:
        with pytest.raises(KeyError, match="a fault of ours"):
            await pool.run()
    finally:
        await pool.close()
