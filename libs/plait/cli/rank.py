"""`plait rank`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.options import DEFAULT_STATE, JsonOption, StateOption
from plait.cli.output import write_json, write_line, write_table
from plait.cli.router_options import (
    AddressOption,
    ApiKeyOption,
    CaOption,
    InsecureOption,
    IntIdsOption,
    ItemsOption,
    LabelsOption,
    PartsOption,
    RouteOption,
    TimeoutOption,
    TlsOption,
    TopKOption,
    UserOption,
    ids_of,
    labels_of,
    shown,
    where,
)

if TYPE_CHECKING:
    from plait.client import Ranking


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(rank)


def rank(
    route: RouteOption,
    user: UserOption,
    items: ItemsOption,
    top_k: TopKOption = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Also show where the time went and which features were found.")] = False,
    int_ids: IntIdsOption = False,
    parts: PartsOption = False,
    labels: LabelsOption = None,
    timeout_s: TimeoutOption = 5.0,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Ask a running mesh which of some items a user should see first.

    Example:  plait rank --route home --user 42 --items 7,8,9 --top-k 2

    Example:  plait rank --route offers --user ann --items shop-a/int:7,shop-b/int:7 --parts

    Example:  PLAIT_API_KEY=… plait rank --address rank.internal:443 --tls -r home -u 42 -i 7,8,9
    """
    subject, ids = ids_of(user, items, int_ids=int_ids, parts=parts)
    target, key = where(address, api_key, state)
    from plait.client import SyncRankingClient, TlsConfig  # noqa: PLC0415

    with SyncRankingClient(target, api_key=key, tls=TlsConfig(root_ca=ca) if ca else tls, insecure=insecure) as client:
        ranking = client.rank(route, subject, ids, top_k=top_k, labels=labels_of(labels), explain=explain, timeout_s=timeout_s)
    if as_json:
        write_json(document(ranking))
    else:
        show(ranking)


def document(ranking: Ranking) -> dict[str, Any]:
    """Return an answer as JSON types; timings in microseconds, as the router measured them."""
    found = {
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
    if ranking.cache:
        found |= {"cache": ranking.cache, "age_s": ranking.age_s}
    if ranking.timings:
        found["timings"] = dataclasses.asdict(ranking.timings)
    if ranking.feature_report:
        found["feature_report"] = [dataclasses.asdict(view) for view in ranking.feature_report]
    return found


def show(ranking: Ranking) -> None:
    """Write an answer as tables."""
    rows = [(place, shown(item), f"{score:.6f}") for place, (item, score) in enumerate(ranking.items, 1)]
    write_table(("rank", "item", "score"), rows)
    write_line(f"\n{ranking.model} version {ranking.version}, variant {ranking.variant}, request {ranking.request_id}", "dim")
    if ranking.cache not in ("", "miss"):
        write_line(f"from the cache ({ranking.cache}), {ranking.age_s:.3g} s old", "dim")
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
