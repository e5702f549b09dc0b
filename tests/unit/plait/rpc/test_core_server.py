"""One contract, two servers: what holds of grpc.aio's server holds of ours, towards stock clients."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from plait.rpc.core_server import CoreServer, Refusal

SERVERS: dict[str, Callable[..., Any]] = {
    "core": CoreServer,
    "core, loop polls": functools.partial(CoreServer, loop_polls=True),
    "aio": grpc.aio.server,
}


class Echo:
    """Methods of every form, on plain bytes, told by the message what to do."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.remaining_s: float | None = None
        self.metadata: dict[str, Any] = {}
        self.peer = ""
        self.aborted_after: list[str] = []

    async def unary(self, request: bytes, context: Any) -> bytes:
        self.remaining_s = context.time_remaining()
        self.metadata = dict(context.invocation_metadata())
        self.peer = context.peer()
        match request:
            case b"hold":
                self.entered.set()
                try:
                    await self.release.wait()
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
            case b"abort":
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not so", (("why", "because"), ("raw-bin", b"\0\xff")))
                self.aborted_after.append("went on")
            case b"bug":
                raise RuntimeError("secret")
            case b"trailers":
                context.set_trailing_metadata((("a", "1"), ("b-bin", b"\0")))
            case b"code":
                context.set_code(grpc.StatusCode.DATA_LOSS)
                context.set_details("gone")
        return request

    async def unary_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for i in range(int(request)):
            yield b"%d" % i

    async def stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b",".join([request async for request in requests])

    async def generating(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            if request == b"abort":
                await context.abort(grpc.StatusCode.ABORTED, "enough")
            yield request

    async def writing(self, requests: AsyncIterator[bytes], context: Any) -> None:
        async for request in requests:
            await context.write(request)

    async def reading(self, _requests: Any, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)

    async def late(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Write after the caller has gone."""
        self.entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            with pytest.raises((asyncio.InvalidStateError, grpc.aio.UsageError)):
                await context.write(b"x")
            self.cancelled.set()
            raise

    def handlers(self) -> dict[str, Any]:
        return {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self.unary_stream),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self.stream_unary),
            "Generating": grpc.stream_stream_rpc_method_handler(self.generating),
            "Writing": grpc.stream_stream_rpc_method_handler(self.writing),
            "Reading": grpc.stream_stream_rpc_method_handler(self.reading),
            "Late": grpc.stream_stream_rpc_method_handler(self.late),
        }


class World:
    def __init__(self, server: Any, echo: Echo, channel: grpc.aio.Channel, address: str) -> None:
        self.server, self.echo, self.channel, self.address = server, echo, channel, address
        self.unary = channel.unary_unary("/e.Echo/Unary")


@pytest.fixture(params=SERVERS)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with serving(request.param) as found:
        yield found


@asynccontextmanager
async def serving(kind: str, options: Any = (), interceptors: Any = ()) -> AsyncIterator[World]:
    echo = Echo()
    server = SERVERS[kind](options=[("grpc.so_reuseport", 0), *options], interceptors=list(interceptors))
    server.add_registered_method_handlers("e.Echo", echo.handlers())
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("e.Echo", echo.handlers()),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield World(server, echo, channel, address)
    await server.stop(5)


async def test_every_form_of_call(world: World) -> None:
    assert await world.unary(b"hello") == b"hello"
    assert await world.unary(b"") == b""
    assert [m async for m in world.channel.unary_stream("/e.Echo/UnaryStream")(b"300")] == [b"%d" % i for i in range(300)]
    sent = [b"%d" % i for i in range(300)]
    assert await world.channel.stream_unary("/e.Echo/StreamUnary")(iter(sent)) == b",".join(sent)
    assert await world.channel.stream_unary("/e.Echo/StreamUnary")(iter([])) == b""
    for form in ("Generating", "Writing", "Reading"):
        assert [m async for m in world.channel.stream_stream(f"/e.Echo/{form}")(iter(sent))] == sent


async def test_a_stream_is_full_duplex(world: World) -> None:
    call: Any = world.channel.stream_stream("/e.Echo/Writing")()
    for i in range(50):
        await call.write(b"%d" % i)
        assert await call.read() == b"%d" % i
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() == grpc.StatusCode.OK


async def test_headers_trailers_peer_and_time_left(world: World) -> None:
    call = world.unary(b"trailers", metadata=(("x-a", "1"), ("x-b-bin", b"\0\xff")), timeout=60)
    assert await call == b"trailers"
    trailers = dict(await call.trailing_metadata())
    assert trailers["a"] == "1"
    assert trailers["b-bin"] == b"\0"
    assert world.echo.metadata["x-a"] == "1"
    assert world.echo.metadata["x-b-bin"] == b"\0\xff"
    assert world.echo.peer.startswith("ipv4:127.0.0.1:")
    assert world.echo.remaining_s is not None
    assert 30 < world.echo.remaining_s <= 61  # the wire rounds up
    await world.unary(b"no deadline")
    assert world.echo.remaining_s is None


async def test_abort_leaves_the_handler_with_code_details_and_trailers(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.unary(b"abort")
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == "not so"
    trailers = dict(caught.value.trailing_metadata() or ())
    assert trailers["why"] == "because"
    assert trailers["raw-bin"] == b"\0\xff"
    assert world.echo.aborted_after == []
    stream: Any = world.channel.stream_stream("/e.Echo/Generating")()
    await stream.write(b"1")
    assert await stream.read() == b"1"
    await stream.write(b"abort")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() == grpc.StatusCode.ABORTED


async def test_a_code_that_was_set_is_the_answer(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.unary(b"code")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.DATA_LOSS, "gone")


async def test_a_handler_that_raises_harms_its_own_call_only(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.unary(b"bug")
    assert caught.value.code() == grpc.StatusCode.UNKNOWN
    assert await world.unary(b"next") == b"next"


async def test_a_method_that_is_not_served_is_unimplemented(world: World) -> None:
    for method in ("/e.Echo/Nothing", "/other/Unary"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await world.channel.unary_unary(method)(b"x")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await world.channel.stream_stream(method)(iter([b"x"])).read()
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_caller_that_goes_away_cancels_its_handler(world: World) -> None:
    call = world.unary(b"hold")
    waiting = asyncio.ensure_future(call)
    await asyncio.wait_for(world.echo.entered.wait(), 10)
    call.cancel()
    await asyncio.wait_for(world.echo.cancelled.wait(), 10)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await world.unary(b"next") == b"next"


async def test_a_deadline_that_passes_cancels_its_handler(world: World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.unary(b"hold", timeout=0.05)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(world.echo.cancelled.wait(), 10)


async def test_writing_to_a_caller_that_has_gone_is_told() -> None:
    async with serving("core") as world:
        await _write_late(world)


async def _write_late(world: World) -> None:
    call = world.channel.stream_stream("/e.Echo/Late")(iter([b"x"]))
    reading = asyncio.ensure_future(call.read())
    await asyncio.wait_for(world.echo.entered.wait(), 10)
    call.cancel()
    await asyncio.wait_for(world.echo.cancelled.wait(), 10)
    await asyncio.gather(reading, return_exceptions=True)


async def test_large_messages_and_many_callers(world: World) -> None:
    large = os.urandom(3_000_000)
    assert await world.unary(large) == large
    answers = await asyncio.gather(*(world.unary(b"%d" % i) for i in range(500)))
    assert answers == [b"%d" % i for i in range(500)]


async def test_a_handler_that_does_not_read_holds_its_sender(world: World) -> None:
    call: Any = world.channel.stream_stream("/e.Echo/Late")()
    sent: list[int] = []

    async def send() -> None:
        for i in range(200):
            await call.write(bytes(1_000_000))
            sent.append(i)

    sending = asyncio.create_task(send())
    await asyncio.wait((sending,), timeout=1)
    assert not sending.done()
    assert len(sent) < 100
    call.cancel()
    await asyncio.gather(sending, return_exceptions=True)


@pytest.mark.parametrize("kind", SERVERS)
async def test_messages_over_the_limit_are_refused(kind: str) -> None:
    async with serving(kind, [("grpc.max_receive_message_length", 1000)]) as world:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await world.unary(bytes(2000))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await world.unary(b"small") == b"small"


@pytest.mark.parametrize("kind", SERVERS)
async def test_interceptors_wrap_in_order_and_see_the_details(kind: str) -> None:
    seen: list[str] = []

    class Naming(grpc.aio.ServerInterceptor):
        def __init__(self, name: str) -> None:
            self.name = name

        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            seen.append(f"{self.name} {details.method} {dict(details.invocation_metadata)['x-a']}")
            return await continuation(details)

    async with serving(kind, interceptors=[Naming("outer"), Naming("inner")]) as world:
        assert await world.unary(b"x", metadata=(("x-a", "1"),)) == b"x"
    assert seen == ["outer /e.Echo/Unary 1", "inner /e.Echo/Unary 1"]


async def test_stopping_finishes_what_is_held_and_takes_nothing_new(world: World) -> None:
    held = asyncio.ensure_future(world.unary(b"hold"))
    await asyncio.wait_for(world.echo.entered.wait(), 10)
    stopping = asyncio.ensure_future(world.server.stop(30))
    await asyncio.sleep(0)
    world.echo.release.set()
    assert await held == b"hold"
    await asyncio.wait_for(stopping, 20)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.unary(b"x", timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_what_does_not_finish_within_the_grace_is_cancelled(world: World) -> None:
    held = asyncio.ensure_future(world.unary(b"hold"))
    await asyncio.wait_for(world.echo.entered.wait(), 10)
    await asyncio.wait_for(world.server.stop(0.05), 20)
    await asyncio.wait_for(world.echo.cancelled.wait(), 10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await held
    assert caught.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)


async def test_stopping_twice_and_before_the_start_is_harmless() -> None:
    server = CoreServer()
    await server.stop(1)
    async with serving("core") as world:
        await world.server.stop(1)
        assert "stopping" in repr(world.server)


async def test_a_port_that_is_taken_is_an_error() -> None:
    async with serving("core") as world:
        with pytest.raises(RuntimeError):
            CoreServer(options=[("grpc.so_reuseport", 0)]).add_insecure_port(world.address)


async def test_no_thread_outlives_its_server() -> None:
    before = threading.active_count()
    for _ in range(3):
        async with serving("core") as world:
            await world.unary(b"x")
    assert threading.active_count() == before


async def test_calls_leave_no_memory_behind() -> None:
    import psutil

    async with serving("core") as world:
        body = bytes(100_000)

        async def some(count: int) -> int:
            for _ in range(count):
                await asyncio.gather(*(world.unary(body) for _ in range(20)))
            return int(psutil.Process().memory_info().rss)

        before = await some(30)
        assert await some(100) - before < 50_000_000  # 200 MB went through
        assert "calls=0" in repr(world.server)


async def test_an_abandoned_crowd_is_forgotten() -> None:
    async with serving("core") as world:
        calls = [world.unary(b"hold", timeout=0.2) for _ in range(200)]
        await asyncio.gather(*calls, return_exceptions=True)
        until_s = time.monotonic() + 10
        while "calls=0" not in repr(world.server) and time.monotonic() < until_s:
            await asyncio.sleep(0.01)
        assert "calls=0" in repr(world.server)


async def test_calls_beyond_the_limit_are_refused_before_they_reach_the_loop() -> None:
    told: list[str] = []
    trailers = (("why", "busy"),)
    refusal = Refusal(lambda under_way: under_way < 2, ("e.Echo",), grpc.StatusCode.RESOURCE_EXHAUSTED, "too many", trailers, told.append)
    echo = Echo()
    server = CoreServer(options=[("grpc.so_reuseport", 0)], refusal=refusal)
    server.add_registered_method_handlers("e.Echo", echo.handlers())
    server.add_registered_method_handlers("e.Health", echo.handlers())
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        unary = channel.unary_unary("/e.Echo/Unary")
        held = [asyncio.ensure_future(_awaited(unary(b"hold"))) for _ in range(2)]
        async with asyncio.timeout(10):
            while len(server._tasks) < 2:
                await asyncio.sleep(0.001)
        for message in (b"small", bytes(1 << 20)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unary(message)
            assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
            assert ("why", "busy") in [(key, value) for key, value in caught.value.trailing_metadata() or ()]
        assert told == ["/e.Echo/Unary"] * 2
        assert await channel.unary_unary("/e.Health/Unary")(b"other services go on") == b"other services go on"
        assert [m async for m in channel.stream_stream("/e.Echo/Writing")(iter([b"a"]))] == [b"a"]
        echo.release.set()
        assert await asyncio.gather(*held) == [b"hold"] * 2
        assert await asyncio.gather(*[_awaited(unary(b"%d" % i)) for i in range(2)]) == [b"0", b"1"]
        echo.release.clear()
        gone = unary(b"hold", timeout=0.05)
        with pytest.raises(grpc.aio.AioRpcError):
            await gone
        assert await unary(b"who leaves makes room") == b"who leaves makes room"
    await server.stop(5)


async def _awaited(call: Any) -> bytes:
    answer: bytes = await call
    return answer


@pytest.mark.parametrize("by_method", [True, False])
async def test_interceptors_that_go_by_the_method_are_asked_once(by_method: bool) -> None:
    asked: list[str] = []

    class Interceptor(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            asked.append(handler_call_details.method)
            return await continuation(handler_call_details)

    interceptor = Interceptor()
    interceptor.by_method = by_method  # type: ignore[attr-defined]
    async with serving("core", interceptors=[interceptor]) as world:
        for _ in range(3):
            assert await world.unary(b"x") == b"x"
            assert [m async for m in world.channel.unary_stream("/e.Echo/UnaryStream")(b"1")] == [b"0"]
    assert len(asked) == (2 if by_method else 6)


class Slow:
    """A server of the core whose `shutdown` takes long to return, as it may on a busy machine."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._destroyed = threading.Event()
        self.destroyed_under_it = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def shutdown(self, queue: Any, tag: Any) -> None:
        self._server.shutdown(queue, tag)
        self.destroyed_under_it = self._destroyed.wait(0.2)  # (what must not come can only be waited for so long)

    def destroy(self) -> None:
        self._destroyed.set()
        self._server.destroy()


@pytest.mark.parametrize("loop_polls", [False, True])
async def test_the_core_is_not_destroyed_before_its_shutdown_has_returned(loop_polls: bool) -> None:
    server = CoreServer(loop_polls=loop_polls)
    server.add_insecure_port("127.0.0.1:0")
    slow = server._server = Slow(server._server)
    await server.start()
    await server.stop(1)
    assert not slow.destroyed_under_it
    assert slow._destroyed.is_set()
