"""`plait explain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from plait.cli.options import DEFAULT_STATE, JsonOption, StateOption
from plait.cli.output import write_json, write_line
from plait.cli.rank import document
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
    from plait.client import Explanation, Ranking, TierReport

_NOT_IN = {
    "rule": "a rule decided",
    "layer": "its bucket is not one of the experiment's, or an experiment before it decided",
    "condition": "the request does not meet its condition",
    "not_ready": "the variant it was given cannot serve",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(explain)


def explain(
    route: RouteOption,
    user: UserOption,
    items: ItemsOption,
    top_k: TopKOption = 0,
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
    """Rank, and tell how the answer came to be: rule, experiment, tier, ages of the features, calls. It is no exposure.

    Example:  plait explain --route home --user 42 --items 7,8,9 --label country=de
    """
    subject, ids = ids_of(user, items, int_ids=int_ids, parts=parts)
    target, key = where(address, api_key, state)
    from plait.client import SyncRankingClient, TlsConfig  # noqa: PLC0415

    with SyncRankingClient(target, api_key=key, tls=TlsConfig(root_ca=ca) if ca else tls, insecure=insecure) as client:
        told = client.explain(route, subject, ids, top_k=top_k, labels=labels_of(labels), timeout_s=timeout_s)
    if as_json:
        write_json(_document(told))
    else:
        write_line(told.summary)
        for line in _tree(told):
            write_line(line)


def _document(told: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON types; times in microseconds."""
    parts = {
        name: [dataclasses.asdict(report) for report in getattr(told, name)] for name in ("rules", "ages", "tiers", "stages", "attempts")
    }
    return {"summary": told.summary, "answer": document(told.ranking), "not_in": dict(told.not_in), "cache_would_be": told.cache, **parts}


def _tree(told: Explanation) -> Iterator[str]:
    """Yield what was told, a heading and what is under it, and no heading with nothing under it."""
    sections = (
        ("answer", _answer(told.ranking)),
        ("rules", [f"{rule.rule}: " + ("matched" if rule.matched else f"{rule.failed_condition} does not hold") for rule in told.rules]),
        ("experiments", [*_assigned(told.ranking), *(f"not in {name}: {_NOT_IN.get(why, why)}" for name, why in told.not_in.items())]),
        ("cache", [] if told.cache == "unspecified" else [f"would have been a {told.cache}"]),
        ("features", [f"{age.feature_view} version {age.view_version}: {_aged(age.oldest_us, age.median_us)}" for age in told.ages]),
        ("tiers", [_tier(tier) for tier in told.tiers]),
        ("stages", [f"{s.stage}: {s.candidates_in} → {s.candidates_out} in {_ms(s.took_us)}{_by(s.by_rule)}" for s in told.stages]),
        ("calls", [f"{a.what}{a.endpoint and f' at {a.endpoint}'} ({a.kind}): {a.outcome} in {_ms(a.took_us)}" for a in told.attempts]),
    )
    for heading, lines in sections:
        yield from _section(heading, lines)


def _section(heading: str, lines: Iterable[str]) -> Iterator[str]:
    found = list(lines)
    if found:
        yield heading
        yield from (f"├─ {line}" for line in found[:-1])
        yield f"└─ {found[-1]}"


def _answer(ranking: Ranking) -> list[str]:
    who = f"{ranking.model} version {ranking.version}" if ranking.model else "no model"
    lines = [f"variant {ranking.variant}, {who}, tier {ranking.tier}, request {ranking.request_id}"]
    if ranking.degraded_reasons:
        lines.append(f"degraded: {', '.join(ranking.degraded_reasons)}")
    return [*lines, *(f"{place}. {shown(item)}  {score:.6f}" for place, (item, score) in enumerate(ranking.items, 1))]


def _assigned(ranking: Ranking) -> list[str]:
    return [
        f"in {given.experiment} (layer {given.layer}, bucket {given.bucket}): {given.variant}"
        if given.experiment
        else f"by weight: {given.variant}"
        for given in ranking.assignments
    ]


def _aged(oldest_us: int, median_us: int) -> str:
    return "no row" if oldest_us < 0 else f"median {_long(median_us)} old, oldest {_long(oldest_us)}"


def _long(age_us: int) -> str:
    """Return an age in the largest unit of which there is at least one."""
    for unit, size_us in (("days", 86_400e6), ("hours", 3600e6), ("minutes", 60e6)):
        if age_us >= size_us:
            return f"{age_us / size_us:.1f} {unit}"
    return f"{age_us / 1e6:.3g} s"


def _tier(tier: TierReport) -> str:
    times = "" if tier.reason == "not_reached" else f" ({_ms(tier.budget_us)} left, {_ms(tier.expected_us)} expected)"
    return f"{tier.tier}: {tier.reason.replace('_', ' ')}{times}"


def _by(by_rule: Any) -> str:
    return f" ({', '.join(f'{name} {count}' for name, count in by_rule.items())})" if by_rule else ""


def _ms(taken_us: int) -> str:
    return f"{taken_us / 1000:.3g} ms"
