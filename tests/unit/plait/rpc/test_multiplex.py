"""The multiplexer against a real grpc.aio server: answers, errors, deadlines, cancellation, breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.api.types.v1 import types_pb2
from plait.errors import Cancelled, DeadlineExceeded, Internal, InvalidArgument, NotFound, PermissionDenied, Unauthenticated, Unavailable
from plait.rpc import frames, multiplex
from plait.rpc.call import Call, current
from plait.rpc.channel import open_channel, service_metadata
from plait.rpc.credentials import Authenticator
from plait.rpc.deadline import Deadline
from plait.rpc.server import RpcServer
from plait.settings import ChannelSettings, RpcSettings

TOKEN = "the-token"
SERVICE = "plait.api.feature_retrieval.v1.FeatureRetrievalService"
STREAM = f"/{SERVICE}/StreamFeatures"
HOSTS = pytest.mark.parametrize("host", ["core", "aio"])


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
    def __init__(self, server: RpcServer, servicer: Servicer, channel: grpc.aio.Channel, to: ChannelSettings) -> None:
        self.server = server
        self.servicer = servicer
        self.stub: Any = pb_grpc.FeatureRetrievalServiceStub(channel)
        self.mux = multiplex.Multiplexer(channel, STREAM, pb.StreamFeaturesResponse, name="features", metadata=service_metadata(to))

    async def ask(self, feature_set: str, number: int = 0, *, timeout_s: float = 20.0, **kwargs: Any) -> int:
        frame = pb.StreamFeaturesRequest()
        frame.request.feature_set = feature_set
        frame.request.max_defaulted_share = number
        response = await self.mux.call(frame, deadline=Deadline.after(timeout_s), **kwargs)
        return int(response.registry_revision)


@asynccontextmanager
async def world(token: str = TOKEN, host: Literal["core", "aio"] = "core") -> AsyncIterator[World]:
    servicer = Servicer()
    server = RpcServer(RpcSettings(grace_s=5, server=host), authenticator=Authenticator(lambda _: None, service_token=TOKEN))
    server.add(pb_grpc.add_FeatureRetrievalServiceServicer_to_server, servicer, SERVICE, scope="features")
    await server.start()
    to = ChannelSettings(service_token=token)  # type: ignore[arg-type]
    async with open_channel(server.address, to) as channel:
        w = World(server, servicer, channel, to)
        try:
            yield w
        finally:
            await w.mux.close()
            await server.drain()


@HOSTS
async def test_concurrent_calls_get_their_own_answers(host: Literal["core", "aio"]) -> None:
    async with world(host=host) as w:
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
        mux = multiplex.Multiplexer(channel, STREAM, pb.StreamFeaturesResponse, name="features")
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


async def messages_of(stub: Any, *requests: Any, metadata: tuple[tuple[str, str], ...] = ()) -> list[Any]:
    """Return what the server sends to a client that is not ours, once it has sent these and no more."""
    stream = stub.StreamFeatures(metadata=(("x-plait-service-token", TOKEN), *metadata))
    for request in requests:
        await stream.write(request)
    await stream.done_writing()
    return [answer async for answer in stream]


def asking(*numbers: int) -> list[Any]:
    return [
        pb.StreamFeaturesRequest(
            call=types_pb2.CallHeader(call_id=n), request=pb.GetFeaturesRequest(feature_set="ok" if n else "missing", max_defaulted_share=n)
        )
        for n in numbers
    ]


async def test_a_client_that_does_not_say_so_gets_no_joined_answers() -> None:
    async with world() as w:
        answers = await messages_of(w.stub, pb.StreamFeaturesRequest(more=asking(1, 2, 3)))
    assert sorted(answer.call_id for answer in answers) == [1, 2, 3]
    assert not any(answer.more for answer in answers)


@HOSTS
async def test_what_is_asked_together_is_answered_together_by_the_one_that_was_asked(host: Literal["core", "aio"]) -> None:
    async with world(host=host) as w:
        [answer] = await messages_of(w.stub, pb.StreamFeaturesRequest(more=asking(1, 2, 0, 3)), metadata=(frames.JOINED,))
    assert {one.call_id: (one.response.registry_revision, one.status.code) for one in answer.more} == {
        1: (1, 0), 2: (2, 0), 0: (0, 5), 3: (3, 0),
    }  # fmt: skip


async def test_calls_of_one_turn_go_as_one_message() -> None:
    async with world() as w:
        await w.ask("ok", 1)  # the stream is open, and what it takes known
        written: list[bytes] = []
        stream = w.mux._stream
        assert stream is not None
        write = stream._writer._write

        async def seen(data: bytes) -> None:
            written.append(data)
            await write(data)

        stream._writer._write = seen
        assert await asyncio.gather(*(w.ask("ok", n) for n in range(100))) == list(range(100))
        assert [len(frames.cut(data, frames.REQUEST_MORE)) for data in written] == [64, 36]


async def test_a_server_that_says_nothing_of_joined_frames_gets_none() -> None:
    asked: list[Any] = []

    async def old(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            asked.append(request)
            yield pb.StreamFeaturesResponse(
                call_id=request.call.call_id, response=pb.GetFeaturesResponse(registry_revision=int(request.request.max_defaulted_share))
            )

    parse, serialize = pb.StreamFeaturesRequest.FromString, pb.StreamFeaturesResponse.SerializeToString
    handler = grpc.stream_stream_rpc_method_handler(old, parse, serialize)
    server = grpc.aio.server()
    server.add_registered_method_handlers(SERVICE, {"StreamFeatures": handler})  # type: ignore[attr-defined]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"StreamFeatures": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}", ChannelSettings()) as channel:
        w = World(None, None, channel, ChannelSettings())  # type: ignore[arg-type]
        assert await w.ask("ok", 3) == 3
        assert await asyncio.gather(*(w.ask("ok", n) for n in range(20))) == list(range(20))
        assert not any(request.more for request in asked)
        await w.mux.close()
    await server.stop(0)


async def test_raw_calls_are_answered_with_the_bytes_of_typed_ones() -> None:
    async with world() as w:
        request = pb.GetFeaturesRequest(feature_set="ok", max_defaulted_share=12)
        answer = await w.mux.call_raw(request.SerializeToString(), deadline=Deadline.after(20), tenant="shop")
        assert answer == pb.GetFeaturesResponse(registry_revision=12).SerializeToString()
        assert w.servicer.calls[0].tenant == "shop"
        request.feature_set = "missing"
        with pytest.raises(NotFound):
            await w.mux.call_raw(request.SerializeToString(), deadline=Deadline.after(20))


@HOSTS
async def test_a_raw_request_that_cannot_be_parsed_hurts_no_other_call(host: Literal["core", "aio"]) -> None:
    broken = b"\x0a\xff"  # a name that is cut off
    async with world(host=host) as w:
        held = asyncio.create_task(w.ask("wait", 9))
        await asyncio.wait_for(w.servicer.started.wait(), 10)
        raw = w.mux.call_raw(broken, deadline=Deadline.after(20))
        alone = await asyncio.gather(raw, return_exceptions=True)
        raws = [w.mux.call_raw(broken, deadline=Deadline.after(20)) for _ in range(2)]
        first, good, second = await asyncio.gather(raws[0], w.ask("ok", 4), raws[1], return_exceptions=True)
        assert good == 4
        for error in (*alone, first, second):
            assert isinstance(error, InvalidArgument)
            assert error.reason == "MALFORMED_MESSAGE"
        w.servicer.release.set()
        assert await held == 9


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["ok", "missing", "bug", "hang", "cancelled", "late", "large", "broken"]), min_size=1, max_size=90))
def test_calls_that_share_messages_share_nothing_else(kinds: list[str]) -> None:
    async def one(w: World, kind: str, n: int) -> str:
        if kind == "broken":
            return str(await w.mux.call_raw(b"\xff", deadline=Deadline.after(20)))
        if kind == "cancelled":
            task = asyncio.create_task(w.ask("hang"))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task
        if kind == "large":
            frame = pb.StreamFeaturesRequest(request=pb.GetFeaturesRequest(feature_set="ok", inputs=["x" * 100_000], max_defaulted_share=n))
            return str((await w.mux.call(frame, deadline=Deadline.after(20))).registry_revision)
        late = kind in ("late", "hang")
        return str(await w.ask("hang" if late else kind, n, timeout_s=0.05 if late else 20.0))

    async def run() -> None:
        async with world() as w:
            await w.ask("ok")
            answers = await asyncio.gather(*(one(w, kind, n) for n, kind in enumerate(kinds)), return_exceptions=True)
            for n, (kind, answer) in enumerate(zip(kinds, answers, strict=True)):
                if kind in ("ok", "large"):
                    assert answer == str(n)
                else:
                    assert type(answer) is WRONG[kind]
            assert await w.ask("ok", 5) == 5
            assert w.mux.in_flight == 0

    asyncio.run(run())


WRONG = {
    "missing": NotFound, "bug": Internal, "hang": DeadlineExceeded, "late": DeadlineExceeded, "cancelled": asyncio.CancelledError,
    "broken": InvalidArgument,
}  # fmt: skip
