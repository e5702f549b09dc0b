"""Who was erased, for ever: the SQL beside its values.

Only the id itself is remembered, because without it nothing of that entity could be refused. Numbers ascend in the order in which they
become visible (they are given under the registry's lock), so whoever has read up to one has read all before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from plait.registry.queries import Connection

# Shared by who writes to the durable copy, held by who deletes an erased entity's rows: a write that had not seen the erasure yet is
# committed, and so seen, before the deletion begins. Rows that are not erased are written side by side.
ROWS_LOCK: Final = 0x706C6169745F7277


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """Events of an entity up to `until_us` (microseconds since the epoch) are refused. `entity` is the typed id, as in the key of a row."""

    id: int
    tenant: str
    entity_type: str
    entity: bytes
    until_us: int


async def remember(
    connection: Connection, tenant: str, entity_type: str, entities: Sequence[bytes], until_us: int, actor: str, reason: str
) -> list[int]:
    """Store one erasure per entity, in order; return their numbers."""
    rows = await connection.fetch(
        """insert into plait.erasure (tenant, entity_type, entity, until_us, actor, reason)
           select $1, $2, given.entity, $4, $5, $6 from unnest($3::bytea[]) with ordinality as given(entity, position)
           order by given.position returning id""",
        tenant,
        entity_type,
        list(entities),
        until_us,
        actor,
        reason,
    )
    return [row["id"] for row in rows]


async def after(connection: Connection, number: int, limit: int) -> list[Erasure]:
    """Return the erasures after a number, at most `limit`, in order."""
    rows = await connection.fetch(
        "select id, tenant, entity_type, entity, until_us from plait.erasure where id > $1 order by id limit $2", number, limit
    )
    return [Erasure(**row) for row in rows]


async def newest(connection: Connection) -> int:
    """Return the number of the last erasure, 0 where there never was one."""
    found: int = await connection.fetchval("select coalesce(max(id), 0) from plait.erasure")
    return found


async def views_of(connection: Connection, tenant: str, entity_type: str) -> list[tuple[str, int, int]]:
    """Return every (view, version, newest epoch) of an entity type that ever held rows of a tenant, deleted views included."""
    rows = await connection.fetch(
        """select distinct c.name as view, (c.spec->>'version')::int as version, coalesce(e.newest, 0) as newest
           from plait.change c
           left join plait.view_epoch e on e.tenant = $1 and e.view = c.name and e.version = (c.spec->>'version')::int
           where c.kind = 'FeatureView' and c.spec->'entity'->>'type' = $2 order by view, version""",
        tenant,
        entity_type,
    )
    return [(row["view"], row["version"], row["newest"]) for row in rows]


async def forget_rows(connection: Connection, erasure: Erasure) -> dict[str, int]:
    """Delete an erased entity's rows from the durable copy, up to its time; return how many there were of each view."""
    until = (erasure.until_us + (1 << 63)).to_bytes(8, "big")  # as a position begins
    async with connection.transaction():
        await connection.execute("select pg_advisory_xact_lock($1)", ROWS_LOCK)
        return await _forget_rows(connection, erasure, until)


async def _forget_rows(connection: Connection, erasure: Erasure, until: bytes) -> dict[str, int]:
    rows = await connection.fetch(
        """with gone as (
               delete from plait.feature_row
               where tenant = $1 and entity_type = $2 and entity = $3 and substring(position from 1 for 8) <= $4 returning view
           ) select view, count(*) as rows from gone group by view""",
        erasure.tenant,
        erasure.entity_type,
        erasure.entity,
        until,
    )
    return {row["view"]: row["rows"] for row in rows}
