"""`plait outcome`: tell a running mesh what became of an answer."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from plait.cli.options import DEFAULT_STATE, JsonOption, StateOption
from plait.cli.output import write_json, write_line
from plait.cli.router_options import AddressOption, ApiKeyOption, CaOption, InsecureOption, IntIdsOption, TlsOption, where


def register(app: typer.Typer) -> None:
    """Add the commands."""
    outcome = typer.Typer(no_args_is_help=True, help="What became of answers, for experiments.")
    outcome.command()(record)
    app.add_typer(outcome, name="outcome")


def record(
    request_id: Annotated[str, typer.Option("--request", "-r", metavar="ID", help="The answer's request_id.", show_default=False)],
    kind: Annotated[
        str, typer.Option("--type", "-t", help="view, like, add_to_cart, make_offer, start_purchase, complete_purchase or rate.")
    ] = "view",
    item: Annotated[str | None, typer.Option("--item", "-i", help="Id of the item; none = the whole answer.", show_default=False)] = None,
    entity: Annotated[str, typer.Option("--entity", help="Entity type of the item.")] = "item",
    int_ids: IntIdsOption = False,
    value: Annotated[float, typer.Option("--value", help="A price, a rating, a duration.")] = 0.0,
    outcome_id: Annotated[str, typer.Option("--id", help="Tells apart what is alike in all of the above.", show_default=False)] = "",
    route: Annotated[str, typer.Option("--route", help="The route that answered.", show_default=False)] = "",
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Tell what became of one item of an answer. It counts once, however often it is told.

    Example:  plait outcome record --request 5f0c… --item 7 --type like
    """
    from plait.client import Outcome, SyncRankingClient, TlsConfig  # noqa: PLC0415
    from plait.errors import InvalidArgument  # noqa: PLC0415

    target, key = where(address, api_key, state)
    told = Outcome(
        request_id=request_id,
        type=kind,
        item=_id(item, int_ids=int_ids),
        entity_type=entity,
        value=value,
        outcome_id=outcome_id,
        route=route,
    )
    with SyncRankingClient(target, api_key=key, tls=TlsConfig(root_ca=ca) if ca else tls, insecure=insecure) as client:
        recorded = client.record_outcomes([told])
    for wrong in recorded.errors:
        raise InvalidArgument(wrong.message, reason=wrong.reason)
    if as_json:
        write_json(dataclasses.asdict(recorded))
    else:
        write_line("counted" if recorded.accepted else "known before, counted once")


def _id(item: str | None, *, int_ids: bool) -> str | int | None:
    if item is None or not int_ids:
        return item
    try:
        return int(item)
    except ValueError:
        raise typer.BadParameter("--int-ids needs a whole number", param_hint="--item / -i") from None
