"""What every command that asks a router takes: whom to ask, and for whom and what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_PANEL = "Where the router is"
INT = "int:"  # before a part of a key that is a number

RouteOption = Annotated[str, typer.Option("--route", "-r", help="Name of the route.", show_default=False)]
UserOption = Annotated[str, typer.Option("--user", "-u", help="Id of the subject to rank for.", show_default=False)]
ItemsOption = Annotated[str, typer.Option("--items", "-i", help="Ids of the candidates, separated by commas.", show_default=False)]
TopKOption = Annotated[int, typer.Option("--top-k", "-k", min=0, help="How many to show, best first; 0 = all.")]
IntIdsOption = Annotated[bool, typer.Option("--int-ids", help="The ids are numbers (entity key: int64), not text.")]
PartsOption = Annotated[bool, typer.Option("--parts", help="Ids with '/' in them are keys of several parts; a part int:7 is a number.")]
LabelsOption = Annotated[
    list[str] | None, typer.Option("--label", "-l", help="NAME=VALUE that the route's rules may look at; may be repeated.")
]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.001, help="Longest wait for the answer, seconds.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="PLAIT_ADDRESS",
        help="host:port; default: the mesh on --state.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option("--api-key", envvar="PLAIT_API_KEY", help="Better given in PLAIT_API_KEY.", show_default=False, rich_help_panel=_PANEL),
]
TlsOption = Annotated[bool, typer.Option("--tls", help="Call over TLS, trusting the system's roots.", rich_help_panel=_PANEL)]
CaOption = Annotated[
    Path | None,
    typer.Option("--ca", dir_okay=False, help="Call over TLS, trusting this PEM file.", show_default=False, rich_help_panel=_PANEL),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Send the API key to another machine in plain text.", rich_help_panel=_PANEL)
]


def ids_of(user: str, items: str, *, int_ids: bool, parts: bool) -> tuple[Any, Any]:
    """Return the subject and the candidates, typed as the options say."""
    candidates = [item.strip() for item in items.split(",") if item.strip()]
    if not candidates:
        raise typer.BadParameter("give at least one id, separated by commas", param_hint="--items / -i")
    if parts:
        return composites([user], "--user / -u")[0], composites(candidates, "--items / -i")
    if int_ids:
        return numbers([user], "--user / -u")[0], numbers(candidates, "--items / -i")
    return user, candidates


def shown(item: object) -> object:
    """Return an id as it is typed."""
    return "/".join(f"{INT}{part}" if isinstance(part, int) else part for part in item) if isinstance(item, tuple) else item


def labels_of(texts: list[str] | None) -> dict[str, str]:
    """Return labels by name."""
    pairs = [text.partition("=") for text in texts or ()]
    if not all(name and equals for name, equals, _ in pairs):
        raise typer.BadParameter("expected NAME=VALUE", param_hint="--label / -l")
    return {name: value for name, _, value in pairs}


def numbers(texts: list[str], option: str) -> list[int]:
    """Return whole-number ids; raises typer.BadParameter on another."""
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise typer.BadParameter("--int-ids needs whole numbers", param_hint=option) from None


def composites(texts: list[str], option: str) -> list[Any]:
    """Return ids with a slash as tuples of their parts, the others as they are."""
    return [tuple(_part(part, option) for part in text.split("/")) if "/" in text else text for text in texts]


def _part(text: str, option: str) -> str | int:
    if not text.startswith(INT):
        return text
    try:
        return int(text.removeprefix(INT))
    except ValueError:
        raise typer.BadParameter("expected a whole number after int:", param_hint=option) from None


def where(address: str | None, api_key: str | None, state: Path) -> tuple[str, str]:
    """Return address and key: what was given, the rest from the mesh on `state`."""
    from plait.errors import FailedPrecondition  # noqa: PLC0415
    from plait.local.endpoints import Endpoints  # noqa: PLC0415

    if address:
        return address, api_key or ""
    try:
        endpoints = Endpoints.read(state)
    except FailedPrecondition as error:
        raise FailedPrecondition(f"which router? {error.message}; or give --address and PLAIT_API_KEY", reason=error.reason) from error
    return endpoints.router, api_key or endpoints.api_key
