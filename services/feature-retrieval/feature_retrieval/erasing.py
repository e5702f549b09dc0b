"""EraseEntity: an entity's rows are removed everywhere, and nothing that happened before brings them back.

Order: Postgres remembers it → the mark in Redis refuses every older event → the rows are removed, of all views, versions and epochs there
ever were → the durable copy → the tenant's dead letters → the certificate. Whoever dies in between leaves what `erasure_guard` completes. A mark refuses events up to
`max_future_s` after the erasure, because such events may have been taken before it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from feature_retrieval.dead_letters import DeadLetters
from feature_retrieval.epochs import READ_TIMEOUT_S, event_time_us
from feature_retrieval.ingestion import MAX_FUTURE_S
from feature_retrieval.permissions import check_admin
from feature_retrieval.row_codec import HEADER_BYTES, Id, KeySpace, decode_id, encode_id
from feature_retrieval.store.redis import RedisStore
from feature_retrieval.write_metrics import WriteMetrics
from plait.errors import FailedPrecondition, InvalidArgument, NotFound, Violation
from plait.redis.dispatch import Receipt
from plait.registry.certificates import Signer
from plait.registry.entity_ids import composites, read_ids
from plait.registry.erasures import Erasure
from plait.registry.records import Snapshot
from plait.rpc.call import Call
from plait.telemetry.logging import get_logger

log = get_logger(__name__)

MAX_IDS: Final = 1000
FOR_EVER_US: Final = (1 << 63) - 1
_KEYS_AT_ONCE: Final = 20_000  # of one read
NOT_COVERED: Final = (
    "dead letters whose bytes are no event, or that were refused for another reason after this, until they are trimmed",
    "the event stream, until it is trimmed; its events of this entity are refused",
    "which events were taken (aggregated views), until window and lateness have passed; holds the id, no values",
    "the skew log's files and exported files, until they are deleted",
    "Redis' and Postgres' backups and append-only files, until they are rewritten",
    "rows in a Feast store that views are read from: delete them there",
    "the table plait.erasure, which remembers the id so that it can be refused",
)

HeldViews = list[tuple[str, int, int]]  # view, version, newest epoch


class Registry(Protocol):
    """What is used of the registry's store."""

    async def remember_erasures(
        self, tenant: str, entity_type: str, entities: Sequence[bytes], until_us: int, *, actor: str, reason: str
    ) -> list[int]: ...
    async def erasures_after(self, number: int, limit: int = ...) -> list[Erasure]: ...
    async def views_that_held(self, tenant: str, entity_type: str) -> HeldViews: ...
    async def forget_rows(self, forgotten: Sequence[Erasure]) -> list[dict[str, int]]: ...


@dataclass(frozen=True, slots=True)
class Removed:
    """How many rows of an entity were removed, by view; every view that was looked at is named."""

    rows: Mapping[str, int]
    durable_rows: Mapping[str, int]


class Erasing:
    """Answers EraseEntity. `signer` is None where no privacy key is set; `complete` has Redis note up to which erasure it knows all.

    With `snapshot`, ids of a kind that no view of the type has are refused: erasing what cannot be there would look as if it had worked.
    """

    def __init__(
        self,
        store: RedisStore,
        registry: Registry,
        signer: Signer | None,
        complete: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.time,
        *,
        max_future_s: float = MAX_FUTURE_S,
        snapshot: Callable[[], Snapshot] = Snapshot,
        metrics: WriteMetrics | None = None,
    ) -> None:
        self._metrics = metrics
        self._snapshot = snapshot
        self._store = store
        self._dead_letters = DeadLetters(store.streams)
        self._registry = registry
        self._signer = signer
        self._complete = complete
        self._clock = clock
        self._max_future_s = max_future_s

    async def erase(self, request: Any, response: Any, call: Call) -> None:
        """Erase 1 to 1 000 entities of one type; fill an EraseEntityResponse with a signed certificate each.

        Raises PermissionDenied, InvalidArgument, NotFound (ENTITY_TYPE_NOT_FOUND), FailedPrecondition (PRIVACY_KEY_MISSING), Unavailable.
        """
        check_admin(call)
        if self._signer is None:
            raise FailedPrecondition(
                "no certificate can be signed: set PLAIT_FEATURE_RETRIEVAL_PRIVACY__KEY to 32 or more random characters",
                reason="PRIVACY_KEY_MISSING",
            )
        entity_type = request.entities.entity_type
        ids = _checked(request)
        _check_kind(request, self._snapshot())
        if not await self._registry.views_that_held(call.tenant, entity_type):
            raise NotFound(f"no view ever held an entity type {entity_type[:80]!r}", reason="ENTITY_TYPE_NOT_FOUND")
        now_us = int(self._clock() * 1e6)
        until_us = FOR_EVER_US if request.for_ever else now_us + int(self._max_future_s * 1e6)
        entities = [encode_id(entity_id) for entity_id in ids]
        numbers = await self._registry.remember_erasures(
            call.tenant, entity_type, entities, until_us, actor=call.caller or "anonymous", reason=request.reason
        )
        erasures = [
            Erasure(id=number, tenant=call.tenant, entity_type=entity_type, entity=entity, until_us=until_us)
            for number, entity in zip(numbers, entities, strict=True)
        ]
        removed = await remove(self._store, self._registry, erasures)
        receipt = Receipt()
        letters = await self._dead_letters.forget(call.tenant, entity_type, ids, receipt)
        await self._store.settle(receipt)
        await self._complete()
        if self._metrics is not None:
            self._metrics.erased(len(erasures))
        for erasure, gone, dead in zip(erasures, removed, letters, strict=True):
            certificate = response.certificates.add(
                id=f"erasure-{erasure.id}",
                tenant=call.tenant,
                entity_type=entity_type,
                erased_until_us=until_us,
                erased_at_us=now_us,
                not_covered=NOT_COVERED,
                dead_letters=dead,
            )
            for view in sorted(gone.rows.keys() | gone.durable_rows.keys()):
                certificate.views.add(feature_view=view, rows=gone.rows.get(view, 0), durable_rows=gone.durable_rows.get(view, 0))
            self._signer.sign(certificate, erasure.entity)
            log.info(
                "entity erased", tenant=call.tenant, entity_type=entity_type, entity=certificate.entity_hash, certificate=certificate.id
            )


