"""The durable copy: rows as Redis has them, in the table `plait.feature_row`, to build a lost Redis from.

A row replaces another by the very order of `scripts.WRITE`: the position holds event time, sequence and whether the row was streamed, in
bytes that compare like them; equal positions are decided by the rows' bytes. So copies may come late, twice and in any order, from any
number of processes. What an erasure refuses is never stored: it holds the lock while it deletes, a write shares it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from feature_retrieval.row_codec import FLAG_BACKFILL, HEADER_BYTES, KeySpace, decode_id, entity_prefix
from plait.registry.database import Pool
from plait.registry.erasures import ROWS_LOCK

_SIGN: Final = 1 << 63
_KEEP: Final = """
insert into plait.feature_row (tenant, entity_type, entity, view, version, epoch, position, value)
select given.* from unnest($1::text[], $2::text[], $3::bytea[], $4::text[], $5::int[], $6::int[], $7::bytea[], $8::bytea[])
  as given(tenant, entity_type, entity, view, version, epoch, position, value)
where not exists (
  select 1 from plait.erasure e where e.tenant = given.tenant and e.entity_type = given.entity_type and e.entity = given.entity
    and substring(given.position from 1 for 8) <= int8send(e.until_us # (-9223372036854775807 - 1)))
on conflict (tenant, entity_type, entity, view, version, epoch) do update set position = excluded.position, value = excluded.value
where (excluded.position, excluded.value) > (feature_row.position, feature_row.value)"""
# The primary key whole on the left, so that its index finds the start of each page.
_PAGE: Final = """
select entity_type, entity, view, version, epoch, value from plait.feature_row
where (tenant, entity_type, entity, view, version, epoch) > ($1, $2, $3::bytea, $4, $5, $6) and tenant = $1 and view = any($7::text[])
order by tenant, entity_type, entity, view, version, epoch limit $8"""
_READ: Final = """
select wanted.at, r.value from unnest($1::text[], $2::text[], $3::bytea[], $4::text[], $5::int[], $6::int[]) with ordinality
  as wanted(tenant, entity_type, entity, view, version, epoch, at)
join plait.feature_row r using (tenant, entity_type, entity, view, version, epoch)"""

_DROP_UNUSED: Final = """
delete from plait.feature_row r using plait.view_epoch e where r.tenant = e.tenant and r.view = e.view and r.version = e.version
  and r.epoch <= e.newest and r.epoch <> all(array_remove(array[e.serving, e.building, e.previous], null))"""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """What a key says. `entity` is the typed id, as in the key."""

    tenant: str
    entity_type: str
    entity: bytes
    view: str
    version: int
    epoch: int

    @classmethod
    def of(cls, key: bytes) -> Place:
        """Take the key of a row apart. Raises ValueError for any other key."""
        if not key.startswith(b"p1{"):
            raise ValueError("not the key of a row")
        tenant, at = _short(key, 3)
        entity_type, at = _short(key, at)
        _, size = decode_id(key[at:])
        entity, at = key[at : at + size], at + size
        view, end = _short(key, at + 1)
        if key[at : at + 1] != b"}" or not view or len(key) != end + 6:
            raise ValueError("not the key of a row")
        version, epoch = struct.unpack(">HI", key[end:])
        return cls(tenant, entity_type, entity, view, version, epoch)

    @property
    def key(self) -> bytes:
        """The key of the row."""
        space = KeySpace.of(self.tenant, self.entity_type, self.view, self.version, self.epoch)
        return space.prefix + self.entity + space.suffix

    @property
    def mark(self) -> bytes:
        """The key of the entity's erasure mark."""
        return entity_prefix(self.tenant, self.entity_type) + self.entity + b"}\0"


class DurableRows:
    """Rows in Postgres, by the key they have in Redis. Raises Unavailable (REGISTRY_UNAVAILABLE) while Postgres is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __repr__(self) -> str:
        return f"<DurableRows {self._pool!r}>"

    async def keep(self, rows: Mapping[bytes, bytes]) -> None:
        """Store rows by key, each where it is newer and its entity was not erased since. They are committed on return."""
        placed = sorted((Place.of(key), row) for key, row in rows.items())  # in one order, so that no two writers block each other
        columns: list[list[object]] = [
            list(column) for column in zip(*((*_columns(place), position(row), row) for place, row in placed), strict=True)
        ]
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("select pg_advisory_xact_lock_shared($1)", ROWS_LOCK)
            await connection.execute(_KEEP, *columns)

    async def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the rows of keys, None where there is none."""
        columns = [list(column) for column in zip(*(_columns(Place.of(key)) for key in keys), strict=True)]
        rows: list[bytes | None] = [None] * len(keys)
        async with self._pool.connection() as connection:
            for found in await connection.fetch(_READ, *columns):
                rows[found["at"] - 1] = found["value"]
        return rows

    async def page(self, tenant: str, views: Sequence[str], after: Place | None, limit: int) -> list[tuple[Place, bytes]]:
        """Return a tenant's rows of some views, in the order of their places, from behind one."""
        start = _columns(after or Place(tenant, "", b"", "", -1, -1))
        async with self._pool.connection() as connection:
            found = await connection.fetch(_PAGE, *start, list(views), limit)
        return [(Place(tenant, r["entity_type"], r["entity"], r["view"], r["version"], r["epoch"]), r["value"]) for r in found]

    async def count(self, tenant: str, views: Sequence[str]) -> int:
        """Return how many rows of some views a tenant has."""
        async with self._pool.connection() as connection:
            found: int = await connection.fetchval(
                "select count(*) from plait.feature_row where tenant = $1 and view = any($2::text[])", tenant, list(views)
            )
        return found

    async def erasures(self, tenant: str) -> int:
        """Return how many erasures of a tenant are remembered."""
        async with self._pool.connection() as connection:
            found: int = await connection.fetchval("select count(*) from plait.erasure where tenant = $1", tenant)
        return found

    async def drop_before(self, view: str, version: int, event_time_us: int) -> int:
        """Delete the rows of a view's version, of all tenants, whose events are older; return how many there were."""
        async with self._pool.connection() as connection:
            status = await connection.execute(
                "delete from plait.feature_row where view = $1 and version = $2 and substring(position from 1 for 8) < $3",
                view,
                version,
                _ordered(event_time_us),
            )
        return int(str(status).rsplit(maxsplit=1)[-1])

    async def drop_unused_epochs(self) -> int:
        """Delete the rows of epochs that are neither served, being built nor kept for a rollback; return how many there were."""
        async with self._pool.connection() as connection:
            status = await connection.execute(_DROP_UNUSED)
        return int(str(status).rsplit(maxsplit=1)[-1])


def position(row: bytes) -> bytes:
    """Return the bytes by which rows are ordered: event time with its sign flipped, sequence, 0 for backfilled or 1 for streamed."""
    flags: int
    event_time_us: int
    sequence: int
    _, _, flags, event_time_us, _, sequence = struct.unpack("<HHIqqQ", row[:HEADER_BYTES])
    return _ordered(event_time_us) + sequence.to_bytes(8, "big") + bytes([not flags & FLAG_BACKFILL])


def newer(row: bytes, other: bytes) -> bool:
    """Return whether a row replaces another one."""
    return (position(row), row) > (position(other), other)


def _ordered(event_time_us: int) -> bytes:
    return (event_time_us + _SIGN).to_bytes(8, "big")


def _columns(place: Place) -> tuple[object, ...]:
    return place.tenant, place.entity_type, place.entity, place.view, place.version, place.epoch


def _short(key: bytes, at: int) -> tuple[str, int]:
    """Return the name that begins at `at` with its length, and where it ends."""
    if at >= len(key) or at + 1 + key[at] > len(key):
        raise ValueError("not the key of a row")
    return key[at + 1 : at + 1 + key[at]].decode(), at + 1 + key[at]
