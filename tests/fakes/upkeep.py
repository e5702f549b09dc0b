"""What administrators' calls are handed to, with no Postgres behind it: erasing says that it is away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from feature_retrieval.aggregation.applying import Applying
from feature_retrieval.aggregation.plan import AggregationPlans
from feature_retrieval.aggregation.replaying import Replaying
from feature_retrieval.epochs import EpochUpkeep
from feature_retrieval.erasing import Erasing
from feature_retrieval.erasure_guard import ErasureGuard
from feature_retrieval.exporting import Exporting
from feature_retrieval.rebuilding import Rebuilding
from feature_retrieval.servicing.upkeep import UpkeepParts
from feature_retrieval.store.postgres import DurableRows
from feature_retrieval.store.redis import RedisStore
from plait.registry.database import open_pool
from plait.registry.records import Snapshot
from plait.registry.store import Store

NOBODY = "postgresql://plait@127.0.0.1:1/none"  # port 1 is tcpmux: nothing listens there


async def nothing_was_erased() -> None:
    """For who keeps no erasures."""


@asynccontextmanager
async def upkeep_of(store: RedisStore, snapshot: Callable[[], Snapshot]) -> AsyncIterator[UpkeepParts]:
    """Give the parts."""
    pool = await open_pool(NOBODY, name="test", min_connections=0)
    async with await Store.open(NOBODY, lazy=True) as registry:
        yield UpkeepParts(
            epochs=EpochUpkeep(store, snapshot, nothing_was_erased),
            exporting=Exporting(store, snapshot),
            erasing=Erasing(store, registry, None, ErasureGuard(store, registry).catch_up),
            rebuilding=Rebuilding(store, DurableRows(pool), snapshot, nothing_was_erased),
            replaying=Replaying(store, Applying(store, lambda: AggregationPlans(snapshot())), snapshot),
        )
    await pool.close()
