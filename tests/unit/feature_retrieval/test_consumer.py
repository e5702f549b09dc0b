"""The consumer's loop on a real Redis that fails in between: nothing is acknowledged before it is applied and safe."""

from __future__ import annotations

import asyncio
import math
import traceback
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.fakes.event_service import EventService, consuming, event_service
from tests.fakes.event_world import LISTINGS, event

from feature_retrieval.aggregation.applying import Applying, Outcome
from feature_retrieval.aggregation.events import Refusal
from feature_retrieval.consumer import Consumer, report
from feature_retrieval.publishing import Publishing
from feature_retrieval.row_codec import KeySpace, header
from feature_retrieval.sources import Message
from feature_retrieval.sources.redis_stream import RedisStreamSource
from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb
from plait.errors import Unavailable
from plait.rpc.call import Call
from plait.rpc.deadline import Deadline
from plait.settings import TelemetrySettings
from plait.telemetry.tracing import Tracing


@pytest_asyncio.fixture
async def service(redis_url: str) -> AsyncIterator[EventService]:
    async with event_service(redis_url) as running:
        yield running


class Watched(RedisStreamSource):
    """Remembers what was done, and fails to read the first times."""

    def __init__(self, service: EventService, log: list[str], broken_reads: int = 0) -> None:
        super().__init__(service.store.streams, service.dead_letters, lambda: ["shop"], consumer="watched")
        self.log = log
        self.broken_reads = broken_reads

    async def read(self, limit: int, timeout_s: float) -> Sequence[Message]:
        if self.broken_reads:
            self.broken_reads -= 1
            raise Unavailable("away", reason="STORE_UNAVAILABLE")
        return await super().read(limit, 0.02)

    async def refuse(self, message: Message, refusal: Refusal) -> None:
        self.log.append("refuse")
        await super().refuse(message, refusal)

    async def acknowledge(self, messages: Sequence[Message]) -> None:
        self.log.append("acknowledge")
        await super().acknowledge(messages)


class Broken(Applying):
    """Fails after the work is done, the first times."""

    log: list[str]
    failures = 2

    async def apply(self, messages: Sequence[Message], receipt: Any = None) -> Outcome:
        outcome = await super().apply(messages, receipt)
        self.log.append("apply")
        if self.failures:
            self.failures -= 1
            raise Unavailable("lost", reason="STORE_UNAVAILABLE")
        return outcome


class Unsafe:
    """Says of the first writes that they were lost again."""

    def __init__(self, log: list[str], failures: int = 2) -> None:
        self.log = log
        self.failures = failures

    async def settle(self, receipt: Any) -> int:
        assert receipt.places
        self.log.append("settle")
        if self.failures:
            self.failures -= 1
            raise Unavailable("restarted", reason="NOT_DURABLE")
        return 1


async def sequence(service: EventService) -> int:
    (row,) = (await service.store.read(KeySpace.of("shop", "listing", LISTINGS.name, 1).keys(["l1"]), 10)).rows
    return 0 if row is None else int(header(np.frombuffer(row, np.uint8)[None, :])["sequence"][0])


async def settled(service: EventService) -> None:
    async with asyncio.timeout(20):
        while (await service.source("front").backlog_of("shop")).events:
            await asyncio.sleep(0.005)


async def test_a_fault_ends_the_consumer_without_naming_anybody(service: EventService) -> None:
    class Faulty(Watched):
        async def read(self, limit: int, timeout_s: float) -> Sequence[Message]:
            raise KeyError("anna")

    with pytest.raises(Exception, match="not told") as caught:
        await service.consumer(Faulty(service, [])).run()
    assert type(caught.value).__name__ == "KeyError"
    assert "anna" not in "".join(traceback.format_exception(caught.value)).replace('KeyError("anna")', "")


async def test_whatever_fails_is_tried_again_and_acknowledged_once_safe(service: EventService) -> None:
    log: list[str] = []
    applying = Broken(service.store, service.aggregations, clock=service.clock)
    applying.log = log
    consumer = Consumer(Watched(service, log, broken_reads=2), applying, Unsafe(log), service.freshness)
    await service.publish([event("e1"), event("e2")])
    async with consuming(consumer):
        await settled(service)
        assert log == ["apply", "apply", "apply", "settle", "apply", "settle", "apply", "settle", "acknowledge"]
        assert await sequence(service) == 2


