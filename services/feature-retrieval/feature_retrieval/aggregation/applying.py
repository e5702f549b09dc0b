"""The page of the write side of events: parse → route to rows → read rows and marks → which events are known → merge → swap → again where beaten.

Exactly once in effect: the row and the fingerprints of the events in it change in one script, guarded by the row that was read. Rows are read
before the fingerprints: an event applied between the two has changed the row (its sequence counts the events in it, so no two of its states
are alike), the swap fails and the row is read again. So a batch may be applied any number of times, by any number of consumers, dying anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Final

import numpy as np

from feature_retrieval.aggregation.events import ERASED, Parsed, Refusal, parse
from feature_retrieval.aggregation.plan import AggregatedView, AggregationPlans
from feature_retrieval.aggregation.windows import MICRO
from feature_retrieval.ingestion import nothing_was_erased
from feature_retrieval.row_codec import MAX_ID_BYTES, Id, KeySpace, encode_id, split
from feature_retrieval.snapshots_in_use import SnapshotsInUse
from feature_retrieval.sources import Message
from feature_retrieval.store.redis import RedisStore, Swap
from plait.errors import InvalidArgument, Unavailable
from plait.redis.dispatch import Receipt
from plait.registry.entity_ids import composites, read_ids
from plait.registry.records import Entity

_ROUNDS: Final = 64  # how often a row that others change is tried; one of them gets on each time
_READ_TIMEOUT_S: Final = 5.0
_REPLAYED_KNOWN_US: Final = 7 * 86_400 * MICRO  # a replay may be cut off, go on days later, and repeat what it had replayed

_NOBODY: Final[tuple[Id | None, Id | None]] = (None, None)
_TWO_IDS: Final = Refusal("ENTITY_ID_INVALID", "an event is about exactly one subject and at most one object")
_BAD_ID: Final = Refusal("ENTITY_ID_INVALID", f"an id has 1 to {MAX_ID_BYTES} bytes of UTF-8")


@dataclass(slots=True)
class Outcome:
    """What became of a batch: why some messages were refused (by position), how many events there were for no view, and how often a row was
    beaten to it; the newest event time applied by (tenant, view)."""

    refused: dict[int, Refusal] = field(default_factory=dict)
    unused: int = 0
    retries: int = 0
    newest_us: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Onto:
    """The one epoch of one view's version that replayed events go to. They may be of any age, so what is known of them is kept for longer."""

    view: str
    version: int
    epoch: int


@dataclass(slots=True)
class _Work:
    """Events for the rows of one view, version and epoch of a tenant; parallel lists."""

    view: AggregatedView
    space: KeySpace
    tenant: str
    remembered_us: int  # for how long after they are applied events are known
    events: list[Parsed] = field(default_factory=list)
    ids: list[tuple[Id | None, Id | None]] = field(default_factory=list)  # (subject, object)
    positions: list[int] = field(default_factory=list)  # of the messages
    entities: list[Id] = field(default_factory=list)


@dataclass(slots=True)
class _Rows:
    """The rows of one work that are still to be changed, with the events of each."""

    work: _Work
    members: dict[Id, list[int]]  # entity → its events in the work
    sets: dict[tuple[Id, int], bytes] = field(default_factory=dict)  # entity, bucket → the key of the events known of it

    def set_of(self, entity: Id, time_us: int) -> bytes:
        """Return the key of the set that an event of an entity is noted in."""
        bucket = self.work.view.bucket(time_us)
        key = self.sets.get((entity, bucket))
        if key is None:
            key = self.sets[(entity, bucket)] = self.work.space.applied_key(entity, bucket)
        return key

    def keys(self) -> tuple[list[bytes], list[bytes]]:
        """Return the keys of the rows and of their marks."""
        ids = list(self.members)
        return self.work.space.keys(ids), self.work.space.mark_keys(ids)


