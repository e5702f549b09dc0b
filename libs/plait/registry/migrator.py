"""Forward-only SQL migrations: each in one transaction, under one lock, remembered with its checksum.

Several processes may migrate at once: they queue on an advisory lock and the later ones find nothing left to do. A migration that was
edited after it was applied is refused, because nobody could say any more what the schema is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Final

from plait.errors import FailedPrecondition, Internal
from plait.registry.queries import Connection

_FILE: Final = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql\Z")
_LOCK: Final = 0x706C616974  # "plait"; any number that nobody else in this database uses
_BOOK: Final = """
    create schema if not exists plait;
    create table if not exists plait.migration (
        version integer primary key,
        name text not null,
        sha256 text not null,
        applied_at timestamptz not null default now()
    );
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One file of `migrations/`: NNNN_name.sql."""

    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        """Of the text with Unix line ends, so that a checkout on Windows is the same migration."""
        return hashlib.sha256(self.sql.replace("\r\n", "\n").encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.version:04d}_{self.name}"


def shipped() -> tuple[Migration, ...]:
    """Return the migrations of this build, in order."""
    return load(resources.files("plait.registry") / "migrations")


def load(folder: Traversable) -> tuple[Migration, ...]:
    """Return the migrations in a folder, in order. Raises Internal where they are not numbered 1, 2, 3, …"""
    found = []
    for file in folder.iterdir():
        match = _FILE.match(file.name)
        if match:
            found.append(Migration(version=int(match[1]), name=match[2], sql=file.read_text(encoding="utf-8")))
    found.sort(key=lambda migration: migration.version)
    if [m.version for m in found] != list(range(1, len(found) + 1)):
        raise Internal("the migrations of this build are not numbered 1, 2, 3, …: install it again", reason="MIGRATIONS_INCOMPLETE")
    return tuple(found)


def pending(known: Sequence[Migration], applied: Mapping[int, str]) -> tuple[Migration, ...]:
    """Return those not applied yet; `applied` is version → sha256. What a newer build applied is left alone.

    Raises FailedPrecondition (MIGRATION_EDITED).
    """
    for migration in known:
        if applied.get(migration.version, migration.sha256) != migration.sha256:
            raise FailedPrecondition(
                f"migration {migration} was edited after it had been applied to this database; restore it and add a new one",
                reason="MIGRATION_EDITED",
                metadata={"migration": str(migration)},
            )
    return tuple(m for m in known if m.version not in applied)


async def migrate(connection: Connection, known: Sequence[Migration]) -> tuple[Migration, ...]:
    """Bring the database up to date; return what was applied just now."""
    done: list[Migration] = []
    while True:
        async with connection.transaction():
            applied = await _applied_under_lock(connection)
            todo = pending(known, applied)
            if not todo:
                return tuple(done)
            await _apply(connection, todo[0])
        done.append(todo[0])


async def _applied_under_lock(connection: Connection) -> dict[int, str]:
    await connection.execute("select pg_advisory_xact_lock($1)", _LOCK)
    await connection.execute(_BOOK)
    rows: Sequence[Mapping[str, Any]] = await connection.fetch("select version, sha256 from plait.migration")
    return {row["version"]: row["sha256"] for row in rows}


async def _apply(connection: Connection, migration: Migration) -> None:
    await connection.execute(migration.sql)
    await connection.execute(
        "insert into plait.migration (version, name, sha256) values ($1, $2, $3)", migration.version, migration.name, migration.sha256
    )
