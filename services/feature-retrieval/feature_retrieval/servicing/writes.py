"""The wire work of writing features: one batch, or a stream of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from feature_retrieval.ingestion import Ingestion
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.errors import PlaitError
from plait.rpc.call import current

_BATCHES_IN_FLIGHT: Final = 4  # per stream: enough to keep Redis busy, few enough that gRPC's flow control holds a fast producer back


class Writes(pb_grpc.FeatureRetrievalServiceServicer):
    """Hands batches to ingestion."""

    def __init__(self, ingestion: Ingestion) -> None:
        self._ingestion = ingestion

    async def WriteFeatures(self, request: Any, context: Any) -> Any:
        """Write one batch."""
        response = pb.WriteFeaturesResponse()
        await self._ingestion.write(request.batch, response, current().tenant)
        return response

    async def IngestFeatures(self, request_iterator: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Write batches as they come; ack each in order, once it is in the store.

        Batches of one stream are written concurrently: rows carry their own order, so the store ends the same.
        """
        tenant = current().tenant
        acks: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(_BATCHES_IN_FLIGHT)
        under_way: set[asyncio.Task[Any]] = set()

        async def read() -> None:
            try:
                async for request in request_iterator:
                    batch = asyncio.create_task(self._ingest(request, tenant), name=f"batch {request.batch_id}")
                    under_way.add(batch)
                    batch.add_done_callback(under_way.discard)
                    await acks.put(batch)
            finally:
                await acks.put(None)

        reader = asyncio.create_task(read(), name="read batches")
        try:
            while (batch := await acks.get()) is not None:
                yield await batch
            await reader  # a message that could not be parsed ends the stream with its error
        finally:
            reader.cancel()
            for left in under_way:
                left.cancel()
            while not acks.empty():  # the reader may be waiting for room
                acks.get_nowait()

    async def _ingest(self, request: Any, tenant: str) -> Any:
        ack = pb.IngestFeaturesResponse(batch_id=request.batch_id)
        try:
            await self._ingestion.write(request.batch, ack.result, tenant)
        except PlaitError as error:
            ack.ClearField("result")
            ack.status.code = error.code.value[0]
            ack.status.message = error.message
            ack.status.status_details = error.to_status().SerializeToString()
        return ack
