"""An asyncio gRPC server that waits for gRPC's core in one thread instead of once per operation: several times the calls per core of `grpc.aio`.

`grpc.aio` takes every operation of a call (arrival, message, end, answer) through a future, a task switch and a hop between threads, about
210 us of CPU for a call that does nothing. Here a thread takes events off the completion queue, starts what comes next in the core itself,
and wakes the loop once for whatever has gathered. With `loop_polls` it waits for the first event of a burst only, and the loop takes the rest
itself without waiting: under many callers two threads that take turns at every event fight for the interpreter's lock. The operations are those of
grpcio's own synchronous server (`grpc/_server.py`), on grpcio's own binding `grpc._cython.cygrpc`, which is private but has had this shape
since 2018; `RpcSettings.server` names `grpc.aio` as the way back, and one contract test runs against both.

Threads: every `_on_…` runs in whichever thread has the turn (`_baton`), all else on the event loop; `_posted` is how the former tells the latter.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Container, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from plait.telemetry.logging import get_logger, without_words

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]

log = get_logger(__name__)

_BURST: Final = 64  # events taken by the loop before it does something else
# In vain, before the loop believes that there are none: each look reads from one connection, and only a whole message is an event.
_LOOKS: Final = 5
_SLOTS: Final = 64  # calls that the core may announce before we look
_PREFETCH: Final = 32  # messages of a stream that are read ahead of its handler; beyond, HTTP/2 flow control holds the sender
_NO_DEADLINE_S: Final = 1e12  # the core's "never" is a point in time beyond any clock
_OK: Final = grpc.StatusCode.OK
# A stock grpc.aio client whose stream is refused before it has sent anything reports INTERNAL, "Internal error from Core", in place of the
# status; so a refusal waits until something was heard, or this long.
_HEAR_S: Final = 0.1


class HandlerCallDetails(NamedTuple):
    """What an interceptor sees of a call before it begins."""

    method: str
    invocation_metadata: Any


class Refusal(NamedTuple):
    """What is answered to unary calls of the services named, before anything of them is looked at, while `takes` says no to how many there are.

    Refusing at once costs a third of letting a call become a task to be refused there, and what waits for the loop stays bounded. `told` hears
    of each, in whichever thread took the call.
    """

    takes: Callable[[int], bool]
    services: Container[str]
    code: grpc.StatusCode
    details: str
    trailers: tuple[tuple[str, str | bytes], ...]
    told: Callable[[str], None]


class CoreServer:
    """The part of `grpc.aio.Server` that plait uses, under the same names.

    Interceptors with a true attribute `by_method` answer alike for every call of a method, and are asked once.
    """

    def __init__(
        self,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        options: Sequence[tuple[str, Any]] = (),
        refusal: Refusal | None = None,
        loop_polls: bool = False,
    ) -> None:
        """With `loop_polls` the event loop takes all but the first event of a burst: for servers whose callers are many and work is short."""
        self._loop_polls = loop_polls
        self._refusal = refusal
        self._arrived = 0  # unary calls; written by whoever has the turn
        self._left = 0  # and written by the event loop
        self._intercept: Callable[[Any], Any] | None = self._found if interceptors else None
        for interceptor in reversed(interceptors):
            self._intercept = _bind(interceptor, self._intercept)
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(options), False)
        self._server.register_completion_queue(self._queue)
        self._handlers: dict[str, Any] = {}
        self._by_method = all(getattr(interceptor, "by_method", False) for interceptor in interceptors)
        self._intercepted: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._posted: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._woken = False
        self._started = self._stopping = self._stopped = False
        self._baton = threading.Lock()  # held by whoever takes events: the thread waits for it while the loop does
        self._baton.acquire()
        self._destroying = threading.Lock()  # the core is still at work in `shutdown` when its event is here, and the thread frees it then
        self._thread = threading.Thread(target=self._poll, name="grpc", daemon=True)

    def __repr__(self) -> str:
        state = "stopping" if self._stopping else "serving" if self._started else "not started"
        return f"<CoreServer {state} methods={len(self._handlers)} calls={len(self._tasks)}>"

    # --- what grpc.aio.Server has

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Generated code calls this beside `add_registered_method_handlers`, with the same methods: nothing is left to do."""

    def add_registered_method_handlers(self, service_name: str, method_handlers: dict[str, _Handler]) -> None:
        """Serve the methods of one service, as generated code registers them."""
        self._handlers |= {f"/{service_name}/{name}": handler for name, handler in method_handlers.items()}

    def add_insecure_port(self, address: str) -> int:
        """Listen in clear text; return the port. Raises RuntimeError where that is not possible."""
        return self._bound(self._server.add_http2_port(address.encode()), address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """Listen with TLS; return the port. Raises RuntimeError where that is not possible."""
        return self._bound(self._server.add_http2_port(address.encode(), server_credentials._credentials), address)  # type: ignore[attr-defined]  # noqa: SLF001

    async def start(self) -> None:
        """Take calls."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._server.start()
        self._started = True
        for _ in range(_SLOTS):
            self._request()
        self._thread.start()

    async def stop(self, grace: float | None) -> None:
        """Refuse new calls; let those under way finish for `grace` seconds, then cancel them."""
        if not self._started:
            return
        if not self._stopping:
            self._stopping = True
            with self._destroying:
                self._server.shutdown(self._queue, self._on_shutdown)
        until_s = time.monotonic() + (grace or 0.0)
        while self._tasks and (left_s := until_s - time.monotonic()) > 0:
            await asyncio.wait(tuple(self._tasks), timeout=left_s)
        # What has been answered may still be on its way out: the core says when it is.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until_s - time.monotonic()) if not self._tasks else 0.0):
                await asyncio.shield(self._ended)
        with self._destroying:
            self._server.cancel_all_calls()
        for task in tuple(self._tasks):
            self.cancel(task)
        await asyncio.shield(self._ended)
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))
        self._thread.join()

    @staticmethod
    def _bound(port: int, address: str) -> int:
        if not port:
            raise RuntimeError(f"cannot listen on {address}: is the port taken?")
        return port

    # --- taking events

    def _poll(self) -> None:
        """In the polling thread: wait for events; with `loop_polls` for the first one of a burst, whose rest is the loop's."""
        while not self._stopped:
            self._take(self._queue.poll())
            if self._stopped:
                break
            if not self._loop_polls:
                continue
            try:
                self._loop.call_soon_threadsafe(self._pump)
            except RuntimeError:  # the loop was closed under us
                continue
            self._baton.acquire()
        while (event := self._queue.poll(time.time())).completion_type != cygrpc.CompletionType.queue_timeout:
            event.tag(event)
        with self._destroying:
            self._server.destroy()
        with contextlib.suppress(RuntimeError):  # the loop was closed under us: nobody is left to tell
            self._loop.call_soon_threadsafe(self._ended.set_result, None)

    def _pump(self) -> None:
        """Take what there is without waiting, and look again once that was handled; where there was nothing, the thread waits for more."""
        self._woken = True  # what is posted from here is drained here
        empty = taken = 0
        while empty < _LOOKS and taken < _BURST and not self._stopped:
            event = self._queue.poll(0.0)
            if event.completion_type == cygrpc.CompletionType.queue_timeout:
                empty += 1
            else:
                empty = 0
                taken += 1
                self._take(event)
        event = None  # an event holds its call, and the core waits for calls to be let go
        try:
            self._drain()
        finally:
            if taken and not self._stopped:
                self._loop.call_soon(self._pump)
            else:
                self._baton.release()

    def _take(self, event: Any) -> None:
        try:
            event.tag(event)
        except Exception as error:  # a fault here must not leave a process that listens and never answers
            log.critical("taking an event off the completion queue failed", exc_info=error)
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._fault, error)

    def _request(self) -> None:
        self._server.request_call(self._queue, self._queue, self._on_arrival)

    def _on_shutdown(self, event: Any) -> None:
        self._stopped = True

    def _on_arrival(self, event: Any) -> None:
        if not event.success:
            return
        if not self._stopping:
            self._request()
        method = event.call_details.method.decode()
        handler = self._handlers.get(method)
        if handler is not None and not handler.request_streaming:
            if self._refusal is not None and self._is_too_many(method, self._refusal):
                self._refuse(event, method, self._refusal)
                return
            self._arrived += 1
        rpc = Rpc(self, event, method, handler)
        event.call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), rpc._on_close)  # noqa: SLF001
        if handler is None or handler.request_streaming:
            self.post(self._begin, rpc)
        rpc._receive()  # noqa: SLF001

    def _is_too_many(self, method: str, refusal: Refusal) -> bool:
        return not refusal.takes(self._arrived - self._left) and method[1:].partition("/")[0] in refusal.services

    @staticmethod
    def _refuse(event: Any, method: str, refusal: Refusal) -> None:
        status = cygrpc.SendStatusFromServerOperation(refusal.trailers, refusal.code.value[0], refusal.details.encode(), 0)
        operations = (cygrpc.SendInitialMetadataOperation((), 0), cygrpc.ReceiveCloseOnServerOperation(0), status)
        event.call.start_server_batch(operations, Rpc._on_finished)  # noqa: SLF001
        refusal.told(method)

    def left(self) -> None:
        """A unary call is over. On the event loop."""
        self._left += 1

    def _fault(self, error: BaseException) -> None:
        self._loop.call_exception_handler({"message": "taking an event off the completion queue failed", "exception": error})

    def post(self, callback: Callable[[Any], None], argument: Any) -> None:
        """Call back on the event loop, together with whatever else has gathered."""
        self._posted.append((callback, argument))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop was closed under us
                self._loop.call_soon_threadsafe(self._drain)

    # --- on the event loop

    def _drain(self) -> None:
        self._woken = False  # first: what is posted from here on wakes again
        posted = self._posted
        while posted:
            callback, argument = posted.popleft()
            callback(argument)

    def _begin(self, rpc: Rpc) -> None:
        if rpc.over:
            return
        task = rpc.task = self._loop.create_task(self._serve(rpc, rpc.handler))
        self._tasks.add(task)

    def cancel(self, task: asyncio.Task[None]) -> None:
        """Cancel the task of a call. One that has not begun never will, so it cannot sign off itself, as the others do."""
        task.add_done_callback(self._tasks.discard)
        task.cancel()

    async def _serve(self, rpc: Rpc, handler: Any) -> None:
        try:
            if handler is not None and self._intercept is not None:
                handler = self._intercepted.get(rpc.method)
                if handler is None:
                    handler = await self._intercept(HandlerCallDetails(rpc.method, rpc.invocation_metadata()))
                    if self._by_method:
                        self._intercepted[rpc.method] = handler
            if handler is None:
                rpc.finish(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            else:
                await self._handle(handler, rpc)
        except grpc.aio.AbortError:
            pass  # `abort` has answered
        except asyncio.CancelledError:
            rpc.finish(grpc.StatusCode.CANCELLED, "the call was cancelled")
        except Exception as error:
            log.exception("a handler failed", method=rpc.method, exc_info=without_words(error))
            rpc.finish(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error).__name__}")
        finally:
            if rpc.task is not None:
                self._tasks.discard(rpc.task)  # a done-callback would be one more turn of the loop per call

    async def _found(self, details: HandlerCallDetails) -> Any:
        return self._handlers.get(details.method)

    @staticmethod
    async def _handle(handler: Any, rpc: Rpc) -> None:
        rpc.serializer = handler.response_serializer or _same
        request: Any
        if handler.request_streaming:
            rpc.deserializer = handler.request_deserializer or _same
            request = rpc
        else:
            message = rpc.first_message()
            if message is None:
                rpc.finish(grpc.StatusCode.CANCELLED, "the call ended before its message")
                return
            request = (handler.request_deserializer or _same)(message)
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        result = behaviour(request, rpc)
        if not handler.response_streaming:
            response = await result
            rpc.finish(message=rpc.serializer(response))
        elif hasattr(result, "__aiter__"):
            async for response in result:
                await rpc.write(response)
            rpc.finish()
        else:
            await result
            rpc.finish()


