"""The registry in Postgres. What is decided is decided in `plan`; the SQL is in `queries`; connections are `database`'s.

Every write is one transaction that holds the lock of the revision row, so writers queue and readers never wait. It stores the
resources, appends to the audit log, bumps the revision and notifies, or does none of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self

from plait.errors import FailedPrecondition, InvalidArgument, NotFound
from plait.registry import epochs as epoch_rules
from plait.registry import erasures, key_changes, migrator, plan, queries
from plait.registry.database import Pool, connect, mapped, open_pool
from plait.registry.epochs import EpochKey
from plait.registry.erasures import Erasure
from plait.registry.manifests import Manifest
from plait.registry.migrator import Migration
from plait.registry.queries import CHANNEL, Connection
from plait.registry.records import ApiKey, Epochs, FeatureView, Kind, Snapshot
from plait.registry.resources import Change, Resource
from plait.registry.specs import to_stored
from plait.rpc.identity.roles import check_scopes

MAX_REASON_BYTES: Final = 1024
MAX_PAGE: Final = 1000
_LISTENER_TIMEOUT_S: Final = 10.0  # an answer this late means that the connection is dead

Changes = list[Change]  # spelt here because the store has a method called list
Keys = list[ApiKey]
Numbers = list[int]
Erasures = list[Erasure]
Counts = list[dict[str, int]]
HeldViews = list[tuple[str, int, int]]


class Store:
    """A pool of connections to the registry and everything one can ask of it. Make it with `open`, then close it or use `async with`.

    Every method raises Unavailable (REGISTRY_UNAVAILABLE) while Postgres is away, and FailedPrecondition (REGISTRY_NOT_MIGRATED)
    before `migrate` has run.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @classmethod
    async def open(cls, dsn: str, *, max_connections: int = 4, lazy: bool = False) -> Self:
        """Connect; with `lazy` only when first asked, so that a service starts while Postgres is away.

        Raises InvalidArgument (REGISTRY_DSN), FailedPrecondition (REGISTRY_REFUSED), Unavailable.
        """
        return cls(await open_pool(dsn, name="plait-registry", min_connections=0 if lazy else 1, max_connections=max_connections))

    async def close(self) -> None:
        """Give every connection back; one that does not answer any more is cut."""
        await self._pool.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Store {self._pool!r}>"

    async def migrate(self, known: Sequence[Migration] | None = None) -> tuple[Migration, ...]:
        """Bring the tables up to date; return what was applied. Raises FailedPrecondition (MIGRATION_EDITED)."""
        async with self._pool.connection() as connection:
            return await migrator.migrate(connection, migrator.shipped() if known is None else known)

    async def snapshot(self) -> Snapshot:
        """Return the whole registry at one revision."""
        async with self._pool.reading() as connection:
            return await queries.snapshot(connection)

    async def apply(self, manifests: Sequence[Manifest], *, actor: str, reason: str = "", dry_run: bool = False) -> list[Change]:
        """Create or replace resources, all or none; return what became of each, in order. What is unchanged is left alone.

        Raises InvalidArgument (MANIFEST_INVALID), Aborted (ETAG_MISMATCH, REGISTRY_BUSY) and FailedPrecondition (CROSS_CHECK_FAILED),
        each with every problem as a violation.
        """
        _check_author(actor, reason)
        if dry_run:
            async with self._pool.reading() as connection:
                return await _apply(connection, manifests, await queries.revision(connection), actor, reason, dry_run=True)
        async with self._writing() as (connection, revision):
            return await _apply(connection, manifests, revision, actor, reason, dry_run=False)

    async def rollback(self, kind: Kind, name: str, *, generation: int = 0, actor: str, reason: str = "") -> Change:
        """Apply an earlier generation again, as a new one (0: the one before; it also brings back what was deleted).

        Raises NotFound (GENERATION_NOT_FOUND), and what `apply` does: the earlier state must fit today's world.
        """
        _check_author(actor, reason)
        async with self._writing() as (connection, revision):
            record = await queries.generation(connection, (kind, name), generation)
            if record is None:
                wanted = f"generation {generation}" if generation else "earlier generation"
                raise NotFound(f"{kind} {name} has no {wanted} to go back to", reason="GENERATION_NOT_FOUND")
            (change,) = await _apply(connection, [Manifest(record=record)], revision, actor, reason, dry_run=False)
            return change

    async def delete(self, kind: Kind, name: str, *, actor: str, reason: str = "", etag: str = "") -> Change:
        """Delete one resource; its history stays.

        Raises NotFound, Aborted (ETAG_MISMATCH), FailedPrecondition (STILL_USED) listing the users.
        """
        _check_author(actor, reason)
        async with self._writing() as (connection, revision):
            current = await queries.resources(connection)
            step = plan.delete((kind, name), etag, current, await queries.world(connection, current.values()))
            (change,) = await _write(connection, [step], revision, actor, reason)
            return change

    async def get(self, kind: Kind, name: str) -> Resource:
        """Return one resource. Raises NotFound (RESOURCE_NOT_FOUND)."""
        async with self._pool.reading() as connection:
            found = await queries.resources(connection, kind, name)
            if (kind, name) not in found:
                raise plan.missing((kind, name), await queries.resources(connection, kind))
        return found[kind, name]

    async def list(self, kind: Kind | None = None) -> list[Resource]:
        """Return the resources of a kind, or all, by kind and name."""
        async with self._pool.reading() as connection:
            return [*(await queries.resources(connection, kind)).values()]

    async def history(
        self, kind: Kind | str | None = None, name: str | None = None, *, limit: int = 100, below_revision: int | None = None
    ) -> Changes:
        """Return the audit log, newest first: of one resource, of a kind ("ApiKey" too), or of everything.

        A page holds `limit` (1 to 1 000) entries and whatever else belongs to the last one's revision; `below_revision` goes on there.
        """
        async with self._pool.reading() as connection:
            return await queries.changes(connection, kind, name, max(1, min(limit, MAX_PAGE)), below_revision)

    async def create_key(
        self,
        tenant: str,
        scopes: Sequence[str] = ("rank", "features", "infer"),
        *,
        actor: str,
        expires_at: float = 0.0,
        reason: str = "",
        note: str = "",
    ) -> tuple[ApiKey, str]:
        """Make an API key; return it and its secret, which is shown this once and stored nowhere.

        `expires_at`: seconds since the epoch, 0 = never. Raises InvalidArgument (SCOPE_UNKNOWN, NOTE_TOO_LONG), NotFound (the tenant).
        """
        _check_author(actor, reason)
        check_scopes(scopes)
        key_changes.check_note(note)
        key, secret = key_changes.new(tenant, scopes, now_s=time.time(), expires_at=expires_at, note=note)
        async with self._writing() as (connection, revision):
            if ("Tenant", tenant) not in await queries.resources(connection, "Tenant", tenant):
                raise NotFound(f"there is no tenant {tenant!r}; apply a Tenant manifest first", reason="RESOURCE_NOT_FOUND")
            await queries.insert_key(connection, key)
            await _record(connection, [key_changes.logged(None, key, 1, revision + 1, actor, reason)])
        return key, secret

    async def rotate_key(self, key_id: str, *, overlap_s: float, actor: str, reason: str = "") -> tuple[ApiKey, str]:
        """Make a key that replaces another, with its tenant, scopes, note and length of life; return it and its secret, as `create_key` does.

        The old one is let in for `overlap_s` more, or as long as it would have been if that is less. Raises NotFound (KEY_NOT_FOUND),
        FailedPrecondition (KEY_REPLACED) where it was rotated before.
        """
        _check_author(actor, reason)
        async with self._writing() as (connection, revision):
            old = await _key(connection, key_id)
            if known := await queries.successor(connection, key_id):
                raise FailedPrecondition(
                    f"API key {key_id} is being replaced by {known} already: rotate that one, or revoke it first", reason="KEY_REPLACED"
                )
            now_s = time.time()
            new, secret = key_changes.successor(old, now_s=now_s)
            shortened = key_changes.shortened(old, now_s + overlap_s)
            await queries.insert_key(connection, new)
            await queries.expire_key(connection, key_id, shortened.expires_at)
            generation = await _next_generation(connection, key_id)
            await _record(
                connection,
                [
                    key_changes.logged(old, shortened, generation, revision + 1, actor, reason),
                    key_changes.logged(None, new, 1, revision + 1, actor, reason),
                ],
            )
        return new, secret

    async def revoke_key(self, key_id: str, *, actor: str, reason: str = "") -> None:
        """Refuse a key from now on (everywhere, as soon as the snapshots are swapped). Raises NotFound (KEY_NOT_FOUND)."""
        _check_author(actor, reason)
        async with self._writing() as (connection, revision):
            old = await _key(connection, key_id)
            await queries.revoke_key(connection, key_id)
            generation = await _next_generation(connection, key_id)
            await _record(connection, [key_changes.logged(old, None, generation, revision + 1, actor, reason)])

    async def list_keys(self, tenant: str | None = None) -> Keys:
        """Return the keys that were not revoked, oldest first."""
        async with self._pool.reading() as connection:
            return await queries.api_keys(connection, tenant)

    async def begin_epoch(self, tenant: str, view: str, *, version: int = 0, actor: str, reason: str = "") -> Epochs:
        """Begin to build a new epoch of a view (`version` 0 = the current one) for a tenant; from now on writers write it, too.

        This and the five below return the epochs as they are then, and raise NotFound (RESOURCE_NOT_FOUND, VIEW_VERSION_NOT_FOUND) and
        FailedPrecondition (EPOCH_BUSY, EPOCH_NOT_FOUND).
        """
        return await self._move_epochs(epoch_rules.begin, tenant, view, version, actor, reason)

    async def complete_epoch(self, tenant: str, view: str, epoch: int, *, version: int = 0, actor: str, reason: str = "") -> Epochs:
        """Note that the epoch being built holds all it shall."""
        return await self._move_epochs(lambda epochs: epoch_rules.complete(epochs, epoch), tenant, view, version, actor, reason)

    async def flip_epoch(
        self, tenant: str, view: str, *, epoch: int | None = None, version: int = 0, actor: str, reason: str = ""
    ) -> Epochs:
        """Serve the epoch that was built; the one served until now is kept, and written, for a rollback.

        `epoch` says which one is meant: whoever built it and was overtaken must not serve what another has half built since.
        """
        return await self._move_epochs(lambda epochs: epoch_rules.flip(epochs, epoch), tenant, view, version, actor, reason, flips=True)

    async def rollback_epoch(self, tenant: str, view: str, *, version: int = 0, actor: str, reason: str = "") -> Epochs:
        """Serve the kept epoch again; the one served until now is kept in its place."""
        return await self._move_epochs(epoch_rules.rollback, tenant, view, version, actor, reason, flips=True)

    async def retire_epoch(self, tenant: str, view: str, *, version: int = 0, actor: str, reason: str = "") -> Epochs:
        """Write the kept epoch no more; there is no rollback after it."""
        return await self._move_epochs(epoch_rules.retire, tenant, view, version, actor, reason)

    async def abandon_epoch(self, tenant: str, view: str, *, version: int = 0, actor: str, reason: str = "") -> Epochs:
        """Give up the epoch being built."""
        return await self._move_epochs(epoch_rules.abandon, tenant, view, version, actor, reason)

    async def epochs(self, tenant: str, view: str, *, version: int = 0) -> Epochs:
        """Return the epochs of a view for a tenant. Raises NotFound as `begin_epoch` does."""
        async with self._pool.reading() as connection:
            return await epoch_rules.read(connection, await _epoch_key(connection, tenant, view, version)) or Epochs()

    async def remember_erasures(
        self, tenant: str, entity_type: str, entities: Sequence[bytes], until_us: int, *, actor: str, reason: str
    ) -> Numbers:
        """Remember that events of these entities (typed ids) up to a time are refused; return the erasures' numbers, in order.

        The audit log is append-only and so holds nothing of them.
        """
        _check_author(actor, reason)
        async with self._writing() as (connection, _):
            return await erasures.remember(connection, tenant, entity_type, entities, until_us, actor, reason)

    async def erasures_after(self, number: int, limit: int = MAX_PAGE) -> Erasures:
        """Return the erasures after a number, in order, at most `limit`."""
        async with self._pool.connection() as connection:
            return await erasures.after(connection, number, limit)

    async def newest_erasure(self) -> int:
        """Return the number of the last erasure, 0 where there never was one."""
        async with self._pool.connection() as connection:
            return await erasures.newest(connection)

    async def views_that_held(self, tenant: str, entity_type: str) -> HeldViews:
        """Return every (view, version, newest epoch) that may hold rows of an entity type, deleted views and old versions included."""
        async with self._pool.connection() as connection:
            return await erasures.views_of(connection, tenant, entity_type)

    async def forget_rows(self, forgotten: Sequence[Erasure]) -> Counts:
        """Delete erased entities' rows from the durable copy; return how many there were of each view, parallel to the erasures."""
        async with self._pool.connection() as connection:
            return [await erasures.forget_rows(connection, erasure) for erasure in forgotten]

    async def _move_epochs(
        self, move: Callable[[Epochs], Epochs], tenant: str, view: str, version: int, actor: str, reason: str, *, flips: bool = False
    ) -> Epochs:
        _check_author(actor, reason)
        async with self._writing() as (connection, revision):
            key = await _epoch_key(connection, tenant, view, version)
            before = await epoch_rules.read(connection, key)
            after = move(before or Epochs())
            await epoch_rules.write(connection, key, after, begun=move is epoch_rules.begin, flipped=flips)
            logged = (epoch_rules.KIND, epoch_rules.name_of(key))
            last = await queries.generations(connection, [logged])
            change = Change(
                action="updated" if before else "created",
                kind="FeatureEpoch",
                name=logged[1],
                generation=last[logged] + 1,
                revision=revision + 1,
                before=epoch_rules.described(before),
                after=epoch_rules.described(after),
                actor=actor,
                reason=reason,
            )
            await _record(connection, [change])
            return after

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[tuple[Connection, int]]:
        """The only writer, and the revision it starts from. Read committed: what is read under the lock is the newest there is."""
        async with self._pool.connection() as connection, connection.transaction():
            yield connection, await queries.lock_revision(connection)


