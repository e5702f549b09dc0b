"""What a route says beyond its variants: whom it sends where, what it answers when time is short, what it keeps, and how it calls.

Records as in `records`: frozen, every field with a default that means "not used". `route_rules` says what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """From `at_least` to `at_most`, both included; None = no bound."""

    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a request must be like; all that is given must hold, and nothing given holds for every request.

    `tenants`: one of these. `headers` and `labels`: each is there and has one of the listed values. `fields`: numbers of the request itself,
    "candidates" (or rows) and "top_k". `request_features`: scalar ones, by declared name; one that was not sent does not hold.
    """

    tenants: tuple[str, ...] = ()
    headers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fields: Mapping[str, Range] = field(default_factory=dict)
    request_features: Mapping[str, Range] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Requests that meet `when` go to `variant`, whatever weights and experiments say. The first rule that matches decides."""

    name: str
    variant: str
    when: Condition = field(default_factory=Condition)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One rung of the ladder below the full model.

    "light" asks another variant; "cached" orders by scores computed at most `max_age_s` ago; "popularity" orders by one feature of the
    candidates ("view:feature"), with no model at all.
    """

    tier: Literal["light", "cached", "popularity"]
    variant: str = ""
    max_age_s: float = 0.0
    feature: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """A share (0..1) of requests is also put to a variant whose answers nobody sees; at most `max_in_flight` at once, `timeout_s` each."""

    variant: str
    share: float = 1.0
    max_in_flight: int = 16
    timeout_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePolicy:
    """How long answers are kept: fresh for `ttl_s`, then for `stale_s` more while they are made anew, never longer.

    `scores_ttl_s`: how long the score of one (subject, candidate) is kept (0 = not at all): only for models whose rows do not look at each
    other. `early_refresh`: the beta of XFetch, 0 = never before time.
    """

    ttl_s: float = 0.0
    stale_s: float = 0.0
    scores_ttl_s: float = 0.0
    early_refresh: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How many attempts a call to a worker is worth in all, each on another one."""

    attempts: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Hedge:
    """Ask a second worker when the first takes longer than this percentile of late; at most for this share of calls."""

    percentile: float = 95.0
    share: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Holds for a candidate whose `column` of the rules feature set is within the bounds, or equal; a missing value does not hold.

    `multiply`: what a boost does to the score.
    """

    name: str
    column: str
    at_least: float | None = None
    at_most: float | None = None
    equals: float | None = None
    multiply: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Diversity:
    """At most `at_most` candidates with the same value of `column` among the first `within`; the others come behind."""

    name: str
    column: str
    at_most: int
    within: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieve:
    """Where candidates come from when the caller gives none: the output of a model that looks at the subject alone, ids of the candidates,
    best first (int64, or text); at most `limit` of them are taken.
    """

    model: str
    use: str
    output: str = "ids"
    limit: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The cascade around the model: retrieve → filter → (rank) → boost → diversity; of Rank only. `rules` names the feature set the columns
    come from.
    """

    retrieve: Retrieve | None = None
    rules: str = ""
    filter: tuple[Comparison, ...] = ()
    boost: tuple[Comparison, ...] = ()
    diversity: tuple[Diversity, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadIdentity:
    """Who may call for a tenant without an API key, and in which roles: a SPIFFE id (a "*" at its end stands for any rest), or the subject
    ("*" = any, where the token names the tenant) of tokens of an issuer."""

    spiffe: str = ""
    issuer: str = ""
    subject: str = ""
    roles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What one tenant may use; 0 = no bound. `burst` requests may come at once (0 = one second's worth)."""

    requests_per_s: float = 0.0
    burst: float = 0.0
    rows_per_s: float = 0.0
    in_flight: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Which of a layer's 10 000 buckets belong to an experiment."""

    first: int = 0
    count: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentArm:
    """A variant of the route, and its relative weight in the experiment."""

    variant: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolEndpoint:
    """One worker: host:port, and the zone it is in ("" = unknown)."""

    address: str
    zone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesService:
    """The workers behind a Service; `port` by its name."""

    namespace: str
    service: str
    port: str = "grpc"