class Rpc:
    """One call: what a handler knows as its `context`, and as its request iterator where it takes a stream."""

    __slots__ = (
        "_call",
        "_callbacks",
        "_code",
        "_deadline_s",
        "_details",
        "_ended",
        "_heard",
        "_inbox",
        "_initial_sent",
        "_last",
        "_loop",
        "_metadata",
        "_reader",
        "_receiving",
        "_sending",
        "_server",
        "_trailing",
        "_writer",
        "deserializer",
        "handler",
        "method",
        "over",
        "serializer",
        "task",
    )  # fmt: skip

    def __init__(self, server: CoreServer, event: Any, method: str, handler: Any) -> None:
        self._server = server
        self._loop = server._loop  # noqa: SLF001
        self._call = event.call
        self._metadata = event.invocation_metadata
        self._deadline_s: float = event.call_details.deadline
        self.method = method
        self.handler = handler
        self.over = False  # answered, or given up by the caller
        self.task: asyncio.Task[None] | None = None
        self.serializer: Callable[[Any], bytes] = _same
        self.deserializer: Callable[[bytes], Any] = _same
        self._inbox: deque[bytes] = deque()
        self._receiving = False  # a read is under way in the core
        self._ended = False  # the caller sends no more
        self._heard = False  # the caller has sent something, or said that it will not
        self._last: tuple[Any, ...] | None = None  # the status, until it is on its way
        self._reader: asyncio.Future[None] | None = None
        self._sending = False  # a write is under way in the core
        self._writer: asyncio.Future[None] | None = None
        self._initial_sent = False
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()
        self._code = _OK
        self._details = ""
        self._callbacks: list[Callable[[Any], None]] = []

    def __repr__(self) -> str:
        return f"<Rpc {self.method} {'over' if self.over else 'under way'}>"

    # --- in whichever thread has the turn

    def _receive(self) -> None:
        """Read the next message. Also called on the loop, when a full inbox has been emptied."""
        self._receiving = True
        self._call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), self._on_message)

    def _on_message(self, event: Any) -> None:
        message = event.batch_operations[0].message() if event.success else None
        self._heard = True
        if self._last is not None:
            self._server.post(Rpc._send_last, self)
        if message is None:
            self._ended = True
            self._receiving = False
        else:
            self._inbox.append(message)
            if self.handler is None or not self.handler.request_streaming or len(self._inbox) >= _PREFETCH:
                self._receiving = False
            else:
                self._receive()
        if self.handler is not None and self.handler.request_streaming:
            if self._reader is not None:
                self._server.post(Rpc._wake_reader, self)
        elif self.handler is not None:
            self._server.post(self._server._begin, self)  # noqa: SLF001

    def _on_close(self, event: Any) -> None:
        if event.batch_operations[0].cancelled():
            self._server.post(Rpc._cancel, self)

    def _on_sent(self, event: Any) -> None:
        self._sending = False
        if self._writer is not None:
            self._server.post(Rpc._wake_writer, self)

    @staticmethod
    def _on_finished(event: Any) -> None:
        """The answer is out."""

    # --- on the event loop

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _wake_writer(self) -> None:
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    def _cancel(self) -> None:
        """The caller has gone, or its deadline has passed."""
        if not self.over:
            self._end()
            if self.task is not None:
                self._server.cancel(self.task)

    def _end(self) -> None:
        self.over = True
        if self.handler is not None and not self.handler.request_streaming:
            self._server.left()
        for callback in self._callbacks:
            callback(self)
        self._wake_reader()
        self._wake_writer()

    def first_message(self) -> bytes | None:
        """Return the message of a call that has one; None where the caller gave up before sending it."""
        return self._inbox.popleft() if self._inbox else None

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        """Return the next message of the caller's stream."""
        while not self._inbox:
            if self._ended or self.over:
                raise StopAsyncIteration
            if not self._receiving:
                self._receive()
            self._reader = self._loop.create_future()
            try:
                if not self._inbox and not self._ended and self._receiving:  # else whoever took the event may not have seen whom to wake
                    await self._reader
            finally:
                self._reader = None
        return self.deserializer(self._inbox.popleft())

    async def read(self) -> Any:
        """Return the next message, or grpc.aio.EOF."""
        try:
            return await self.__anext__()
        except StopAsyncIteration:
            return grpc.aio.EOF

    async def write(self, message: Any) -> None:
        """Send one message of a stream; waits while the one before it is on its way. Raises InvalidStateError once the call is over."""
        data = self.serializer(message)
        while self._sending:
            self._writer = self._loop.create_future()
            try:
                if self._sending and not self.over:  # else it was sent before anybody could see whom to wake
                    await self._writer
            finally:
                self._writer = None
            if self.over:
                break
        if self.over:
            raise asyncio.InvalidStateError("the call is over: nobody takes its answers")
        self._sending = True
        self._call.start_server_batch((*self._initial(), cygrpc.SendMessageOperation(data, 0)), self._on_sent)

    def finish(self, code: grpc.StatusCode | None = None, details: str | None = None, message: bytes | None = None) -> None:
        """Answer for good; what comes too late is dropped."""
        if self.over:
            return
        code = self._code if code is None else code
        details = self._details if details is None else details
        last = () if message is None or code is not _OK else (cygrpc.SendMessageOperation(message, 0),)
        status = cygrpc.SendStatusFromServerOperation(self._trailing, code.value[0], details.encode(errors="replace"), 0)
        self._last = (*self._initial(), *last, status)
        self._end()
        if self._heard or code is _OK:
            self._send_last()
        else:
            self._loop.call_later(_HEAR_S, self._send_last)

    def _send_last(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            self._call.start_server_batch(last, self._on_finished)

    def _initial(self) -> tuple[Any, ...]:
        if self._initial_sent:
            return ()
        self._initial_sent = True
        return (cygrpc.SendInitialMetadataOperation((), 0),)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        """Answer with an error and leave the handler."""
        if code is _OK:
            raise ValueError("abort is for errors")
        if trailing_metadata:
            self._trailing = (*self._trailing, *trailing_metadata)
        self.finish(code, details)
        raise grpc.aio.AbortError("Locally aborted.")

    async def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Send headers ahead of the first message."""
        if self._initial_sent or self.over:
            raise asyncio.InvalidStateError("the headers were sent already")
        self._initial_sent = self._sending = True
        self._call.start_server_batch((cygrpc.SendInitialMetadataOperation(tuple(initial_metadata), 0),), self._on_sent)

    def invocation_metadata(self) -> Any:
        """Return the caller's headers as (key, value) pairs."""
        return self._metadata

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        """Send these with the status."""
        self._trailing = tuple(trailing_metadata)

    def trailing_metadata(self) -> Any:
        """Return what will be sent with the status."""
        return self._trailing

    def time_remaining(self) -> float | None:
        """Return the seconds left, 0 or more; None where the caller set no deadline."""
        return max(0.0, self._deadline_s - time.time()) if self._deadline_s < _NO_DEADLINE_S else None

    def set_code(self, code: grpc.StatusCode) -> None:
        """End with this code."""
        self._code = code

    def set_details(self, details: str) -> None:
        """End with this message."""
        self._details = details

    def code(self) -> grpc.StatusCode:
        """Return the code set so far."""
        return self._code

    def details(self) -> str:
        """Return the message set so far."""
        return self._details

    def peer(self) -> str:
        """Return the caller's address, as gRPC writes it."""
        peer: str = self._call.peer().decode()
        return peer

    def auth_context(self) -> dict[str, list[bytes]]:
        """Return what TLS knows of the caller."""
        return {key.decode(): value for key, value in cygrpc.auth_context(self._call).items()}

    def peer_identities(self) -> Any:
        """Return the names in the caller's certificate, or None."""
        return cygrpc.peer_identities(self._call)

    def peer_identity_key(self) -> str | None:
        """Return which property of TLS those names are."""
        key = cygrpc.peer_identity_key(self._call)
        return key.decode() if key else None

    def cancelled(self) -> bool:
        """Whether the caller gave up."""
        return self.over and self.task is not None and self.task.cancelling() > 0

    def done(self) -> bool:
        """Whether the call is over."""
        return self.over

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call back when it is."""
        self._callbacks.append(callback)


def _bind(interceptor: Any, inner: Any) -> Callable[[Any], Any]:
    def intercept(details: Any) -> Any:
        return interceptor.intercept_service(inner, details)

    return intercept


def _same(message: Any) -> Any:
    return message
