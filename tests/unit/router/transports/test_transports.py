"""What both ways of calling an endpoint do alike, against real servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from tests.fakes.foreign_server import ForeignServer
from tests.fakes.model_worker import FakeModelWorker
from tests.fakes.registry_world import eventually

from plait.api.inference.v2 import inference_pb2
from plait.api.model_worker.v1 import model_worker_service_pb2 as pb
from plait.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PlaitError,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from plait.rpc.deadline import Deadline
from plait.settings import ChannelSettings
from router.connections import lost
from router.endpoints import Transport
from router.transports.foreign import ForeignTransport
from router.transports.plait import PlaitTransport

STREAM = "/plait.api.model_worker.v1.ModelWorkerService/StreamInfer"


def opened(server: FakeModelWorker | ForeignServer) -> Transport:
    settings = ChannelSettings(service_token="the-token")  # type: ignore[arg-type]
    if isinstance(server, ForeignServer):
        return ForeignTransport(server.address, ChannelSettings())
    return PlaitTransport(server.address, "Infer", STREAM, pb.StreamInferResponse, settings)


Server = Any
Make = Callable[[], Server]


@pytest.fixture(params=["plait", "foreign"])
def make(request: pytest.FixtureRequest) -> Make:
    return FakeModelWorker if request.param == "plait" else ForeignServer


@asynccontextmanager
async def both(make: Make) -> AsyncIterator[tuple[Server, Transport]]:
    async with make() as server:
        transport = opened(server)
        try:
            yield server, transport
        finally:
            await transport.close()


def request(rows: int = 2) -> inference_pb2.ModelInferRequest:
    made = inference_pb2.ModelInferRequest(model_name="ranker", model_version="2", id="r-7")
    for name in ("user", "item"):
        made.inputs.add(name=name, datatype="FP32", shape=[rows, 1])
        made.raw_input_contents.append(b"\x00\x00\x80?" * rows)
    return made


async def typed(transport: Transport, timeout_s: float = 20.0) -> Any:
    frame = pb.StreamInferRequest()
    frame.request.CopyFrom(request())
    return await transport.typed(frame, deadline=Deadline.after(timeout_s), tenant="shop", request_id="q")


async def raw(transport: Transport, timeout_s: float = 20.0) -> Any:
    answer = await transport.raw(request().SerializeToString(), deadline=Deadline.after(timeout_s), tenant="shop", request_id="q")
    return inference_pb2.ModelInferResponse.FromString(answer)


Call = Callable[..., Awaitable[Any]]


@pytest.mark.parametrize("call", [typed, raw])
async def test_the_answer_is_the_servers_and_the_request_is_the_callers(make: Make, call: Call) -> None:
    async with both(make) as (server, transport):
        answer = await call(transport)
        assert (answer.model_name, answer.model_version, answer.id) == ("ranker", "2", "r-7")
        assert list(answer.raw_output_contents) == [b"\x00\x00\x80?" * 2]
        assert server.requests == [request()]


@pytest.mark.parametrize("call", [typed, raw])
async def test_a_deadline_ends_the_call_on_both_sides(make: Make, call: Call) -> None:
    async with both(make) as (server, transport):
        server.gate = asyncio.Event()
        with pytest.raises(DeadlineExceeded):
            await call(transport, timeout_s=0.1)
        await eventually(lambda: server.cancelled == 1)
        with pytest.raises(DeadlineExceeded):
            await call(transport, timeout_s=0.0)
        assert len(server.requests) == 1, "what has no time left is not sent"


@pytest.mark.parametrize("call", [typed, raw])
async def test_a_caller_that_leaves_is_heard_of(make: Make, call: Call) -> None:
    async with both(make) as (server, transport):
        server.gate = asyncio.Event()
        leaving = asyncio.create_task(call(transport))  # type: ignore[arg-type,var-annotated]
        await asyncio.wait_for(server.started.wait(), 20)
        leaving.cancel()
        await eventually(lambda: server.cancelled == 1)


@pytest.mark.parametrize("call", [typed, raw])
async def test_a_call_that_waits_when_its_connection_is_closed_ends_with_an_error(make: Make, call: Call) -> None:
    async with both(make) as (server, transport):
        server.gate = asyncio.Event()
        waiting = asyncio.create_task(call(transport))  # type: ignore[arg-type,var-annotated]
        await asyncio.wait_for(server.started.wait(), 20)
        await transport.close()
        with pytest.raises(PlaitError):
            await waiting


@pytest.mark.parametrize("call", [typed, raw])
async def test_a_server_that_is_away_is_lost(make: Make, call: Call) -> None:
    async with make() as server:
        pass
    transport = opened(server)
    try:
        with pytest.raises(Unavailable) as caught:
            await call(transport)
        assert lost(caught.value)
        assert await transport.ready_versions(Deadline.after(1.0)) is None
    finally:
        await transport.close()


@pytest.mark.parametrize(
    ("answered", "expected", "reason"),
    [
        ((grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full"), ResourceExhausted, "RESOURCE_EXHAUSTED"),
        ((grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape"), InvalidArgument, "INVALID_ARGUMENT"),
        ((grpc.StatusCode.INVALID_ARGUMENT, "Request for unknown model: 'x' is not found"), NotFound, "MODEL_NOT_FOUND"),
        ((grpc.StatusCode.NOT_FOUND, "no such model"), NotFound, "NOT_FOUND"),
        ((grpc.StatusCode.FAILED_PRECONDITION, "no"), FailedPrecondition, "FAILED_PRECONDITION"),
    ],
)
async def test_a_foreign_servers_codes_in_our_words(answered: Any, expected: type[PlaitError], reason: str) -> None:
    async with both(ForeignServer) as (server, transport):
        server.fail = answered
        with pytest.raises(expected) as caught:
            await typed(transport)
        assert caught.value.reason == reason
        assert not lost(caught.value)


async def test_what_a_foreign_server_holds_is_known_where_it_says_so() -> None:
    async with both(lambda: ForeignServer(("ranker", "2"))) as (server, transport):
        assert await transport.ready_versions(Deadline.after(5.0)) == {("ranker", "2")}
        server.held = (("ranker", ""),)
        assert await transport.ready_versions(Deadline.after(5.0)) is None
        server.lists = False
        assert await transport.ready_versions(Deadline.after(5.0)) is None


async def test_other_questions_of_the_protocol_are_asked_bytes_for_bytes() -> None:
    async with ForeignServer(("ranker", "2")) as server:
        transport = ForeignTransport(server.address, ChannelSettings())
        try:
            answer = await transport.ask(
                "RepositoryIndex", inference_pb2.RepositoryIndexRequest(ready=True).SerializeToString(), Deadline.after(20)
            )
            assert inference_pb2.RepositoryIndexResponse.FromString(answer).models
            with pytest.raises(Unimplemented):
                await transport.ask("TraceSetting", b"", Deadline.after(20))
        finally:
            await transport.close()


async def test_a_foreign_server_gets_the_callers_metadata_but_no_credentials() -> None:
    async with ForeignServer() as server:
        transport = ForeignTransport(server.address, ChannelSettings())
        sent = (
            ("authorization", "Bearer secret"),
            ("proxy-authorization", "Basic secret"),
            ("cookie", "secret"),
            ("x-forwarded-client-cert", "secret"),
            ("x-plait-service-token", "t"),
            ("user-agent", "me"),
            ("x-mine", "1"),
            ("y-bin", b"\x00"),
        )
        try:
            await transport.raw(request().SerializeToString(), deadline=Deadline.after(20), tenant="", request_id="", metadata=sent)
        finally:
            await transport.close()
        [seen] = server.metadata
        assert seen.pop("user-agent") != "me"
        assert {name: value for name, value in seen.items() if name in dict(sent)} == {"x-mine": "1", "y-bin": b"\x00"}
