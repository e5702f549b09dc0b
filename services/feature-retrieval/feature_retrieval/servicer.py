"""FeatureRetrievalService as the sum of its parts, one per theme in `servicing`; a method that no part has answers UNIMPLEMENTED."""

from __future__ import annotations

from collections.abc import Callable

from feature_retrieval.explanation import Explanation
from feature_retrieval.ingestion import Ingestion
from feature_retrieval.retrieval import Retrieval
from feature_retrieval.servicing.events import EventParts, Events
from feature_retrieval.servicing.reads import Reads
from feature_retrieval.servicing.upkeep import Upkeep, UpkeepParts
from feature_retrieval.servicing.writes import MAX_BATCHES, MAX_BYTES, Writes
from feature_retrieval.views import Plans
from plait.telemetry.tracing import Tracing


class FeatureRetrievalServicer(Reads, Writes, Events, Upkeep):
    """Gives each part what it hands requests to."""

    def __init__(
        self,
        retrieval: Retrieval,
        ingestion: Ingestion,
        plans: Callable[[], Plans],
        *,
        events: EventParts,
        explanation: Explanation,
        max_in_flight: int,
        tracing: Tracing,
        upkeep: UpkeepParts,
        max_batches: int = MAX_BATCHES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        Reads.__init__(self, retrieval, explanation, plans, max_in_flight=max_in_flight, tracing=tracing)
        Writes.__init__(self, ingestion, max_batches=max_batches, max_bytes=max_bytes)
        Events.__init__(self, events, tracing=tracing)
        Upkeep.__init__(self, upkeep)
