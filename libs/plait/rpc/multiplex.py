"""Many concurrent calls over one long-lived bidirectional stream, each with its own deadline, tenant, trace and cancellation.

A unary call on grpc.aio costs about twice what one message on an open stream does, and a Rank makes two calls behind the router.
The frames are ordinary protobuf messages: a `CallHeader` and the very request the unary method takes; the answer is its response, filled
in place so that tensors are never copied into an envelope, or a `CallStatus`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
from opentelemetry.trace import SpanKind

from plait.api.types.v1 import types_pb2
from plait.errors import Cancelled, DeadlineExceeded, Internal, PlaitError, ResourceExhausted, Unavailable, from_rpc_error, from_status
from plait.rpc.call import Call, current, enter
from plait.rpc.credentials import DEFAULT_TENANT
from plait.rpc.deadline import Deadline
from plait.telemetry.logging import get_logger, without_words
from plait.telemetry.tracing import Tracing, off

log = get_logger(__name__)

_MAX_TIMEOUT_S: Final = 3600.0

Fill = Callable[[Any, Any], Awaitable[object]]


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
) -> None:
    """Answer the calls of one stream until the client ends it (or the process drains), then finish those under way.

    `fill(request, response)` fills the response in place, or raises a PlaitError. `frames` yields Stream…Request messages
    (`.call`, `.request`), `response_type` is the Stream…Response (`.call_id`, `.response`, `.status`). Calls that bring no deadline get
    `default_timeout_s`.
    """
    calls = _ServedCalls(context, fill, response_type, tracing or off(), span_name, default_timeout_s)
    try:
        async for frame in frames:
            header = frame.call
            if header.cancel:
                calls.cancel(header.call_id)
            elif len(calls) >= max_in_flight:
                calls.refuse(header.call_id, max_in_flight)
            else:
                calls.start(frame)
        await calls.finish()
    finally:
        calls.close()


class _ServedCalls:
    """The calls under way on one stream, server side."""

    def __init__(
        self, context: Any, fill: Fill, response_type: type[Any], tracing: Tracing, span_name: str, default_timeout_s: float
    ) -> None:
        self._fill = fill
        self._response_type = response_type
        self._tracing = tracing
        self._span_name = span_name
        self._default_timeout_s = default_timeout_s
        self._stream_call = current()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._writer = _Writer(context.write, "write answers")

    def __len__(self) -> int:
        return len(self._tasks)

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

    def refuse(self, call_id: int, limit: int) -> None:
        message = f"{limit} calls are under way on this stream, which is all it takes: retry later"
        self._writer.put(self._failure(call_id, ResourceExhausted(message, reason="OVERLOADED", retry_after_s=0.1)))

    async def _answer(self, frame: Any) -> None:
        call_id = frame.call.call_id
        try:
            with self._tracing.span(self._span_name, kind=SpanKind.SERVER, traceparent=frame.call.traceparent):
                answer = await self._run(call_id, frame)
            self._writer.put(answer)
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

    `open_stream` is the generated stub's stream method, ready to call (metadata included).
    """

    def __init__(self, open_stream: Callable[[], Any], *, name: str, tracing: Tracing | None = None) -> None:
        self._open_stream = open_stream
        self._name = name
        self._tracing = tracing or off()
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
        left_s = deadline.remaining_s()
        if left_s <= 0:
            raise DeadlineExceeded(f"no time was left to call {self._name}: allow the call more time")
        with self._tracing.span(self._name, kind=SpanKind.CLIENT):
            header = frame.call
            header.call_id = call_id = next(self._ids)
            header.timeout_us = max(1, int(min(left_s, _MAX_TIMEOUT_S) * 1e6))
            header.tenant = tenant
            header.request_id = request_id
            if self._tracing.enabled:
                header.traceparent = self._tracing.traceparent()
            return await self._exchange(frame, call_id, left_s)

    async def close(self) -> None:
        """End the stream; calls still waiting fail with Cancelled."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close(Cancelled(f"the connection to {self._name} was closed"))

    async def _exchange(self, frame: Any, call_id: int, left_s: float) -> Any:
        stream = self._stream
        if stream is None or not stream.usable:
            stream = self._stream = _OpenStream(self._open_stream(), self._name)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        stream.waiting[call_id] = answer
        timer = loop.call_later(left_s, _expire, answer, self._name) if left_s < _MAX_TIMEOUT_S else None
        try:
            stream.send(frame)
            received = await answer
        except BaseException:
            # The caller has gone, or the time is up: tell the server not to bother.
            if stream.waiting.pop(call_id, None) is not None:
                stream.cancel_call(type(frame), call_id)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if received.HasField("status"):
            raise from_status(received.status.code, received.status.message, received.status.status_details)
        return received.response


class _OpenStream:
    """One stream of a Multiplexer, from its opening until it breaks; owns the task that reads it."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream = stream
        self._name = name
        self._writer = _Writer(stream.write, f"write {name}")
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.usable = True
        self._reader = asyncio.create_task(self._read(), name=f"read {name}")

    def send(self, frame: Any) -> None:
        self._writer.put(frame)

    def cancel_call(self, frame_type: type[Any], call_id: int) -> None:
        if self.usable:
            self.send(frame_type(call=types_pb2.CallHeader(call_id=call_id, cancel=True)))

    async def close(self, error: PlaitError) -> None:
        self._break(error)
        self._stream.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        error: PlaitError = Unavailable(f"{self._name} ended the connection", reason="CONNECTION_LOST", retry_after_s=0.1)
        try:
            while (answer := await self._stream.read()) is not grpc.aio.EOF:
                waiter = self.waiting.pop(answer.call_id, None)
                if waiter is not None and not waiter.done():
                    waiter.set_result(answer)
        except grpc.RpcError as broken:
            error = self._reason(from_rpc_error(broken))
        finally:
            self._break(error)

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
    """Writes messages one after the other, as gRPC demands, from a task of its own: cancelling a task inside a gRPC write would cancel the
    whole stream, and with it everybody else's calls."""

    def __init__(self, write: Callable[[Any], Awaitable[None]], name: str) -> None:
        self._write = write
        self._queue: deque[Any] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task = asyncio.create_task(self._run(), name=name)

    def put(self, message: Any) -> None:
        self._queue.append(message)
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
                    await self._write(self._queue.popleft())
                self._idle.set()
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            pass  # the stream broke: whoever reads it learns why
