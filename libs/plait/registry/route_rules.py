"""What a route and an experiment must satisfy on their own: names, counts, ranges, and that nothing in them would be ignored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from plait.registry import findings
from plait.registry.findings import Finding, Steps
from plait.registry.policies import Comparison, Condition, Range, Stages, Tier
from plait.registry.records import Experiment, Route

MAX_VARIANTS: Final = 100
MAX_CANDIDATES: Final = 10_000
MAX_TIMEOUT_S: Final = 60.0
MAX_RULES: Final = 100
MAX_VALUES: Final = 1000  # that one condition lists for one header or label
BUCKETS: Final = 10_000
FIELDS: Final = ("candidates", "top_k")

_UNIT: Final = re.compile(r"(subject|tenant|request|(header|label):[A-Za-z0-9_.-]{1,63})\Z")
_HEADER: Final = re.compile(r"[a-z0-9_.-]{1,63}\Z")
_LABEL: Final = re.compile(r"[A-Za-z0-9_.-]{1,63}\Z")
_FEATURE: Final = re.compile(r"[^:]+:[^:]+\Z")
_CREDENTIALS: Final = frozenset({"authorization", "x-api-key", "x-plait-service-token", "x-forwarded-client-cert", "cookie"})
_TIERS: Final = ("light", "cached", "popularity")  # from the best to the cheapest


def check_route(route: Route) -> Iterator[Finding]:
    """Yield what is wrong with a route."""
    yield from _variants(route)
    yield from findings.name(("subject",), route.subject)
    yield from findings.name(("candidate",), route.candidate)
    if route.subject == route.candidate:
        yield ("candidate",), f"must differ from subject, which is {route.subject!r} too"
    yield from findings.in_range(("timeout_s",), route.timeout_s, 0, MAX_TIMEOUT_S, open_low=True)
    yield from findings.in_range(("max_candidates",), route.max_candidates, 1, MAX_CANDIDATES)
    yield from findings.in_range(("max_defaulted_share",), route.max_defaulted_share, 0, 1)
    yield from findings.unique(("tenants",), route.tenants, leaf=())
    for index, tenant in enumerate(route.tenants):
        yield from findings.name(("tenants", index), tenant)
    yield from unit(("sticky",), route.sticky)
    yield from _rules(route)
    yield from _ladder(route)
    yield from _shadow(route)
    yield from _policies(route)
    if route.stages is not None:
        yield from _stages(("stages",), route.stages)


def check_experiment(experiment: Experiment) -> Iterator[Finding]:
    """Yield what is wrong with an experiment."""
    yield from findings.name(("route",), experiment.route)
    yield from findings.name(("layer",), experiment.layer)
    yield from findings.text(("salt",), experiment.salt)
    yield from unit(("unit",), experiment.unit)
    yield from findings.count(("arms",), experiment.arms, MAX_VARIANTS, "arm")
    yield from findings.unique(("arms",), (arm.variant for arm in experiment.arms), ("variant",))
    for index, arm in enumerate(experiment.arms):
        yield from findings.name(("arms", index, "variant"), arm.variant)
        yield from findings.in_range(("arms", index, "weight"), arm.weight, 0, 1e9, open_low=True)
    buckets = experiment.buckets
    yield from findings.in_range(("buckets", "first"), buckets.first, 0, BUCKETS - 1)
    yield from findings.in_range(("buckets", "count"), buckets.count, 1, BUCKETS)
    if buckets.first + buckets.count > BUCKETS:
        yield ("buckets", "count"), f"reaches beyond the last bucket: first + count may be {BUCKETS} at most"
    yield from condition(("when",), experiment.when)


def unit(at: Steps, given: str) -> Iterator[Finding]:
    """Yield what keeps a text from saying who is assigned."""
    if not _UNIT.match(given):
        yield at, f"{given[:80]!r} names nobody to assign: write subject, tenant, request, header:NAME or label:NAME"
    elif given.startswith("header:") and (
        given != given.lower() or given.removeprefix("header:") in _CREDENTIALS or given.endswith("-bin")
    ):
        yield at, f"{given[:80]!r} can assign nobody: a header is written in lower case, and is neither a credential nor bytes"


def condition(at: Steps, given: Condition) -> Iterator[Finding]:
    """Yield what is wrong with a condition."""
    for index, tenant in enumerate(given.tenants):
        yield from findings.name((*at, "tenants", index), tenant)
    for part, pattern, what in (("headers", _HEADER, "a header, in lower case"), ("labels", _LABEL, "a label")):
        for name, values in getattr(given, part).items():
            if not pattern.match(name):
                yield (*at, part, name), f"is not the name of {what}: use up to 63 letters, digits, '.', '_' and '-'"
            elif part == "headers" and (name in _CREDENTIALS or name.endswith("-bin")):
                yield (*at, part, name), "cannot be looked at: it holds a credential, or bytes"
            yield from findings.count((*at, part, name), values, MAX_VALUES, "value")
            for value in values:
                yield from findings.text((*at, part, name), value)
    for name, bounds in given.fields.items():
        if name not in FIELDS:
            yield (*at, "fields", name), f"is no field of a request to look at; there are {', '.join(FIELDS)}"
        yield from _range((*at, "fields", name), bounds)
    for name, bounds in given.request_features.items():
        yield from findings.name((*at, "request_features", name), name)
        yield from _range((*at, "request_features", name), bounds)


def _variants(route: Route) -> Iterator[Finding]:
    yield from findings.count(("variants",), route.variants, MAX_VARIANTS, "variant")
    yield from findings.unique(("variants",), (v.name for v in route.variants))
    for index, variant in enumerate(route.variants):
        at: Steps = ("variants", index)
        yield from findings.name((*at, "name"), variant.name)
        yield from findings.name((*at, "model"), variant.model)
        yield from findings.in_range((*at, "weight"), variant.weight, 0, 1e9)
    if route.variants and not any(variant.weight > 0 for variant in route.variants):
        yield ("variants",), "need one with a weight above 0: requests that no rule and no experiment takes have to go somewhere"


def _rules(route: Route) -> Iterator[Finding]:
    if len(route.rules) > MAX_RULES:
        yield ("rules",), f"has {len(route.rules)} entries; at most {MAX_RULES} are allowed"
    yield from findings.unique(("rules",), (rule.name for rule in route.rules))
    for index, rule in enumerate(route.rules):
        at: Steps = ("rules", index)
        yield from findings.name((*at, "name"), rule.name)
        yield from _known_variant((*at, "variant"), rule.variant, route)
        yield from condition((*at, "when"), rule.when)


def _ladder(route: Route) -> Iterator[Finding]:
    reached = -1
    for index, tier in enumerate(route.ladder):
        at: Steps = ("ladder", index)
        place = _TIERS.index(tier.tier)
        if place <= reached and tier.tier != "light":
            yield (*at, "tier"), f"stands below a cheaper one: the order is {', '.join(_TIERS)}, and only light may come twice"
        reached = max(place, reached)
        yield from _tier(at, tier, route)


def _tier(at: Steps, tier: Tier, route: Route) -> Iterator[Finding]:
    takes = {"light": "variant", "cached": "max_age_s", "popularity": "feature"}
    for kind, name in takes.items():
        if kind != tier.tier and getattr(tier, name):
            yield (*at, name), f"belongs to tier {kind}, not to {tier.tier}; leave it out"
    if tier.tier == "light":
        yield from _known_variant((*at, "variant"), tier.variant, route)
    elif tier.tier == "cached":
        yield from findings.in_range((*at, "max_age_s"), tier.max_age_s, 0, 7 * 86_400, open_low=True)
        if route.cache is None or not route.cache.scores_ttl_s:
            yield at, "needs cache.scores_ttl_s, without which no scores are kept"
    elif not _FEATURE.match(tier.feature):
        yield (*at, "feature"), f"expected view:feature of the candidate, found {tier.feature[:80]!r}"


def _shadow(route: Route) -> Iterator[Finding]:
    yield from findings.unique(("shadow",), (shadow.variant for shadow in route.shadow), ("variant",))
    for index, shadow in enumerate(route.shadow):
        at: Steps = ("shadow", index)
        yield from _known_variant((*at, "variant"), shadow.variant, route)
        yield from findings.in_range((*at, "share"), shadow.share, 0, 1, open_low=True)
        yield from findings.in_range((*at, "max_in_flight"), shadow.max_in_flight, 1, 10_000)
        yield from findings.in_range((*at, "timeout_s"), shadow.timeout_s, 0, MAX_TIMEOUT_S, open_low=True)


def _policies(route: Route) -> Iterator[Finding]:
    yield from findings.in_range(("repeat_window_s",), route.repeat_window_s, 0, 86_400)
    yield from findings.in_range(("retry", "attempts"), route.retry.attempts, 1, 3)
    if route.hedge is not None:
        yield from findings.in_range(("hedge", "percentile"), route.hedge.percentile, 50, 99.9)
        yield from findings.in_range(("hedge", "share"), route.hedge.share, 0, 0.5, open_low=True)
    if route.cache is not None:
        if route.cache.scores_ttl_s and route.stages is not None:
            yield ("cache", "scores_ttl_s"), "is not looked at on a route with stages; leave it out"
        for name in ("ttl_s", "stale_s", "scores_ttl_s"):
            yield from findings.in_range(("cache", name), getattr(route.cache, name), 0, 86_400)
        yield from findings.in_range(("cache", "early_refresh"), route.cache.early_refresh, 0, 10)
        if route.cache.stale_s and not route.cache.ttl_s:
            yield ("cache", "stale_s"), "is of no use without ttl_s; leave it out"
        if not (route.cache.ttl_s or route.cache.scores_ttl_s):
            yield ("cache",), "keeps nothing: give ttl_s or scores_ttl_s, or leave it out"
    yield from findings.unique(("required_views",), route.required_views, leaf=())


def _stages(at: Steps, stages: Stages) -> Iterator[Finding]:
    retrieve = stages.retrieve
    if retrieve is not None:
        yield from findings.name((*at, "retrieve", "model"), retrieve.model)
        yield from findings.in_range((*at, "retrieve", "limit"), retrieve.limit, 1, MAX_CANDIDATES)
    for part in ("filter", "boost"):
        entries: tuple[Comparison, ...] = getattr(stages, part)
        yield from findings.unique((*at, part), (entry.name for entry in entries))
        for index, entry in enumerate(entries):
            yield from _comparison((*at, part, index), entry, boosts=part == "boost")
    yield from findings.unique((*at, "diversity"), (entry.name for entry in stages.diversity))
    for index, cap in enumerate(stages.diversity):
        yield from findings.name((*at, "diversity", index, "name"), cap.name)
        yield from findings.in_range((*at, "diversity", index, "at_most"), cap.at_most, 1, MAX_CANDIDATES)
        yield from findings.in_range((*at, "diversity", index, "within"), cap.within, cap.at_most, MAX_CANDIDATES)
    needs = bool(stages.filter or stages.boost or stages.diversity)
    if needs and not stages.rules:
        yield (*at, "rules"), "is required: the feature set that the columns of filter, boost and diversity come from"
    if stages.rules and not needs:
        yield (*at, "rules"), "is not looked at without filter, boost or diversity; leave it out"
    if not needs and retrieve is None:
        yield at, "holds no stage; leave it out"


def _comparison(at: Steps, entry: Comparison, *, boosts: bool) -> Iterator[Finding]:
    yield from findings.name((*at, "name"), entry.name)
    yield from findings.text((*at, "column"), entry.column)
    bounds = Range(at_least=entry.at_least, at_most=entry.at_most)
    if (entry.equals is None) == (bounds == Range()):
        yield at, "needs either equals, or at_least and at_most or one of them"
    if bounds != Range():
        yield from _range(at, bounds)
    if boosts:
        yield from findings.in_range((*at, "multiply"), entry.multiply, 0, 1000, open_low=True)
    elif entry.multiply != 1:
        yield (*at, "multiply"), "belongs to a boost; a filter only drops"


def _range(at: Steps, given: Range) -> Iterator[Finding]:
    if given.at_least is None and given.at_most is None:
        yield at, "needs at_least, at_most or both"
    elif given.at_least is not None and given.at_most is not None and not given.at_least <= given.at_most:
        yield at, f"holds for nothing: at_least {given.at_least:g} is more than at_most {given.at_most:g}"


def _known_variant(at: Steps, name: str, route: Route) -> Iterator[Finding]:
    known = [variant.name for variant in route.variants]
    if name not in known:
        yield at, f"the route has no variant {name[:80]!r}; it has {', '.join(known[:10])}"
