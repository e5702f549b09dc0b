"""`plait apply`, `get`, `describe` and `rollback`: the registry, written and read directly in Postgres."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli import kinds, render
from plait.cli.author import author
from plait.cli.options import DEFAULT_STATE, AllowHttpOption, DsnOption, JsonOption, StateOption, registry_dsn
from plait.cli.output import write_json

if TYPE_CHECKING:
    from plait.registry.records import Kind
    from plait.registry.resources import Change, Resource

KindArgument = Annotated[str, typer.Argument(help=f"One of: {', '.join(kinds.NAMES)}.", autocompletion=kinds.complete, show_default=False)]
_HISTORY = 20


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(apply)
    app.command()(get)
    app.command()(describe)
    app.command()(rollback)


def apply(
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "--file", "-f", metavar="PATH", help="A file, a folder of *.yaml, or - for stdin; may be repeated.", show_default=False
        ),
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="PATH", help="More of the same.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show what would change, but change nothing.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit log.", show_default=False)] = "",
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    allow_http: AllowHttpOption = False,
    as_json: JsonOption = False,
) -> None:
    """Create or change models, feature views, feature sets, routes and tenants: all of them or none.

    Everything is checked first, and every problem shown at once with its file and line.

    Model artifacts (folders, s3://bucket/folder, gs://bucket/folder) are read and pinned by digest.

    Example:  plait apply -f manifests/ --reason "new ranker"

    Example:  plait apply -f route.yaml --dry-run
    """
    paths = [*(files or ()), *(more or ())]
    if not paths:
        raise typer.BadParameter("say what to apply: plait apply -f PATH", param_hint="--file / -f")
    changes = asyncio.run(_apply(paths, registry_dsn(dsn, state), reason, dry_run, allow_http))
    if as_json:
        write_json({"dry_run": dry_run, "changes": [render.change(c) for c in changes]})
    else:
        render.show_changes(changes, dry_run=dry_run)


def get(
    kind: KindArgument,
    name: Annotated[str | None, typer.Argument(help="Show this one, as a manifest that can be applied again.", show_default=False)] = None,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """List the resources of a kind, or show one as a manifest.

    Example:  plait get models

    Example:  plait get route home > route.yaml
    """
    wanted = kinds.parse(kind)
    found = asyncio.run(_read(registry_dsn(dsn, state), wanted, name))
    if as_json:
        documents = [render.resource(r) for r in found]
        write_json(documents[0] if name else documents)
    elif name:
        render.show_manifest(found[0])
    else:
        render.show_list(wanted, found)


def describe(
    kind: KindArgument,
    name: Annotated[str, typer.Argument(help="Its name.")],
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Show everything known about one resource: spec, generation, versions, aliases, and who changed what when.

    Example:  plait describe model marketplace-ranker
    """
    resource, history = asyncio.run(_describe(registry_dsn(dsn, state), kinds.parse(kind), name))
    if as_json:
        write_json(render.resource(resource) | {"history": [render.change(c) for c in history]})
    else:
        render.show_description(resource, history)


def rollback(
    kind: KindArgument,
    name: Annotated[str, typer.Argument(help="Its name.")],
    to: Annotated[int, typer.Option("--to", min=0, help="The generation to go back to; 0 = the one before.")] = 0,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit log.", show_default=False)] = "",
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Apply an earlier generation of one resource again, as a new one; `plait describe` lists them. It also brings back what was deleted.

    Example:  plait rollback route home-feed --reason "canary was slower"
    """
    change = asyncio.run(_rollback(registry_dsn(dsn, state), kinds.parse(kind), name, to, reason))
    if as_json:
        write_json(render.change(change))
    else:
        render.show_changes([change], dry_run=False)


async def _apply(paths: list[Path], dsn: str, reason: str, dry_run: bool, allow_http: bool) -> list[Change]:
    from plait.registry import manifests  # noqa: PLC0415
    from plait.registry.sources import StoreOptions  # noqa: PLC0415
    from plait.registry.store import Store  # noqa: PLC0415

    wanted = manifests.pin_artifacts(manifests.load(paths), options=StoreOptions(allow_http=allow_http))
    async with await Store.open(dsn, max_connections=1) as store:
        return await store.apply(wanted, actor=author(), reason=reason, dry_run=dry_run)


async def _read(dsn: str, kind: Kind, name: str | None) -> list[Resource]:
    from plait.registry.store import Store  # noqa: PLC0415

    async with await Store.open(dsn, max_connections=1) as store:
        return [await store.get(kind, name)] if name else await store.list(kind)


async def _describe(dsn: str, kind: Kind, name: str) -> tuple[Resource, list[Any]]:
    from plait.registry.store import Store  # noqa: PLC0415

    async with await Store.open(dsn, max_connections=1) as store:
        return await store.get(kind, name), await store.history(kind, name, limit=_HISTORY)


async def _rollback(dsn: str, kind: Kind, name: str, generation: int, reason: str) -> Change:
    from plait.registry.store import Store  # noqa: PLC0415

    async with await Store.open(dsn, max_connections=1) as store:
        return await store.rollback(kind, name, generation=generation, actor=author(), reason=reason)
