"""The wire work of FeatureRetrievalService, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from feature_retrieval.ingestion import Ingestion
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.views import Plan, Plans
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.dtypes import BY_NAME
from plait.errors import PermissionDenied, PlaitError
from plait.rpc import multiplex
from plait.rpc.call import current
from plait.telemetry.tracing import Tracing

_BATCHES_IN_FLIGHT: Final = 4  # per stream: enough to keep Redis busy, few enough that gRPC's flow control holds a fast producer back


class FeatureRetrievalServicer(pb_grpc.FeatureRetrievalServiceServicer):
    """Hands requests to the page and to ingestion."""

    def __init__(
        self, retrieval: Retrieval, ingestion: Ingestion, plans: Callable[[], Plans], *, max_in_flight: int, tracing: Tracing
    ) -> None:
        self._retrieval = retrieval
        self._ingestion = ingestion
        self._plans = plans
        self._max_in_flight = max_in_flight
        self._tracing = tracing

    async def GetFeatures(self, request: Any, context: Any) -> Any:
        """One call, one answer."""
        response = pb.GetFeaturesResponse()
        await self._fill(request, response)
        return response

    async def StreamFeatures(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]  # it writes to the context
        """Many calls of a plait service over one stream."""
        if not current().is_service:
            raise PermissionDenied("StreamFeatures is for plait services: call GetFeatures", reason="SERVICE_TOKEN_MISSING")
        await multiplex.serve(
            request_iterator,
            context,
            self._fill,
            pb.StreamFeaturesResponse,
            max_in_flight=self._max_in_flight,
            tracing=self._tracing,
            span_name="plait.api.feature_retrieval.v1.FeatureRetrievalService/GetFeatures",
        )

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

    async def DescribeFeatureSet(self, request: Any, context: Any) -> Any:
        """What a set yields."""
        plans = self._plans()
        plan = plans.get(request.feature_set, ())
        response = pb.DescribeFeatureSetResponse(feature_set=request.feature_set, registry_revision=plans.snapshot.revision)
        _describe(plan, plans, response)
        return response

    async def _fill(self, request: Any, response: Any) -> None:
        await self._retrieval.get_features(request, response, current())

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


def _describe(plan: Plan, plans: Plans, response: Any) -> None:
    for model_input, tensor in zip(plan.feature_set.inputs, plan.tensors, strict=True):
        described = response.inputs.add(name=model_input.name, entity_type=model_input.entity, dtype=tensor.number)
        for reference in model_input.features:
            view_name, _, name = reference.partition(":")
            view = plans.snapshot.feature_views[view_name]
            feature = next(f for f in view.features if f.name == name)
            described.features.add(
                feature_view=view_name,
                feature=name,
                stored_dtype=BY_NAME[feature.dtype].number,
                default_value=None if feature.default is None else float(feature.default),
                max_age_s=view.max_age_s,
                description=feature.description,
            )
