"""Many concurrent calls over one long-lived bidirectional stream, each with its own deadline, tenant, trace and cancellation.

A unary call on grpc.aio costs about twice what one message on an open stream does, and a Rank makes two calls behind the router.
The frames are ordinary protobuf messages: a `CallHeader` and the very request the unary method takes; the answer is its response, filled
in place so that tensors are never copied into an envelope, or a `CallStatus`. The client handles them as bytes, so that a call whose request
is serialized already (`call_raw`) shares the stream with others. What gathers in one turn of the loop goes as one message (`plait.rpc.frames`).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.trace import SpanKind

from plait.api.types.v1 import types_pb2
from plait.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    PlaitError,
    ResourceExhausted,
    Unavailable,
    from_rpc_error,
    from_status,
)
from plait.rpc import frames as wire
from plait.rpc.call import Call, current, enter
from plait.rpc.credentials import DEFAULT_TENANT
from plait.rpc.deadline import Deadline
from plait.rpc.interceptor import MalformedMessage
from plait.telemetry.logging import get_logger, without_words
from plait.telemetry.tracing import Tracing, off

log = get_logger(__name__)

_MAX_TIMEOUT_S: Final = 3600.0

Fill = Callable[[Any, Any], Awaitable[object]]
Finish = Callable[[Any], None]


async def serve(
    frames: AsyncIterator[Any],
    context: Any,
    fill: Fill,
    response_type: type[Any],
    *,
    max_in_flight: int = 1024,
    default_timeout_s: float = 10.0,
    tracing: Tracing | None = None,
    span_name: str = "",
    finish: Finish | None = None,
) -> None:
    """Answer the calls of one stream until the client ends it (or the process drains), then finish those under way.

    `fill(request, response)` fills the response in place, or raises a PlaitError. `frames` yields Stream…Request messages
    (`.call`, `.request`), `response_type` is the Stream…Response (`.call_id`, `.response`, `.status`). Calls that bring no deadline get
    `default_timeout_s`. `finish` may add to each Stream…Response, failures included, just before it goes out.
    """
    calls = _ServedCalls(context, fill, response_type, tracing or off(), span_name, default_timeout_s, finish, max_in_flight)
    try:
        await calls.agree()
        messages = aiter(frames)
        while True:
            try:
                message = await anext(messages)
            except StopAsyncIteration:
                break
            except MalformedMessage as error:
                calls.take_apart(error)
                continue
            for frame in message.more or (message,):
                calls.take(frame)
        await calls.finish()
    finally:
        calls.close()


class _ServedCalls:
    """The calls under way on one stream, server side."""

    def __init__(
        self,
        context: Any,
        fill: Fill,
        response_type: type[Any],
        tracing: Tracing,
        span_name: str,
        default_timeout_s: float,
        finish: Finish | None,
        max_in_flight: int,
    ) -> None:
        self._context = context
        self._max_in_flight = max_in_flight
        self._fill = fill
        self._response_type = response_type
        self._tracing = tracing
        self._span_name = span_name
        self._default_timeout_s = default_timeout_s
        self._finish = finish
        self._stream_call = current()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._writer = _Writer(context.write, "write answers", wire.Numbers.of(response_type).more)

    async def agree(self) -> None:
        """Join answers for a client that takes them joined, and say so."""
        if wire.JOINED in (self._context.invocation_metadata() or ()):
            await self._context.send_initial_metadata((wire.JOINED,))
            self._writer.joins = True

    def take(self, frame: Any) -> None:
        header = frame.call
        if header.cancel:
            self.cancel(header.call_id)
        elif len(self._tasks) >= self._max_in_flight:
            self.refuse(header.call_id)
        else:
            self.start(frame)

    def take_apart(self, error: MalformedMessage) -> None:
        """Serve what can be parsed of a message, and refuse the other calls in it alone. Raises the error where there is no telling whose it is.

        The tensors of a raw call were parsed by nobody before us: they must not be able to end the calls of others.
        """
        try:
            for data in wire.cut(error.data, wire.REQUEST_MORE):
                self._take_unparsed(data, error)
        except (ValueError, DecodeError):
            raise error from None

    def _take_unparsed(self, data: bytes, error: MalformedMessage) -> None:
        try:
            frame = error.parse(data)
        except Exception:  # (as gRPC's own call of it is guarded)
            call_id = types_pb2.CallHeader.FromString(wire.header(data)).call_id
            self._writer.put(self._failure(call_id, InvalidArgument(error.message, reason=error.reason)).SerializeToString())
        else:
            self.take(frame)

    def start(self, frame: Any) -> None:
        call_id = frame.call.call_id
        if call_id in self._tasks:  # two answers under one id would be taken for each other
            self._tasks[call_id].cancel()
        task = asyncio.create_task(self._answer(frame), name=f"call {call_id}")
        self._tasks[call_id] = task

    def cancel(self, call_id: int) -> None:
        task = self._tasks.pop(call_id, None)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        for call_id in tuple(self._tasks):
            self.cancel(call_id)
        self._writer.close()

    async def finish(self) -> None:
        while self._tasks:
            await asyncio.wait(tuple(self._tasks.values()))
        await self._writer.flush()

    def refuse(self, call_id: int) -> None:
        message = f"{self._max_in_flight} calls are under way on this stream, which is all it takes: retry later"
        self._writer.put(self._failure(call_id, ResourceExhausted(message, reason="OVERLOADED", retry_after_s=0.1)).SerializeToString())

    async def _answer(self, frame: Any) -> None:
        call_id = frame.call.call_id
        try:
            with self._tracing.span(self._span_name, kind=SpanKind.SERVER, traceparent=frame.call.traceparent):
                answer = await self._run(call_id, frame)
            if self._finish is not None:
                self._finish(answer)
            self._writer.put(answer.SerializeToString())
        finally:
            if self._tasks.get(call_id) is asyncio.current_task():
                del self._tasks[call_id]

    async def _run(self, call_id: int, frame: Any) -> Any:
        answer = self._response_type(call_id=call_id)
        try:
            enter(self._call(frame.call))
            await self._fill(frame.request, answer.response)
        except PlaitError as error:
            return self._failure(call_id, error)
        except Exception as error:  # (whatever it is, the caller must get a typed status)
            log.exception("a call failed by a fault of ours", method=self._stream_call.method, exc_info=without_words(error))
            return self._failure(call_id, Internal("a fault inside plait; it was logged, please report it with the time of the call"))
        return answer

    def _call(self, header: types_pb2.CallHeader) -> Call:
        stream = self._stream_call
        return Call(
            method=stream.method,
            tenant=(header.tenant if stream.is_service else stream.tenant) or DEFAULT_TENANT,
            caller=stream.caller,
            scopes=stream.scopes,
            is_service=stream.is_service,
            request_id=header.request_id,
            deadline=Deadline.after(header.timeout_us / 1e6 if header.timeout_us > 0 else self._default_timeout_s),
        )

    def _failure(self, call_id: int, error: PlaitError) -> Any:
        answer = self._response_type(call_id=call_id)
        answer.status.code = error.code.value[0]
        answer.status.message = error.message
        answer.status.status_details = error.to_status().SerializeToString()
        return answer


class Multiplexer:
    """The client side: any number of concurrent calls over one stream, which is opened on first use and again after a break.

    `method` is the stream's full name, "/package.Service/Method", on `channel`; `response_type` its Stream…Response; `metadata` opens it.
    `on_load` gets the `.load` of each answer that brings one, before the caller gets its answer.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        method: str,
        response_type: type[Any],
        *,
        name: str,
        metadata: Sequence[tuple[str, str]] = (),
        tracing: Tracing | None = None,
        on_load: Callable[[Any], None] | None = None,
    ) -> None:
        self._open: Any = channel.stream_stream(method)  # (no serializers: it takes and gives bytes)
        self._metadata = (*metadata, wire.JOINED)
        empty = response_type()
        self._response_type = type(empty.response)
        self._numbers = wire.Numbers.of(response_type)
        self._name = name
        self._tracing = tracing or off()
        self._on_load: Callable[[bytes], None] | None = None
        if on_load is not None:
            parse = type(empty.load).FromString
            self._on_load = lambda load: on_load(parse(load))
        self._stream: _OpenStream | None = None
        self._ids = itertools.count(1)

    def __repr__(self) -> str:
        return f"<Multiplexer {self._name} in_flight={self.in_flight} {'open' if self._stream and self._stream.usable else 'closed'}>"

    @property
    def in_flight(self) -> int:
        """Calls waiting for their answer."""
        return len(self._stream.waiting) if self._stream else 0

    async def call(self, frame: Any, *, deadline: Deadline, tenant: str = "", request_id: str = "") -> Any:
        """Send `frame` (a Stream…Request whose `.request` is filled) and return the `.response` of its answer.

        Raises the PlaitError of the answer, DeadlineExceeded when the deadline passes first, Unavailable when the stream breaks.
        """
        left_s = self._left_s(deadline)
        with self._tracing.span(self._name, kind=SpanKind.CLIENT):
            self._head(frame.call, left_s, tenant, request_id)
            answer = await self._exchange(frame.call.call_id, frame.SerializeToString(), left_s)
        return self._response_type.FromString(answer)

    async def call_raw(self, request: bytes, *, deadline: Deadline, tenant: str = "", request_id: str = "") -> bytes:
        """Send a request that is serialized already and return the response as its bytes; raises as `call`."""
        left_s = self._left_s(deadline)
        with self._tracing.span(self._name, kind=SpanKind.CLIENT):
            header = types_pb2.CallHeader()
            self._head(header, left_s, tenant, request_id)
            return await self._exchange(header.call_id, wire.request_frame(header, request), left_s)

    async def close(self) -> None:
        """End the stream; calls still waiting fail with Cancelled."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close(Cancelled(f"the connection to {self._name} was closed"))

    def _left_s(self, deadline: Deadline) -> float:
        left_s = deadline.remaining_s()
        if left_s <= 0:
            raise DeadlineExceeded(f"no time was left to call {self._name}: allow the call more time")
        return left_s

    def _head(self, header: Any, left_s: float, tenant: str, request_id: str) -> None:
        header.call_id = next(self._ids)
        header.timeout_us = max(1, int(min(left_s, _MAX_TIMEOUT_S) * 1e6))
        header.tenant = tenant
        header.request_id = request_id
        if self._tracing.enabled:
            header.traceparent = self._tracing.traceparent()

    async def _exchange(self, call_id: int, frame: bytes, left_s: float) -> bytes:
        stream = self._stream
        if stream is None or not stream.usable:
            opened = self._open(metadata=self._metadata)
            stream = self._stream = _OpenStream(opened, self._name, self._numbers, self._on_load)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[wire.Parts] = loop.create_future()
        stream.waiting[call_id] = answer
        timer = loop.call_later(left_s, _expire, answer, self._name) if left_s < _MAX_TIMEOUT_S else None
        try:
            stream.send(frame)
            received = await answer
        except BaseException:
            # The caller has gone, or the time is up: tell the server not to bother.
            if stream.waiting.pop(call_id, None) is not None:
                stream.cancel_call(call_id)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if received.status is not None:
            status = types_pb2.CallStatus.FromString(received.status)
            raise from_status(status.code, status.message, status.status_details)
        return received.response or b""


class _OpenStream:
    """One stream of a Multiplexer, from its opening until it breaks; owns the task that reads it."""

    def __init__(self, stream: Any, name: str, numbers: wire.Numbers, on_load: Callable[[bytes], None] | None) -> None:
        self._stream = stream
        self._numbers = numbers
        self._on_load = on_load
        self._name = name
        self._writer = _Writer(stream.write, f"write {name}", wire.REQUEST_MORE)
        self.waiting: dict[int, asyncio.Future[wire.Parts]] = {}
        self.usable = True
        self._reader = asyncio.create_task(self._read(), name=f"read {name}")

    def send(self, frame: bytes) -> None:
        self._writer.put(frame)

    def cancel_call(self, call_id: int) -> None:
        if self.usable:
            self.send(wire.request_frame(types_pb2.CallHeader(call_id=call_id, cancel=True), b""))

    async def close(self, error: PlaitError) -> None:
        self._break(error)
        self._stream.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        error: PlaitError = Unavailable(f"{self._name} ended the connection", reason="CONNECTION_LOST", retry_after_s=0.1)
        try:
            self._writer.joins = wire.JOINED in tuple(await self._stream.initial_metadata() or ())
            while (message := await self._stream.read()) is not grpc.aio.EOF:
                for frame in wire.cut(message, self._numbers.more):
                    self._hand_over(wire.parts(frame, self._numbers))
        except grpc.RpcError as broken:
            error = self._reason(from_rpc_error(broken))
        except ValueError as broken:
            error = Unavailable(f"{self._name} sent what is no answer: {broken}", reason="CONNECTION_LOST", retry_after_s=0.1)
            self._stream.cancel()
        finally:
            self._break(error)

    def _hand_over(self, answer: wire.Parts) -> None:
        if answer.load is not None and self._on_load is not None:
            self._on_load(answer.load)
        waiter = self.waiting.pop(answer.call_id, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(answer)

    def _reason(self, error: PlaitError) -> PlaitError:
        """A broken stream is a reason to retry elsewhere, unless we are not let in."""
        if error.code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED):
            return error
        return Unavailable(f"the connection to {self._name} broke: {error.message}", reason="CONNECTION_LOST", retry_after_s=0.1)

    def _break(self, error: PlaitError) -> None:
        self.usable = False
        self._writer.close()
        waiting, self.waiting = self.waiting, {}
        for waiter in waiting.values():
            if not waiter.done():
                waiter.set_exception(error)


def _expire(answer: asyncio.Future[Any], name: str) -> None:
    if not answer.done():
        answer.set_exception(DeadlineExceeded(f"{name} did not answer within the deadline: allow the call more time"))


class _Writer:
    """Writes frames one after the other, as gRPC demands, from a task of its own: cancelling a task inside a gRPC write would cancel the
    whole stream, and with it everybody else's calls. Where the other side `joins`, what has gathered goes together, in field `more`."""

    def __init__(self, write: Callable[[bytes], Awaitable[None]], name: str, more: int) -> None:
        self._write = write
        self._more = more
        self.joins = False
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task = asyncio.create_task(self._run(), name=name)

    def put(self, frame: bytes) -> None:
        self._queue.append(frame)
        self._idle.clear()
        self._wake.set()

    async def flush(self) -> None:
        """Wait until everything put so far was taken by gRPC, or the stream broke."""
        idle = asyncio.create_task(self._idle.wait(), name="flush")
        await asyncio.wait((idle, self._task), return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()

    def close(self) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._queue:
                    await self._write(wire.join(self._queue, self._more) if self.joins else self._queue.popleft())
                self._idle.set()
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            pass  # the stream broke: whoever reads it learns why
