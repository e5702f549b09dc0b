"""`plait keys`: who may call, written and read directly in the registry. A key is shown once, when it is made."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from plait.cli.author import author
from plait.cli.options import DEFAULT_STATE, DsnOption, JsonOption, StateOption, registry_dsn
from plait.cli.output import when, write_json, write_line, write_note, write_table

if TYPE_CHECKING:
    from plait.registry.records import ApiKey

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Its id, as `plait keys list` shows it.", show_default=False)]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the audit log.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    keys = typer.Typer(no_args_is_help=True, help="API keys: make, list, rotate and revoke them.")
    for command, name in ((create, "create"), (list_, "list"), (rotate, "rotate"), (revoke, "revoke")):
        keys.command(name)(command)
    app.add_typer(keys, name="keys")


def create(
    roles: Annotated[
        list[str],
        typer.Option("--role", metavar="ROLE", help="predict, publish, operate or admin; may be repeated.", show_default=False),
    ],
    tenant: Annotated[str, typer.Option("--tenant", "-t", help="Whose rows and routes it opens.")] = "default",
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="How long it is let in, such as 90d or 12h; default: for ever.")
    ] = "",
    note: Annotated[str, typer.Option("--note", help="What it is for.", show_default=False)] = "",
    reason: ReasonOption = "",
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Make an API key and show it, this once. Every service lets it in within a second.

    Roles: predict (ask for rankings and predictions, read features), publish (write features and events), operate (caches, the inside
    of a mesh), admin (everything).

    Example:  plait keys create --tenant shop --role predict --expires 90d --note "home page"
    """
    from plait.rpc.identity.roles import scopes_of  # noqa: PLC0415

    scopes = scopes_of(roles)
    expires_at = time.time() + _seconds(expires, "--expires") if expires else 0.0

    async def made(store: Any) -> tuple[ApiKey, str]:
        found: tuple[ApiKey, str] = await store.create_key(tenant, scopes, actor=author(), expires_at=expires_at, reason=reason, note=note)
        return found

    _show_secret(*_with_store(registry_dsn(dsn, state), made), as_json=as_json)


def list_(
    tenant: Annotated[str | None, typer.Option("--tenant", "-t", help="Only this tenant's.", show_default=False)] = None,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """List the keys that were not revoked, oldest first. Not even a part of a key itself is kept anywhere.

    Example:  plait keys list --tenant shop
    """

    async def listed(store: Any) -> list[ApiKey]:
        found: list[ApiKey] = await store.list_keys(tenant)
        return found

    keys = _with_store(registry_dsn(dsn, state), listed)
    if as_json:
        write_json([_document(key) for key in keys])
    else:
        rows = [(k.id, k.tenant, _may(k), when(_moment(k.created_at)), _until(k), k.replaces, k.note) for k in keys]
        write_table(("id", "tenant", "may", "made", "expires", "replaces", "note"), rows)


def rotate(
    key_id: IdArgument,
    overlap: Annotated[str, typer.Option("--overlap", metavar="TIME", help="How long the old key is still let in.")] = "24h",
    reason: ReasonOption = "",
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Make a key that replaces another, and show it, this once. The old one is let in for the overlap, then refused.

    The new key has the old one's tenant, roles and note, and lives as long as the old one was made to live.

    Example:  plait keys rotate key-0123456789ab --overlap 7d
    """
    overlap_s = _seconds(overlap, "--overlap")

    async def rotated(store: Any) -> tuple[ApiKey, str]:
        found: tuple[ApiKey, str] = await store.rotate_key(key_id, overlap_s=overlap_s, actor=author(), reason=reason)
        return found

    _show_secret(*_with_store(registry_dsn(dsn, state), rotated), as_json=as_json)


def revoke(
    key_id: IdArgument,
    reason: ReasonOption = "",
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Refuse a key from now on. Every service refuses it within a second, and ends the streams it holds open.

    Example:  plait keys revoke key-0123456789ab --reason "leaked in a log"
    """

    async def revoked(store: Any) -> None:
        await store.revoke_key(key_id, actor=author(), reason=reason)

    _with_store(registry_dsn(dsn, state), revoked)
    if as_json:
        write_json({"id": key_id, "revoked": True})
    else:
        write_line(f"{key_id} revoked")


def _with_store(dsn: str, work: Any) -> Any:
    async def run() -> Any:
        from plait.registry.store import Store  # noqa: PLC0415

        async with await Store.open(dsn, max_connections=1) as store:
            return await work(store)

    return asyncio.run(run())


def _show_secret(key: ApiKey, secret: str, *, as_json: bool) -> None:
    """Only the key itself goes to stdout, so that `KEY=$(plait keys create …)` works."""
    if as_json:
        write_json(_document(key) | {"key": secret})
        return
    write_note(f"{key.id}, tenant {key.tenant}, may {_may(key)}, expires {_until(key) or 'never'}; keep it now, it is not shown again:")
    typer.echo(secret)


def _document(key: ApiKey) -> dict[str, Any]:
    from plait.rpc.identity.roles import held_by  # noqa: PLC0415

    return {
        "id": key.id,
        "tenant": key.tenant,
        "roles": [*held_by(key.scopes)],
        "scopes": [*key.scopes],
        "created_at": _stamp(key.created_at),
        "expires_at": _stamp(key.expires_at),
        "expired": bool(key.expires_at and key.expires_at <= time.time()),
        "replaces": key.replaces,
        "note": key.note,
    }


def _may(key: ApiKey) -> str:
    """Return the key's roles, the widest alone; its scopes where it has no whole role."""
    from plait.rpc.identity.roles import held_by  # noqa: PLC0415

    roles = held_by(key.scopes)
    return "admin" if "admin" in roles else ", ".join(roles or key.scopes)


def _until(key: ApiKey) -> str:
    past = key.expires_at and key.expires_at <= time.time()
    return when(_moment(key.expires_at)) + (" (over)" if past else "")


def _moment(seconds: float) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def _stamp(seconds: float) -> str | None:
    moment = _moment(seconds)
    return moment.isoformat() if moment else None


def _seconds(text: str, option: str) -> float:
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if found is None:
        raise typer.BadParameter("expected a number and a unit: 90d, 12h, 30m or 45s", param_hint=option)
    return float(int(found[1]) * _UNITS_S[found[2]])