async def test_an_event_that_one_view_refuses_is_a_dead_letter_once_what_others_counted_is_safe(service: EventService) -> None:
    log: list[str] = []
    applying = Applying(service.store, service.aggregations, clock=service.clock)
    bad = event("e1", "complete_purchase", value=1e18)  # too much for a sum
    await service.publish([bad, event("e2")])
    async with consuming(Consumer(Watched(service, log), applying, Unsafe(log, 1), service.freshness)):
        await settled(service)
    assert log == ["settle", "settle", "refuse", "acknowledge"]
    assert await service.dead_letters.count("shop") == 1
    assert service.metric("plait_features_dead_letters_total", reason="VALUE_INVALID") == 1


async def test_a_recorded_publishing_has_a_span_for_its_events_being_applied(service: EventService) -> None:
    spans = InMemorySpanExporter()
    tracing = Tracing(TelemetrySettings(trace_exporter="none", trace_sample_ratio=1.0), "test", spans)
    recorded, unrecorded = f"00-{1:032x}-{2:016x}-01", f"00-{3:032x}-{4:016x}-00"
    call = Call(method="", tenant="shop", deadline=Deadline.after(20))
    publishing = Publishing(service.store.streams, service.store, service.source("front"), plans=service.aggregations, clock=service.clock)
    await publishing.publish([event("e1"), event("e2")], pb.PublishEventsResponse(), call, recorded)
    await publishing.publish([event("e3")], pb.PublishEventsResponse(), call, unrecorded)
    applying = Applying(service.store, service.aggregations, clock=service.clock)
    async with consuming(Consumer(Watched(service, []), applying, service.store, service.freshness, tracing=tracing)):
        await settled(service)
    tracing.close()
    [span] = spans.get_finished_spans()
    assert span.name == "apply events"
    assert (span.context.trace_id, span.parent.span_id) == (1, 2)
    assert span.attributes == {"plait.source": "redis", "plait.events": 2, "plait.batch": 3}


async def test_what_is_not_safe_is_not_acknowledged_and_counts_once_for_the_next(service: EventService) -> None:
    log: list[str] = []
    unsafe = Consumer(
        Watched(service, log), Applying(service.store, service.aggregations, clock=service.clock), Unsafe(log, 10**9), service.freshness
    )
    await service.publish([event("e1")])
    task = asyncio.create_task(unsafe.run())
    async with asyncio.timeout(20):
        while log.count("settle") < 2:
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert "acknowledge" not in log
    assert (await service.source("front").backlog_of("shop")).events == 1
    assert await sequence(service) == 1
    async with consuming(service.consumer(service.source("next", claim_after_s=0.01))):
        while (await service.source("front").backlog_of("shop")).events:
            service.now_s += 1
            await asyncio.sleep(0.02)
    assert await sequence(service) == 1


async def test_the_lag_is_published_again_and_again_over_every_outage(service: EventService) -> None:
    away = True

    class Away(RedisStreamSource):
        async def backlog_of(self, tenant: str) -> Any:
            if away:
                raise Unavailable("away", reason="STORE_UNAVAILABLE")
            return await super().backlog_of(tenant)

    class Known:
        def tenants(self) -> Sequence[str]:
            return ["shop"]

        def views(self) -> Sequence[str]:
            return [LISTINGS.name]

    await service.publish([event("e1"), event("e2")])
    source = Away(service.store.streams, service.dead_letters, lambda: ["shop"], consumer="a")
    task = asyncio.create_task(report(source, Known(), service.freshness, every_s=0.001))
    async with asyncio.timeout(20):
        for is_away, expected in ((True, math.nan), (False, 2), (True, math.nan), (False, 2)):
            away = is_away
            while str(service.metric("plait_features_event_lag", source="redis")) != str(float(expected)):
                await asyncio.sleep(0.002)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
