"""A consumer of events in a process of its own, to be killed: `python -m tests.fakes.consumer_process REDIS_URL NAME`."""

from __future__ import annotations

import asyncio
import sys

from tests.fakes.event_world import NOW_S, PLANS

from feature_retrieval.aggregation.applying import Applying
from feature_retrieval.consumer import Consumer
from feature_retrieval.dead_letters import DeadLetters
from feature_retrieval.freshness import Freshness
from feature_retrieval.sources.redis_stream import RedisStreamSource
from feature_retrieval.store.redis import RedisStore
from plait.telemetry.metrics import Metrics


async def main(url: str, name: str) -> None:
    """Consume small batches until killed."""
    store = RedisStore(url)
    source = RedisStreamSource(store.streams, DeadLetters(store.streams), lambda: ["shop"], consumer=name, claim_after_s=0.3)
    applying = Applying(store, lambda: PLANS, clock=lambda: NOW_S)
    await Consumer(source, applying, store, Freshness(Metrics()), batch=7).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
