"""What a single record must satisfy beyond its types: names, counts, ranges, uniqueness. `crosschecks` looks at several together.

Each finding is (steps to the field, sentence), so that manifests can point at a line and the store at a field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import Final

from plait.registry import feature_rules, findings, identity_rules, pool_rules, route_rules
from plait.registry.findings import Finding, Steps
from plait.registry.records import (
    Experiment,
    FeatureSet,
    FeatureView,
    Model,
    ModelVersion,
    Pool,
    Record,
    Route,
    Signature,
    Tenant,
    TensorSpec,
    VersionPolicy,
)

MAX_VERSIONS: Final = 1000
MAX_LATEST: Final = 64  # of a version policy

NAME: Final = findings.NAME
NAME_HELP: Final = findings.NAME_HELP
_VERSION: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62})\Z")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")


def check(record: Record) -> list[Finding]:
    """Return everything wrong with a record on its own."""
    found = [*findings.name(("name",), record.name), *findings.text(("description",), record.description)]
    match record:
        case FeatureView():
            found += feature_rules.check_view(record)
        case FeatureSet():
            found += feature_rules.check_set(record)
        case Model():
            found += _model(record)
        case Route():
            found += route_rules.check_route(record)
        case Experiment():
            found += route_rules.check_experiment(record)
        case Pool():
            found += pool_rules.check_pool(record)
        case Tenant():
            found += _tenant(record)
    return found


def _model(model: Model) -> Iterator[Finding]:
    if model.pool:
        yield from findings.name(("pool",), model.pool)
    yield from findings.count(("versions",), model.versions, MAX_VERSIONS, "version")
    yield from findings.unique(("versions",), (v.version for v in model.versions), ("version",))
    for index, version in enumerate(model.versions):
        yield from _version(("versions", index), version, elsewhere=bool(model.pool))
    known = {v.version for v in model.versions}
    for alias, target in model.aliases.items():
        yield from findings.name(("aliases", alias), alias)
        if alias in known:
            yield ("aliases", alias), f"{alias!r} is also a version; give the alias a name of its own"
        if target not in known:
            yield ("aliases", alias), f"refers to version {target!r}, which is not listed under versions"
    yield from _version_policy(("version_policy",), model.version_policy, known)


def _version_policy(at: Steps, policy: VersionPolicy, known: Collection[str]) -> Iterator[Finding]:
    """`latest` is 1 where it is not written; a value that `specific` or `all` would make meaningless is refused rather than ignored."""
    yield from findings.in_range((*at, "latest"), policy.latest, 0, MAX_LATEST)
    yield from findings.unique((*at, "specific"), policy.specific, leaf=())
    for index, version in enumerate(policy.specific):
        if version not in known:
            yield (*at, "specific", index), f"is version {version[:80]!r}, which is not listed under versions"
    if policy.all and (policy.specific or policy.latest != 1):
        yield (*at, "all"), "excludes latest and specific; leave them out"
    elif policy.specific and policy.latest > 1:
        yield (*at, "latest"), "is not looked at where specific versions are named; leave one of them out"


def _version(at: Steps, version: ModelVersion, *, elsewhere: bool) -> Iterator[Finding]:
    """`elsewhere`: the model runs in a pool, where it may be that nobody fetches an artifact; `crosschecks` knows."""
    if not _VERSION.match(version.version):
        yield (*at, "version"), f"{version.version[:80]!r} is not a version: use up to 63 letters, digits, '.', '_' and '-'"
    yield from findings.text((*at, "artifact"), version.artifact)
    if not version.artifact and not elsewhere:
        yield (*at, "artifact"), "expected the folder of the artifact"
    if version.digest and not _DIGEST.match(version.digest):
        yield (*at, "digest"), "expected sha256: and 64 hexadecimal digits; leave it out and it is read from the artifact"
    for name, value in version.metrics.items():
        yield from findings.text((*at, "metrics", name), name)
        if not math.isfinite(value):
            yield (*at, "metrics", name), f"expected a finite number, found {value}"
    if version.signature is not None:
        for steps, message in check_signature(version.signature):
            yield (*at, "signature", *steps), message


def check_signature(signature: Signature) -> Iterator[Finding]:
    """Yield what is wrong with a signature on its own."""
    for side, tensors in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        yield from findings.count((side,), tensors, 100, "tensor")
        yield from findings.unique((side,), (t.name for t in tensors))
        for index, tensor in enumerate(tensors):
            yield from _tensor((side, index), tensor)
    if signature.feature_set:
        yield from findings.name(("feature_set",), signature.feature_set)


def _tensor(at: Steps, tensor: TensorSpec) -> Iterator[Finding]:
    yield from feature_rules.tensor_name((*at, "name"), tensor.name)
    if not 1 <= len(tensor.shape) <= 8:
        yield (*at, "shape"), f"expected 1 to 8 dimensions, found {len(tensor.shape)}"
    elif any(size < -1 for size in tensor.shape):
        yield (*at, "shape"), "expected sizes of 0 and more, or -1 for a variable dimension"


def _tenant(tenant: Tenant) -> Iterator[Finding]:
    yield from findings.in_range(("weight",), tenant.weight, 0, 1e6, open_low=True)
    for name in ("requests_per_s", "burst", "rows_per_s", "in_flight"):
        yield from findings.in_range(("quota", name), getattr(tenant.quota, name), 0, 1e9)
    if tenant.quota.burst and not tenant.quota.requests_per_s:
        yield ("quota", "burst"), "is of no use without requests_per_s; leave it out"
    yield from identity_rules.check(tenant)
