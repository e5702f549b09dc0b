"""`plait cache`: what every router should forget, because somebody knows that it is no longer true."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any, Final

import typer

from plait.cli.options import DEFAULT_STATE, StateOption
from plait.cli.output import write_note
from plait.cli.router_options import (
    AddressOption,
    ApiKeyOption,
    CaOption,
    InsecureOption,
    IntIdsOption,
    PartsOption,
    TimeoutOption,
    TlsOption,
    composites,
    numbers,
    where,
)

_ITEM: Final = "--item / -i"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    cache = typer.Typer(no_args_is_help=True, help="Answers that routers keep.")
    cache.command()(invalidate)
    app.add_typer(cache, name="cache")


def invalidate(
    items: Annotated[
        list[str] | None,
        typer.Option("--item", "-i", metavar="TYPE:ID", help="An entity that changed; may be repeated.", show_default=False),
    ] = None,
    route: Annotated[str, typer.Option("--route", "-r", help="All answers of this route.", show_default=False)] = "",
    model: Annotated[str, typer.Option("--model", "-m", help="All answers of this model.", show_default=False)] = "",
    int_ids: IntIdsOption = False,
    parts: PartsOption = False,
    timeout_s: TimeoutOption = 5.0,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
) -> None:
    """Make every router forget answers, because an item is sold or a route, a model or a user's data changed.

    Needs a key that may operate. Only answers of the key's tenant are forgotten.

    Example:  plait cache invalidate --item item:7 --item item:9

    Example:  plait cache invalidate --route home
    """
    by_type = _by_type(items or [], int_ids=int_ids, parts=parts)
    if not (by_type or route or model):
        raise typer.BadParameter("say what to forget: --item TYPE:ID, --route or --model")
    target, key = where(address, api_key, state)
    from plait.client import SyncRankingClient, TlsConfig  # noqa: PLC0415

    with SyncRankingClient(target, api_key=key, tls=TlsConfig(root_ca=ca) if ca else tls, insecure=insecure) as client:
        if route or model:
            client.invalidate_cache(route=route, model=model, timeout_s=timeout_s)
        for entity_type, ids in by_type.items():
            client.invalidate_cache(entity_type=entity_type, items=ids, timeout_s=timeout_s)
    write_note("forgotten: what is asked from now on is answered anew")


def _by_type(items: list[str], *, int_ids: bool, parts: bool) -> dict[str, list[Any]]:
    """Return the ids of each entity type."""
    found: dict[str, list[str]] = defaultdict(list)
    for item in items:
        entity_type, colon, id_ = item.partition(":")
        if not (entity_type and colon and id_):
            raise typer.BadParameter("expected TYPE:ID, for example item:7", param_hint=_ITEM)
        found[entity_type].append(id_)
    if parts:
        return {entity_type: composites(ids, _ITEM) for entity_type, ids in found.items()}
    if int_ids:
        return {entity_type: list(numbers(ids, _ITEM)) for entity_type, ids in found.items()}
    return dict(found)
