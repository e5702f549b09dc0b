"""Batches to IngestFeatures, over every break: what was not acknowledged is sent again, which changes nothing where it had arrived."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.cli.features.parquet import Position
from plait.errors import PlaitError, Unavailable, from_rpc_error, from_status
from plait.rpc.pace import Pace

WINDOW: Final = 48  # batches not acknowledged yet: acks that wait for a disk take up to a second
PATIENCE_S: Final = 120.0  # without any progress
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_NOT_HEARD_YET: Final = frozenset({"EPOCH_NOT_FOUND"})  # a replica that does not know a new epoch yet
_PASSING: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED})


@dataclass(slots=True)
class Totals:
    """What became of the rows that were acknowledged; `first` is the first row of the file (from 0) refused for each reason."""

    rows: int = 0
    applied: int = 0
    ignored: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    durability: int = 0

    def add(self, first_row: int, rows: int, result: Any) -> None:
        """Count one acknowledged batch."""
        self.rows += rows
        self.applied += result.applied
        self.ignored += result.ignored
        self.durability = min(self.durability or result.durability, result.durability) if result.durability else self.durability
        for error in result.errors:
            self.refused[error.reason] += 1
            self.first.setdefault(error.reason, first_row + error.row)


@dataclass(frozen=True, slots=True)
class Sent:
    """A batch on its way: `position` is where the file goes on after it."""

    number: int
    position: Position
    first_row: int
    batch: pb.FeatureBatch

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.batch.event_times_us)


class Upload:
    """Sends batches and calls `acked(position, batch, result)` for each in order. `batches` gives (position after, batch)."""

    def __init__(
        self,
        stub: Any,
        metadata: Any,
        batches: Iterator[tuple[Position, pb.FeatureBatch]],
        acked: Callable[[Sent, Any], None],
        *,
        first_row: int = 0,
        pace: Pace | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._stub = stub
        self._metadata = metadata
        self._batches = batches
        self._acked = acked
        self._pace = pace or Pace(0)
        self._patience_s = patience_s
        self._waiting: deque[Sent] = deque()
        self._room = asyncio.Event()
        self._next_row = first_row
        self._number = 0
        self._progressed_at = time.monotonic()

    async def run(self) -> None:
        """Return once every batch is acknowledged. Raises the error of a batch that was refused whole, or what stood in the way too long."""
        failures = 0
        while True:
            progressed_at = self._progressed_at
            try:
                await self._once()
            except grpc.RpcError as error:
                failure = from_rpc_error(error) if error.code() is not grpc.StatusCode.INTERNAL else await self._cause()
            except PlaitError as error:
                failure = error
            else:
                return
            if not _passes(failure) or time.monotonic() - self._progressed_at > self._patience_s:
                raise failure
            failures = 1 if self._progressed_at > progressed_at else failures + 1
            await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10)))

    async def _cause(self) -> PlaitError:
        """Return why a stream broke: grpc.aio reports INTERNAL, "Internal error from Core", where it was refused while it was sending. A
        stream that sends nothing is told the reason, if there still is one."""
        call = self._stub.IngestFeatures(metadata=self._metadata)
        try:
            await call.done_writing()
            await call.read()
        except grpc.RpcError as error:
            return from_rpc_error(error)
        finally:
            call.cancel()
        return Unavailable("the stream broke")

    async def _once(self) -> None:
        call = self._stub.IngestFeatures(metadata=self._metadata)
        reader = asyncio.create_task(self._read(call), name="read acks")
        sender = asyncio.create_task(self._send(call), name="send batches")
        try:
            await asyncio.wait((reader, sender), return_when=asyncio.FIRST_EXCEPTION)
            if sender.done() and sender.exception() and not isinstance(sender.exception(), grpc.RpcError | asyncio.InvalidStateError):
                await sender  # the file, not the stream
            await reader  # a stream that broke says here why
        finally:
            call.cancel()
            for task in (reader, sender):
                task.cancel()
            await asyncio.gather(reader, sender, return_exceptions=True)

    async def _read(self, call: Any) -> None:
        while (ack := await call.read()) is not grpc.aio.EOF:
            self._take(ack)
        if await call.code() is not grpc.StatusCode.OK or self._waiting:
            raise Unavailable("the stream ended before everything was acknowledged")

    async def _send(self, call: Any) -> None:
        for sent in tuple(self._waiting):  # of a stream that broke
            await call.write(pb.IngestFeaturesRequest(batch_id=sent.number, batch=sent.batch))
        async for sent in self._more():
            await call.write(pb.IngestFeaturesRequest(batch_id=sent.number, batch=sent.batch))
        await call.done_writing()

    async def _more(self) -> AsyncIterator[Sent]:
        for position, batch in self._batches:
            sent = Sent(self._number, position, self._next_row, batch)
            self._number += 1
            self._next_row += sent.rows
            self._waiting.append(sent)  # before anything is awaited: a stream that breaks now must find it here
            await self._pace.take(sent.rows)
            yield sent
            while len(self._waiting) >= WINDOW:
                self._room.clear()
                await self._room.wait()

    def _take(self, ack: Any) -> None:
        sent = self._waiting[0]
        if ack.batch_id != sent.number:
            raise Unavailable("acknowledgements came out of order")
        if ack.HasField("status"):
            raise from_status(ack.status.code, ack.status.message, ack.status.status_details)
        self._waiting.popleft()
        self._room.set()
        self._progressed_at = time.monotonic()
        self._acked(sent, ack.result)


def _passes(failure: PlaitError, reasons: frozenset[str] = _NOT_HEARD_YET) -> bool:
    return failure.code in _PASSING or failure.reason in reasons


async def patiently(call: Callable[[Any], Any], request: Any, *, patience_s: float = PATIENCE_S) -> Any:
    """Return what a call that may be repeated answers, over every break. Raises what stood in the way for `patience_s`, or for good."""
    answers: list[Any] = []

    async def once(asked: Any) -> AsyncIterator[Any]:
        yield await call(asked)

    await follow(once, request, answers.append, patience_s=patience_s)
    return answers[-1]


async def follow(
    start: Callable[[Any], Any],
    request: Any,
    told: Callable[[Any], None],
    *,
    passing: frozenset[str] = _NOT_HEARD_YET,
    patience_s: float = PATIENCE_S,
) -> None:
    """Follow a stream of answers to its end, over every break: begin it again at the cursor of the last answer.

    `start(request)` makes the call, `told` hears every answer; errors with a reason in `passing` pass, as do broken connections. Raises what
    stood in the way without progress for `patience_s`, or for good.
    """
    failures, progressed_at = 0, time.monotonic()
    while True:
        try:
            async for answer in start(request):
                if hasattr(request, "cursor"):
                    request.cursor = answer.cursor or request.cursor
                failures, progressed_at = 0, time.monotonic()
                told(answer)
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            if not _passes(failure, passing) or time.monotonic() - progressed_at > patience_s:
                raise failure from error
            failures += 1
            await asyncio.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10)))
        else:
            return
