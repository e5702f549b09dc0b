"""Events that could not be applied, kept with their bytes and the reason, and appended again once the reason is gone.

They lie in a stream per tenant beside the events', in the same slot, so that moving one there or back is one script: it is in one of the two,
whoever dies in between. The stream holds about the newest 100 000. An erasure removes those that are about who is erased; of events that come
afterwards only the reason is kept: their bytes hold the id, and nobody could apply them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from feature_retrieval.aggregation.events import ERASED, MAX_EVENT_BYTES, Refusal
from feature_retrieval.row_codec import Id, tenant_key
from feature_retrieval.sources import Message
from feature_retrieval.store.streams import Entry, Streams
from plait.api.events.v1 import events_pb2
from plait.errors import InvalidArgument, NotFound, Violation
from plait.redis.dispatch import Receipt, all_here
from plait.redis.script import Script
from plait.registry.entity_ids import composites

MAX_KEPT: Final = 100_000
_PAGE: Final = 500  # entries looked at per round trip
_MAX_LOOKED_AT: Final = 20_000  # per call, when most are of another reason
_CHUNK: Final = 100  # entries moved by one script call, so that it never blocks Redis for long, or looked through at once
_ID: Final = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")

# KEYS: the stream of events, that of dead letters. ARGV: group, id of the event's entry, longest length, then fields of the dead letter.
# Moves an entry once: whoever comes second finds it acknowledged.
_BURY: Final = Script(b"""
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', unpack(ARGV, 4))
return 1
""")

# KEYS: the stream of dead letters, that of events. ARGV: ids. Appends them as events, counting how often, and removes them; answers how many.
# One without bytes stays: there is nothing to append.
_REDRIVE: Final = Script(b"""
local moved = 0
for i = 1, #ARGV do
  local found = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])
  if #found > 0 then
    local fields = {}
    local given = found[1][2]
    for at = 1, #given, 2 do fields[given[at]] = given[at + 1] end
    if fields['e'] ~= '' then
      local redrives = tostring(tonumber(fields['n'] or '0') + 1)
      redis.call('XADD', KEYS[2], '*', 'e', fields['e'], 't', fields['t'] or '', 'n', redrives, 'w', fields['w'] or '')
      redis.call('XDEL', KEYS[1], ARGV[i])
      moved = moved + 1
    end
  end
