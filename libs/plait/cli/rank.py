"""`plait rank`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.options import DEFAULT_STATE, JsonOption, StateOption
from plait.cli.output import write_json, write_line, write_table

if TYPE_CHECKING:
    from plait.api.router.v1 import router_service_pb2 as pb

_PANEL = "Where the router is"


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
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Ask a running mesh which of some items a user should see first.

    Example:  plait rank --route home --user 42 --items 7,8,9 --top-k 2

    Example:  PLAIT_API_KEY=… plait rank --address rank.internal:443 --tls -r home -u 42 -i 7,8,9
    """
    candidates = [item.strip() for item in items.split(",") if item.strip()]
    if not candidates:
        raise typer.BadParameter("give at least one id, separated by commas", param_hint="--items / -i")
    subject: Any = user
    ids: Any = candidates
    if int_ids:
        (subject,), ids = _numbers([user], "--user / -u"), _numbers(candidates, "--items / -i")
    target, key = _where(address, api_key, state)
    answer = _ask(target, key, tls, timeout_s, route=route, subject=subject, candidates=ids, top_k=top_k, explain=explain)
    if as_json:
        write_json(_document(answer))
    else:
        _show(answer, explain=explain)


def _numbers(texts: list[str], option: str) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise typer.BadParameter("--int-ids needs whole numbers", param_hint=option) from None


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


def _ask(target: str, key: str, tls: bool, timeout_s: float, **question: Any) -> pb.RankResponse:
    from plait.client import RankingClient  # noqa: PLC0415

    with RankingClient(target, api_key=key, tls=tls) as client:
        return client.rank(**question, timeout_s=timeout_s)


def _ids(answer: pb.RankResponse) -> list[str] | list[int]:
    return list(answer.item_ids.string_ids) or list(answer.item_ids.int64_ids)


def _document(answer: pb.RankResponse) -> dict[str, Any]:
    """Return the answer as JSON types; timings in microseconds, as the router measured them."""
    document = {
        "items": [{"id": item, "score": score} for item, score in zip(_ids(answer), answer.scores, strict=True)],
        "model": answer.model,
        "model_version": answer.model_version,
        "variant": answer.variant,
        "tier": answer.tier,
        "degraded_reasons": list(answer.degraded_reasons),
        "request_id": answer.request_id,
        "registry_revision": answer.registry_revision,
    }
    if answer.HasField("timings"):
        document["timings"] = {field.name: value for field, value in answer.timings.ListFields()}
    if answer.feature_report:
        document["feature_report"] = [{field.name: value for field, value in view.ListFields()} for view in answer.feature_report]
    return document


def _show(answer: pb.RankResponse, *, explain: bool) -> None:
    rows = zip(_ids(answer), answer.scores, strict=True)
    write_table(("rank", "item", "score"), [(place, item, f"{score:.6f}") for place, (item, score) in enumerate(rows, 1)])
    write_line(f"\n{answer.model} version {answer.model_version}, variant {answer.variant}, request {answer.request_id}", "dim")
    if answer.degraded_reasons:
        write_line(f"degraded: {', '.join(answer.degraded_reasons)}", "yellow")
    if not explain:
        return
    if answer.HasField("timings"):
        write_line("")
        stages = answer.timings.ListFields()
        write_table(("stage", "ms"), [(field.name.removesuffix("_us"), f"{value / 1000:.3f}") for field, value in stages])
    if answer.feature_report:
        write_line("")
        columns = [field.name for field in answer.feature_report[0].DESCRIPTOR.fields]
        write_table(columns, [[getattr(view, name) for name in columns] for view in answer.feature_report])
