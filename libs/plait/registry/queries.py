"""The registry's SQL, each statement beside the values it turns into. Knows the tables, not the driver: `store` brings connections."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

from plait.registry.plan import Step
from plait.registry.records import ApiKey, Epochs, FeatureView, Kind, Record, Snapshot
from plait.registry.resources import Change, Key, Past, Resource, snapshot_of
from plait.registry.specs import KINDS, from_stored, to_stored

CHANNEL: Final = "plait_registry"
_LOCK_TIMEOUT: Final = "set local lock_timeout = '10s'"

Row = Mapping[str, Any]


class Connection(Protocol):
    """What is used of a driver's connection."""

    async def fetch(self, query: str, *args: object) -> Sequence[Row]: ...
    async def fetchrow(self, query: str, *args: object) -> Row | None: ...
    async def fetchval(self, query: str, *args: object) -> Any: ...
    async def execute(self, query: str, *args: object) -> object: ...
    async def executemany(self, query: str, args: Iterable[Sequence[object]]) -> object: ...
    def transaction(self, *, isolation: Any = None, readonly: bool = False) -> AbstractAsyncContextManager[Any]: ...


async def revision(connection: Connection) -> int:
    """Return the revision as this transaction sees it."""
    return cast("int", await connection.fetchval("select value from plait.revision"))


async def lock_revision(connection: Connection) -> int:
    """Wait for other writers to end, keep them out until this transaction ends, and return the revision."""
    await connection.execute(_LOCK_TIMEOUT)
    return cast("int", await connection.fetchval("select value from plait.revision for update"))


async def bump(connection: Connection, to: int) -> None:
    """Set the revision and tell everybody who listens; they hear of it when the transaction commits."""
    await connection.execute("update plait.revision set value = $1", to)
    await connection.execute("select pg_notify($1, $2)", CHANNEL, str(to))


async def resources(connection: Connection, kind: Kind | None = None, name: str | None = None) -> dict[Key, Resource]:
    """Return the stored resources, by kind and name; of one kind, or one alone."""
    rows = await connection.fetch(
        """select kind, name, spec, generation, revision, created_at, updated_at from plait.resource
           where kind = any($1::text[]) and ($2::text is null or name = $2) order by kind, name""",
        [kind] if kind else list(KINDS),
        name,
    )
    return {(row["kind"], row["name"]): _resource(row) for row in rows}


