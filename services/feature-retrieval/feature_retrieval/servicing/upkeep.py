"""The wire work of looking after what is stored: export, carrying over and purging epochs, erasing entities,
rebuilding a lost Redis, replaying events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from feature_retrieval.aggregation.replaying import Replaying
from feature_retrieval.epochs import EpochUpkeep
from feature_retrieval.erasing import Erasing
from feature_retrieval.exporting import Exporting
from feature_retrieval.rebuilding import Rebuilding
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2_grpc as pb_grpc
from plait.rpc.call import current


@dataclass(frozen=True, slots=True, kw_only=True)
class UpkeepParts:
    """Who does it."""

    epochs: EpochUpkeep
    exporting: Exporting
    erasing: Erasing
    rebuilding: Rebuilding
    replaying: Replaying


class Upkeep(pb_grpc.FeatureRetrievalServiceServicer):
    """Hands administrators' calls to who does the work."""

    def __init__(self, parts: UpkeepParts) -> None:
        self._parts = parts

    async def ExportFeatures(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """The rows of an epoch."""
        async for answer in self._parts.exporting.export(request, current()):
            yield answer

    async def CarryOverEpoch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Streamed rows from one epoch to another."""
        async for answer in self._parts.epochs.carry_over(request, current()):
            yield answer

    async def PurgeEpoch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """An epoch that is not in use any more."""
        async for answer in self._parts.epochs.purge(request, current()):
            yield answer

    async def RebuildFeatures(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """A lost Redis from the durable copy."""
        async for answer in self._parts.rebuilding.rebuild(request, current()):
            yield answer

    async def ReplayEvents(self, request: Any, context: Any) -> Any:
        """Events of the past into an epoch that is being built."""
        response = pb.ReplayEventsResponse()
        await self._parts.replaying.replay(request, response, current())
        return response

    async def EraseEntity(self, request: Any, context: Any) -> Any:
        """Entities that wish to be forgotten."""
        response = pb.EraseEntityResponse()
        await self._parts.erasing.erase(request, response, current())
        return response
