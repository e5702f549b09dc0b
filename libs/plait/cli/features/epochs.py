"""`plait features epochs`, `flip`, `rollback`, `retire`, `abandon`: which generation of a view's rows is served."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from plait.cli import progress
from plait.cli.author import author
from plait.cli.features.calling import (
    AddressOption,
    ApiKeyOption,
    CaOption,
    InsecureOption,
    ReasonOption,
    Target,
    TlsOption,
    VersionOption,
    ViewArgument,
    run,
    stub,
    target,
    tenant_of,
)
from plait.cli.options import DEFAULT_STATE, DsnOption, JsonOption, StateOption, registry_dsn
from plait.cli.output import write_json, write_line, write_note

if TYPE_CHECKING:
    from plait.registry.records import Epochs
    from plait.registry.store import Store

Move = Literal["rollback", "retire", "abandon"]
TenantOption = Annotated[
    str | None, typer.Option("--tenant", help="Whose rows; default: those of PLAIT_API_KEY, else of 'default'.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("epochs")(show)
    for command in (flip, rollback, carry_over, retire, abandon, purge):
        app.command()(command)


def show(
    view: ViewArgument,
    version: VersionOption = 0,
    tenant: TenantOption = None,
    api_key: ApiKeyOption = None,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Show which epoch of a view is read, which is being built and which is kept for a rollback.

    Example:  plait features epochs item-stats
    """
    found = run(_with_store(registry_dsn(dsn, state), tenant, api_key, lambda store, of: store.epochs(of, view, version=version)))
    _tell(view, found, as_json)