class Listener:
    """One connection that hears of every change and reads snapshots. It is used by one task; when it breaks, open another.

    `known` may be handed from one listener to the next, so that after an outage only what changed is parsed again.
    """

    def __init__(self, connection: Any, known: queries.Known) -> None:
        self._connection = connection
        self._heard = asyncio.Event()
        self._known = known
        self._since = 0  # this server may be another than the last listener's, so it is asked for everything once

    @classmethod
    @asynccontextmanager
    async def open(cls, dsn: str, known: queries.Known | None = None) -> AsyncIterator[Self]:
        """Connect and listen. Raises as `Store.open` does."""
        connection = await connect(dsn, name="plait-watcher", command_timeout_s=_LISTENER_TIMEOUT_S)
        listener = cls(connection, {} if known is None else known)
        connection.add_termination_listener(lambda _: listener._heard.set())
        try:
            with mapped():
                await connection.add_listener(CHANNEL, lambda *_: listener._heard.set())
            yield listener
        finally:
            connection.terminate()  # nothing is under way that a polite good-bye would save

    async def wait(self, timeout_s: float) -> bool:
        """Return whether a change was announced, or the connection broke, within the time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._heard.wait()
        except TimeoutError:
            return False
        self._heard.clear()
        return True

    async def revision(self) -> int:
        """Return the revision now. Raises as `Store` does."""
        with mapped():
            return await queries.revision(self._connection)

    async def snapshot(self) -> Snapshot:
        """Return the whole registry at one revision; what did not change since the last time is not read again."""
        with mapped():
            async with self._connection.transaction(isolation="repeatable_read", readonly=True):
                found = await queries.snapshot(self._connection, self._known, self._since)
        self._since = found.revision
        return found


async def _epoch_key(connection: Connection, tenant: str, view: str, version: int) -> EpochKey:
    """Return what a view's epochs are kept under; raises NotFound where the registry has no such tenant, view or version."""
    found = await queries.resources(connection, "FeatureView", view)
    if ("FeatureView", view) not in found:
        raise plan.missing(("FeatureView", view), await queries.resources(connection, "FeatureView"))
    if ("Tenant", tenant) not in (tenants := await queries.resources(connection, "Tenant")):
        raise plan.missing(("Tenant", tenant), tenants)
    record = found["FeatureView", view].record
    wanted = record.at(version) if isinstance(record, FeatureView) else None
    if wanted is None:
        raise NotFound(f"FeatureView {view} has no version {version} any more", reason="VIEW_VERSION_NOT_FOUND")
    return tenant, view, wanted.version