async def remove(store: RedisStore, registry: Registry, erasures: Sequence[Erasure]) -> list[Removed]:
    """Refuse the events of erased entities from now on, and remove their rows up to then; what is newer stays. May be repeated.

    The marks come first: once they are set no older row can arrive, so the rows found afterwards are all there ever will be.
    """
    receipt = Receipt()
    entities = [_Entity.of(erasure) for erasure in erasures]
    untils = [erasure.until_us for erasure in erasures]
    await store.erase([entity.mark for entity in entities], [()] * len(entities), untils, receipt)
    held = {
        (tenant, entity_type): await registry.views_that_held(tenant, entity_type)
        for tenant, entity_type in {(erasure.tenant, erasure.entity_type) for erasure in erasures}
    }
    keys = [entity.keys(held[erasure.tenant, erasure.entity_type]) for entity, erasure in zip(entities, erasures, strict=True)]
    old = await _old_rows(store, keys, untils)
    await store.erase([entity.mark for entity in entities], [list(mine) for mine in old], untils, receipt)
    await store.settle(receipt)
    durable = await registry.forget_rows(erasures)
    return [
        Removed(_counted(held[erasure.tenant, erasure.entity_type], mine.values()), gone)
        for erasure, mine, gone in zip(erasures, old, durable, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Entity:
    """An erased entity's keys in Redis."""

    erasure: Erasure
    entity_id: Id
    mark: bytes

    @classmethod
    def of(cls, erasure: Erasure) -> _Entity:
        entity_id, _ = decode_id(erasure.entity)
        [mark] = KeySpace.of(erasure.tenant, erasure.entity_type, "", 0).mark_keys([entity_id])
        return cls(erasure, entity_id, mark)

    def keys(self, held: HeldViews) -> dict[bytes, str]:
        """Return the key of every row there may be, and its view."""
        return {
            KeySpace.of(self.erasure.tenant, self.erasure.entity_type, view, version, epoch).keys([self.entity_id])[0]: view
            for view, version, newest in held
            for epoch in range(newest + 1)
        }


async def _old_rows(store: RedisStore, keys: Sequence[Mapping[bytes, str]], untils: Sequence[int]) -> list[dict[bytes, str]]:
    """Return those of each entity's keys that hold a row from before its erasure, and the view."""
    flat = [(owner, key) for owner, mine in enumerate(keys) for key in mine]
    old: list[dict[bytes, str]] = [{} for _ in keys]
    for at in range(0, len(flat), _KEYS_AT_ONCE):
        part = flat[at : at + _KEYS_AT_ONCE]
        read = await store.read([key for _, key in part], READ_TIMEOUT_S)
        read.check_whole()
        for (owner, key), row in zip(part, read.rows, strict=True):
            if row is not None and (len(row) < HEADER_BYTES or event_time_us(row) <= untils[owner]):
                old[owner][key] = keys[owner][key]
    return old


def _counted(held: HeldViews, views: Any) -> dict[str, int]:
    counts = {view: 0 for view, _, _ in held}
    for view in views:
        counts[view] += 1
    return counts


def _check_kind(request: Any, snapshot: Snapshot) -> None:
    views = [view for view in snapshot.feature_views.values() if view.entity.type == request.entities.entity_type]
    entities = [entity for view in views for entity in (view.entity, *(past.entity for past in view.versions))]
    problems = [read_ids(request.entities.ids, entity)[1] for entity in entities]
    if problems and all(problems):
        raise InvalidArgument("the entities cannot be erased", violations=[Violation("entities.ids", problems[0])])


def _checked(request: Any) -> list[Id]:
    """Return the ids of an EraseEntityRequest. Raises InvalidArgument; messages tell places, never an id."""
    message = request.entities.ids
    given: list[list[Id]] = [list(ids) for ids in (message.string_ids, message.int64_ids, composites(message)) if ids]
    problem = ""
    if len(given) != 1:
        problem = "give ids of one kind" if given else "at least one id is needed"
    elif len(given[0]) > MAX_IDS:
        problem = f"{len(given[0])} ids are given, at most {MAX_IDS} are erased by one call"
    elif any(entity_id in {"", ()} for entity_id in given[0]):
        problem = "an id is empty"
    elif len(set(given[0])) < len(given[0]):
        problem = "an id is given twice"
    if problem:
        raise InvalidArgument("the entities cannot be erased", violations=[Violation("entities.ids", problem)])
    return given[0]