def flip(
    view: ViewArgument,
    version: VersionOption = 0,
    incomplete: Annotated[bool, typer.Option("--incomplete", help="Serve it although its materialize did not come to its end.")] = False,
    reason: ReasonOption = "",
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Serve the epoch that a materialize with --no-flip has built. The one served until now is kept for a rollback.

    What was streamed before it was begun is carried over first, once every replica of the service writes what is streamed to it, too.

    Example:  plait features flip item-stats --reason "checked"
    """
    where = target(address, api_key, tls, ca, insecure, state)
    _tell(view, run(_flip(view, version, incomplete, reason, where, registry_dsn(dsn, state))), as_json)


def carry_over(
    view: ViewArgument,
    version: VersionOption = 0,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Carry over again what was streamed into the kept epoch, where it is newer: for a writer that was cut off during a flip.

    Example:  plait features carry-over item-stats
    """
    where = target(address, api_key, tls, ca, insecure, state)
    copied = run(_carry_over(view, version, where, registry_dsn(dsn, state)))
    if as_json:
        write_json({"view": view, "carried_over": copied})
    else:
        write_line(f"{copied:,} streamed rows were carried over to the epoch of {view} that is served")


def rollback(
    view: ViewArgument,
    version: VersionOption = 0,
    reason: ReasonOption = "",
    tenant: TenantOption = None,
    api_key: ApiKeyOption = None,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Serve the epoch from before the last flip again; it holds everything streamed since. Rolling back twice undoes it.

    Example:  plait features rollback item-stats --reason "wrong prices"
    """
    _move("rollback", view, version, reason, tenant, api_key, registry_dsn(dsn, state), as_json)


def retire(
    view: ViewArgument,
    version: VersionOption = 0,
    reason: ReasonOption = "",
    tenant: TenantOption = None,
    api_key: ApiKeyOption = None,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Keep the epoch from before the last flip no longer: writes get cheaper, and there is no rollback any more.

    Its rows stay until 'plait features purge' removes them.

    Example:  plait features retire item-stats
    """
    _move("retire", view, version, reason, tenant, api_key, registry_dsn(dsn, state), as_json)


def abandon(
    view: ViewArgument,
    version: VersionOption = 0,
    reason: ReasonOption = "",
    tenant: TenantOption = None,
    api_key: ApiKeyOption = None,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Give up the epoch that is being built.

    Example:  plait features abandon item-stats
    """
    _move("abandon", view, version, reason, tenant, api_key, registry_dsn(dsn, state), as_json)


def purge(
    view: ViewArgument,
    epoch: Annotated[int, typer.Option("--epoch", min=0, help="The epoch, which must not be in use any more.", show_default=False)],
    version: VersionOption = 0,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Remove the rows of an epoch that was retired or abandoned. Until then they take memory, or as long as the view keeps rows.

    Example:  plait features purge item-stats --epoch 3
    """
    removed = run(_purge(view, version, epoch, target(address, api_key, tls, ca, insecure, state)))
    if as_json:
        write_json({"view": view, "epoch": epoch, "removed": removed})
    else:
        write_line(f"{removed:,} rows of epoch {epoch} of {view} are removed")


async def _carry_over(view: str, version: int, where: Target, dsn: str) -> int:
    from plait.cli.features.flipping import Flip  # noqa: PLC0415
    from plait.registry.store import Store  # noqa: PLC0415

    async with await Store.open(dsn, max_connections=1) as store, stub(where) as service:
        return await Flip(store, service, where.metadata, await tenant_of(store, where.api_key), view, version).carry_over_again()


async def _purge(view: str, version: int, epoch: int, where: Target) -> int:
    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415
    from plait.cli.features.uploading import follow  # noqa: PLC0415

    request = pb.PurgeEpochRequest(feature_view=view, view_version=version, epoch=epoch)
    removed = 0
    with progress.rows(f"removing epoch {epoch}", 0) as show:

        def told(answer: Any) -> None:
            nonlocal removed
            removed = answer.removed
            show(answer.scanned, answer.total)

        async with stub(where) as service:
            await follow(lambda asked: service.PurgeEpoch(asked, metadata=where.metadata), request, told, passing=frozenset())
    return removed


async def _flip(view: str, version: int, incomplete: bool, reason: str, where: Target, dsn: str) -> Epochs:
    from plait.cli.features.flipping import Flip  # noqa: PLC0415
    from plait.registry.store import Store  # noqa: PLC0415

    async with await Store.open(dsn, max_connections=1) as store, stub(where) as service:
        flip = Flip(store, service, where.metadata, await tenant_of(store, where.api_key), view, version)
        await flip.flip(await flip.complete_epoch(incomplete=incomplete), reason=reason)
        return await flip.epochs()


def _move(move: Move, view: str, version: int, reason: str, tenant: str | None, api_key: str | None, dsn: str, as_json: bool) -> None:
    async def moved(store: Store, of: str) -> Epochs:
        method: Callable[..., Awaitable[Epochs]] = getattr(store, f"{move}_epoch")
        return await method(of, view, version=version, actor=author(), reason=reason)

    _tell(view, run(_with_store(dsn, tenant, api_key, moved)), as_json)


async def _with_store(dsn: str, tenant: str | None, api_key: str | None, work: Callable[[Store, str], Awaitable[Epochs]]) -> Epochs:
    from plait.registry.store import Store  # noqa: PLC0415

    async with await Store.open(dsn, max_connections=1) as store:
        return await work(store, tenant or await tenant_of(store, api_key or ""))


def _tell(view: str, epochs: Epochs, as_json: bool) -> None:
    if as_json:
        document: dict[str, Any] = {"view": view, **dataclasses.asdict(epochs)}
        write_json(document)
        return
    write_line(f"{view}: epoch {epochs.serving} is served")
    if epochs.building is not None:
        state = f"is complete: 'plait features flip {view}' serves it" if epochs.built else "is being built"
        write_line(f"epoch {epochs.building} {state}; 'plait features abandon {view}' gives it up")
    if epochs.previous is not None:
        write_line(f"epoch {epochs.previous} is kept for a rollback")
        write_note(f"every write goes to it, too: run 'plait features retire {view}' once a rollback is out of the question")