async def _key(connection: Connection, key_id: str) -> ApiKey:
    found = await queries.api_keys(connection, key_id=key_id)
    if not found:
        raise NotFound("there is no such API key, or it was revoked before", reason="KEY_NOT_FOUND")
    return found[0]


async def _next_generation(connection: Connection, key_id: str) -> int:
    logged = ("ApiKey", key_id)
    return (await queries.generations(connection, [logged]))[logged] + 1


def _check_author(actor: str, reason: str) -> None:
    if not actor or len(actor.encode()) > 256 or "\0" in actor + reason:
        raise InvalidArgument("say who makes this change (actor), in 1 to 256 bytes without NUL", reason="ACTOR_INVALID")
    if len(reason.encode()) > MAX_REASON_BYTES:
        raise InvalidArgument(f"the reason has {len(reason.encode())} bytes; at most {MAX_REASON_BYTES} are kept", reason="REASON_TOO_LONG")


async def _apply(
    connection: Connection, manifests: Sequence[Manifest], revision: int, actor: str, reason: str, *, dry_run: bool
) -> list[Change]:
    current = await queries.resources(connection)
    past = await queries.past(connection, *plan.names_with_past(manifests))
    steps = plan.apply(manifests, current, await queries.world(connection, current.values()), past)
    if dry_run:
        return [_change(step, step.before.generation + 1 if step.before else 1, revision, actor, reason) for step in steps]
    return await _write(connection, steps, revision, actor, reason)


