"""The load generator against a real grpc.aio server and a real HTTP server: every call is seen there, and every answer here."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import pytest

from plait_bench import http1
from plait_bench.connection import Closed
from plait_bench.http2 import GrpcRequest
from plait_bench.load import Target, closed_loop, open_loop


class Echo(grpc.GenericRpcHandler):
    """Answers what it is sent; "fail" as a failure, with trailers of its own."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, dict[str, str], float | None]] = []

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self.answer) if details.method == "/t.Echo/Say" else None

    async def answer(self, message: bytes, context: Any) -> bytes:
        self.seen.append((message, dict(context.invocation_metadata()), context.time_remaining()))
        context.set_trailing_metadata((("x-number", str(len(self.seen))),))
        if message == b"fail":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more")
        return message


@asynccontextmanager
async def echo() -> AsyncIterator[tuple[Echo, int]]:
    server = grpc.aio.server()
    handler = Echo()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield handler, port
    finally:
        await server.stop(0)


def say(port: int, message: bytes, **more: Any) -> Target:
    return Target(port=port, request=GrpcRequest(method="/t.Echo/Say", message=message, **more))


@pytest.mark.parametrize("size", [0, 100, 16_384, 1_000_000])
@pytest.mark.parametrize(("callers", "connections"), [(1, 1), (8, 1), (8, 3)])
async def test_a_grpc_server_sees_each_call_whole_and_each_answer_comes_back(size: int, callers: int, connections: int) -> None:
    message = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with echo() as (handler, port):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert await channel.unary_unary("/t.Echo/Say")(message) == message  # as a client of grpc's own does
        tally = await asyncio.to_thread(closed_loop, say(port, message), callers=callers, connections=connections, seconds=0.2)
        assert set(tally.statuses) == {0}
        assert len(tally.taken_s) == tally.statuses[0] > 0
        assert tally.statuses[0] <= len(handler.seen) - 1 <= tally.statuses[0] + callers
        assert all(seen == message for seen, _, _ in handler.seen)
        assert tally.first_bodies == [message] * connections
        assert tally.per_s == pytest.approx(len(tally.taken_s) / tally.seconds)


async def test_metadata_budget_and_refusals_are_as_with_a_real_client() -> None:
    async with echo() as (handler, port):
        target = say(port, b"fail", metadata=(("x-token", "secret"),), timeout_ms=5000)
        tally = await asyncio.to_thread(closed_loop, target, callers=2, seconds=0.1)
        assert set(tally.statuses) == {grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]}
        assert tally.taken_s == []
        _, metadata, left_s = handler.seen[0]
        assert metadata["x-token"] == "secret"
        assert left_s is not None
        assert 0 < left_s <= 5
        unknown = Target(port=port, request=GrpcRequest(method="/t.Echo/Nothing", message=b""))
        tally = await asyncio.to_thread(closed_loop, unknown, callers=1, seconds=0.05)
        assert set(tally.statuses) == {grpc.StatusCode.UNIMPLEMENTED.value[0]}


async def test_an_open_loop_begins_what_it_announces() -> None:
    async with echo() as (handler, port):
        tally = await asyncio.to_thread(open_loop, say(port, b"hello"), per_s=500, seconds=0.2, connections=2, settle_s=10)
        assert len(handler.seen) == 100 == tally.statuses[0] == len(tally.taken_s)


@contextmanager
def http_server(status: int, body: bytes, *, requests: int = 1 << 30) -> Iterator[int]:
    """A keep-alive server that hangs up after so many requests."""
    left = [requests]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.rfile.read(int(self.headers["content-length"])) == b"question"
            left[0] -= 1
            self.close_connection = left[0] <= 0
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("callers", [1, 4])
def test_http_callers_have_a_connection_each(callers: int) -> None:
    with http_server(200, b"answer") as port:
        target = Target(port=port, request=http1.build_request("/", b"question"))
        tally = closed_loop(target, callers=callers, seconds=0.2, warm_up_s=0.05)
    assert set(tally.statuses) == {200}
    assert tally.first_bodies == [b"answer"] * callers
    assert tally.cpu_s > 0


def test_http_failures_are_counted_and_not_timed() -> None:
    with http_server(503, b"") as port:
        tally = closed_loop(Target(port=port, request=http1.build_request("/", b"question")), callers=1, seconds=0.1)
    assert set(tally.statuses) == {503}
    assert tally.taken_s == []
    assert tally.per_s == 0


def test_a_server_that_hangs_up_is_said() -> None:
    with http_server(200, b"", requests=3) as port, pytest.raises(Closed):
        closed_loop(Target(port=port, request=http1.build_request("/", b"question")), callers=1, seconds=10)


def test_the_servers_cpu_time_is_read_at_both_ends() -> None:
    readings = iter([10.0, 12.5])
    with http_server(200, b"") as port:
        target = Target(port=port, request=http1.build_request("/", b"question"))
        assert closed_loop(target, callers=1, seconds=0.05, server_cpu_s=lambda: next(readings)).server_cpu_s == 2.5
