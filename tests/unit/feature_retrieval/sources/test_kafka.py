"""What of the Kafka source needs no broker: how a record becomes a message, and that a broker that is away is told."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition

from feature_retrieval.settings import EventSettings
from feature_retrieval.sources.kafka import KafkaSource, _message
from plait.errors import Unavailable


def record(offset: int, value: bytes | None = b"event", headers: Any = ()) -> ConsumerRecord:
    return ConsumerRecord("t", 3, offset, 1_760_000_000_123 + offset - 7, 0, None, value, None, 0, 0, headers)


def source_at(servers: str) -> KafkaSource:
    unused: Any = None
    return KafkaSource(EventSettings(source="kafka", kafka_servers=servers, kafka_topics="shop=t,mall=u"), unused)


def test_a_record_becomes_a_message_of_the_topics_tenant() -> None:
    message = _message("shop", record(7, headers=[("traceparent", b"00-a-b-01"), ("other", b"\xff")]))
    assert (message.tenant, message.payload, message.traceparent) == ("shop", b"event", "00-a-b-01")
    assert (message.origin, message.token, message.published_us) == ("kafka:t:3:7", ("t", 3, 7), 1_760_000_000_123_000)
    assert _message("shop", record(8, value=None)).payload == b""  # a tombstone of a compacted topic: not an event


async def test_a_broker_that_is_away_is_unavailable() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        source = source_at(f"127.0.0.1:{nobody.getsockname()[1]}")
        assert (await source.backlog_of("shop")).events == -1
        with pytest.raises(Unavailable) as caught:
            await source.read(10, 0.1)
        assert caught.value.reason == "EVENT_SOURCE_UNAVAILABLE"
        await source.close()


class Broker:
    """Remembers commits, and has the partitions that it is told."""

    def __init__(self) -> None:
        self.commits: list[dict[TopicPartition, int]] = []
        self.ends = {TopicPartition("t", 3): 10, TopicPartition("u", 0): 5}

    async def commit(self, offsets: dict[TopicPartition, int]) -> None:
        self.commits.append(offsets)

    def assignment(self) -> set[TopicPartition]:
        return set(self.ends)

    def highwater(self, place: TopicPartition) -> int:
        return self.ends[place]

    async def position(self, place: TopicPartition) -> int:
        return self.ends[place]


async def test_nothing_is_committed_before_all_below_it_is_done_and_nothing_of_a_lost_partition() -> None:
    source = source_at("unused:1")
    broker = Broker()
    source._consumer = broker
    messages = [_message("shop", record(offset)) for offset in range(6, 10)]
    for message in messages:
        source._offsets.delivered(message.token, message.published_us)
    assert (await source.backlog_of("shop")).events == 4
    assert (await source.backlog_of("mall")).events == 0
    await source.acknowledge(messages[1:3])
    assert broker.commits == []
    assert (await source.backlog_of("shop")).watermark_us == messages[0].published_us - 1
    await source.acknowledge(messages[:1])
    assert (await source.backlog_of("shop")).watermark_us == messages[3].published_us - 1
    assert broker.commits == [{TopicPartition("t", 3): 9}]
    await source.on_partitions_revoked([TopicPartition("t", 3)])
    await source.acknowledge(messages[3:])
    assert len(broker.commits) == 1