async def _write(connection: Connection, steps: Sequence[plan.Step], revision: int, actor: str, reason: str) -> list[Change]:
    """Do what was decided; nothing at all where nothing changes."""
    changing = [step for step in steps if step.action != "unchanged"]
    last = await queries.generations(connection, [step.key for step in steps])
    await queries.write(connection, changing, last, revision + 1)
    changes = [_change(step, last[step.key] + 1, revision + 1, actor, reason) for step in steps]
    await _record(connection, [c for c in changes if c.action != "unchanged"])
    return changes


async def _record(connection: Connection, changes: Sequence[Change]) -> None:
    if changes:
        await queries.log(connection, changes)
        await queries.bump(connection, changes[0].revision)


def _change(step: plan.Step, generation: int, revision: int, actor: str, reason: str) -> Change:
    """Describe a step; an unchanged resource keeps the generation and revision it has."""
    kind, name = step.key
    before = to_stored(step.before.record) if step.before else None
    if step.action == "unchanged" and step.before:
        generation, revision = step.before.generation, step.before.revision
    return Change(
        action=step.action,
        kind=kind,
        name=name,
        generation=generation,
        revision=revision,
        before=before,
        after=to_stored(step.after) if step.after is not None else None,
        actor=actor,
        reason=reason,
    )
