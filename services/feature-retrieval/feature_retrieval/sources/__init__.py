"""Where events come from: one seam for Redis Streams and Kafka, at least once in, with whoever consumes deciding what was applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from feature_retrieval.aggregation.events import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One event as it came. `origin` names its place for people, `token` is what its source knows it by, `published_us` when it was appended.

    `redrives`: how often it was a dead letter before. `publisher`: the id of the API key that published it, '' where it had none (a plait
    service, Kafka): then only the tenant can be named as a writer.
    """

    tenant: str
    payload: bytes
    traceparent: str
    origin: str
    token: Any
    published_us: int
    redrives: int = 0
    publisher: str = ""


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits to be applied for one tenant: how many events (-1 = not known), until when everything that was appended is applied
    (µs since the epoch, 0 = not known), and where `events` is not known more than how many it cannot be (0 = not known either)."""

    events: int
    watermark_us: int
    most: int = 0


class EventSource(Protocol):
    """A stream of events that several consumers share. Every failure to reach it is Unavailable."""

    name: str  # a bounded word, for metrics

    async def read(self, limit: int, timeout_s: float) -> Sequence[Message]:
        """Return up to `limit` messages that no living consumer has, as soon as there are any; none at the time-out."""
        ...

    async def acknowledge(self, messages: Sequence[Message]) -> None:
        """Say that these are applied, and never to be delivered again."""
        ...

    async def refuse(self, message: Message, refusal: Refusal) -> None:
        """Move a message to the dead letters, once, and acknowledge it."""
        ...

    async def backlog_of(self, tenant: str) -> Backlog:
        """Return what waits for one tenant."""
        ...

    async def close(self) -> None:
        """Give back what this consumer holds and close connections."""
        ...
