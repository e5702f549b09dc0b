"""`plait rank`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.options import DEFAULT_STATE, JsonOption, StateOption
from plait.cli.output import write_json, write_line, write_table

if TYPE_CHECKING:
    from plait.client import Ranking

_PANEL = "Where the router is"
_INT = "int:"  # before a part of a key that is a number


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(rank)


def rank(
    route: Annotated[str, typer.Option("--route", "-r", help="Name of the route.", show_default=False)],
    user: Annotated[str, typer.Option("--user", "-u", help="Id of the subject to rank for.", show_default=False)],
    items: Annotated[str, typer.Option("--items", "-i", help="Ids of the candidates, separated by commas.", show_default=False)],
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=0, help="How many to show, best first; 0 = all.")] = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Also show where the time went and which features were found.")] = False,
    int_ids: Annotated[bool, typer.Option("--int-ids", help="The ids are numbers (entity key: int64), not text.")] = False,
    parts: Annotated[
        bool, typer.Option("--parts", help="Ids with '/' in them are keys of several parts; a part int:7 is a number.")
    ] = False,
    labels: Annotated[
        list[str] | None, typer.Option("--label", "-l", help="NAME=VALUE that the route's rules may look at; may be repeated.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.001, help="Longest wait for the answer, seconds.")] = 5.0,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            envvar="PLAIT_ADDRESS",
            help="host:port; default: the mesh on --state.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar="PLAIT_API_KEY", help="Better given in PLAIT_API_KEY.", show_default=False, rich_help_panel=_PANEL
        ),
    ] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Call over TLS, trusting the system's roots.", rich_help_panel=_PANEL)] = False,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", dir_okay=False, help="Call over TLS, trusting this PEM file.", show_default=False, rich_help_panel=_PANEL),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Send the API key to another machine in plain text.", rich_help_panel=_PANEL)
    ] = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Ask a running mesh which of some items a user should see first.

    Example:  plait rank --route home --user 42 --items 7,8,9 --top-k 2

    Example:  plait rank --route offers --user ann --items shop-a/int:7,shop-b/int:7 --parts

    Example:  PLAIT_API_KEY=… plait rank --address rank.internal:443 --tls -r home -u 42 -i 7,8,9
    """
    candidates = [item.strip() for item in items.split(",") if item.strip()]
    if not candidates:
        raise typer.BadParameter("give at least one id, separated by commas", param_hint="--items / -i")
    subject: Any = user
    ids: Any = candidates
    if parts:
        (subject,), ids = _composites([user], "--user / -u"), _composites(candidates, "--items / -i")
    elif int_ids:
        (subject,), ids = _numbers([user], "--user / -u"), _numbers(candidates, "--items / -i")
    target, key = _where(address, api_key, state)
    from plait.client import SyncRankingClient, TlsConfig  # noqa: PLC0415

    with SyncRankingClient(target, api_key=key, tls=TlsConfig(root_ca=ca) if ca else tls, insecure=insecure) as client:
        ranking = client.rank(route, subject, ids, top_k=top_k, labels=_labels(labels or []), explain=explain, timeout_s=timeout_s)
    if as_json:
        write_json(_document(ranking))
    else:
        _show(ranking)


def _labels(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if not all(name and equals for name, equals, _ in pairs):
        raise typer.BadParameter("expected NAME=VALUE", param_hint="--label / -l")
    return {name: value for name, _, value in pairs}


def _numbers(texts: list[str], option: str) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise typer.BadParameter("--int-ids needs whole numbers", param_hint=option) from None


def _composites(texts: list[str], option: str) -> list[Any]:
    """Return ids with a slash as tuples of their parts, the others as they are."""
    return [tuple(_part(part, option) for part in text.split("/")) if "/" in text else text for text in texts]


def _part(text: str, option: str) -> str | int:
    if not text.startswith(_INT):
        return text
    try:
        return int(text.removeprefix(_INT))
    except ValueError:
        raise typer.BadParameter("expected a whole number after int:", param_hint=option) from None


def _where(address: str | None, api_key: str | None, state: Path) -> tuple[str, str]:
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


def _document(ranking: Ranking) -> dict[str, Any]:
    """Return the answer as JSON types; timings in microseconds, as the router measured them."""
    document = {
        "items": [{"id": item, "score": score} for item, score in ranking.items],
        "model": ranking.model,
        "model_version": ranking.version,
        "variant": ranking.variant,
        "tier": ranking.tier,
        "degraded_reasons": list(ranking.degraded_reasons),
        "request_id": ranking.request_id,
        "registry_revision": ranking.revision,
        "assignments": [dataclasses.asdict(given) for given in ranking.assignments],
    }
    if ranking.timings:
        document["timings"] = dataclasses.asdict(ranking.timings)
    if ranking.feature_report:
        document["feature_report"] = [dataclasses.asdict(view) for view in ranking.feature_report]
    return document


def _show(ranking: Ranking) -> None:
    rows = [(place, _shown(item), f"{score:.6f}") for place, (item, score) in enumerate(ranking.items, 1)]
    write_table(("rank", "item", "score"), rows)
    write_line(f"\n{ranking.model} version {ranking.version}, variant {ranking.variant}, request {ranking.request_id}", "dim")
    if ranking.degraded_reasons:
        write_line(f"degraded: {', '.join(ranking.degraded_reasons)}", "yellow")
    if ranking.timings:
        write_line("")
        stages = dataclasses.asdict(ranking.timings)
        write_table(("stage", "ms"), [(name.removesuffix("_us"), f"{taken_us / 1000:.3f}") for name, taken_us in stages.items()])
    if ranking.feature_report:
        write_line("")
        views = [dataclasses.asdict(view) for view in ranking.feature_report]
        write_table(list(views[0]), [list(view.values()) for view in views])


def _shown(item: object) -> object:
    return "/".join(f"{_INT}{part}" if isinstance(part, int) else part for part in item) if isinstance(item, tuple) else item
