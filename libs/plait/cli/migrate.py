"""`plait migrate`."""

from __future__ import annotations

import asyncio

import typer

from plait.cli.options import DEFAULT_STATE, DsnOption, JsonOption, StateOption, registry_dsn
from plait.cli.output import write_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(migrate)


def migrate(dsn: DsnOption = None, state: StateOption = DEFAULT_STATE, as_json: JsonOption = False) -> None:
    """Bring the registry's tables in Postgres up to date.

    Safe to run again and by several processes at once. `plait up` does it by itself.

    Example:  plait migrate --dsn postgresql://plait:…@db.internal:5432/plait
    """
    applied = asyncio.run(_migrate(registry_dsn(dsn, state)))
    if as_json:
        write_json({"applied": applied})
    elif applied:
        typer.echo("\n".join(f"applied {name}" for name in applied))
    else:
        typer.echo("up to date, nothing to do")


async def _migrate(dsn: str) -> list[str]:
    from plait.registry.store import Store  # noqa: PLC0415

    async with await Store.open(dsn, max_connections=1) as store:
        return [str(migration) for migration in await store.migrate()]
