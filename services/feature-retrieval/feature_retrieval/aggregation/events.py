"""Events as they come off the wire: parsed and checked one by one, because one bad event must not stop the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from google.protobuf.message import DecodeError

from plait.api.events.v1 import events_pb2

MAX_EVENT_ID_BYTES: Final = 128
MAX_EVENT_BYTES: Final = 64 * 1024
MAX_VALUES: Final = 32

TYPES: Final = {name.removeprefix("EVENT_TYPE_").lower(): number for name, number in events_pb2.EventType.items() if number}
_KNOWN_TYPES: Final = frozenset(TYPES.values())


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an event is not applied: a stable word, and what to do about it (no ids, no values)."""

    reason: str
    message: str


UNREADABLE: Final = Refusal("EVENT_UNREADABLE", "these bytes are not a plait.api.events.v1.Event: see what the producer sends")
TOO_LARGE: Final = Refusal("EVENT_TOO_LARGE", f"an event has at most {MAX_EVENT_BYTES} bytes")
ID_INVALID: Final = Refusal(
    "EVENT_ID_INVALID", f"event_id has 1 to {MAX_EVENT_ID_BYTES} bytes: it is what makes applying an event once possible"
)
TYPE_UNKNOWN: Final = Refusal("EVENT_TYPE_UNKNOWN", "the type is unset or newer than this service: set it, or update plait and redrive")
TIME_INVALID: Final = Refusal("EVENT_TIME_INVALID", "event_time must be set and after 1970")
TIME_IN_FUTURE: Final = Refusal(
    "EVENT_TIME_IN_FUTURE", "event_time is further ahead of this service's clock than it allows: is its unit right?"
)
NOT_WRITABLE: Final = Refusal(
    "VIEW_NOT_WRITABLE", "every view that counts such events names others in spec.writers: its owner has to add the tenant or the API key"
)
VALUES_INVALID: Final = Refusal("VALUE_INVALID", f"value and values must be finite numbers, at most {MAX_VALUES} of them")
ERASED: Final = Refusal("ENTITY_ERASED", "the entity was erased after this event: it stays erased, and the event itself is not kept")


@dataclass(frozen=True, slots=True)
class Parsed:
    """An event that can be applied. `fingerprint` is 63 bits of its id: what tells it apart from others of its entity."""

    event: Any  # plait.api.events.v1.Event
    type: int
    time_us: int
    fingerprint: int


def parse(payload: bytes, latest_us: int) -> Parsed | Refusal:
    """Return the event in `payload`, or why it cannot be applied. `latest_us`: event times after it are refused."""
    try:
        event = events_pb2.Event.FromString(payload)
    except DecodeError:
        return UNREADABLE
    return check(event, latest_us)


def check(event: Any, latest_us: int) -> Parsed | Refusal:
    """Return the event with what was worked out of it, or why it cannot be applied."""
    event_id = event.event_id.encode()
    if not 1 <= len(event_id) <= MAX_EVENT_ID_BYTES:
        return ID_INVALID
    kind = event.type
    if kind not in _KNOWN_TYPES:
        return TYPE_UNKNOWN
    at = event.event_time
    time_us = at.seconds * 1_000_000 + at.nanos // 1000
    if time_us <= 0:
        return TIME_INVALID
    if time_us > latest_us:
        return TIME_IN_FUTURE
    if not math.isfinite(event.value) or (event.values and not _usable(event.values)):
        return VALUES_INVALID
    return Parsed(event, kind, time_us, fingerprint_of(event_id))


def fingerprint_of(event_id: bytes) -> int:
    """Return 63 bits of an event's id."""
    return int.from_bytes(blake2b(event_id, digest_size=8).digest(), "little") >> 1


def _usable(values: Any) -> bool:
    return len(values) <= MAX_VALUES and all(map(math.isfinite, values.values()))
