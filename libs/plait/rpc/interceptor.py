"""What every call of every service passes through, once: authentication, deadline, errors to the wire, metrics.

One interceptor wraps each method's handler when it is first called and keeps the wrapped one, so a call pays for nothing but what it needs.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import grpc
from prometheus_client import Counter, Histogram

from plait.errors import DETAILS_KEY, Internal, InvalidArgument, PlaitError, ResourceExhausted, Unauthenticated
from plait.rpc.call import Call, enter
from plait.rpc.core_server import Refusal
from plait.rpc.credentials import Authenticator
from plait.rpc.deadline import Deadline
from plait.rpc.identity.issuers import KeyUnknown
from plait.telemetry.logging import get_logger, without_words
from plait.telemetry.metrics import Metrics, observe_all

log = get_logger(__name__)

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]

_PUSHBACK: Final = ("grpc-retry-pushback-ms", "-1")
_MAX_REQUEST_ID_CHARS: Final = 128
_UNPARSED: Final = "cannot be parsed: is it the message this method takes?"


class Malformed(NamedTuple):
    """What a message that cannot be parsed becomes, so that the handler's wrapper can answer for it."""

    data: bytes
    parse: Callable[[bytes], Any]


class MalformedMessage(InvalidArgument):
    """A message of a stream that cannot be parsed; the stream may be read on. `data` is the message as it came, `parse` what failed."""

    default_reason = "MALFORMED_MESSAGE"

    def __init__(self, data: bytes, parse: Callable[[bytes], Any]) -> None:
        super().__init__(f"a message of the stream {_UNPARSED}")
        self.data = data
        self.parse = parse


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our services; health, reflection and channelz pass untouched.

    `scopes` maps a service's full name to the scope its methods ask for; `method_scopes` maps methods ("/service/Method") that ask for
    another. At most `max_in_flight` unary calls run at once, and fewer where `takes` says so.
    """

    by_method: Final = True  # what is wrapped depends on the method alone

    def __init__(
        self,
        authenticator: Authenticator,
        scopes: dict[str, str],
        metrics: Metrics,
        *,
        max_in_flight: int,
        default_timeout_s: float,
        method_scopes: Mapping[str, str] = MappingProxyType({}),
        takes: Callable[[int], bool] | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._scopes = scopes
        self._method_scopes = method_scopes
        self._max_in_flight = max_in_flight
        self._default_timeout_s = default_timeout_s
        self._takes = takes or (lambda in_flight: in_flight < max_in_flight)
        self._in_flight = 0
        self._streams: set[RequestStream] = set()
        self._let_in: dict[_Open, tuple[Any, str]] = {}  # streams under way: the context and the scope each was let in with
        self._draining = False
        self._wrapped: dict[str, _Handler] = {}
        self._handled: Counter = metrics.counter(
            "plait_rpc_server_handled", "calls answered, by method and status code", ("method", "code")
        )
        self._seconds: Histogram = metrics.histogram("plait_rpc_server_seconds", "time to answer a unary call, seconds", ("method",))

    def __repr__(self) -> str:
        return f"<CallInterceptor in_flight={self._in_flight}/{self._max_in_flight} streams={len(self._streams)} draining={self._draining}>"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Return the wrapped handler of the method called."""
        method: str = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        scope = self._scopes.get(method.split("/")[1])
        if handler is None or scope is None:
            return handler
        wrapped = self._wrap(handler, method, self._method_scopes.get(method, scope))
        self._wrapped[method] = wrapped
        return wrapped

    def refusal(self) -> Refusal:
        """Return what a server that can refuse calls before they get here answers beyond the limit."""
        error = self._overloaded()
        return Refusal(
            takes=self._takes,
            services=self._scopes,
            code=error.code,
            details=error.message,
            trailers=_trailers(error),
            told=lambda method: self._handled.labels(method, error.code.name).inc(),
        )

    def reexamine(self) -> None:
        """End open streams whose callers would not be let in any more: a key that was revoked, a token that has expired."""
        for stream, (context, scope) in tuple(self._let_in.items()):
            try:
                self._authenticator.identify(context.invocation_metadata() or (), scope, context)
            except PlaitError as error:
                stream.refuse(error)
            except KeyUnknown as unknown:
                if unknown.issuer.look(unknown=True) is None:  # asked just now: it is the issuer's no longer
                    stream.refuse(Unauthenticated("the key that signed the token was taken back", reason="TOKEN_INVALID"))

    def drain(self) -> None:
        """End the request side of every open stream, as if its client had finished, so that handlers answer what they hold and return."""
        self._draining = True
        for stream in tuple(self._streams):
            stream.end()

    def _wrap(self, handler: Any, method: str, scope: str) -> _Handler:
        parse = _tolerant(handler.request_deserializer)
        if handler.unary_unary is not None:
            behaviour = self._unary(handler.unary_unary, method, scope)
            return grpc.unary_unary_rpc_method_handler(behaviour, parse, handler.response_serializer)
        if handler.stream_stream is not None:
            behaviour = self._stream(handler.stream_stream, method, scope)
            return grpc.stream_stream_rpc_method_handler(behaviour, parse, _unless_bytes(handler.response_serializer))
        if handler.unary_stream is not None:
            behaviour = self._answering_stream(handler.unary_stream, method, scope)
            return grpc.unary_stream_rpc_method_handler(behaviour, parse, handler.response_serializer)
        raise TypeError(f"{method}: methods that take a stream and give one answer are not served")

    def _unary(self, inner: Callable[[Any, Any], Awaitable[Any]], method: str, scope: str) -> Callable[[Any, Any], Awaitable[Any]]:
        seconds = self._seconds.labels(method)
        handled_ok = self._handled.labels(method, "OK")
        taken_s: list[float] = []  # by the calls that ended in this turn of the loop
        answered = 0

        def count() -> None:
            nonlocal answered
            handled_ok.inc(answered)
            answered = 0
            observe_all(seconds, taken_s)
            taken_s.clear()

        async def behaviour(request: Any, context: Any) -> Any:
            nonlocal answered
            started = time.perf_counter()
            self._in_flight += 1
            try:
                await self._admit(context, method, scope)
                if type(request) is Malformed:
                    raise InvalidArgument(f"the request {_UNPARSED}", reason="MALFORMED_MESSAGE")
                response = await inner(request, context)
            except Exception as error:  # (whatever it is, it must reach the wire as a typed status)
                await self._fail(context, method, error)
            else:
                answered += 1
                return response
            finally:
                self._in_flight -= 1
                if not taken_s:  # the callers wait for their answers, nobody for the counters
                    asyncio.get_running_loop().call_soon(count)
                taken_s.append(time.perf_counter() - started)

        return behaviour

    def _answering_stream(self, inner: Callable[[Any, Any], AsyncIterator[Any]], method: str, scope: str) -> Callable[[Any, Any], Any]:
        handled_ok = self._handled.labels(method, "OK")

        async def behaviour(request: Any, context: Any) -> AsyncIterator[Any]:
            stream = _Open()
            try:
                await self._admit(context, method, scope)
                if type(request) is Malformed:
                    raise InvalidArgument(f"the request {_UNPARSED}", reason="MALFORMED_MESSAGE")
                self._let_in[stream] = (context, scope)
                async for response in inner(request, context):
                    yield response
                    stream.check()
            except Exception as error:
                await self._fail(context, method, error)
            else:
                handled_ok.inc()
            finally:
                self._let_in.pop(stream, None)

        return behaviour

    def _stream(self, inner: Callable[[Any, Any], Any], method: str, scope: str) -> Callable[[Any, Any], Any]:
        handled_ok = self._handled.labels(method, "OK")

        @asynccontextmanager
        async def accepted(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[RequestStream]:
            stream = RequestStream(requests)
            self._streams.add(stream)
            try:
                await self._admit(context, method, scope)
                self._let_in[stream] = (context, scope)
                if self._draining:
                    stream.end()
                yield stream
            except Exception as error:
                await self._fail(context, method, error)
            else:
                handled_ok.inc()
            finally:
                self._let_in.pop(stream, None)
                self._streams.discard(stream)

        async def generating(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            async with accepted(requests, context) as stream:
                async for response in inner(stream, context):
                    yield response
                    stream.check()

        async def writing(requests: AsyncIterator[Any], context: Any) -> None:
            async with accepted(requests, context) as stream:
                await inner(stream, context)

        return generating if inspect.isasyncgenfunction(inner) else writing

    async def _admit(self, context: Any, method: str, scope: str) -> None:
        """Authenticate first: who is not let in learns nothing else."""
        metadata = context.invocation_metadata() or ()
        try:
            identity = self._authenticator.identify(metadata, scope, context)
        except KeyUnknown as unknown:
            await self._authenticator.learn(unknown.issuer)
            identity = self._authenticator.identify(metadata, scope, context, last=True)
        if not self._takes(self._in_flight - 1):
            raise self._overloaded()
        left = context.time_remaining()
        request_id = ""
        for name, value in metadata:
            if name == "x-request-id":
                request_id = str(value)[:_MAX_REQUEST_ID_CHARS]
                break
        enter(
            Call(
                method=method,
                tenant=identity.tenant,
                caller=identity.caller,
                scopes=identity.scopes,
                is_service=identity.is_service,
                request_id=request_id,
                deadline=Deadline.after(self._default_timeout_s if left is None else left),
                metadata=metadata,
            )
        )

    def _overloaded(self) -> ResourceExhausted:
        return ResourceExhausted(
            "as many calls are under way as this process takes: retry later",
            reason="OVERLOADED",
            retry_after_s=0.1,
        )

    async def _fail(self, context: Any, method: str, error: Exception) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if not isinstance(error, PlaitError):
            log.error("a call failed by a fault of ours", method=method, exc_info=without_words(error))
            error = Internal("a fault inside plait; it was logged, please report it with the time of the call")
        self._handled.labels(method, error.code.name).inc()
        log.debug("a call was refused", method=method, code=error.code.name, reason=error.reason)
        await context.abort(error.code, error.message, _trailers(error))


class _Open:
    """A stream under way, which is refused between two of its messages where its caller is not let in any more."""

    def __init__(self) -> None:
        self._refused: PlaitError | None = None

    def refuse(self, error: PlaitError) -> None:
        """Fail the stream with this error."""
        self._refused = error

    def check(self) -> None:
        """Raise the error, if there is one."""
        if self._refused is not None:
            raise self._refused


class RequestStream(_Open):
    """The request side of a stream: refuses malformed messages, and can be ended from our side when the process drains."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        super().__init__()
        self._requests = requests
        self._iterator: AsyncIterator[Any] | None = None  # made when first read: grpc warns of one that is never used
        self._reader: asyncio.Task[Any] | None = None
        self._ended = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Any:
        self.check()
        if self._ended:
            raise StopAsyncIteration
        if self._iterator is None:
            self._iterator = self._requests.__aiter__()
        self._reader = asyncio.current_task()
        try:
            message = await self._iterator.__anext__()
        except asyncio.CancelledError:
            ours = self._ended or self._refused is not None
            if ours and self._reader is not None and self._reader.uncancel() == 0:
                raise (self._refused or StopAsyncIteration()) from None
            raise
        finally:
            self._reader = None
        if type(message) is Malformed:
            raise MalformedMessage(*message)
        return message

    def end(self) -> None:
        """Let the handler see the end of its requests, now."""
        self._ended = True
        self._wake()

    def refuse(self, error: PlaitError) -> None:
        """Let the handler see this error in place of its next request, now."""
        if self._refused is None:
            super().refuse(error)
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None:
            self._reader.cancel()


def _trailers(error: PlaitError) -> tuple[tuple[str, str | bytes], ...]:
    details = (DETAILS_KEY, error.to_status().SerializeToString())
    return (details, _PUSHBACK) if isinstance(error, ResourceExhausted) else (details,)


def _tolerant(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Return a deserializer that never raises: grpc would answer INTERNAL with a traceback in our log for what is the caller's mistake."""
    if parse is None:  # the method takes bytes
        return None

    def tolerant(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:
            return Malformed(data, parse)

    return tolerant


def _unless_bytes(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    """Return a serializer that lets pass what is serialized already."""
    if serialize is None:
        return None
    return lambda message: message if type(message) is bytes else serialize(message)
