"""A deployment of Redis as tests see it: what reaches it, and how to empty it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from feature_retrieval.settings import IngestionSettings, RowStoreSettings
from feature_retrieval.store.opening import open_store
from feature_retrieval.store.redis import RedisStore
from plait.telemetry.metrics import Metrics


@dataclass(frozen=True)
class Place:
    """A deployment: what reaches it, and how to empty it."""

    settings: RowStoreSettings
    flush: Callable[[], None]

    def open(self, **ingestion: Any) -> RedisStore:
        """Return a store that the caller closes."""
        return open_store(self.settings, IngestionSettings(**ingestion), Metrics())
