"""The multiplexer against a real grpc.aio server: answers, errors, deadlines, cancellation, breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.errors import Cancelled, DeadlineExceeded, Internal, NotFound, PermissionDenied, Unauthenticated, Unavailable
from plait.rpc import multiplex
from plait.rpc.call import Call, current
from plait.rpc.channel import open_channel, service_metadata
from plait.rpc.credentials import Authenticator
from plait.rpc.deadline import Deadline
from plait.rpc.server import RpcServer
from plait.settings import ChannelSettings, RpcSettings

TOKEN = "the-token"
SERVICE = "plait.api.feature_retrieval.v1.FeatureRetrievalService"


class Servicer(pb_grpc.FeatureRetrievalServiceServicer):
    """Answers by the name of the feature set asked for."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()

    async def StreamFeatures(self, requests: AsyncIterator[Any], context: Any) -> None:
        await multiplex.serve(requests, context, self.fill, pb.StreamFeaturesResponse)

    async def GetFeatures(self, request: Any, context: Any) -> Any:
        response = pb.GetFeaturesResponse()
        await self.fill(request, response)
        return response

    async def fill(self, request: Any, response: Any) -> None:
        self.calls.append(current())
        match request.feature_set:
            case "missing":
                raise NotFound("no such set", reason="FEATURE_SET_NOT_FOUND")
            case "bug":
                raise ZeroDivisionError("secret detail")
            case "hang":
                self.started.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
            case "wait":
                self.started.set()
                await self.release.wait()
        response.registry_revision = int(request.max_defaulted_share)


class World:
    def __init__(self, server: RpcServer, servicer: Servicer, channel: grpc.aio.Channel, settings: ChannelSettings) -> None:
        self.server = server
        self.servicer = servicer
        self.stub: Any = pb_grpc.FeatureRetrievalServiceStub(channel)
        self.mux = multiplex.Multiplexer(lambda: self.stub.StreamFeatures(metadata=service_metadata(settings)), name="features")

    async def ask(self, feature_set: str, number: int = 0, *, timeout_s: float = 20.0, **kwargs: Any) -> int:
        frame = pb.StreamFeaturesRequest()
        frame.request.feature_set = feature_set
        frame.request.max_defaulted_share = number
        response = await self.mux.call(frame, deadline=Deadline.after(timeout_s), **kwargs)
        return int(response.registry_revision)


@asynccontextmanager
async def world(token: str = TOKEN) -> AsyncIterator[World]:
    servicer = Servicer()
    server = RpcServer(RpcSettings(grace_s=5), authenticator=Authenticator(lambda _: None, service_token=TOKEN))
    server.add(pb_grpc.add_FeatureRetrievalServiceServicer_to_server, servicer, SERVICE, scope="features")
    await server.start()
    settings = ChannelSettings(service_token=token)  # type: ignore[arg-type]
    async with open_channel(server.address, settings) as channel:
        w = World(server, servicer, channel, settings)
        try:
            yield w
        finally:
            await w.mux.close()
            await server.drain()


async def test_concurrent_calls_get_their_own_answers() -> None:
    async with world() as w:
        assert await asyncio.gather(*(w.ask("ok", n) for n in range(200))) == list(range(200))
        assert "open" in repr(w.mux)
        assert w.mux.in_flight == 0


async def test_header_carries_tenant_request_id_and_what_is_left_of_the_deadline() -> None:
    async with world() as w:
        await w.ask("ok", tenant="shop", request_id="r-1", timeout_s=3.0)
        [call] = w.servicer.calls
        assert (call.tenant, call.request_id, call.is_service) == ("shop", "r-1", True)
        assert 0 < call.deadline.remaining_s() <= 3.0


async def test_errors_are_typed_and_touch_no_other_call() -> None:
    async with world() as w:
        missing, fine, bug = await asyncio.gather(w.ask("missing"), w.ask("ok", 7), w.ask("bug"), return_exceptions=True)
        assert isinstance(missing, NotFound)
        assert missing.reason == "FEATURE_SET_NOT_FOUND"
        assert fine == 7
        assert isinstance(bug, Internal)
        assert "secret" not in str(bug)


async def test_deadline_stops_the_work_behind() -> None:
    async with world() as w:
        with pytest.raises(DeadlineExceeded):
            await w.ask("hang", timeout_s=0.05)
        await asyncio.wait_for(w.servicer.cancelled.wait(), 10)
        assert await w.ask("ok", 3) == 3
        with pytest.raises(DeadlineExceeded):
            await w.ask("ok", timeout_s=-1.0)


async def test_cancelling_one_caller_cancels_its_work_and_nobody_elses() -> None:
    async with world() as w:
        gone = asyncio.create_task(w.ask("hang"))
        await asyncio.wait_for(w.servicer.started.wait(), 10)
        gone.cancel()
        assert await w.ask("ok", 5) == 5
        await asyncio.wait_for(w.servicer.cancelled.wait(), 10)
        with pytest.raises(asyncio.CancelledError):
            await gone


async def test_drain_answers_what_is_held_and_then_ends_the_stream() -> None:
    async with world() as w:
        held = asyncio.create_task(w.ask("wait", 9))
        await asyncio.wait_for(w.servicer.started.wait(), 10)
        draining = asyncio.create_task(w.server.drain())
        w.servicer.release.set()
        assert await held == 9
        await asyncio.wait_for(draining, 4)  # well within the grace: the long-lived stream does not hold it up
        with pytest.raises(Unavailable):
            await w.ask("ok")


async def test_wrong_token_is_told_as_such() -> None:
    async with world(token="wrong") as w:
        with pytest.raises(Unauthenticated):
            await w.ask("ok")


async def test_close_fails_waiting_calls() -> None:
    async with world() as w:
        waiting = asyncio.create_task(w.ask("hang"))
        await asyncio.wait_for(w.servicer.started.wait(), 10)
        await w.mux.close()
        with pytest.raises(Cancelled):
            await waiting


async def test_nothing_listens() -> None:
    async with open_channel("127.0.0.1:1", ChannelSettings()) as channel:
        stub: Any = pb_grpc.FeatureRetrievalServiceStub(channel)
        mux = multiplex.Multiplexer(stub.StreamFeatures, name="features")
        with pytest.raises(Unavailable):
            await mux.call(pb.StreamFeaturesRequest(), deadline=Deadline.after(10))
        await mux.close()


async def test_unary_speaks_the_same_errors() -> None:
    async with world() as w:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await w.stub.GetFeatures(pb.GetFeaturesRequest(feature_set="missing"), metadata=(("x-plait-service-token", TOKEN),))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await w.stub.GetFeatures(pb.GetFeaturesRequest(feature_set="ok"))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert PermissionDenied.code is grpc.StatusCode.PERMISSION_DENIED
