"""The wire work of RouterService, and nothing else."""

from __future__ import annotations

from typing import Any

from plait.api.router.v1 import router_service_pb2_grpc as pb_grpc
from router.invalidating import Invalidating
from router.outcomes import Outcomes
from router.ranking import Ranking


class RouterServicer(pb_grpc.RouterServiceServicer):
    """Hands requests to the page, and what is no request to who answers it."""

    def __init__(self, ranking: Ranking, invalidating: Invalidating, outcomes: Outcomes) -> None:
        self._ranking = ranking
        self._invalidating = invalidating
        self._outcomes = outcomes

    async def Rank(self, request: Any, context: Any) -> Any:
        """Which of these candidates first?"""
        return await self._ranking.rank(request)

    async def Predict(self, request: Any, context: Any) -> Any:
        """Rows and tensors in, tensors out."""
        return await self._ranking.predict(request)

    async def InvalidateCache(self, request: Any, context: Any) -> Any:
        """Forget what is no longer true."""
        return await self._invalidating.invalidate(request)

    async def Explain(self, request: Any, context: Any) -> Any:
        """The answer, and how it came to be."""
        return await self._ranking.explain(request)

    async def RecordOutcome(self, request: Any, context: Any) -> Any:
        """What became of answers."""
        return await self._outcomes.record(request)