def _resource(row: Row) -> Resource:
    return Resource(
        record=from_stored(row["kind"], row["name"], json.loads(row["spec"])),
        generation=row["generation"],
        revision=row["revision"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


@dataclass(frozen=True, slots=True)
class Read:
    """A record, the text it was read from, and the revision of its last change."""

    revision: int
    text: str
    record: Record


Known = dict[Key, Read]


async def snapshot(connection: Connection, known: Known | None = None, since: int = 0) -> Snapshot:
    """Return the whole registry.

    `known` is what was read before and is brought up to date; what has the same text is not parsed again, and what did not change
    after revision `since` (0 unless this very database answered then) is not even fetched.
    """
    known = {} if known is None else known
    now = await revision(connection)
    rows = await connection.fetch(
        "select kind, name, revision, case when revision > $2 then spec end as spec from plait.resource where kind = any($1::text[])",
        list(KINDS),
        since,
    )
    current = {(row["kind"], row["name"]): _read(row, known.get((row["kind"], row["name"]))) for row in rows}
    known.clear()
    known.update(current)
    return snapshot_of(now, (read.record for read in current.values()), await api_keys(connection), await epochs(connection))


async def epochs(connection: Connection) -> dict[tuple[str, str, int], Epochs]:
    """Return the epochs of every view that was ever backfilled, by (tenant, view, version)."""
    rows = await connection.fetch("select tenant, view, version, serving, building, previous, newest, built from plait.view_epoch")
    return {
        (row["tenant"], row["view"], row["version"]): Epochs(
            serving=row["serving"], building=row["building"], previous=row["previous"], newest=row["newest"], built=row["built"]
        )
        for row in rows
    }


def _read(row: Row, before: Read | None) -> Read:
    text = row["spec"]
    if before is not None and text in (None, before.text):
        return before
    return Read(row["revision"], text, from_stored(row["kind"], row["name"], json.loads(text)))


async def world(connection: Connection, resources: Iterable[Resource]) -> Snapshot:
    """Return resources already read, and the keys, as a snapshot."""
    return snapshot_of(await revision(connection), (r.record for r in resources), await api_keys(connection))


async def past(connection: Connection, views: Sequence[str], models: Sequence[str]) -> Past:
    """Return what was published before under these names, deleted or not."""
    view_rows = await connection.fetch(
        """select distinct on (name, spec->'version') name, spec from plait.change
           where kind = 'FeatureView' and name = any($1::text[]) and spec is not null
           order by name, spec->'version', generation desc""",
        views,
    )
    old = [cast("FeatureView", from_stored("FeatureView", row["name"], json.loads(row["spec"]))) for row in view_rows]
    digest_rows = await connection.fetch(
        """select distinct name, v->>'version' as version, v->>'digest' as digest
           from plait.change, jsonb_array_elements(spec->'versions') as v
           where kind = 'Model' and name = any($1::text[]) and spec is not null""",
        models,
    )
    digests = {(row["name"], row["version"]): row["digest"] for row in digest_rows}
    return Past(views={(view.name, view.version): view for view in old}, digests=digests)


async def generations(connection: Connection, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Return the last generation of each key, which a delete does not reset; 0 where there never was one."""
    rows = await connection.fetch(
        """select kind, name, max(generation) as generation from plait.change
           where (kind, name) in (select * from unnest($1::text[], $2::text[])) group by kind, name""",
        [kind for kind, _ in keys],
        [name for _, name in keys],
    )
    return dict.fromkeys(keys, 0) | {(row["kind"], row["name"]): row["generation"] for row in rows}


async def write(connection: Connection, steps: Sequence[Step], last: Mapping[tuple[str, str], int], at: int) -> None:
    """Store what the steps decided, at revision `at`; the log is written by `log`."""
    kept = [(*step.key, json.dumps(to_stored(step.after)), last[step.key] + 1, at) for step in steps if step.after is not None]
    await connection.executemany(
        """insert into plait.resource (kind, name, spec, generation, revision) values ($1, $2, $3::jsonb, $4, $5)
           on conflict (kind, name) do update
           set spec = excluded.spec, generation = excluded.generation, revision = excluded.revision, updated_at = now()""",
        kept,
    )
    gone = [step.key for step in steps if step.after is None]
    await connection.executemany("delete from plait.resource where kind = $1 and name = $2", gone)


async def log(connection: Connection, changes: Sequence[Change]) -> None:
    """Append to the audit log."""
    await connection.executemany(
        """insert into plait.change (revision, kind, name, generation, action, spec, actor, reason)
           values ($1, $2, $3, $4, $5, $6::jsonb, $7, $8)""",
        [(c.revision, c.kind, c.name, c.generation, c.action, _json(c.after), c.actor, c.reason) for c in changes],
    )


def _json(spec: Mapping[str, Any] | None) -> str | None:
    return None if spec is None else json.dumps(spec)


async def changes(connection: Connection, kind: str | None, name: str | None, limit: int, below: int | None) -> list[Change]:
    """Return the log, newest first: `limit` entries and those of the same revision as the last.

    `below` is the revision at which the page before ended.
    """
    rows = await connection.fetch(
        """select c.*, b.spec as before from (
               select * from plait.change
               where ($1::text is null or kind = $1) and ($2::text is null or name = $2) and ($4::bigint is null or revision < $4)
               order by revision desc fetch first ($3::bigint) rows with ties
           ) c
           left join plait.change b on b.kind = c.kind and b.name = c.name and b.generation = c.generation - 1
           order by c.revision desc, c.kind, c.name""",
        kind,
        name,
        limit,
        below,
    )
    return [_change(row) for row in rows]


def _change(row: Row) -> Change:
    return Change(
        action=row["action"],
        kind=row["kind"],
        name=row["name"],
        generation=row["generation"],
        revision=row["revision"],
        before=json.loads(row["before"]) if row["before"] else None,
        after=json.loads(row["spec"]) if row["spec"] else None,
        actor=row["actor"],
        reason=row["reason"],
        changed_at=row["changed_at"],
    )


async def generation(connection: Connection, key: Key, wanted: int) -> Record | None:
    """Return the resource as it was in a generation; with 0, as it last was before what it is now."""
    row = await connection.fetchrow(
        """select spec from plait.change
           where kind = $1 and name = $2 and spec is not null
           and case when $3 > 0 then generation = $3
               else generation < (select max(generation) from plait.change where kind = $1 and name = $2) end
           order by generation desc limit 1""",
        *key,
        wanted,
    )
    return from_stored(*key, json.loads(row["spec"])) if row else None


async def api_keys(connection: Connection, tenant: str | None = None, key_id: str | None = None) -> list[ApiKey]:
    """Return the keys that were not revoked (an expired one is still there, so that its bearer can be told)."""
    rows = await connection.fetch(
        """select id, tenant, sha256, scopes, expires_at, extract(epoch from created_at)::double precision as created_at,
                  coalesce(replaces, '') as replaces, note
           from plait.api_key
           where revoked_at is null and ($1::text is null or tenant = $1) and ($2::text is null or id = $2) order by created_at, id""",
        tenant,
        key_id,
    )
    return [ApiKey(**{**row, "scopes": tuple(row["scopes"])}) for row in rows]


async def insert_key(connection: Connection, key: ApiKey) -> None:
    """Store a key."""
    await connection.execute(
        """insert into plait.api_key (id, tenant, sha256, scopes, expires_at, created_at, replaces, note)
           values ($1, $2, $3, $4, $5, to_timestamp($6), nullif($7, ''), $8)""",
        key.id,
        key.tenant,
        key.sha256,
        list(key.scopes),
        key.expires_at,
        key.created_at,
        key.replaces,
        key.note,
    )


async def successor(connection: Connection, key_id: str) -> str:
    """Return the id of the key that was made to replace this one and is still let in, or ''."""
    found = await connection.fetchval("select id from plait.api_key where replaces = $1 and revoked_at is null limit 1", key_id)
    return cast("str", found or "")


async def expire_key(connection: Connection, key_id: str, expires_at: float) -> None:
    """Let a key in until then, and no longer."""
    await connection.execute("update plait.api_key set expires_at = $2 where id = $1", key_id, expires_at)


async def revoke_key(connection: Connection, key_id: str) -> None:
    """Mark a key as revoked; the row stays, so that its id is never given again."""
    await connection.execute("update plait.api_key set revoked_at = now() where id = $1", key_id)
