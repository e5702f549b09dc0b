"""One contract for every source of events: Redis Streams on a real Redis; Kafka where PLAIT_TEST_KAFKA names a broker (host:port)."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from feature_retrieval.aggregation.events import Refusal
from feature_retrieval.dead_letters import DeadLetters
from feature_retrieval.row_codec import tenant_key
from feature_retrieval.settings import EventSettings
from feature_retrieval.sources import EventSource, Message
from feature_retrieval.sources.redis_stream import RedisStreamSource
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.store.streams import Streams

_KAFKA = os.environ.get("PLAIT_TEST_KAFKA", "")


@dataclass
class World:
    """Makes sources of one group that read what `send` appends for the tenant `shop`."""

    source: Callable[[str], EventSource]
    send: Callable[[Sequence[bytes]], Awaitable[None]]
    dead_letters: DeadLetters


@pytest_asyncio.fixture(params=["redis", pytest.param("kafka", marks=pytest.mark.skipif(not _KAFKA, reason="PLAIT_TEST_KAFKA is not set"))])
async def world(request: pytest.FixtureRequest, redis_url: str) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        store = RedisStore(redis_url)
        stack.push_async_callback(store.close)
        dead = DeadLetters(store.streams)
        if request.param == "redis":

            async def append(payloads: Sequence[bytes]) -> None:
                key = tenant_key(b"e1", "shop")
                await store.streams.append([key] * len(payloads), [{b"e": each, b"t": b"00-trace"} for each in payloads])

            yield World(
                lambda name: RedisStreamSource(store.streams, dead, lambda: ["shop", "mall"], consumer=name, claim_after_s=0.05),
                append,
                dead,
            )
            return
        from aiokafka import AIOKafkaProducer

        from feature_retrieval.sources.kafka import KafkaSource

        topic = f"plait-test-{secrets.token_hex(6)}"
        settings = EventSettings(source="kafka", kafka_servers=_KAFKA, kafka_topics=f"shop={topic}", kafka_group=topic)
        producer = AIOKafkaProducer(bootstrap_servers=_KAFKA)
        await producer.start()
        stack.push_async_callback(producer.stop)

        async def produce(payloads: Sequence[bytes]) -> None:
            for each in payloads:
                await producer.send_and_wait(topic, each, headers=[("traceparent", b"00-trace")])

        yield World(lambda _: KafkaSource(settings, dead), produce, dead)


async def drink(source: EventSource, count: int) -> list[Message]:
    found: list[Message] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            found += await source.read(100, 0.5)
    return found


async def test_what_is_sent_is_delivered_with_its_tenant_and_trace(world: World) -> None:
    source = world.source("one")
    await world.send([b"a", b"b", b"c"])
    messages = await drink(source, 3)
    assert [message.payload for message in messages] == [b"a", b"b", b"c"]
    assert {(message.tenant, message.traceparent, message.redrives) for message in messages} == {("shop", "00-trace", 0)}
    assert all(message.origin.startswith(f"{source.name}:") and message.published_us > 1.6e15 for message in messages)
    assert (await source.backlog_of("shop")).events == 3
    await source.acknowledge(messages)
    backlog = await source.backlog_of("shop")
    assert backlog.events == 0
    assert backlog.watermark_us >= messages[-1].published_us
    assert list(await source.read(100, 0.05)) == []
    await source.close()


async def test_what_was_not_acknowledged_is_delivered_again_to_the_next(world: World) -> None:
    first = world.source("one")
    await world.send([b"%d" % n for n in range(6)])
    messages = await drink(first, 6)
    await first.acknowledge(messages[:2])
    assert (await first.backlog_of("shop")).watermark_us < messages[2].published_us
    await first.acknowledge(messages[4:])
    await first.close()
    second = world.source("two")
    again = {message.payload for message in await drink(second, 2)}
    assert {b"2", b"3"} <= again  # a source may deliver more, as Kafka does: what lies above the gap
    assert again <= {b"2", b"3", b"4", b"5"}
    await second.close()


async def test_what_is_refused_is_a_dead_letter_and_done(world: World) -> None:
    source = world.source("one")
    await world.send([b"bad", b"good"])
    bad, good = await drink(source, 2)
    await source.refuse(bad, Refusal("VALUE_INVALID", "mend it"))
    await source.acknowledge([bad, good])
    (entry,) = (await world.dead_letters.page("shop", size=10, token="", reason="")).entries
    fields = dict(entry.fields)
    assert fields == {
        b"r": b"VALUE_INVALID",
        b"m": b"mend it",
        b"e": b"bad",
        b"t": b"00-trace",
        b"o": bad.origin.encode(),
        b"n": b"0",
        b"w": b"",
    }
    assert (await source.backlog_of("shop")).events == 0
    await source.close()


async def test_of_two_who_refuse_one_message_only_one_buries_it(redis_url: str) -> None:
    store = RedisStore(redis_url)
    dead = DeadLetters(store.streams)
    one, two = (RedisStreamSource(store.streams, dead, lambda: ["shop"], consumer=name, claim_after_s=0.01) for name in "ab")
    await store.streams.append([tenant_key(b"e1", "shop")], [{b"e": b"bad"}])
    (held,) = await drink(one, 1)
    (claimed,) = await drink(two, 1)
    for source, message in ((one, held), (two, claimed)):
        await source.refuse(message, Refusal("VALUE_INVALID", ""))
    assert await dead.count("shop") == 1
    await store.close()


async def test_events_that_are_not_acknowledged_are_never_trimmed(redis_url: str) -> None:
    store = RedisStore(redis_url)
    now_s = 2e9  # long after what is appended now
    source = RedisStreamSource(
        store.streams, DeadLetters(store.streams), lambda: ["shop"], consumer="a", claim_after_s=900, keep_s=0, clock=lambda: now_s
    )
    key = tenant_key(b"e1", "shop")
    await store.streams.append([key] * 3000, [{b"e": b"%d" % n} for n in range(3000)])
    messages = await drink(source, 2500)
    await source.acknowledge(messages[:1000])
    now_s += 10
    await source.read(1, 0.01)
    left = await store.streams.range(key, count=5000)
    assert 2000 <= len(left) < 3000
    assert left[-1].fields == {b"e": b"2999"}
    payloads = {entry.fields[b"e"] for entry in left}
    assert {message.payload for message in messages[1000:]} <= payloads
    await store.close()


async def test_what_is_appended_while_it_is_trimmed_stays_whatever_the_clocks_say(redis_url: str) -> None:
    key = tenant_key(b"e1", "shop")
    due: list[int] = []

    class Raced(Streams):
        """More is appended right before the trimming."""

        async def ask(self, key: bytes, commands: Sequence[bytes], script: Any = None) -> list[Any]:
            if due and b"XTRIM" in commands[0]:
                await self.append([key] * due[0], [{b"e": b"new"}] * due.pop())
            return await super().ask(key, commands, script)

    store = RedisStore(redis_url)
    streams = Raced(store.dispatch)
    await streams.append([key], [{b"e": b"old"}])
    ahead_s = iter(range(10**10, 10**11, 10))  # of Redis' clock; every look for what to trim is due
    source = RedisStreamSource(
        streams, DeadLetters(streams), lambda: ["shop"], consumer="a", claim_after_s=900, keep_s=0, clock=ahead_s.__next__
    )
    await source.acknowledge(await source.read(1, 0.01))
    due.append(3000)
    await source.read(1, 0.01)
    assert not due
    assert await streams.length(key) >= 3000
    await store.close()