end
return moved
""")


@dataclass(frozen=True, slots=True)
class Page:
    """Some dead letters, newest first, and where the next ones begin (empty = there are none)."""

    entries: Sequence[Entry]
    next_token: str


class DeadLetters:
    """The dead letters of every tenant."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def bury(self, message: Message, refusal: Refusal, group: bytes, entry_id: bytes) -> None:
        """Move an event from its tenant's stream here, once."""
        events, dead = tenant_key(b"e1", message.tenant), tenant_key(b"d1", message.tenant)
        fields = [part for item in _fields(message, refusal).items() for part in item]
        call = _BURY.call([events, dead], [group, entry_id, b"%d" % MAX_KEPT, *fields])
        all_here(await self._streams.ask(events, [call], _BURY))

    async def add(self, message: Message, refusal: Refusal) -> None:
        """Put an event of another source here. Repeated where its source delivers it again."""
        await self._streams.append([tenant_key(b"d1", message.tenant)], [_fields(message, refusal)], max_length=MAX_KEPT)

    async def count(self, tenant: str) -> int:
        """Return how many a tenant has."""
        return await self._streams.length(tenant_key(b"d1", tenant))

    async def page(self, tenant: str, *, size: int, token: str, reason: str) -> Page:
        """Return up to `size` of a tenant's, newest first from `token` on, of one reason where one is given.

        A page may hold fewer, or none, and still not be the last. Raises InvalidArgument for a token that no page gave.
        """
        key, before = tenant_key(b"d1", tenant), _checked_id("page_token", token) if token else b""
        found: list[Entry] = []
        for _ in range(0, _MAX_LOOKED_AT, _PAGE):
            entries = await self._streams.range(key, before=before, count=_PAGE, newest_first=True)
            for entry in entries:
                before = entry.id
                if not reason or entry.fields.get(b"r") == reason.encode():
                    found.append(entry)
                    if len(found) == size:
                        return Page(found, before.decode())
            if len(entries) < _PAGE:
                return Page(found, "")
        return Page(found, before.decode())

    async def redrive(self, tenant: str, ids: Sequence[str], reason: str) -> int:
        """Append these to the tenant's events again, or all of a reason (empty = every one) where none is named; return how many.

        Those that die again meanwhile are not tried twice. Raises NotFound (DEAD_LETTER_NOT_FOUND) where none of the named is there.
        """
        dead, events = tenant_key(b"d1", tenant), tenant_key(b"e1", tenant)
        if ids:
            wanted = [_checked_id("ids", one) for one in ids]
            moved = await self._move(dead, events, wanted)
            if not moved:
                raise NotFound(
                    "none of these dead letters is there: see 'plait features dead-letters list'", reason="DEAD_LETTER_NOT_FOUND"
                )
            return moved
        newest = await self._streams.range(dead, count=1, newest_first=True)
        moved, after = 0, b""
        while newest and after != newest[0].id:
            entries = [e for e in await self._streams.range(dead, after=after, count=_PAGE) if _order(e.id) <= _order(newest[0].id)]
            if not entries:
                break
            after = entries[-1].id
            moved += await self._move(dead, events, [e.id for e in entries if not reason or e.fields.get(b"r") == reason.encode()])
        return moved

    async def forget(self, tenant: str, entity_type: str, ids: Sequence[Id], receipt: Receipt) -> list[int]:
        """Remove those that are there now whose subject or object is one of some entities; return how many for each, in order.

        An id is known in whatever kind an event gives it: an int64 id as text is whom it names, too. Bytes that are no event stay: nobody
        can tell whom they are about. Looks through the whole stream, some 100 000 entries, a page at a time.
        """
        dead = tenant_key(b"d1", tenant)
        places = {_words(entity_id): place for place, entity_id in enumerate(ids)}
        counts = [0] * len(ids)
        newest = await self._streams.range(dead, count=1, newest_first=True)
        after = b""
        while newest and (not after or _order(after) < _order(newest[0].id)):
            entries = await self._streams.range(
                dead, after=after, count=_CHUNK
            )  # few: reading them takes this process's time from who waits for features
            if not entries:
                break
            after = entries[-1].id
            found = {entry.id: places.keys() & _about(entry.fields.get(b"e", b""), entity_type) for entry in entries}
            gone = [entry_id for entry_id, whose in found.items() if whose]
            await self._streams.delete(dead, gone, receipt)
            for entry_id in gone:
                for words in found[entry_id]:
                    counts[places[words]] += 1
        return counts

    async def _move(self, dead: bytes, events: bytes, ids: Sequence[bytes]) -> int:
        moved = 0
        for at in range(0, len(ids), _CHUNK):
            call = _REDRIVE.call([dead, events], ids[at : at + _CHUNK])
            replies = await self._streams.ask(dead, [call], _REDRIVE)
            all_here(replies)
            moved += replies[0]
        return moved


def _fields(message: Message, refusal: Refusal) -> dict[bytes, bytes]:
    return {
        b"r": refusal.reason.encode(),
        b"m": refusal.message.encode(),
        b"e": b"" if refusal == ERASED else message.payload[:MAX_EVENT_BYTES],
        b"t": message.traceparent.encode(),
        b"o": message.origin.encode(),
        b"n": b"%d" % message.redrives,
        b"w": message.publisher.encode(),
    }


def _about(payload: bytes, entity_type: str) -> set[tuple[str, ...]]:
    """Return the entities of a type that an event's bytes name."""
    try:
        event = events_pb2.Event.FromString(payload)
    except DecodeError:
        return set()
    found: set[tuple[str, ...]] = set()
    for rows in (event.subject, event.object):
        if rows.entity_type == entity_type:
            given: list[Id] = [*rows.ids.string_ids, *rows.ids.int64_ids, *composites(rows.ids)]
            found.update(map(_words, given))
    return found


def _words(entity_id: Id) -> tuple[str, ...]:
    return tuple(map(str, entity_id)) if isinstance(entity_id, tuple) else (str(entity_id),)


def _order(entry_id: bytes) -> tuple[int, int]:
    ms, _, number = entry_id.partition(b"-")
    return int(ms), int(number)


def _checked_id(field: str, text: str) -> bytes:
    if not _ID.fullmatch(text) or not _order(text.encode()) > (0, 0) or max(_order(text.encode())) >= 1 << 64:
        raise InvalidArgument("this is not the id of a dead letter", violations=[Violation(field, "expected <milliseconds>-<number>")])
    return text.encode()
