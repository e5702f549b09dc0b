"""A real server: health, reflection, channelz, bad messages, overload, faults, TLS, drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as features_pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as features_grpc
from plait.api.router.v1 import router_service_pb2 as pb
from plait.api.router.v1 import router_service_pb2_grpc as pb_grpc
from plait.errors import InvalidArgument, ResourceExhausted, Violation, from_rpc_error
from plait.rpc.call import current
from plait.rpc.credentials import Authenticator
from plait.rpc.server import RpcServer
from plait.settings import RpcSettings

SERVICE = "plait.api.router.v1.RouterService"


class Router(pb_grpc.RouterServiceServicer):
    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def Rank(self, request: Any, context: Any) -> Any:
        match request.route:
            case "bad":
                raise InvalidArgument("1 problem", violations=[Violation("top_k", "is negative")])
            case "bug":
                raise RuntimeError("password=hunter2")
            case "hold":
                self.entered.set()
                await self.release.wait()
        call = current()
        return pb.RankResponse(model=call.tenant, request_id=call.request_id)


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[tuple[RpcServer, Any, grpc.aio.Channel, Router]]:
    router = Router()
    server = RpcServer(RpcSettings(grace_s=5, **settings), authenticator=Authenticator(lambda _: None, required=False))
    server.add(pb_grpc.add_RouterServiceServicer_to_server, router, SERVICE, scope="rank")
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield server, pb_grpc.RouterServiceStub(channel), channel, router
    await server.drain()


async def test_health_reflection_and_channelz() -> None:
    async with running() as (_, _stub, channel, _router):
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = reflect.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {s.name async for answer in call for s in answer.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"} <= names
        channelz: Any = channelz_pb2_grpc.ChannelzStub(channel)
        assert (await channelz.GetServers(channelz_pb2.GetServersRequest())).server


async def test_a_service_may_be_less_ready_than_its_process() -> None:
    serving, waiting = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    server = RpcServer(RpcSettings(grace_s=5), authenticator=Authenticator(lambda _: None, required=False))
    server.add(pb_grpc.add_RouterServiceServicer_to_server, Router(), SERVICE, scope="rank")
    await server.set_ready(SERVICE, False)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)

        async def told() -> list[int]:
            return [(await health.Check(health_pb2.HealthCheckRequest(service=name))).status for name in ("", SERVICE)]

        assert await told() == [serving, waiting]
        await server.set_ready(SERVICE, True)
        assert await told() == [serving, serving]
        watched = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watched.read()).status == serving
        draining = asyncio.create_task(server.drain())
        assert (await watched.read()).status == waiting
        await server.set_ready(SERVICE, True)  # too late: it stays away from balancers
        watched.cancel()
        await draining


async def test_an_error_of_the_domain_keeps_its_details() -> None:
    async with running() as (_, stub, _channel, _router):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Rank(pb.RankRequest(route="bad"))
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidArgument)
        assert error.violations == (Violation("top_k", "is negative"),)


async def test_a_fault_is_told_without_its_details_and_the_process_lives_on() -> None:
    async with running() as (_, stub, _channel, _router):
        with capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Rank(pb.RankRequest(route="bug"))
        assert caught.value.code() == grpc.StatusCode.INTERNAL
        assert "hunter2" not in str(caught.value)
        assert "Traceback" not in str(caught.value)
        [told] = [repr(log["exc_info"]) for log in logs if "exc_info" in log]  # what a foreign exception says may be anything
        assert told.startswith("RuntimeError(")
        assert "hunter2" not in told
        assert (await stub.Rank(pb.RankRequest(), metadata=(("x-request-id", "r1"),))).request_id == "r1"


async def test_a_message_that_cannot_be_parsed_is_the_callers_mistake() -> None:
    async with running() as (_, _stub, channel, _router):
        raw = channel.unary_unary(f"/{SERVICE}/Rank")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(b"\xff\xff\xff\xff")
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_message_over_the_limit_is_refused() -> None:
    async with running(max_message_bytes=2048) as (_, stub, _channel, _router):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Rank(pb.RankRequest(route="x" * 4096))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await stub.Rank(pb.RankRequest())


async def test_overload_is_answered_early_and_not_to_be_retried_at_once() -> None:
    async with running(max_in_flight=1) as (server, stub, _channel, router):
        held = asyncio.ensure_future(stub.Rank(pb.RankRequest(route="hold")))
        await asyncio.wait_for(router.entered.wait(), 10)
        assert "in_flight=1/1" in repr(server)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Rank(pb.RankRequest())
        error = from_rpc_error(caught.value)
        assert isinstance(error, ResourceExhausted)
        assert error.retry_after_s == pytest.approx(0.1)
        assert ("grpc-retry-pushback-ms", "-1") in [(k, v) for k, v in caught.value.trailing_metadata() or ()]
        router.release.set()
        await held


async def test_drain_finishes_what_is_held_and_takes_nothing_new() -> None:
    async with running() as (server, stub, _channel, router):
        held = asyncio.ensure_future(stub.Rank(pb.RankRequest(route="hold")))
        await asyncio.wait_for(router.entered.wait(), 10)
        draining = asyncio.ensure_future(server.drain())
        router.release.set()
        await held
        await asyncio.wait_for(draining, 10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Rank(pb.RankRequest())
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_calls_are_counted_by_method_and_code() -> None:
    async with running() as (server, stub, _channel, _router):
        await stub.Rank(pb.RankRequest())
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Rank(pb.RankRequest(route="bad"))
        sample = server.metrics.registry.get_sample_value
        method = f"/{SERVICE}/Rank"
        assert sample("plait_rpc_server_handled_total", {"method": method, "code": "OK"}) == 1
        assert sample("plait_rpc_server_handled_total", {"method": method, "code": "INVALID_ARGUMENT"}) == 1
        assert sample("plait_rpc_server_seconds_count", {"method": method}) == 2


class Exporter(features_grpc.FeatureRetrievalServiceServicer):
    async def ExportFeatures(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for scanned in range(3):
            yield features_pb.ExportFeaturesResponse(scanned=scanned, cursor=current().tenant.encode())
        if request.feature_view == "bad":
            raise InvalidArgument("1 problem", violations=[Violation("feature_view", "is bad")])


@asynccontextmanager
async def exporting(*, required: bool) -> AsyncIterator[Any]:
    server = RpcServer(RpcSettings(grace_s=5), authenticator=Authenticator(lambda _: None, required=required))
    name = features_pb.DESCRIPTOR.services_by_name["FeatureRetrievalService"].full_name
    server.add(features_grpc.add_FeatureRetrievalServiceServicer_to_server, Exporter(), name, scope="features")  # type: ignore[abstract]
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel
    await server.drain()


async def test_a_method_may_answer_with_a_stream() -> None:
    async with exporting(required=False) as channel:
        stub: Any = features_grpc.FeatureRetrievalServiceStub(channel)
        answers = [a async for a in stub.ExportFeatures(features_pb.ExportFeaturesRequest(feature_view="good"))]
        assert [(a.scanned, a.cursor) for a in answers] == [(0, b"default"), (1, b"default"), (2, b"default")]
        call = stub.ExportFeatures(features_pb.ExportFeaturesRequest(feature_view="bad"))
        assert [(await call.read()).scanned for _ in range(3)] == [0, 1, 2]  # what was found before the fault has arrived
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert from_rpc_error(caught.value).violations == (Violation("feature_view", "is bad"),)
        raw = channel.unary_stream("/plait.api.feature_retrieval.v1.FeatureRetrievalService/ExportFeatures")
        with pytest.raises(grpc.aio.AioRpcError) as malformed:
            [a async for a in raw(b"\xff\xff")]
        assert from_rpc_error(malformed.value).reason == "MALFORMED_MESSAGE"


async def test_a_stream_of_answers_is_for_who_may_call() -> None:
    async with exporting(required=True) as channel:
        stub: Any = features_grpc.FeatureRetrievalServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [a async for a in stub.ExportFeatures(features_pb.ExportFeaturesRequest())]
        assert from_rpc_error(caught.value).reason == "API_KEY_MISSING"
