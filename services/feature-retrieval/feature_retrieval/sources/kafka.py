"""Events out of Kafka: a topic per tenant, offsets committed by hand, none before everything below it is done.

The only module that imports aiokafka (the extra `kafka`). Dead letters go to the tenant's in Redis, as those of every source do, and are
redriven through the tenant's stream there.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from feature_retrieval.aggregation.events import Refusal
from feature_retrieval.dead_letters import DeadLetters
from feature_retrieval.settings import EventSettings
from feature_retrieval.sources import Backlog, Message
from feature_retrieval.sources.offsets import Offsets
from plait.errors import Unavailable


class KafkaSource(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka ships no types
    """All topics as one source; connects when first read."""

    name = "kafka"

    def __init__(self, settings: EventSettings, dead_letters: DeadLetters, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._tenants = {topic: tenant for tenant, _, topic in (pair.partition("=") for pair in settings.kafka_topics.split(",") if pair)}
        self._dead_letters = dead_letters
        self._clock = clock
        self._offsets = Offsets()
        self._consumer: Any = None

    def __repr__(self) -> str:
        return f"<KafkaSource topics={len(self._tenants)} {self._offsets!r}>"

    async def read(self, limit: int, timeout_s: float) -> Sequence[Message]:
        """Return up to `limit` messages of the partitions that are this consumer's."""
        with _mapped():
            if self._consumer is None:
                await self._connect()
            found = await self._consumer.getmany(timeout_ms=int(timeout_s * 1000), max_records=limit)
        messages = [_message(self._tenants[record.topic], record) for records in found.values() for record in records]
        for message in messages:
            self._offsets.delivered(message.token, message.published_us)
        return messages

    async def acknowledge(self, messages: Sequence[Message]) -> None:
        """Commit as far as everything is done. Partitions that moved to another consumer are for that one to commit."""
        moved = self._offsets.done(message.token for message in messages)
        if moved:
            with _mapped(), contextlib.suppress(CommitFailedError, IllegalStateError):
                await self._consumer.commit({TopicPartition(*where): offset for where, offset in moved.items()})

    async def refuse(self, message: Message, refusal: Refusal) -> None:
        """Put it among the tenant's dead letters. Delivered again before it is committed, it is there twice."""
        await self._dead_letters.add(message, refusal)

    async def backlog_of(self, tenant: str) -> Backlog:
        """Return what waits in the partitions of a tenant's topic that are this consumer's."""
        if self._consumer is None:
            return Backlog(-1, 0)
        waiting, watermark_us = 0, int(self._clock() * 1e6)
        for place in self._consumer.assignment():
            if self._tenants[place.topic] != tenant:
                continue
            end = self._consumer.highwater(place)
            if end is None:
                return Backlog(-1, 0)
            oldest = self._offsets.oldest(place.topic, place.partition)
            with _mapped():
                behind = end - (await self._consumer.position(place) if oldest is None else oldest)
            waiting += behind
            if behind:
                watermark_us = min(watermark_us, self._offsets.reached_us(place.topic, place.partition))
        return Backlog(waiting, watermark_us)

    async def close(self) -> None:
        """Leave the group."""
        if self._consumer is not None:
            with _mapped():
                await self._consumer.stop()

    async def on_partitions_revoked(self, revoked: Sequence[TopicPartition]) -> None:
        """Forget what others go on with; they begin at what was committed, and applying twice changes nothing."""
        self._offsets.give_up([(place.topic, place.partition) for place in revoked])

    async def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        """Begin where the group stands, without a memory of an earlier time with these partitions."""
        self._offsets.give_up([(place.topic, place.partition) for place in assigned])

    async def _connect(self) -> None:
        wanted = self._settings
        secure = wanted.kafka_security_protocol.endswith("SSL")
        consumer = AIOKafkaConsumer(
            bootstrap_servers=wanted.kafka_servers.split(","),
            group_id=wanted.kafka_group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            security_protocol=wanted.kafka_security_protocol,
            ssl_context=ssl.create_default_context(cafile=wanted.kafka_ca) if secure else None,
            sasl_mechanism=wanted.kafka_sasl_mechanism,
            sasl_plain_username=wanted.kafka_user or None,
            sasl_plain_password=wanted.kafka_password.get_secret_value() or None,
        )
        consumer.subscribe(list(self._tenants), listener=self)
        try:
            await consumer.start()
        except BaseException:
            await consumer.stop()
            raise
        self._consumer = consumer


def _message(tenant: str, record: ConsumerRecord) -> Message:
    headers = dict(record.headers)
    return Message(
        tenant=tenant,
        payload=record.value or b"",
        traceparent=headers.get("traceparent", b"").decode(errors="replace"),
        origin=f"kafka:{record.topic}:{record.partition}:{record.offset}",
        token=(record.topic, record.partition, record.offset),
        published_us=record.timestamp * 1000,
    )


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except KafkaError as error:
        raise Unavailable(
            f"Kafka cannot be used ({type(error).__name__}): retry, and see its brokers",
            reason="EVENT_SOURCE_UNAVAILABLE",
            retry_after_s=1.0,
        ) from error
