"""The wire work of writing features: one batch, or a stream of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from feature_retrieval.ingestion import Ingestion
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.errors import PlaitError
from plait.rpc.call import Call, current

MAX_BATCHES: Final = 64  # per stream, in flight: where acks wait for a disk, one may take a second
MAX_BYTES: Final = 64 * 1024 * 1024


class Writes(pb_grpc.FeatureRetrievalServiceServicer):
    """Hands batches to ingestion. Of one stream, `max_batches` of together `max_bytes` are in flight at once; gRPC's flow control holds a
    faster producer back."""

    def __init__(self, ingestion: Ingestion, *, max_batches: int = MAX_BATCHES, max_bytes: int = MAX_BYTES) -> None:
        self._ingestion = ingestion
        self._max_batches = max_batches
        self._max_bytes = max_bytes

    async def WriteFeatures(self, request: Any, context: Any) -> Any:
        """Write one batch."""
        response = pb.WriteFeaturesResponse()
        await self._ingestion.write(request.batch, response, current())
        return response

    async def IngestFeatures(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Write batches as they come; ack each in order, once it is in the store and as safe as the settings ask.

        Batches of one stream are written concurrently: rows carry their own order, so the store ends the same.
        """
        call = current()
        window = Window(self._max_batches, self._max_bytes)
        acks: asyncio.Queue[tuple[asyncio.Task[Any], int] | None] = asyncio.Queue()
        under_way: set[asyncio.Task[Any]] = set()

        async def read() -> None:
            try:
                async for request in request_iterator:
                    size = request.ByteSize()
                    await window.enter(size)
                    batch = asyncio.create_task(self._ingest(request, call), name=f"batch {request.batch_id}")
                    under_way.add(batch)
                    batch.add_done_callback(under_way.discard)
                    acks.put_nowait((batch, size))
            finally:
                acks.put_nowait(None)

        reader = asyncio.create_task(read(), name="read batches")
        try:
            while (next_one := await acks.get()) is not None:
                batch, size = next_one
                yield await batch
                window.leave(size)
            await reader  # a message that could not be parsed ends the stream with its error
        finally:
            reader.cancel()
            for left in under_way:
                left.cancel()

    async def _ingest(self, request: Any, call: Call) -> Any:
        ack = pb.IngestFeaturesResponse(batch_id=request.batch_id)
        try:
            await self._ingestion.write(request.batch, ack.result, call)
        except PlaitError as error:
            ack.ClearField("result")
            ack.status.code = error.code.value[0]
            ack.status.message = error.message
            ack.status.status_details = error.to_status().SerializeToString()
        return ack


class Window:
    """What one stream has in flight. One batch is let in whatever its size, so that none waits for ever."""

    def __init__(self, max_batches: int, max_bytes: int) -> None:
        self._max_batches = max_batches
        self._max_bytes = max_bytes
        self._batches = 0
        self._bytes = 0
        self._left = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Window batches={self._batches}/{self._max_batches} bytes={self._bytes}/{self._max_bytes}>"

    async def enter(self, size: int) -> None:
        """Wait until there is room for a batch of so many bytes. For one task."""
        while self._batches and (self._batches >= self._max_batches or self._bytes + size > self._max_bytes):
            self._left.clear()
            await self._left.wait()
        self._batches += 1
        self._bytes += size

    def leave(self, size: int) -> None:
        """A batch is answered."""
        self._batches -= 1
        self._bytes -= size
        self._left.set()