class Applying:
    """Applies batches of events to aggregated views.

    `max_future_s`: how far an event time may be ahead of `clock`. `erasures_loaded` returns once Redis knows every erasure, or raises.
    """

    def __init__(
        self,
        store: RedisStore,
        plans: Callable[[], AggregationPlans],
        *,
        erasures_loaded: Callable[[], Awaitable[None]] = nothing_was_erased,
        max_future_s: float = 300.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._plans = plans
        self.snapshots = SnapshotsInUse(lambda: plans().snapshot)
        self._erasures_loaded = erasures_loaded
        self._max_future_us = int(max_future_s * 1e6)
        self._clock = clock

    async def apply(self, messages: Sequence[Message], receipt: Receipt | None = None, *, onto: Onto | None = None) -> Outcome:
        """Apply every event that can be; when it returns, each is in every row that takes it, or in `refused`.

        `onto`: in the rows of this epoch only, however late it is. `receipt`: to be settled before the messages are acknowledged; it also names where events are that were found to be applied already,
        which may have yet to be safe.
        Raises Unavailable (STORE_UNAVAILABLE, ERASURES_NOT_LOADED, ROW_UNREADABLE, ROW_CONTENDED): some are applied; apply all of them again.
        """
        outcome = Outcome()
        now_us = int(self._clock() * 1e6)
        await self._erasures_loaded()
        with self.snapshots.held():
            todo = [_Rows(work, _by_entity(work)) for work in self._route(messages, now_us, outcome, onto)]
            for _ in range(_ROUNDS):
                todo = await self._round(todo, outcome, receipt)
                if not todo:
                    return outcome
                outcome.retries += sum(len(rows.members) for rows in todo)
        raise Unavailable("other consumers keep changing the same rows: retry", reason="ROW_CONTENDED", retry_after_s=0.1)

    def _route(self, messages: Sequence[Message], now_us: int, outcome: Outcome, onto: Onto | None) -> list[_Work]:
        """Return the events by the rows they change; refuse those that cannot be used."""
        plans = self._plans()
        works: dict[tuple[str, int], list[_Work]] = {}  # by tenant and view
        latest_us = now_us + self._max_future_us
        for position, message in enumerate(messages):
            parsed = parse(message.payload, latest_us)
            if isinstance(parsed, Refusal):
                outcome.refused[position] = parsed
                continue
            views = plans.fed_by(parsed, message.tenant, message.publisher, None if onto is None else (onto.view, onto.version))
            if isinstance(views, Refusal):
                outcome.refused[position] = views
                continue
            used = False
            ids = _NOBODY
            for view in views:
                entity = _entity(view.about(parsed).ids, view.view.entity)
                refusal = entity if isinstance(entity, Refusal) else view.refusal(parsed, now_us, however_late=onto is not None)
                if refusal is not None:
                    outcome.refused.setdefault(position, refusal)
                    continue
                used = True
                if view.needs_ids and ids is _NOBODY:
                    ids = (_any_id(parsed.event.subject.ids), _any_id(parsed.event.object.ids))
                found = works.get((message.tenant, id(view)))
                if found is None:
                    found = works[(message.tenant, id(view))] = self._works(plans, view, message.tenant, onto)
                for work in found:
                    work.events.append(parsed)
                    work.ids.append(ids)
                    work.positions.append(position)
                    work.entities.append(entity)  # type: ignore[arg-type]  # not a Refusal, as was just seen
            outcome.unused += not used and position not in outcome.refused
        return [work for found in works.values() for work in found]

    def _works(self, plans: AggregationPlans, view: AggregatedView, tenant: str, onto: Onto | None) -> list[_Work]:
        """Return empty works of a view for a tenant, one per epoch in use; or the one that is named."""
        name, version, entity_type = view.view.name, view.view.version, view.view.entity.type
        epochs = plans.epochs(tenant, view.view) if onto is None else [onto.epoch]
        building = plans.snapshot.epochs_of(tenant, name, version).building  # live events of now are in the log that is replayed tomorrow
        usual_us = view.memory_us + self._max_future_us
        return [
            _Work(
                view,
                KeySpace.of(tenant, entity_type, name, version, epoch),
                tenant,
                usual_us + (_REPLAYED_KNOWN_US if onto is not None or epoch == building else 0),
            )
            for epoch in epochs
        ]

    async def _round(self, todo: Sequence[_Rows], outcome: Outcome, receipt: Receipt | None) -> list[_Rows]:
        """Try every row once; return those that somebody else changed meanwhile."""
        if not todo:
            return []
        named = [rows.keys() for rows in todo]
        stored = await self._store.read([key for keys, marks in named for part in (keys, marks) for key in part], _READ_TIMEOUT_S)
        if not stored.whole:
            raise Unavailable("the feature store did not answer in time: retry", reason="STORE_UNAVAILABLE", retry_after_s=0.25)
        known = await self._known(todo, receipt)
        swaps: list[Swap] = []
        owners: list[tuple[_Rows, Id]] = []
        at = 0
        for rows, (keys, marks) in zip(todo, named, strict=True):
            count = len(keys)
            found = _Found(keys, marks, stored.rows[at : at + count], stored.rows[at + count : at + 2 * count])
            at += 2 * count
            for entity, swap in self._prepare(rows, found, known, outcome):
                swaps.append(swap)
                owners.append((rows, entity))
        done = await self._store.swap(swaps, receipt)
        beaten: dict[int, _Rows] = {}
        for (rows, entity), applied in zip(owners, done, strict=True):
            if applied:
                _note(rows, entity, outcome)
            else:
                beaten.setdefault(id(rows), _Rows(rows.work, {})).members[entity] = rows.members[entity]
        return list(beaten.values())

    async def _known(self, todo: Sequence[_Rows], receipt: Receipt | None) -> Mapping[bytes, Container[int]]:
        """Return by set which of the asked events are in their row already."""
        asked: dict[bytes, list[int]] = {}
        for rows in todo:
            work = rows.work
            for entity, members in rows.members.items():
                for member in members:
                    parsed = work.events[member]
                    asked.setdefault(rows.set_of(entity, parsed.time_us), []).append(parsed.fingerprint)
        answers = await self._store.applied(list(asked), list(asked.values()), receipt)
        return {key: set(compress(marks, known)) if any(known) else () for (key, marks), known in zip(asked.items(), answers, strict=True)}

    def _prepare(self, rows: _Rows, found: _Found, known: Mapping[bytes, Container[int]], outcome: Outcome) -> list[tuple[Id, Swap]]:
        """Merge what is new into the rows that were read; return what to swap. Rows to which nothing is new are done."""
        work, view = rows.work, rows.work.view
        fresh: list[int] = []
        owners: list[int] = []
        changed: list[int] = []
        added: list[dict[bytes, list[int]]] = []
        for at, (entity, members) in enumerate(rows.members.items()):
            mark = found.marks[at]
            erased_us = None if mark is None else int.from_bytes(mark, "little", signed=True)
            new: dict[bytes, list[int]] = {}
            for member in members:
                parsed = work.events[member]
                if erased_us is not None and parsed.time_us <= erased_us:
                    outcome.refused.setdefault(work.positions[member], ERASED)
                    continue
                key = rows.set_of(entity, parsed.time_us)
                mine = new.setdefault(key, [])
                if parsed.fingerprint in known[key] or parsed.fingerprint in mine:
                    continue
                mine.append(parsed.fingerprint)
                fresh.append(member)
                owners.append(len(changed))
            new = {key: marks for key, marks in new.items() if marks}
            if new:
                changed.append(at)
                added.append(new)
        if not changed:
            return []
        block, unreadable = view.widen([found.rows[at] for at in changed])
        if unreadable:
            raise Unavailable(
                f"rows of view {view.view.name!r} have a schema that is newer than this process' registry: it will catch up",
                reason="ROW_UNREADABLE",
                retry_after_s=1.0,
            )
        view.merge(block, [work.events[n] for n in fresh], [work.ids[n] for n in fresh], np.array(owners, np.intp))
        entities = list(rows.members)
        memory_ms = work.remembered_us // 1000 + 1
        return [
            (
                entities[at],
                Swap(
                    key=found.keys[at],
                    mark_key=found.mark_keys[at],
                    old=found.rows[at],
                    mark=found.marks[at],
                    new=new_row,
                    ttl_ms=view.ttl_ms,
                    applied=marks,
                    applied_ttl_ms=memory_ms,
                ),
            )
            for at, new_row, marks in zip(changed, split(block), added, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Found:
    """What was read for some rows; parallel lists."""

    keys: Sequence[bytes]
    mark_keys: Sequence[bytes]
    rows: Sequence[bytes | None]
    marks: Sequence[bytes | None]


def _by_entity(work: _Work) -> dict[Id, list[int]]:
    members: dict[Id, list[int]] = {}
    for at, entity in enumerate(work.entities):
        members.setdefault(entity, []).append(at)
    return members


def _note(rows: _Rows, entity: Id, outcome: Outcome) -> None:
    newest = max(rows.work.events[member].time_us for member in rows.members[entity])
    where = (rows.work.tenant, rows.work.view.view.name)
    outcome.newest_us[where] = max(newest, outcome.newest_us.get(where, 0))


def _entity(ids: Any, entity: Entity) -> Id | Refusal:
    """Return the one id of the entity a row is about, of the view's kind of key."""
    if entity.key == "string" and len(ids.string_ids) == 1 and not (ids.int64_ids or ids.composite_ids):  # as `read_ids` does, for the many
        text: str = ids.string_ids[0]
        return _BAD_ID if not text or _too_long(text) else text
    values, problem = read_ids(ids, entity)
    if problem:
        return Refusal("ENTITY_ID_INVALID", f"the entity's id cannot be used: {problem}")
    if len(values) != 1:
        return _TWO_IDS
    return _BAD_ID if _too_long(values[0]) else values[0]


def _any_id(ids: Any) -> Id | None:
    """Return the one id of somebody, of whatever kind; None where there is none that can be used."""
    found: list[Id] = [*ids.string_ids, *ids.int64_ids, *composites(ids)]
    return None if len(found) != 1 or _too_long(found[0]) else found[0]


def _too_long(entity_id: Id) -> bool:
    """Whether an id makes no key."""
    if isinstance(entity_id, str) and len(entity_id) <= MAX_ID_BYTES // 4:
        return False
    try:
        encode_id(entity_id)
    except InvalidArgument:
        return True
    return False
