"""What a single record must satisfy beyond its types: names, counts, ranges, uniqueness. `crosschecks` looks at several together.

Each finding is (steps to the field, sentence), so that manifests can point at a line and the store at a field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

from plait.registry.records import (
    Feature,
    FeatureSet,
    FeatureView,
    Model,
    ModelVersion,
    Record,
    Route,
    Signature,
    Tenant,
    TensorSpec,
    VersionPolicy,
)

Steps = tuple[str | int, ...]
Finding = tuple[Steps, str]

MAX_FEATURES: Final = 1000  # per view, and per model input
MAX_VERSIONS: Final = 1000
MAX_LATEST: Final = 64  # of a version policy
MAX_VARIANTS: Final = 100
MAX_CANDIDATES: Final = 10_000
MAX_TIMEOUT_S: Final = 60.0
MAX_VIEW_VERSION: Final = 2**31 - 1
MAX_TEXT: Final = 4096

NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?\Z")
NAME_HELP: Final = "1 to 63 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit"
_TENSOR: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,62}\Z")
_VERSION: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62})\Z")
_REFERENCE: Final = re.compile(r"[^:\s]+:[^:\s]+\Z")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_BITS: Final = {"int8": 8, "int16": 16, "int32": 32, "int64": 64, "timestamp": 64}
_DEFAULTS: Final[dict[str, tuple[type, str]]] = {"bool": (bool, "true or false"), "string": (str, "text")}
_LARGEST: Final = {"float16": 65504.0, "float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}


def check(record: Record) -> list[Finding]:
    """Return everything wrong with a record on its own."""
    found = [*_name(("name",), record.name), *_text(("description",), record.description)]
    match record:
        case FeatureView():
            found += _view(record)
        case FeatureSet():
            found += _set(record)
        case Model():
            found += _model(record)
        case Route():
            found += _route(record)
        case Tenant():
            pass
    return found


def _name(steps: Steps, name: str) -> Iterator[Finding]:
    if not NAME.match(name):
        yield steps, f"{name[:80]!r} is not a name: use {NAME_HELP}"


def _text(steps: Steps, text: str) -> Iterator[Finding]:
    if len(text) > MAX_TEXT:
        yield steps, f"is {len(text)} characters long; at most {MAX_TEXT} are allowed"
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        yield steps, "holds a character that cannot be stored (NUL or half of a surrogate pair)"


def _count(steps: Steps, items: Sequence[object], most: int, what: str) -> Iterator[Finding]:
    if not items:
        yield steps, f"needs at least one {what}"
    if len(items) > most:
        yield steps, f"has {len(items)} entries; at most {most} are allowed"


def _unique(steps: Steps, names: Iterable[str], leaf: Steps = ("name",)) -> Iterator[Finding]:
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if name in seen:
            yield (*steps, index, *leaf), f"{name!r} is listed twice, first as entry {seen[name]}"
        seen.setdefault(name, index)


def _range(steps: Steps, value: float, low: float, high: float, *, open_low: bool = False) -> Iterator[Finding]:
    inside = math.isfinite(value) and value <= high and (value > low if open_low else value >= low)
    if not inside:
        bounds = f"more than {low:g}" if open_low else f"at least {low:g}"
        most = f" and at most {high:g}" if math.isfinite(high) else ""
        yield steps, f"expected a number of {bounds}{most}, found {value:g}"


def _view(view: FeatureView) -> Iterator[Finding]:
    yield from _name(("entity", "type"), view.entity.type)
    yield from _count(("features",), view.features, MAX_FEATURES, "feature")
    yield from _unique(("features",), (f.name for f in view.features))
    for index, feature in enumerate(view.features):
        at: Steps = ("features", index)
        yield from _name((*at, "name"), feature.name)
        yield from _text((*at, "description"), feature.description)
        yield from _default((*at, "default"), feature)
    yield from _range(("version",), view.version, 1, MAX_VIEW_VERSION)
    yield from _range(("max_age_s",), view.max_age_s, 0, math.inf)
    yield from _range(("retention_s",), view.retention_s, 0, math.inf)
    if 0 < view.retention_s <= view.max_age_s:
        yield ("retention_s",), f"must be longer than max_age_s ({view.max_age_s:g}), so that a stale row is still there to be called stale"


def _default(steps: Steps, feature: Feature) -> Iterator[Finding]:
    value = feature.default
    if value is None:
        return
    if feature.dtype in _DEFAULTS:
        kind, wanted = _DEFAULTS[feature.dtype]
        if not isinstance(value, kind):
            yield steps, f"a {feature.dtype} feature needs {wanted} as default, found {value!r}"
    elif isinstance(value, bool | str):
        yield steps, f"the default of a feature of {feature.dtype} is a number, found {value!r}"
    elif bits := _BITS.get(feature.dtype):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if not isinstance(value, int) or not low <= value <= high:
            yield steps, f"an {feature.dtype} feature needs a whole number from {low} to {high} as default, found {value!r}"
    elif not abs(value) <= _LARGEST[feature.dtype]:
        yield steps, f"does not fit {feature.dtype}: {value!r}; leave the default out where no value is known"


def _set(feature_set: FeatureSet) -> Iterator[Finding]:
    yield from _count(("inputs",), feature_set.inputs, 100, "input")
    yield from _unique(("inputs",), (i.name for i in feature_set.inputs))
    for index, item in enumerate(feature_set.inputs):
        at: Steps = ("inputs", index)
        yield from _tensor_name((*at, "name"), item.name)
        yield from _name((*at, "entity"), item.entity)
        yield from _count((*at, "features"), item.features, MAX_FEATURES, "feature")
        yield from _unique((*at, "features"), item.features, leaf=())
        for place, reference in enumerate(item.features):
            if not _REFERENCE.match(reference):
                yield (*at, "features", place), f"expected view:feature, found {reference[:80]!r}"


def _tensor_name(steps: Steps, name: str) -> Iterator[Finding]:
    if not _TENSOR.match(name):
        yield steps, f"{name[:80]!r} is not a tensor name: use a letter or '_', then up to 62 letters, digits, '_', '.' and '-'"


def _model(model: Model) -> Iterator[Finding]:
    yield from _count(("versions",), model.versions, MAX_VERSIONS, "version")
    yield from _unique(("versions",), (v.version for v in model.versions), ("version",))
    for index, version in enumerate(model.versions):
        yield from _version(("versions", index), version)
    known = {v.version for v in model.versions}
    for alias, target in model.aliases.items():
        yield from _name(("aliases", alias), alias)
        if alias in known:
            yield ("aliases", alias), f"{alias!r} is also a version; give the alias a name of its own"
        if target not in known:
            yield ("aliases", alias), f"refers to version {target!r}, which is not listed under versions"
    yield from _version_policy(("version_policy",), model.version_policy, known)


def _version_policy(at: Steps, policy: VersionPolicy, known: Collection[str]) -> Iterator[Finding]:
    """`latest` is 1 where it is not written; a value that `specific` or `all` would make meaningless is refused rather than ignored."""
    yield from _range((*at, "latest"), policy.latest, 0, MAX_LATEST)
    yield from _unique((*at, "specific"), policy.specific, leaf=())
    for index, version in enumerate(policy.specific):
        if version not in known:
            yield (*at, "specific", index), f"is version {version[:80]!r}, which is not listed under versions"
    if policy.all and (policy.specific or policy.latest != 1):
        yield (*at, "all"), "excludes latest and specific; leave them out"
    elif policy.specific and policy.latest > 1:
        yield (*at, "latest"), "is not looked at where specific versions are named; leave one of them out"


def _version(at: Steps, version: ModelVersion) -> Iterator[Finding]:
    if not _VERSION.match(version.version):
        yield (*at, "version"), f"{version.version[:80]!r} is not a version: use up to 63 letters, digits, '.', '_' and '-'"
    yield from _text((*at, "artifact"), version.artifact)
    if not version.artifact:
        yield (*at, "artifact"), "expected the folder of the artifact"
    if version.digest and not _DIGEST.match(version.digest):
        yield (*at, "digest"), "expected sha256: and 64 hexadecimal digits; leave it out and it is read from the artifact"
    for name, value in version.metrics.items():
        yield from _text((*at, "metrics", name), name)
        if not math.isfinite(value):
            yield (*at, "metrics", name), f"expected a finite number, found {value}"
    if version.signature is not None:
        for steps, message in check_signature(version.signature):
            yield (*at, "signature", *steps), message


def check_signature(signature: Signature) -> Iterator[Finding]:
    """Yield what is wrong with a signature on its own."""
    for side, tensors in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        yield from _count((side,), tensors, 100, "tensor")
        yield from _unique((side,), (t.name for t in tensors))
        for index, tensor in enumerate(tensors):
            yield from _tensor((side, index), tensor)
    if signature.feature_set:
        yield from _name(("feature_set",), signature.feature_set)


def _tensor(at: Steps, tensor: TensorSpec) -> Iterator[Finding]:
    yield from _tensor_name((*at, "name"), tensor.name)
    if not 1 <= len(tensor.shape) <= 8:
        yield (*at, "shape"), f"expected 1 to 8 dimensions, found {len(tensor.shape)}"
    elif any(size < -1 for size in tensor.shape):
        yield (*at, "shape"), "expected sizes of 0 and more, or -1 for a variable dimension"


def _route(route: Route) -> Iterator[Finding]:
    yield from _count(("variants",), route.variants, MAX_VARIANTS, "variant")
    yield from _unique(("variants",), (v.name for v in route.variants))
    for index, variant in enumerate(route.variants):
        at: Steps = ("variants", index)
        yield from _name((*at, "name"), variant.name)
        yield from _name((*at, "model"), variant.model)
        yield from _range((*at, "weight"), variant.weight, 0, 1e9, open_low=True)
    yield from _name(("subject",), route.subject)
    yield from _name(("candidate",), route.candidate)
    if route.subject == route.candidate:
        yield ("candidate",), f"must differ from subject, which is {route.subject!r} too"
    yield from _range(("timeout_s",), route.timeout_s, 0, MAX_TIMEOUT_S, open_low=True)
    yield from _range(("max_candidates",), route.max_candidates, 1, MAX_CANDIDATES)
    yield from _range(("max_defaulted_share",), route.max_defaulted_share, 0, 1)
    yield from _unique(("tenants",), route.tenants, leaf=())
    for index, tenant in enumerate(route.tenants):
        yield from _name(("tenants", index), tenant)
