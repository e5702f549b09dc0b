"""What becomes of requests when something behind the router is away, slow or wrong; the router itself lives on each time."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import AsyncExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from tests.fakes.feature_retrieval import FakeFeatureRetrieval
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.registry_world import eventually
from tests.fakes.router_world import DEFAULT, DI, INPUTS, OTHER_KEY, RouterWorld, route, router_world, snapshot
from tests.integration.test_router import rank

from plait.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PlaitError,
    ResourceExhausted,
    Unavailable,
    from_rpc_error,
)
from plait.registry.policies import Hedge, Quota, Retry
from plait.registry.records import Route, Tenant
from router.settings import AdmissionSettings


async def failing(router: RouterWorld, **how: Any) -> PlaitError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.rank(rank(), **how)
    return from_rpc_error(caught.value)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def test_a_worker_that_is_away_is_a_typed_error_and_is_found_again() -> None:
    async with FakeFeatureRetrieval(INPUTS) as features, AsyncExitStack() as stack:
        worker = await stack.enter_async_context(FakeModelWorker())
        address = worker.address
        router = await stack.enter_async_context(router_world(features.address, address))
        await router.rank(rank())
        await worker.server.drain()
        error = await failing(router)
        assert isinstance(error, Unavailable)
        assert error.reason == "WORKER_UNAVAILABLE"
        assert error.retry_after_s is not None
        assert "failing" in repr(router.ranking)
        async with FakeModelWorker(port=port_of(address)):
            await asyncio.wait_for(_until_answered(router), 20)
        assert "failing" not in repr(router.ranking)


async def test_without_features_defaults_stand_in_and_the_answer_says_so() -> None:
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(FakeModelWorker())
        features = await stack.enter_async_context(FakeFeatureRetrieval(INPUTS))
        address = features.address
        router = await stack.enter_async_context(router_world(address, worker.address))
        assert not (await router.rank(rank())).degraded_reasons
        await features.server.drain()
        answer = await router.rank(rank(explain=True))
        assert list(answer.degraded_reasons) == ["features_unavailable"]
        assert [(r.feature_view, r.rows, r.unavailable) for r in answer.feature_report] == [("user-view", 1, 1), ("item-view", 3, 3)]
        assert list(answer.item_ids.string_ids) == ["i3", "i1", "i2"]  # all the same to the model, so the caller's order
        assert list(answer.scores) == [DEFAULT] * 3
        user, item = worker.requests[-1].raw_input_contents
        assert np.array_equal(np.frombuffer(user, "<f4"), [DEFAULT, np.nan], equal_nan=True)
        assert np.array_equal(np.frombuffer(item, "<f4").reshape(3, DI), [[DEFAULT, np.nan, np.nan]] * 3, equal_nan=True)
        async with FakeFeatureRetrieval(INPUTS, port=port_of(address)):
            await asyncio.wait_for(_until_whole(router), 20)


@pytest.mark.parametrize("strict", [route(on_missing="fail"), route(max_defaulted_share=0.5)])
async def test_without_features_a_route_that_takes_no_defaults_is_a_typed_error(strict: Route) -> None:
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(FakeModelWorker())
        features = await stack.enter_async_context(FakeFeatureRetrieval(INPUTS))
        router = await stack.enter_async_context(router_world(features.address, worker.address, snapshot(strict)))
        await features.server.drain()
        error = await failing(router)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "FEATURES_UNAVAILABLE")
        assert error.retry_after_s is not None
        assert not worker.calls


async def test_slow_features_are_not_waited_for_to_the_end_of_the_budget() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, features_share=0.1) as router,
    ):
        features.gate = asyncio.Event()
        answer = await router.rank(rank(), timeout_s=5.0)
        assert list(answer.degraded_reasons) == ["features_timed_out"]
        await eventually(lambda: features.cancelled == 1)
        features.gate = None
        assert not (await router.rank(rank())).degraded_reasons


async def test_a_worker_that_dies_mid_call_is_replaced_by_another() -> None:
    async with FakeFeatureRetrieval(INPUTS) as features, FakeModelWorker() as good, AsyncExitStack() as stack:
        dying = await stack.enter_async_context(FakeModelWorker())
        router = await stack.enter_async_context(router_world(features.address, f"{dying.address},{good.address}"))
        dying.gate = asyncio.Event()  # holds every call it gets
        calls = [asyncio.create_task(router.rank(rank())) for _ in range(12)]
        await asyncio.wait_for(dying.started.wait(), 20)
        await dying.server._server.stop(None)
        answers = await asyncio.wait_for(asyncio.gather(*calls), 20)
        assert all(list(a.item_ids.string_ids) == ["i3", "i2", "i1"] for a in answers)
        assert len(good.calls) == 12
        before = len(good.calls)
        await asyncio.gather(*(router.rank(rank()) for _ in range(20)))
        assert len(good.calls) == before + 20


async def test_a_route_says_how_often_its_model_is_asked_and_when_a_second_worker_is() -> None:
    async with FakeFeatureRetrieval(INPUTS) as features, FakeModelWorker() as one, FakeModelWorker() as two, AsyncExitStack() as stack:
        registry = snapshot(
            route("once", retry=Retry(attempts=1)), route("thrice", retry=Retry(attempts=3)), route("hedged", hedge=Hedge(share=0.5))
        )
        router = await stack.enter_async_context(router_world(features.address, f"{one.address},{two.address}", registry))
        for name, attempts in (("once", 1), ("thrice", 2)):  # (there are two)
            one.error = two.error = NotFound("Request for unknown model")
            before = len(one.calls) + len(two.calls)
            with pytest.raises(grpc.aio.AioRpcError):
                await router.rank(rank(name))
            assert len(one.calls) + len(two.calls) - before == attempts
        one.error = two.error = None
        for _ in range(60):
            await router.rank(rank("hedged"))
        one.gate = asyncio.Event()  # it holds every call it gets from now on
        one.calls.clear()
        while not one.calls:
            await router.rank(rank("hedged"))
        await eventually(lambda: one.cancelled == 1)


async def test_a_connection_that_was_reset_is_opened_again_within_the_call() -> None:
    async with FakeFeatureRetrieval(INPUTS) as features, AsyncExitStack() as stack:
        worker = await stack.enter_async_context(FakeModelWorker())
        router = await stack.enter_async_context(router_world(features.address, worker.address))
        await router.rank(rank())
        stack.push_async_exit(worker)  # (drained twice is fine)
        await worker.server.drain()
        async with FakeModelWorker(port=port_of(worker.address)) as again:
            answer = await asyncio.wait_for(_until_answered(router), 20)
            assert answer.variant == "main"
            assert again.calls


async def test_a_worker_without_the_model_is_passed_over_where_there_is_another() -> None:
    async with FakeFeatureRetrieval(INPUTS) as features, FakeModelWorker() as ready, FakeModelWorker() as loading:
        loading.error = NotFound("Request for unknown model", reason="MODEL_NOT_FOUND")
        async with router_world(features.address, f"{ready.address},{loading.address}") as router:
            for _ in range(12):
                await router.rank(rank())
            assert "failing" not in repr(router.ranking)
        async with router_world(features.address, loading.address) as router:
            error = await failing(router)
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_NOT_READY")
            assert error.retry_after_s is not None


@pytest.mark.parametrize(
    ("raised", "code", "reason"),
    [
        (ResourceExhausted("full", reason="QUEUE_FULL", retry_after_s=0.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
        (FailedPrecondition("did not load", reason="MODEL_FAILED"), grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FAILED"),
        (InvalidArgument("no such input", reason="TENSOR_INVALID"), grpc.StatusCode.FAILED_PRECONDITION, "SIGNATURE_MISMATCH"),
        (DeadlineExceeded("too late"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        (Unavailable("loading", reason="MODEL_LOADING"), grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING"),
    ],
)
async def test_what_a_worker_answers_reaches_the_caller_in_its_own_terms(raised: PlaitError, code: grpc.StatusCode, reason: str) -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address) as router,
    ):
        worker.error = raised
        error = await failing(router)
        assert (error.code, error.reason) == (code, reason)
        assert (error.retry_after_s is None) == (code not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE))
        assert len(worker.calls) == 1
        worker.error = None
        await router.rank(rank())


@pytest.mark.parametrize(
    ("raised", "code", "reason"),
    [
        (FailedPrecondition("missing", reason="FEATURES_MISSING"), grpc.StatusCode.FAILED_PRECONDITION, "FEATURES_MISSING"),
        (Unavailable("redis", reason="STORE_UNAVAILABLE", retry_after_s=0.1), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
        (NotFound("no set", reason="FEATURE_SET_NOT_FOUND"), grpc.StatusCode.UNAVAILABLE, "FEATURES_UNAVAILABLE"),
        (InvalidArgument("an id", reason="ID_INVALID"), grpc.StatusCode.INVALID_ARGUMENT, "ID_INVALID"),
    ],
)
async def test_what_features_answer_reaches_the_caller_in_its_own_terms(raised: PlaitError, code: grpc.StatusCode, reason: str) -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address) as router,
    ):
        features.error = raised
        error = await failing(router)
        assert (error.code, error.reason) == (code, reason)
        features.error = None
        await router.rank(rank())


async def test_a_wrong_service_token_is_not_blamed_on_the_caller() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, token="not-theirs") as router,
    ):
        error = await failing(router)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_UNAVAILABLE")
        router.ranking.adopt(snapshot(route(on_missing="fail")))
        error = await failing(router)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "FEATURES_UNAVAILABLE")


async def test_a_worker_that_answers_nonsense_is_a_typed_error() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address) as router,
    ):
        worker.score = lambda user, item: np.zeros(1)
        error = await failing(router)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SIGNATURE_MISMATCH")


async def test_slow_work_ends_with_the_callers_deadline_and_is_cancelled_behind() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, features_share=1.0) as router,
    ):
        worker.gate = asyncio.Event()
        error = await failing(router, timeout_s=0.3)
        assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: worker.cancelled == 1)
        worker.gate = None
        features.gate = asyncio.Event()
        error = await failing(router, timeout_s=0.3)
        assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: features.cancelled == 1)
        features.gate = None
        await router.rank(rank())
        assert "in_flight=0/" in repr(router.ranking)


async def test_the_routes_own_timeout_ends_slow_work() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, snapshot(route(timeout_s=0.1))) as router,
    ):
        worker.gate = asyncio.Event()
        assert isinstance(await failing(router), DeadlineExceeded)


async def test_a_caller_that_leaves_takes_its_work_along() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address) as router,
    ):
        worker.gate = asyncio.Event()
        gone = asyncio.create_task(router.rank(rank()))
        await asyncio.wait_for(worker.started.wait(), 20)
        gone.cancel()
        await eventually(lambda: worker.cancelled == 1)
        await eventually(lambda: "in_flight=0/" in repr(router.ranking))


async def test_overload_is_refused_early_with_a_time_to_come_back() -> None:
    admission = AdmissionSettings(limit=2, queue=1, max_wait_s=30.0)
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, admission=admission) as router,
    ):
        worker.gate = asyncio.Event()
        held = [asyncio.create_task(router.rank(rank())) for _ in range(3)]
        await eventually(lambda: "in_flight=2/2 waiting=1/1" in repr(router.ranking))
        error = await failing(router)
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert error.retry_after_s is not None
        worker.gate.set()
        assert len(await asyncio.gather(*held)) == 3  # what was admitted is finished


async def test_a_new_snapshot_is_served_from_the_next_request_on() -> None:
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address) as router,
    ):
        assert (await router.rank(rank())).registry_revision == 7
        router.ranking.adopt(snapshot(route("other"), revision=8))
        assert (await failing(router)).reason == "ROUTE_NOT_FOUND"
        assert (await router.rank(rank("other"))).registry_revision == 8


async def _until_whole(router: RouterWorld) -> None:
    while (await router.rank(rank())).degraded_reasons:
        await asyncio.sleep(0.02)


async def _until_answered(router: RouterWorld) -> Any:
    while True:
        try:
            return await router.rank(rank())
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
            await asyncio.sleep(0.02)


async def test_a_used_up_quota_is_told_to_a_stock_client_and_touches_no_other_tenant() -> None:
    registry = snapshot()
    tenants = {"shop": Tenant(name="shop", quota=Quota(requests_per_s=0.01, burst=2)), "other": Tenant(name="other")}
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, dataclasses.replace(registry, tenants=tenants)) as router,
    ):
        await router.rank(rank())
        await router.rank(rank())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.rank(rank())
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers: Any = dict(caught.value.trailing_metadata() or ())
        assert trailers["grpc-retry-pushback-ms"] == "-1"
        details = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
        quota, retry, info = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
        for detail in details:
            assert detail.Unpack(quota) or detail.Unpack(retry) or detail.Unpack(info)
        assert [(v.subject, v.description) for v in quota.violations] == [("tenant:shop", "0.01 requests a second, 2 at once")]
        assert info.reason == "QUOTA_EXCEEDED"
        assert retry.retry_delay.seconds == 60
        await router.rank(rank(), key=OTHER_KEY)
        assert len(worker.calls) == 3


async def test_rows_and_requests_under_way_are_bounded_by_tenant() -> None:
    tenants = {"shop": Tenant(name="shop", quota=Quota(rows_per_s=0.5, in_flight=1))}
    async with (
        FakeFeatureRetrieval(INPUTS) as features,
        FakeModelWorker() as worker,
        router_world(features.address, worker.address, dataclasses.replace(snapshot(), tenants=tenants)) as router,
    ):
        worker.gate = asyncio.Event()
        held = asyncio.create_task(router.rank(rank()))
        await asyncio.wait_for(worker.started.wait(), 20)
        error = await failing(router)
        assert [violation.description for violation in error.quota] == ["1 requests under way at once"]
        worker.gate.set()
        await held
        error = await failing(router)  # three rows were a few seconds' worth
        assert [violation.description for violation in error.quota] == ["0.5 rows a second"]
